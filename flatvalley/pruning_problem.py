"""A dense network as methods of pruning see it: its weights, its loss, its calibration samples."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatvalley.trainees import Criterion
from flatvalley.transport_replay import TransportReplay
from hessian import Eigenspace, Objective, hessian_operator, leading_eigenspace
from pruning import DenseDistance, SparsityTrim
from pruning.allocation import Allocation
from pruning.pruned import wanted_zeros

Batch = tuple[Tensor, Tensor]
Kind = Literal["kl", "squared"]


@dataclass
class Clock:
    """Adds up the time of the blocks it is given: of the processor, or the wall's on a GPU."""

    device: torch.device
    seconds: float = 0.0
    _began: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        self._began = self._now()
        try:
            yield
        finally:
            self.seconds, self._began = self.elapsed(), None

    def elapsed(self) -> float:
        """Return the seconds of all blocks, of one that still runs so far."""
        return self.seconds + (0.0 if self._began is None else self._now() - self._began)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()


@dataclass(frozen=True)
class PruningProblem:
    """What a method of pruning is given. The model is only read.

    Args:
        model: The dense network, in evaluation mode.
        criterion: Its loss, a mean over the batch.
        batches: Calibration samples: inputs and targets, on the model's device.
        kind: How outputs are compared: ``"kl"`` for scores of classes, else ``"squared"``.
        exclude: Glob patterns of parameters that stay as many as they are.
        allocation: Who competes with whom for the zeros; None for each method's own default.
        training_time: Steps times learning rate of the training, if that is known.
        replay: The training itself, if it can be made once more.
        progress: Called with steps done and in all while it is.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3).eval()
        >>> samples = [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))]
        >>> len(PruningProblem(model, torch.nn.functional.cross_entropy, samples).w)
        9
    """

    model: nn.Module
    criterion: Criterion
    batches: Sequence[Batch]
    kind: Kind = "kl"
    exclude: tuple[str, ...] = ()
    allocation: Allocation | None = None
    training_time: float | None = None
    replay: TransportReplay | None = None
    progress: Callable[[int, int], None] | None = None
    _kept: dict[tuple[object, ...], tuple[Eigenspace, float]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def objective(self) -> Objective:
        """The loss over the calibration samples, which takes their labels."""
        return Objective(self.model, self.criterion, self.batches)

    @cached_property
    def w(self) -> Float[Tensor, " d"]:
        """The dense weights."""
        return self.objective.weights()

    @property
    def num_samples(self) -> int:
        """Number of calibration samples."""
        return sum(len(y) for _, y in self.batches)

    def distance(self, temperature: float = 1.0) -> DenseDistance:
        """Return the distance of outputs to the dense network's, which takes no labels.

        Raises:
            ValueError: If the temperature is not positive, or not 1 where outputs are no scores of
                classes.
        """
        return DenseDistance(
            self.model, self.batches, kind=self.kind, temperature=temperature, labelled=True
        )

    def eigenspace(
        self, k: int, tol: float, max_products: int, seed: int
    ) -> tuple[Eigenspace, float]:
        """Return the sharpest directions of the loss at w, and the seconds they took.

        Computed once; methods that share them are told the same seconds.
        """
        key = (k, tol, max_products, seed)
        if key not in self._kept:
            clock = Clock(self.w.device)
            with clock.running():
                H = hessian_operator(self.objective, self.w)
                space = leading_eigenspace(
                    H, k=k, tol=tol, max_products=max_products, measure=False, seed=seed
                )
            self._kept[key] = space, clock.seconds
        return self._kept[key]

    def require_sparsities(self, sparsities: Sequence[float]) -> None:
        """Look at the sparsities that are wanted, before any work is done.

        Raises:
            ValueError: If there is none, they do not increase, one is outside (0, 1), or w has
                more zeros already.
        """
        require_sparsities(sparsities)
        zeros = int((self.w == 0).sum())
        if wanted_zeros(sparsities[0], len(self.w)) < zeros:
            raise ValueError(
                f"`sparsity` must be at least {zeros / len(self.w):.4f}, the share of zeros that "
                f"the network has already, got {sparsities[0]:g}. Zeros do not come back."
            )


@dataclass(frozen=True)
class PrunedAt:
    """The dense network pruned to one sparsity, with what it took to get there."""

    sparsity: float
    """The share of zeros that was wanted."""
    weights: Tensor
    products: int
    """Products with a matrix of second derivatives since the dense network."""
    gradients: int
    """Gradients, of a batch or of a sample, since the dense network."""
    seconds: float
    """Time since the dense network: of the processor, or the wall's on a GPU."""
    stages: tuple[Any, ...] = ()
    """Evidence of the stages so far, dataclasses with ``sparsity`` and ``loss``; or none."""
    iterations: int = 0
    """Of Net-Trim's programs since the dense network."""
    trim: SparsityTrim | None = None
    """What Net-Trim measured on every layer; None for other methods."""


def require_sparsities(sparsities: Sequence[float]) -> None:
    """Look at sparsities that are wanted.

    Raises:
        ValueError: If there is none, one is outside (0, 1), or they do not increase.
    """
    if not sparsities:
        raise ValueError("`sparsities` must be one or more shares of zeros, got none.")
    for share in sparsities:
        if not 0.0 < share < 1.0:
            raise ValueError(f"`sparsity` must be in (0, 1), the share of zeros, got {share:g}.")
    if any(b <= a for a, b in itertools.pairwise(sparsities)):
        listed = ", ".join(f"{share:g}" for share in sparsities)
        raise ValueError(f"`sparsities` must increase, got {listed}. Sort them.")
