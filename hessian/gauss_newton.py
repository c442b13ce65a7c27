"""The generalised Gauss-Newton matrix: the Hessian with the model linearised in its weights."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.batches import Batch
from hessian.determinism import require_fixed_modules
from hessian.double_backward import differentiable_twice
from hessian.objective import Objective
from hessian.operators import Operator


def gauss_newton_operator(objective: Objective, w: Float[Tensor, " d"] | None = None) -> Operator:
    """Return the generalised Gauss-Newton matrix G = Σ Jᵀ (∇²_z ℓ) J / N of the loss at w.

    J is the Jacobian of the model's output z in w, ℓ the loss as a function of z. G is positive
    semidefinite if ℓ is convex in z, as cross-entropy and squared error are, and equals the
    Hessian where the model is linear or the loss gradient in z vanishes. A product costs one
    forward pass and about three backward passes over the data, and works wherever the Hessian's
    does; nothing is kept between products.

    Args:
        objective: The training loss. The model must return one tensor.
        w: Where the matrix is taken, shape [d]. Default: the model's current weights.

    Returns:
        The operator of shape [d, d]. Its products raise ``TypeError`` if the model returns
        anything but one tensor, and ``NonFiniteError`` if they are not finite.

    Raises:
        ValueError: If w does not fit the objective.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> G = gauss_newton_operator(Objective(model, torch.nn.MSELoss(), data))
        >>> G @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
        Martens (2020), New insights and perspectives on the natural gradient method.
    """
    w = objective.weights() if w is None else w.detach().clone()
    objective.require_vector(w, "w")
    leaf = w.requires_grad_()

    def product(v: Tensor) -> Tensor:
        require_fixed_modules(objective.model)
        out = torch.zeros_like(v)
        with torch.enable_grad(), differentiable_twice():
            for batch in objective.batches():
                out += _batch_product(objective, leaf, v, batch)
        return out / objective.num_samples

    return Operator(product, objective.size, objective.dtype, objective.device)


def _batch_product(objective: Objective, w: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Return Jᵀ (∇²_z Σ ℓ) J v for one batch."""
    output: Any = objective.output(w, batch)
    if not isinstance(output, Tensor):
        raise TypeError(
            "The Gauss-Newton matrix needs a model that returns one tensor, got "
            f"{type(output).__name__}. Wrap the model so that it returns its logits."
        )
    # J v by two backward passes: u ↦ Jᵀ u is linear, and its derivative along v is J v. Unlike
    # forward mode, this exists for every layer that can be differentiated twice.
    u = torch.zeros_like(output, requires_grad=True)
    (pulled,) = torch.autograd.grad(output, w, u, create_graph=True, materialize_grads=True)
    if not pulled.requires_grad:  # an output that does not depend on w
        return torch.zeros_like(v)
    (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
    z = output.detach().requires_grad_()
    total = objective.total_from_output(z, batch)
    (slope,) = torch.autograd.grad(total, z, create_graph=True, materialize_grads=True)
    if not slope.requires_grad:  # a loss linear in the output
        return torch.zeros_like(v)
    (bent,) = torch.autograd.grad(slope, z, pushed.detach(), materialize_grads=True)
    return torch.autograd.grad(output, w, bent.detach(), materialize_grads=True)[0].detach()
