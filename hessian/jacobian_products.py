"""Sums of Jᵀ M J over batches, with the graphs of the Jacobians kept where memory allows."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian.batches import Batch, map_tensors
from hessian.determinism import require_fixed_modules
from hessian.double_backward import differentiable_twice, require_second_derivative
from hessian.errors import NonDeterministicError
from hessian.memory import free_memory
from hessian.objective import Objective
from hessian.operators import Operator

logger = logging.getLogger(__name__)

FREE_SHARE = 0.25
"""Share of the free memory that graphs may take if no budget is given."""

Middle = Callable[[Tensor], Tensor]
Part = Callable[[int, Batch, Tensor], tuple[Tensor, Middle]]
"""Called with a batch's place, the batch and w: a tensor z(w) with its graph, and u ↦ M u."""


@dataclass(frozen=True)
class _Linearized:
    """J of a tensor z in w, by two graphs: that of z, and that of Jᵀ u for any u."""

    z: Tensor
    u: Tensor
    pulled: Tensor
    middle: Middle


class JacobianProducts:
    """Products with Σ Jᵀ M J / N plus the regulariser's Hessian, at one point.

    J v takes one backward pass through the graph of u ↦ Jᵀ u, whose derivative along v it is.
    Unlike forward mode, this exists for every layer that can be differentiated twice. Kept graphs
    leave two backward passes to a product; batches whose graphs do not fit are linearised anew,
    for every product or once for a matrix of columns.

    Args:
        objective: The training loss.
        w: Where J is taken, shape [d]; not changed by anybody later.
        part: What is linearised for a batch, and M.
        memory_budget: Bytes for the graphs; 0 keeps none. Default: a quarter of what is free when
            the first product is made.
        regularized: Whether the regulariser's Hessian is added.
    """

    def __init__(
        self,
        objective: Objective,
        w: Tensor,
        part: Part,
        memory_budget: int | None,
        *,
        regularized: bool,
    ) -> None:
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"`memory_budget` must not be negative, got {memory_budget} bytes.")
        self._objective, self._part, self._budget = objective, part, memory_budget
        self._w = w.detach().requires_grad_()
        self._regularized = regularized
        self._kept: list[_Linearized | None] | None = None
        self._first_mark: float | None = None
        self.complete = False
        """Whether every batch has its graphs kept."""

    def operator(self, method: str) -> Operator:
        """Return the matrix as an operator."""
        o = self._objective
        return Operator(self.product, o.size, o.dtype, o.device, self.columns, method)

    @property
    def num_kept(self) -> int:
        """Number of batches whose graphs are kept; 0 before the first product."""
        return len(self._kept or ())

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
        objective = self._objective
        with torch.enable_grad(), differentiable_twice():
            with objective.ranks.in_step(rows):
                require_fixed_modules(objective.model)
                if self._kept is None:
                    self._kept = self._keep()
                out = torch.zeros_like(rows)
                for kept in self._kept:
                    self._add(kept, rows, out, keep=True)
                if not self.complete:
                    self._add_recomputed(rows, out)
            objective.reduce_(out).div_(objective.normalizer)
            if self._regularized:
                self._add_regularizer(rows, out)
        if not torch.isfinite(out).all():
            objective.loss(self._w.detach())  # raises, and names the batch or the parameter
        return out

    def _keep(self) -> list[_Linearized | None]:
        """Linearise as many batches, from the first on, as the budget allows."""
        budget = self._budget
        if budget is None:
            budget = int(FREE_SHARE * free_memory(self._objective.device))
        kept: list[_Linearized | None] = []
        used, bytes_per_element = 0, 0.0
        self.complete = budget > 0
        for i, batch in enumerate(self._objective.batches()) if self.complete else ():
            elements = max(_num_elements(batch), 1)
            if not kept:
                bytes_per_element = self._measure(batch) / elements
            size = math.ceil(bytes_per_element * elements)
            if used + size > budget:
                self.complete = False
                break
            kept.append(self._linearized(i, batch))
            used += size
        logger.info(
            "Jacobians of %s kept, %.2f GiB of a budget of %.2f GiB",
            "all batches" if self.complete else f"{len(kept)} batches",
            used / 2**30,
            budget / 2**30,
        )
        return kept

    def _linearized(self, i: int, batch: Batch) -> _Linearized | None:
        """Return the graphs of one batch; None if nothing depends on w."""
        z, middle = self._part(i, batch, self._w)
        if not z.requires_grad:
            return None
        u = torch.zeros_like(z, requires_grad=True)
        (pulled,) = torch.autograd.grad(z, self._w, u, create_graph=True, materialize_grads=True)
        if not pulled.requires_grad:
            return None
        require_second_derivative(pulled)
        return _Linearized(z, u, pulled, middle)

    def _add(self, part: _Linearized | None, rows: Tensor, out: Tensor, *, keep: bool) -> None:
        """Add one batch's products in place."""
        if part is None:
            return
        try:
            for i, v in enumerate(rows):
                (pushed,) = torch.autograd.grad(part.pulled, part.u, v, retain_graph=True)
                bent = part.middle(pushed)
                retain = keep or i + 1 < len(rows)
                (row,) = torch.autograd.grad(part.z, self._w, bent, retain_graph=retain)
                out[i] += row
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise NonDeterministicError(
                "A tensor of the model or the data was changed in place since the first product, "
                "so the products would belong to different matrices. Build a new operator."
            ) from error

    def _add_recomputed(self, rows: Tensor, out: Tensor) -> None:
        """Add the part of the sum that belongs to batches without kept graphs."""
        mark = torch.zeros((), dtype=torch.float64, device=rows.device)
        for i, batch in enumerate(self._objective.batches()):
            if i >= self.num_kept:
                part = self._linearized(i, batch)
                if part is not None:
                    mark += part.z.detach().to(torch.float64).abs().sum()
                self._add(part, rows, out, keep=False)
        slack = 1e-10 if rows.dtype == torch.float64 else 1e-4
        now = float(mark)
        first = self._first_mark = now if self._first_mark is None else self._first_mark
        if not math.isclose(now, first, rel_tol=slack, abs_tol=slack):
            raise NonDeterministicError(
                "The model's outputs at the same weights had absolute values that sum to "
                f"{first:.9g} in the first product and to {now:.9g} now, so the products belong to "
                "different matrices. Something in the data or the model changes between passes."
            )

    def _add_regularizer(self, rows: Tensor, out: Tensor) -> None:
        penalty = self._objective.regularization(self._w)
        if not penalty.requires_grad:
            return
        (slope,) = torch.autograd.grad(penalty, self._w, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return
        for i, v in enumerate(rows):
            out[i] += torch.autograd.grad(
                slope, self._w, v, retain_graph=True, materialize_grads=True
            )[0]

    def _measure(self, batch: Batch) -> int:
        """Bytes that the graphs of one batch hold, from graphs that are thrown away."""
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would keep its own graph alive

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._linearized(0, batch)
        return sum(sizes.values())


def _num_elements(batch: Batch) -> int:
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    map_tensors(batch, count)
    return total
