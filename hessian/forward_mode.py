"""Forward-over-reverse Hessian products: the derivative of the gradient along a direction."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hessian.batches import Batch
from hessian.determinism import require_fixed_modules
from hessian.double_backward import differentiable_forward
from hessian.objective import Objective


class ForwardOverReverse:
    """Products with the Hessian at w by one gradient on dual numbers a batch and vector.

    For layers whose backward pass has a forward derivative but no backward one. Nothing is kept.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]; not changed by anybody later.

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """

    def __init__(self, objective: Objective, w: Tensor) -> None:
        self._objective, self._w = objective, w.detach()
        self._fixed = objective.fixed_state()

    def product(self, v: Tensor) -> Tensor:
        """Return H v for v of shape [d].

        Raises:
            NonFiniteError: If the product is not finite.
        """
        objective = self._objective
        with objective.ranks.in_step(v):
            require_fixed_modules(objective.model)
            self._fixed.require_same()
            out = torch.zeros_like(v)
            for batch in objective.batches():
                out += self.batch_product(v, batch)
        objective.reduce_(out).div_(objective.normalizer)
        out += self._derivative(objective.regularization, v)
        if not torch.isfinite(out).all():
            objective.gradient(self._w)  # raises, and names what is wrong, if it is the loss
        return out

    def batch_product(self, v: Tensor, batch: Batch) -> Tensor:
        """Return H_b v for the Hessian of the summed loss of one batch."""
        return self._derivative(partial(self._objective.batch_total, batch=batch), v)

    def _derivative(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return the derivative along v of the gradient of one function of w."""
        with torch.enable_grad(), differentiable_forward(), forward_ad.dual_level():
            leaf = self._w.detach().requires_grad_()
            w = forward_ad.make_dual(leaf, v.detach())  # type: ignore[no-untyped-call]
            value = function(w)
            if not value.requires_grad:
                return torch.zeros_like(v)
            (slope,) = torch.autograd.grad(value, w, materialize_grads=True)
            tangent: Tensor | None
            tangent = forward_ad.unpack_dual(slope).tangent  # type: ignore[no-untyped-call]
            return torch.zeros_like(v) if tangent is None else tangent.detach().clone()
