"""Hessian products by central differences of gradients, with an estimate of their error."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from hessian.errors import ConvergenceWarning
from hessian.objective import Objective

WORRYING = 0.05
"""Relative error of a product from which on a warning is due."""


class CentralDifferences:
    """Products with the Hessian at w from four gradients, extrapolated after Richardson.

    For networks that can be differentiated once only. The gradient must be smooth: across the
    kinks of a ReLU it jumps, and so does every difference.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]; not changed by anybody later.

    References:
        Martens (2010), Deep learning via Hessian-free optimization, section 4.
    """

    def __init__(self, objective: Objective, w: Tensor) -> None:
        self._objective, self._w = objective, w.detach()
        self._fixed = objective.fixed_state()
        self.error = 0.0
        """Largest relative error of a product so far, as estimated from two step widths."""

    def product(self, v: Tensor) -> Tensor:
        """Return H v for v of shape [d]. Warns once if the differences do not settle.

        Raises:
            NonDeterministicError: If the model changed since the first product.
            NonFiniteError: If a gradient is not finite.
        """
        with self._objective.ranks.in_step():
            self._fixed.require_same()
        out, error = difference_quotient(self._objective.gradient, self._w, v)
        if error > WORRYING >= self.error:
            warnings.warn(
                f"A Hessian product by central differences is off by about {error:.0%}: the "
                "gradient is not smooth over the step, as across the kinks of a ReLU, or is lost "
                "in rounding. Work in float64, or replace what cannot be differentiated twice.",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.error = max(self.error, error)
        return out


def difference_quotient(
    gradient: Callable[[Tensor], Tensor], w: Tensor, v: Tensor
) -> tuple[Tensor, float]:
    """Return the derivative of a gradient along v at w, and its estimated relative error."""
    norm = float(v.norm())
    if norm == 0.0:
        return torch.zeros_like(v), 0.0
    # Rounding of the gradient over the step against the step's fourth power would ask for the
    # fifth root; a little less, because the higher derivatives are not known.
    root: float = torch.finfo(w.dtype).eps ** 0.25
    step = root * max(float(w.norm()), math.sqrt(len(w)) * 1e-3)
    direction = v / norm

    def quotient(h: float) -> Tensor:
        return (gradient(w + h * direction) - gradient(w - h * direction)) / (2.0 * h)

    fine, coarse = quotient(step), quotient(2.0 * step)
    out = (4.0 * fine - coarse) / 3.0
    size = float(out.norm())
    return norm * out, float((out - fine).norm()) / size if size > 0.0 else 0.0
