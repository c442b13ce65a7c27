"""The growth that makes gRDA's threshold arrive at a wanted sparsity: measured, then aimed at."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessian.unsharded import is_sharded
from pruning.grda_step import local

Number = float | int | Tensor

LANDING = 0.75
"""Share of the horizon after which the wanted sparsity is held: the rest trains what is left."""
WINDOW = 0.02
"""Share of the horizon in which a remaining gap is closed once the sparsity is held."""
MEASUREMENTS = 500
"""Measurements in a horizon."""
SAMPLES = 1 << 20
"""Coordinates looked at in a measurement: a sparsity of .95 is known to 2e-4."""
TOLERANCE = 0.01
"""Distance from the target, at the horizon, above which there is a warning."""

# A float32 without its last 16 bits is a bin: 128 to an octave, so 0.8 % wide.
_DROPPED_BITS = 16
_BINS = 1 << (31 - _DROPPED_BITS)


class SparsityWarning(UserWarning):
    """The wanted sparsity was not there at the horizon; the message says what came."""


def growth(lr: Number, mu: float, first: Number, last: Number) -> Any:
    """Return what c = 1 adds to the threshold from step ``first`` to step ``last`` at this lr."""
    return lr ** (mu + 0.5) * (last**mu - first**mu)


def landing(step: Number, horizon: int) -> Any:
    """Return the step at which a threshold planned after ``step`` steps is to arrive."""
    soonest = step + max(1.0, WINDOW * horizon)
    if isinstance(soonest, Tensor):
        return soonest.clamp(min=LANDING * horizon)
    return max(LANDING * horizon, soonest)


def interval(horizon: int) -> int:
    """Return the number of steps between two measurements."""
    return max(1, horizon // MEASUREMENTS)


def constant_for(
    target: float, groups: Sequence[tuple[Sequence[Tensor], Number, Number]]
) -> Tensor:
    """Return the c with which a share ``target`` of all weights is zero at the landing.

    A weight with dual v, in a group of threshold g to which c adds c·r until the landing, needs
    c = (|v| − g) / r. The answer is the quantile of that over the weights of all groups, each
    counted once however they are sharded over ranks, from a histogram of at most about a million
    of them. Nothing is read back by the host.

    Args:
        target: Wanted share of zeros, in (0, 1).
        groups: Duals, threshold g ≥ 0 and reach r ≥ 0 of each group.

    Returns:
        c in float64, without dimensions, on the device of the first dual: 0 where more than the
        wanted share is below the threshold already, infinite where no growth is enough.
    """
    size = sum(v.numel() for duals, _, _ in groups for v in duals)
    stride = -(-size // SAMPLES)
    # One histogram, and one sum over ranks, for all duals that are laid out alike.
    alike: dict[Hashable, tuple[Tensor, list[Tensor]]] = {}
    for duals, threshold, reach in groups:
        for v in duals:
            layout = _layout(v)
            _, parts = alike.setdefault(layout, (v, []))
            parts.append(_needed(v, threshold, reach, stride))
    histograms = [_over_ranks(_histogram(torch.cat(parts)), v) for v, parts in alike.values()]
    counts = torch.stack([h.to(histograms[0].device) for h in histograms]).sum(0)
    below = counts.cumsum(0)
    wanted = target * below[-1:].double()
    i = torch.searchsorted(below, wanted.ceil().to(below.dtype)).clamp_(max=_BINS - 1)
    share = (wanted - (below - counts)[i]) / counts[i]
    edges = (torch.cat([i, i + 1]) << _DROPPED_BITS).to(torch.int32).view(torch.float32).double()
    value = edges[0] + share * (edges[1] - edges[0])
    # The lowest bin holds what needs no growth.
    return torch.where(i == 0, 0.0, value).squeeze(0)


def _needed(v: Tensor, threshold: Number, reach: Number, stride: int) -> Tensor:
    """The c that zeroes each coordinate, of every ``stride``-th one on this rank."""
    c = local(v).detach().reshape(-1)[::stride].abs().float().sub_(threshold).div_(reach)
    return c.nan_to_num_(0.0, torch.inf).clamp_(min=0.0)


def _histogram(values: Tensor) -> Tensor:
    bins = (values.view(torch.int32) >> _DROPPED_BITS).long()
    counts = torch.zeros(_BINS, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))


def _layout(v: Any) -> Hashable:
    return (v.device_mesh, v.placements) if is_sharded(v) else v.device


def _over_ranks(counts: Tensor, v: Any) -> Tensor:
    """Add up over the ranks that hold different parts of v."""
    if not is_sharded(v):
        return counts
    from torch.distributed.tensor import DTensor, Partial  # takes as long as torch itself

    placements = [Partial() if p.is_shard() else p for p in v.placements]
    total: Tensor = DTensor.from_local(counts, v.device_mesh, placements).full_tensor()
    return total


def num_zeros(p: Tensor) -> Tensor:
    """Return how many entries of a parameter are zero, over all ranks, as a 0-d tensor."""
    part = local(p)
    zeros = part.numel() - torch.count_nonzero(part.detach())
    return _over_ranks(zeros, p)
