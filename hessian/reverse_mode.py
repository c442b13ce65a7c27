"""Reverse-over-reverse Hessian products: back through the graph of the gradient."""

import torch
from torch import Tensor

from hessian.batches import Batch
from hessian.kept_graphs import KeptGraphs
from hessian.objective import Objective

Gradient = dict[str, Tensor]
"""The gradient in the weights by name, with its graph, where it depends on the weights."""


class ReverseOverReverse(KeptGraphs[Gradient]):
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
        self._weights = objective.unflatten(w.detach())
        # One leaf a parameter: through one flat leaf, every batch would cut and join long vectors.
        self._leaves = {name: self._weights[name].requires_grad_() for name in objective.shapes}

    def _build(self, place: int, batch: Batch) -> tuple[float, Gradient | None]:
        total = self._objective.batch_total_at(self._weights, batch)
        loss = float(total.detach())
        self._require_second_derivative(total)
        parts = torch.autograd.grad(
            total, list(self._leaves.values()), create_graph=True, materialize_grads=True
        )
        gradient = {
            name: part
            for name, part in zip(self._leaves, parts, strict=True)
            if part.requires_grad  # others do not depend on the weights
        }
        if not gradient:
            return loss, None
        self._require_second_derivative(*gradient.values())
        return loss, gradient

    def _add_through(self, graph: Gradient, v: Tensor, out: Tensor, *, retain: bool) -> None:
        directions, sums = self._objective.unflatten(v), self._objective.unflatten(out)
        parts = torch.autograd.grad(
            list(graph.values()),
            list(self._leaves.values()),
            [directions[name] for name in graph],
            retain_graph=retain,
            materialize_grads=True,
        )
        for name, part in zip(self._leaves, parts, strict=True):
            sums[name] += part
