"""Linear systems with symmetric positive definite matrices, by products only."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import NonFiniteError, Operator

Stop = Literal["tolerance", "progress", "budget", "curvature"]

WINDOW = 0.1
"""Share of the iterations made so far over which progress is judged (Martens 2010)."""

LEAST_WINDOW = 10
"""Iterations over which progress is judged at least (Martens 2010)."""


@dataclass(frozen=True)
class LinearSolution:
    """An approximate solution of A x = b, and how far it got."""

    x: Float[Tensor, " n"]
    residual: float
    """‖b − A x‖₂ / ‖b‖₂ as the iteration carries it along; 0 where b is 0."""
    value: float
    """½ xᵀ A x − bᵀ x, which x makes small; 0 at x = 0."""
    num_products: int
    converged: bool
    """Whether the tolerance or the rule of progress was met within the budget."""
    stopped: Stop
    """``"curvature"`` if a direction with pᵀ A p ≤ 0 was met: A is not positive definite."""


def conjugate_gradients(
    operator: Operator,
    b: Float[Tensor, " n"],
    *,
    tol: float = 1e-6,
    progress: float = 0.0,
    max_products: int = 100,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> LinearSolution:
    """Solve A x = b from x = 0 by conjugate gradients.

    Every iterate minimises ½ xᵀ A x − bᵀ x over a growing Krylov space, and is longer than the
    one before (in the norm of the preconditioner), so stopping early is a trust region. Five
    vectors of length n are held.

    Args:
        operator: Symmetric positive definite matrix A, shape [n, n].
        b: Right-hand side, shape [n].
        tol: Stop once ‖b − A x‖₂ ≤ tol · ‖b‖₂.
        progress: Stop once ½ xᵀ A x − bᵀ x has fallen, over the last tenth of the iterations and
            no fewer than ten, by less than ``progress`` of its size per iteration (Martens 2010,
            who takes 5e-4). 0 leaves the rule out.
        max_products: Budget of products, one an iteration.
        preconditioner: Maps r to P r for a symmetric positive definite P, near the inverse of A.

    Returns:
        The solution. An exhausted budget shows as ``converged=False``.

    Raises:
        ValueError: If b does not fit the operator, tol or progress is negative, or max_products is
            not positive.
        NonFiniteError: If b or a product is not finite.

    Example:
        >>> import torch
        >>> A = Operator.from_matrix(torch.diag(torch.tensor([1.0, 4.0])))
        >>> conjugate_gradients(A, torch.tensor([1.0, 2.0])).x
        tensor([1.0000, 0.5000])

    References:
        Hestenes & Stiefel (1952), Methods of conjugate gradients for solving linear systems.
        Martens (2010), Deep learning via Hessian-free optimization, section 4.4.
    """
    _check(operator, b, tol, progress, max_products)
    size = _dot(b, b) ** 0.5
    x, r = torch.zeros_like(b), b.clone()
    if size == 0.0:
        return LinearSolution(x, 0.0, 0.0, 0, True, "tolerance")
    y = r if preconditioner is None else preconditioner(r)
    p, rho = y.clone(), _dot(r, y)
    values, residual = [0.0], 1.0
    stopped: Stop = "budget"
    while len(values) <= max_products:
        q = operator @ p
        bend = _dot(p, q)
        if not bend > 0.0 or not rho > 0.0:
            stopped = "curvature"
            break
        step = rho / bend
        x.add_(p, alpha=step)
        r.sub_(q, alpha=step)
        values.append(values[-1] - 0.5 * step * rho)
        residual = _dot(r, r) ** 0.5 / size
        if residual <= tol:
            stopped = "tolerance"
            break
        if progress and _stalls(values, progress):
            stopped = "progress"
            break
        y = r if preconditioner is None else preconditioner(r)
        before, rho = rho, _dot(r, y)
        p.mul_(rho / before).add_(y)
    spent = len(values) - (stopped != "curvature")
    return LinearSolution(
        x, residual, values[-1], spent, stopped in ("tolerance", "progress"), stopped
    )


def _stalls(values: list[float], progress: float) -> bool:
    """Whether the value fell by less than ``progress`` of itself an iteration."""
    made = len(values) - 1
    window = max(LEAST_WINDOW, math.ceil(WINDOW * made))
    return made > window and values[-1 - window] - values[-1] < window * progress * -values[-1]


def _dot(a: Tensor, b: Tensor) -> float:
    # The recursion divides by differences of these: float64 keeps it as good as the products.
    return float(torch.dot(a.double(), b.double()))


def _check(operator: Operator, b: Tensor, tol: float, progress: float, max_products: int) -> None:
    if b.shape != (operator.size,):
        raise ValueError(
            f"`b` must have one entry for each of the operator's {operator.size} rows, got shape "
            f"{list(b.shape)}."
        )
    if not torch.isfinite(b).all():
        raise NonFiniteError("`b`, the right-hand side, holds a NaN or an infinity.")
    if not (tol >= 0 and progress >= 0):
        raise ValueError(
            f"`tol` and `progress` must not be negative, got tol={tol} and progress={progress}."
        )
    if max_products < 1:
        raise ValueError(f"`max_products` must be at least 1, got {max_products}.")
