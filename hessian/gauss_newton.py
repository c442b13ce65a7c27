"""The generalised Gauss-Newton matrix: the Hessian with the model linearised in its weights."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.batches import Batch
from hessian.double_backward import require_second_derivative
from hessian.jacobian_products import JacobianProducts, Middle
from hessian.likelihoods import factor, likelihood_of, target_of
from hessian.objective import Objective
from hessian.operators import Operator
from hessian.precision import Precision, in_precision


def gauss_newton_operator(
    objective: Objective,
    w: Float[Tensor, " d"] | None = None,
    *,
    precision: Precision = "full",
    memory_budget: int | None = None,
) -> Operator:
    """Return the generalised Gauss-Newton matrix G = Σ Jᵀ (∇²_z ℓ) J / N of the loss at w.

    J is the Jacobian of the model's output z in w, ℓ the loss as a function of z. G is positive
    semidefinite if ℓ is convex in z, as cross-entropy and squared error are, and equals the
    Hessian where the model is linear or the loss gradient in z vanishes. A regulariser enters by
    its own Hessian. G exists wherever the Hessian's reverse-over-reverse products do.

    The first product builds two graphs for every batch, of z and of u ↦ Jᵀ u. Where they fit into
    the memory budget they are kept, and a further product is one backward pass through each;
    batches that do not fit are linearised anew, for one product or for all columns of ``G @ V``.

    Args:
        objective: The training loss. The model must return one tensor.
        w: Where the matrix is taken, shape [d]. Default: the model's current weights.
        precision: As for ``hessian_operator``.
        memory_budget: Bytes for the graphs that are kept; 0 keeps none. Default: a quarter of what
            is free at the first product.

    Returns:
        The operator of shape [d, d]. Its products raise ``TypeError`` if the model returns
        anything but one tensor, ``NonDeterministicError`` if the model or the data changed since
        the first one, and ``NonFiniteError`` if they are not finite.

    Raises:
        ValueError: If w does not fit the objective, the budget is negative, or the precision is
            not to be had for these weights.

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
    objective = in_precision(objective, precision)
    likelihood = likelihood_of(objective)

    def part(i: int, batch: Batch, leaf: Tensor) -> tuple[Tensor, Middle]:
        del i
        z: Any = objective.output(leaf, batch)
        if not isinstance(z, Tensor):
            raise TypeError(
                "The Gauss-Newton matrix needs a model that returns one tensor, got "
                f"{type(z).__name__}. Wrap the model so that it returns its logits."
            )
        fixed, y = z.detach(), target_of(batch)
        if likelihood is None or not likelihood.fits(fixed, y):
            return z, _loss_hessian(objective, fixed, batch)
        # The formula keeps no second graph through the loss, which a large vocabulary would feel.
        scale = factor(likelihood, objective, fixed, batch)
        return z, lambda u: scale * likelihood.bend(fixed, y, u)

    products = JacobianProducts(objective, w, part, memory_budget, regularized=True)
    return products.operator("Gauss-Newton by reverse mode", precision)


def _loss_hessian(objective: Objective, z: Tensor, batch: Batch) -> Middle:
    """Return u ↦ (∇²_z Σ ℓ) u by automatic differentiation of any loss."""
    z = z.requires_grad_()
    total = objective.total_from_output(z, batch)
    require_second_derivative(total)
    (slope,) = torch.autograd.grad(total, z, create_graph=True, materialize_grads=True)

    def product(u: Tensor) -> Tensor:
        if not slope.requires_grad:  # a loss linear in the output
            return torch.zeros_like(u)
        return torch.autograd.grad(slope, z, u, retain_graph=True, materialize_grads=True)[0]

    return product
