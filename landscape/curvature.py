"""How sharp the loss is along a move, as a share of the sharpest there is."""

import math

from jaxtyping import Float
from torch import Tensor

from hessian.operators import Operator
from hessian.subspace import Eigenspace


def curvature_share(
    operator: Operator, direction: Float[Tensor, " d"], largest: Eigenspace | float
) -> float:
    """Return Dᵀ H D / (λ₁ |D|²): 1 along the sharpest direction, 0 along a flat one.

    Unlike a share of |D|² in k eigenvectors it needs no k: every direction counts as much as it
    bends. A direction without preference has tr(H) / (d λ₁) on average. Negative where the loss
    curves down.

    Args:
        operator: The Hessian at a minimum, from ``hessian_operator``. Costs one product.
        direction: The move D, e.g. from one minimum to another; not zero.
        largest: The largest eigenvalue λ₁ > 0, or an eigenspace that holds it.

    Raises:
        ValueError: If the direction is zero or not finite, or λ₁ is not positive.

    Example:
        >>> import torch
        >>> H = Operator.from_matrix(torch.diag(torch.tensor([4.0, 1.0])))
        >>> round(curvature_share(H, torch.tensor([1.0, 1.0]), 4.0), 4)
        0.625
    """
    top = float(largest.values.max()) if isinstance(largest, Eigenspace) else largest
    if not (top > 0 and math.isfinite(top)):
        raise ValueError(f"`largest` must hold a positive eigenvalue, got {top}.")
    length = float(direction.norm())
    if not (length > 0 and math.isfinite(length)):
        raise ValueError(f"`direction` must have positive, finite length, got {length}.")
    unit = direction / length
    return float(unit @ (operator @ unit)) / top
