"""Running statistics at points away from the weights that they were gathered with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hessian.batch_statistics import batch_norm_layers, normalising_by_batch
from hessian.batches import Batch, batch_length
from hessian.objective import Objective
from landscape.resident import held_batches, random_samples, rows

BatchNormKind = Literal["recompute", "frozen", "interpolated", "batch"]

Buffers = Mapping[str, Tensor]
"""Running statistics by name, as in a state dict; other entries are not looked at."""

BATCH = 512
"""Most samples of which statistics are gathered at once."""


@dataclass(frozen=True)
class BatchNorm:
    """What batch norm layers normalise by at a point: part of the definition of the loss there.

    - ``"recompute"``: by the mean and variance over a fixed subset of the samples at the point's
      own weights, as a user of these weights would after renewing the statistics. One forward
      pass over the subset a point.
    - ``"frozen"``: by the statistics that the model holds. They belong to its own weights; at
      any other point the loss is that of another function.
    - ``"interpolated"``: by the statistics of both ends, mixed with 1 − t and t.
    - ``"batch"``: each batch by its own statistics, as in training. The loss then depends on how
      the data are cut, and a sample's loss on its neighbours.

    A model without running statistics is evaluated as it is under every policy.

    Args:
        kind: One of the above.
        num_samples: Size of the subset for ``"recompute"``. 512 is close to what all data give.
        seed: Of the subset, drawn on the CPU.
        data: The objective whose samples are used for ``"recompute"``. Default: the one that is
            evaluated, the first if there are several. For a test loss, pass the training loss.
        ends: State dicts (or the buffers alone) of the models at t = 0 and t = 1, for
            ``"interpolated"``.

    Raises:
        ValueError: If the kind is not known, ``num_samples`` is below 2, or ``ends`` are missing
            or not wanted.

    Example:
        >>> BatchNorm("recompute", num_samples=1024).words
        'recompute on 1024 samples, seed 0'
    """

    kind: BatchNormKind = "recompute"
    num_samples: int = 512
    seed: int = 0
    data: Objective | None = None
    ends: tuple[Buffers, Buffers] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(BatchNormKind):
            raise ValueError(
                f"`batch_norm` must be one of {', '.join(get_args(BatchNormKind))}, got "
                f'"{self.kind}".'
            )
        if self.num_samples < 2:
            raise ValueError(
                "`num_samples` must be at least 2, so that there is a variance, got "
                f"{self.num_samples}."
            )
        if (self.ends is None) == (self.kind == "interpolated"):
            raise ValueError(
                '`ends` must be the state dicts of both end models with "interpolated", and left '
                f'out otherwise, got {"none" if self.ends is None else "some"} with "{self.kind}".'
            )

    @property
    def words(self) -> str:
        """The policy in words, for a record or a figure."""
        if self.kind == "recompute":
            return f"recompute on {self.num_samples} samples, seed {self.seed}"
        return self.kind


class PointStatistics:
    """The running statistics at one point after the other, in buffers of its own.

    Args:
        policy: What to normalise by.
        objective: The loss; its model is only read.

    Raises:
        ValueError: If the ends lack a buffer of the model.
    """

    def __init__(self, policy: BatchNorm, objective: Objective) -> None:
        self._kind = policy.kind
        self._layers = batch_norm_layers(objective.model)
        self._model = objective.model
        self.buffers: dict[str, Tensor] = {}
        """What to evaluate the objective with; empty where the model's own are right."""
        self._ends: list[dict[str, Tensor]] = []
        self.samples: list[Batch] = []
        """Batches that statistics are gathered from."""
        if not self._layers or policy.kind == "frozen":
            self._kind = "frozen"
            return
        own = dict(objective.model.named_buffers())
        names = [
            f"{layer}.{leaf}".lstrip(".")
            for layer in self._layers
            for leaf in ("running_mean", "running_var", "num_batches_tracked")
        ]
        self.buffers = {name: own[name].clone() for name in names if name in own}
        if policy.ends is not None:
            self._ends = [self._end(buffers, k) for k, buffers in enumerate(policy.ends)]
        if policy.kind == "recompute":
            self.samples = subset(policy, policy.data or objective)

    @property
    def recomputes(self) -> bool:
        """Whether every point costs a pass over the samples."""
        return self._kind == "recompute"

    def begin_(self, t: float | None) -> None:
        """Write the statistics at t of a path where they are a function of t alone."""
        if self._kind != "interpolated":
            return
        if t is None:
            raise ValueError(
                '`batch_norm="interpolated"` needs a path with two ends, got a plane. Take '
                '"recompute".'
            )
        for name, buffer in self.buffers.items():
            start, end = (each[name] for each in self._ends)
            if buffer.is_floating_point():
                torch.lerp(start, end, t, out=buffer)

    @contextmanager
    def gathering(self) -> Iterator["Gathering"]:
        """Let forward passes inside write the statistics anew, every sample with equal weight."""
        with normalising_by_batch(self._model, self._layers.values()):
            yield Gathering(self)

    def forward_mode(self) -> Any:
        """What forward passes for the loss run in."""
        if self._kind == "batch":
            return normalising_by_batch(self._model, self._layers.values())
        return nullcontext()

    def _end(self, buffers: Buffers, k: int) -> dict[str, Tensor]:
        missing = [name for name in self.buffers if name not in buffers]
        if missing:
            raise ValueError(
                f"`ends[{k}]` must hold the model's running statistics, but `{missing[0]}` is "
                "missing. Pass the state dict of the model at that end."
            )
        return {name: buffers[name].detach().to(own) for name, own in self.buffers.items()}


class Gathering:
    """Averages over batches, each weighted with its samples."""

    def __init__(self, statistics: PointStatistics) -> None:
        self._layers, self._seen = list(statistics._layers.values()), 0
        for name, buffer in statistics.buffers.items():
            buffer.fill_(1 if name.endswith("running_var") else 0)

    def next_batch(self, batch: Batch) -> None:
        """Announce the batch whose forward pass comes next."""
        number = batch_length(batch)
        self._seen += number
        for layer in self._layers:
            layer.momentum = number / self._seen


def as_batch_norm(policy: BatchNorm | BatchNormKind) -> BatchNorm:
    """Return a policy from its name."""
    return policy if isinstance(policy, BatchNorm) else BatchNorm(policy)


def subset(policy: BatchNorm, source: Objective) -> list[Batch]:
    """Return the samples that statistics are gathered from, in batches of some hundred.

    No batch is so small that its own statistics mean little: the samples are shared evenly.
    """
    held = held_batches(source)
    samples = random_samples(
        source.batches() if held is None else held, policy.num_samples, policy.seed
    )
    found: list[Batch] = []
    for batch in samples:
        pieces = -(-batch_length(batch) // BATCH)
        found += even_pieces(batch, pieces)
    return found


def even_pieces(batch: Batch, pieces: int) -> list[Batch]:
    """Return a batch in pieces that differ by at most one sample."""
    n = batch_length(batch)
    bounds = [n * k // pieces for k in range(pieces + 1)]
    return [rows(batch, slice(a, b)) for a, b in pairwise(bounds)]
