"""The Hessian product of a PyHessian object, which leaves the model's gradients as they were."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def solver_product(solver: Any) -> tuple[Callable[[Tensor], Tensor], int, Tensor]:
    """Return the product, its size, and a parameter whose type and device vectors have.

    Args:
        solver: A ``pyhessian.hessian``.

    Raises:
        TypeError: If ``solver`` is no such object.
        ValueError: If it weights the batches of a loader wrongly, because its criterion is not a
            mean, or if a parameter has no part in the loss.
    """
    if not all(hasattr(solver, name) for name in ("params", "gradsH", "full_dataset")):
        raise TypeError(f"`solver` must be a pyhessian.hessian, got {type(solver).__name__}.")
    reduction = getattr(solver.criterion, "reduction", "mean")
    if solver.full_dataset and reduction != "mean":
        raise ValueError(
            "`solver` must have a criterion that is a mean, because PyHessian multiplies the "
            f'loss of a batch by its length, got reduction="{reduction}".'
        )
    params = list(solver.params)
    lengths = [p.numel() for p in params]
    if not solver.full_dataset and not all(isinstance(g, Tensor) for g in solver.gradsH):
        raise ValueError(
            "`solver` must have a gradient for every parameter, got one that has no part in "
            "the loss. Freeze it with `requires_grad_(False)` before PyHessian is built."
        )

    def product(v: Tensor) -> Tensor:
        parts = [
            part.view(p.shape) for part, p in zip(torch.split(v, lengths), params, strict=True)
        ]
        held = [(p, p.grad) for p in solver.model.parameters()]
        try:
            with torch.enable_grad():
                if solver.full_dataset:
                    out = solver.dataloader_hv_product(parts)[1]
                else:
                    out = torch.autograd.grad(
                        solver.gradsH, params, parts, retain_graph=True, materialize_grads=True
                    )
        finally:
            for p, gradient in held:
                p.grad = gradient
        return torch.cat([part.detach().reshape(-1) for part in out])

    return product, sum(lengths), params[0]
