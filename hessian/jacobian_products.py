"""Sums of Jᵀ M J over batches, for the Gauss-Newton and Fisher matrices."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian.batches import Batch
from hessian.kept_graphs import KeptGraphs
from hessian.objective import Objective
from hessian.operators import Operator
from hessian.precision import IN_WORDS, Precision, with_precision

Middle = Callable[[Tensor], Tensor]
Part = Callable[[int, Batch, Tensor], tuple[Tensor, Middle]]
"""Called with a batch's place, the batch and w: a tensor z(w) with its graph, and u ↦ M u."""


@dataclass(frozen=True)
class Linearized:
    """J of a tensor z in w, by two graphs: that of z, and that of Jᵀ u for any u."""

    z: Tensor
    u: Tensor
    pulled: Tensor
    middle: Middle


class JacobianProducts(KeptGraphs[Linearized]):
    """Products with Σ Jᵀ M J / N plus the regulariser's Hessian, at one point.

    J v takes one backward pass through the graph of u ↦ Jᵀ u, whose derivative along v it is.
    Unlike forward mode, this exists for every layer that can be differentiated twice. Kept graphs
    leave two backward passes to a product.

    Args:
        objective: The training loss.
        w: Where J is taken, shape [d]; not changed by anybody later.
        part: What is linearised for a batch, and M.
        memory_budget: Bytes for the graphs; 0 keeps none. Default: a quarter of what is free when
            the first product is made.
        regularized: Whether the regulariser's Hessian is added.
    """

    marked = "The mean absolute output of the model"

    def __init__(
        self,
        objective: Objective,
        w: Tensor,
        part: Part,
        memory_budget: int | None,
        *,
        regularized: bool,
    ) -> None:
        super().__init__(objective, w, memory_budget, regularized=regularized)
        self._part = part

    def operator(self, method: str, precision: Precision = "full") -> Operator:
        """Return the matrix as an operator."""
        o = self._objective
        product, columns = (with_precision(f, o, precision) for f in (self.product, self.columns))
        words = method + IN_WORDS[precision]
        return Operator(product, o.size, o.dtype, o.device, columns, words)

    def _build(self, place: int, batch: Batch) -> tuple[float, Linearized | None]:
        z, middle = self._part(place, batch, self._w)
        mark = float(z.detach().to(torch.float64).abs().sum())
        if not z.requires_grad:
            return mark, None
        u = torch.zeros_like(z, requires_grad=True)
        (pulled,) = torch.autograd.grad(z, self._w, u, create_graph=True, materialize_grads=True)
        if pulled.grad_fn is None:  # z depends on other weights only
            return mark, None
        self._require_second_derivative(pulled)
        return mark, Linearized(z, u, pulled, middle)

    def _add_through(self, graph: Linearized, v: Tensor, out: Tensor, *, retain: bool) -> None:
        (pushed,) = torch.autograd.grad(graph.pulled, graph.u, v, retain_graph=True)
        bent = graph.middle(pushed)
        out += torch.autograd.grad(graph.z, self._w, bent, retain_graph=retain)[0]
