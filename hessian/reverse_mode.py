"""Reverse-over-reverse Hessian products: back through the graph of the gradient."""

import torch
from torch import Tensor

from hessian.batches import Batch
from hessian.double_backward import require_second_derivative
from hessian.kept_graphs import KeptGraphs
from hessian.objective import Objective


class ReverseOverReverse(KeptGraphs[Tensor]):
    """Products with the Hessian at w by one backward pass through each batch's gradient.

    The graph of the gradient does not depend on the vector of a product. Kept, a product costs
    about half of computing it anew.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]; not changed by anybody later.
        memory_budget: Bytes for the graphs; 0 keeps none. Default: a quarter of what is free when
            the first product is made.

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """

    def __init__(self, objective: Objective, w: Tensor, memory_budget: int | None) -> None:
        super().__init__(objective, w, memory_budget, regularized=True)

    def _build(self, place: int, batch: Batch) -> tuple[float, Tensor | None]:
        total = self._objective.batch_total(self._w, batch)
        loss = float(total.detach())
        (gradient,) = torch.autograd.grad(total, self._w, create_graph=True, materialize_grads=True)
        if not gradient.requires_grad:  # a loss linear in w
            return loss, None
        require_second_derivative(gradient)
        return loss, gradient

    def _through(self, graph: Tensor, v: Tensor, *, retain: bool) -> Tensor:
        return torch.autograd.grad(graph, self._w, v, retain_graph=retain, materialize_grads=True)[
            0
        ]
