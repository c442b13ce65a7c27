"""Products from graphs of the batches, kept between products where memory allows."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hessian.batches import Batch, batch_length, first_samples, map_tensors
from hessian.determinism import require_fixed_modules
from hessian.double_backward import differentiable_twice, require_second_derivative
from hessian.errors import NonDeterministicError
from hessian.memory import free_memory
from hessian.objective import Objective

logger = logging.getLogger(__name__)

FREE_SHARE = 0.25
"""Share of the free memory that graphs may take if no budget is given."""

Graph = TypeVar("Graph")


class KeptGraphs(ABC, Generic[Graph]):
    """A matrix at w that is a sum over batches, each known by a graph that serves every vector.

    Graphs are kept for as many batches, from the first on, as the budget allows. The others are
    built anew for every product, or once for a matrix of columns, and what they say about the loss
    is compared with the first time.

    Args:
        objective: The training loss.
        w: Where the matrix is taken, shape [d]; not changed by anybody later.
        memory_budget: Bytes for the graphs; 0 keeps none. Default: a quarter of what is free when
            the first product is made.
        regularized: Whether the regulariser's Hessian is added.

    Raises:
        ValueError: If the budget is negative.
    """

    def __init__(
        self, objective: Objective, w: Tensor, memory_budget: int | None, *, regularized: bool
    ) -> None:
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"`memory_budget` must not be negative, got {memory_budget} bytes.")
        self._objective, self._budget = objective, memory_budget
        self._w = w.detach().requires_grad_()
        self._regularized = regularized
        self._fixed = objective.fixed_state()
        self._graphs: list[Graph | None] | None = None
        self._penalty: Tensor | None = None
        self._first_mark: float | None = None
        self.complete = False
        """Whether every batch has its graph kept."""
        self.bytes = 0
        """Estimated size of the graphs that are kept."""

    @abstractmethod
    def _build(self, place: int, batch: Batch) -> tuple[float, Graph | None]:
        """Return a number that tells whether the batch is still the same, and its graph.

        The graph is None if the batch adds nothing.
        """

    @abstractmethod
    def _add_through(self, graph: Graph, v: Tensor, out: Tensor, *, retain: bool) -> None:
        """Add one batch's part of the product with v to ``out``, in place."""

    def _require_second_derivative(self, *tensors: Tensor) -> None:
        """Refuse graphs without one, in the first pass; later ones make the same graphs."""
        if self._first_mark is None:
            require_second_derivative(*tensors)

    @property
    def num_kept(self) -> int:
        """Number of batches whose graphs are kept; 0 before the first product."""
        return len(self._graphs or ())

    def product(self, v: Tensor) -> Tensor:
        """Return the product with v of shape [d].

        Raises:
            NonDeterministicError: If the model or the data changed since the first product.
            NonFiniteError: If the product is not finite because the loss is not.
        """
        return self._rows(v[None])[0]

    def columns(self, V: Tensor) -> Tensor:
        """Return the product with V of shape [d, k]; raises what `product` does."""
        return self._rows(V.T.contiguous()).T

    def _rows(self, rows: Tensor) -> Tensor:
        """Return the product with every row, as rows."""
        objective = self._objective
        with torch.enable_grad():
            with objective.ranks.in_step(rows):
                require_fixed_modules(objective.model)
                self._fixed.require_same()
                if self._graphs is None:
                    with differentiable_twice():
                        self._graphs = self._keep()
                        self._penalty = self._regularizer_gradient() if self._regularized else None
                out = torch.zeros_like(rows)
                for graph in self._graphs:
                    self._add(graph, rows, out, keep=True)
                if not self.complete:
                    self._add_recomputed(rows, out)
            objective.reduce_(out).div_(objective.normalizer)
            if self._penalty is not None:
                for i, v in enumerate(rows):
                    (part,) = torch.autograd.grad(
                        self._penalty, self._w, v, retain_graph=True, materialize_grads=True
                    )
                    out[i] += part
        if not torch.isfinite(out).all():
            objective.gradient(self._w.detach())  # raises, and names the batch or the parameter
        return out

    def _keep(self) -> list[Graph | None]:
        """Build the graphs of as many batches, from the first on, as the budget allows."""
        budget = self._budget
        if budget is None:
            budget = int(FREE_SHARE * free_memory(self._objective.device))
        kept: list[Graph | None] = []
        size_of: dict[tuple[torch.Size, ...], Callable[[Batch], int]] = {}
        self.bytes, self.complete = 0, budget > 0  # a first product may have failed before
        for place, batch in enumerate(self._objective.batches()) if self.complete else ():
            if self._objective.batch_weight(batch) == 0:  # no graph, and nothing to learn from it
                kept.append(None)
                continue
            shapes = _sample_shapes(batch)  # attention is not linear in the length of a text
            if shapes not in size_of:
                size_of[shapes] = self._size_of_graphs(batch)
            size = size_of[shapes](batch)
            if self.bytes + size > budget:
                self.complete = False
                break
            kept.append(self._build(place, batch)[1])
            self.bytes += size
        logger.info(
            "graphs of %s kept, %.2f GiB of a budget of %.2f GiB",
            "all batches" if self.complete else f"{len(kept)} batches",
            self.bytes / 2**30,
            budget / 2**30,
        )
        return kept

    def _regularizer_gradient(self) -> Tensor | None:
        penalty = self._objective.regularization(self._w)
        if not penalty.requires_grad:
            return None
        require_second_derivative(penalty)
        (slope,) = torch.autograd.grad(penalty, self._w, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return None
        require_second_derivative(slope)
        return slope

    def _add(self, graph: Graph | None, rows: Tensor, out: Tensor, *, keep: bool) -> None:
        """Add one batch's products in place."""
        if graph is None:
            return
        try:
            for i, v in enumerate(rows):
                self._add_through(graph, v, out[i], retain=keep or i + 1 < len(rows))
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise NonDeterministicError(
                "A tensor of the model or the data was changed in place since the first product, "
                "so the products would belong to different matrices. Build a new operator."
            ) from error

    def _add_recomputed(self, rows: Tensor, out: Tensor) -> None:
        """Add the part of the sum that belongs to batches without a kept graph."""
        total = 0.0
        for place, batch in enumerate(self._objective.batches()):
            if place >= self.num_kept:
                # Only here: on the way back no function of the model's is called.
                with differentiable_twice():
                    mark, graph = self._build(place, batch)
                self._add(graph, rows, out, keep=False)
                total += mark
        slack = 1e-10 if rows.dtype == torch.float64 else 1e-4
        first = self._first_mark = total if self._first_mark is None else self._first_mark
        if not math.isclose(total, first, rel_tol=slack, abs_tol=slack):
            n = self._objective.normalizer
            raise NonDeterministicError(
                f"{self.marked} at the same weights was {first / n:.9g} in the first product and "
                f"is {total / n:.9g} now, so the products belong to different matrices. Something "
                "in the data or the model changes between passes."
            )

    marked = "The loss"
    """What the number is that `_build` returns."""

    def _size_of_graphs(self, batch: Batch) -> Callable[[Batch], int]:
        """Return how many bytes the graph of a batch holds, as learned from a part of one batch."""
        length = batch_length(batch)
        points = []
        for samples in (length // 16, length // 8):
            if samples > 0:
                with suppress(Exception):  # a batch that cannot be cut is measured whole
                    part = first_samples(batch, samples)
                    if self._objective.batch_weight(part) == 0:  # it may have no graph at all
                        continue
                    points.append((_num_elements(part), self._measure(part)))
        if len(points) < 2 or points[0][0] >= points[1][0]:
            points = [(0, 0), (max(_num_elements(batch), 1), self._measure(batch))]
        (few, small), (more, large) = points
        slope = max(large - small, 0) / (more - few)
        return lambda other: math.ceil(small + slope * (_num_elements(other) - few))

    def _measure(self, batch: Batch) -> int:
        """Bytes that the graph of one batch holds, from a graph that is thrown away."""
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would keep its own graph alive

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._build(0, batch)
        return sum(sizes.values())


def _num_elements(batch: Batch) -> int:
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    map_tensors(batch, count)
    return total


def _sample_shapes(batch: Batch) -> tuple[torch.Size, ...]:
    """Shapes of the batch's tensors without their first dimension."""
    shapes: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape[1:])
        return tensor

    map_tensors(batch, note)
    return tuple(shapes)
