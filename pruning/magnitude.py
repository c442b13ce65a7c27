"""Pruning that knows no loss: the smallest weights go, or any."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from pruning.allocation import Allocation, keep_mask
from pruning.pruned import Pruned, as_pruned
from pruning.scores import require_weights


def magnitude_prune(
    w: Float[Tensor, " d"],
    sparsity: float,
    *,
    objective: Objective | None = None,
    allocation: Allocation = "global",
    exclude: Sequence[str] = (),
) -> Pruned:
    """Set the smallest weights to zero until a share ``sparsity`` of all is zero.

    The control at equal sparsity. Of equal magnitudes, the first in order go first, so the
    count is exact: ⌈sparsity · d⌉ zeros, or more where w has them already.

    Args:
        w: Weights, shape [d].
        sparsity: Share of zeros wanted, in [0, 1].
        objective: Knows the parameters by name, for ``allocation`` and ``exclude``.
        allocation: ``"global"``, ``"uniform"`` for equal shares of all parameters, or sparsities
            by glob pattern; see ``keep_mask``.
        exclude: Glob patterns of parameters that stay, and count for the sparsity.

    Raises:
        ValueError: If sparsity is outside [0, 1] or cannot be reached, w is not a finite flat
            vector or does not fit the objective, or a pattern matches nothing.

    Example:
        >>> import torch
        >>> magnitude_prune(torch.tensor([3.0, -1.0, 0.5, -2.0]), 0.5).weights
        tensor([ 3.,  0.,  0., -2.])
    """
    require_weights(w)
    keep = keep_mask(
        w.abs(),
        w,
        sparsity=sparsity,
        objective=objective,
        allocation=allocation,
        exclude=exclude,
    )
    return as_pruned(torch.where(keep, w, 0.0))


def random_prune(
    w: Float[Tensor, " d"],
    sparsity: float,
    *,
    seed: int = 0,
    objective: Objective | None = None,
    allocation: Allocation = "global",
    exclude: Sequence[str] = (),
) -> Pruned:
    """Set weights to zero at random until a share ``sparsity`` of all is zero.

    The floor that every method must clear. At equal seeds, fewer zeros are among more of them.

    Args:
        w: Weights, shape [d].
        sparsity: Share of zeros wanted, in [0, 1]: ⌈sparsity · d⌉ zeros, or more where w has them
            already.
        seed: Seed of the ranking, drawn on the CPU; the global random state is not used.
        objective: As for ``magnitude_prune``, like all that follow.
        allocation: Who competes with whom.
        exclude: Glob patterns of parameters that stay.

    Raises:
        ValueError: As ``magnitude_prune``.

    Example:
        >>> import torch
        >>> int(random_prune(torch.ones(10), 0.3).mask.sum())
        7
    """
    require_weights(w)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(w), generator=generator, dtype=torch.float64, device="cpu")
    keep = keep_mask(
        scores.to(w.device),
        w,
        sparsity=sparsity,
        objective=objective,
        allocation=allocation,
        exclude=exclude,
    )
    return as_pruned(torch.where(keep, w, 0.0))
