"""Functions of a symmetric matrix times a vector, f(A) b, from one Krylov space."""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hessian.errors import ConvergenceWarning, NonFiniteError
from hessian.lanczos import Array, KrylovBasis, Response
from hessian.operators import Operator

FEWEST = 10
"""Products before an estimate is believed: earlier, much of the spectrum has not been seen."""


@dataclass(frozen=True)
class FunctionProduct:
    """The vector f(A) b, with its estimated error."""

    value: Float[Tensor, " n"]
    error: float
    """Estimate of ‖value − f(A) b‖₂ from how fast the last steps moved the value.

    Not a bound. Where ``converged`` is False, eigenvalues that matter may not have been seen yet,
    and it can be several times too small.
    """
    ritz_values: Float[Tensor, " m"]
    """Where the spectrum of A was sampled, ascending: f was evaluated there only."""
    num_products: int
    converged: bool


def apply_function(
    operator: Operator,
    f: Response,
    b: Float[Tensor, " n"],
    *,
    tol: float = 1e-6,
    max_products: int = 500,
) -> FunctionProduct:
    """Return f(A) b by Lanczos started at b; no eigenvector of A is needed.

    Converges as fast as polynomials approximate f on the spectrum of A: after m products the
    value is exact for polynomials of degree below m. A function with a kink or a step converges
    slowly, and with it the error estimate may be too small.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        f: Function of eigenvalues, from a float64 vector to one of the same shape.
        b: The vector, shape [n].
        tol: Stop once the estimated error is at most tol · ‖f(A) b‖₂.
        max_products: Budget of products with A; also the most vectors of length n in memory.

    Returns:
        The vector with its error estimate. On an exhausted budget ``converged`` is False and a
        ``ConvergenceWarning`` names the error reached.

    Raises:
        ValueError: If tol or max_products is not positive, b does not fit or is not finite, or f
            is not finite on the spectrum.
        NonFiniteError: If a product is not finite, or f(A) b overflows the type of b.

    Example:
        >>> import torch
        >>> A = Operator.from_matrix(torch.diag(torch.tensor([0.0, 1.0, 2.0])))
        >>> apply_function(A, torch.exp, torch.ones(3)).value
        tensor([1.0000, 2.7183, 7.3891])

    References:
        Higham (2008), Functions of Matrices, section 13.2.
    """
    if not tol > 0:
        raise ValueError(f"`tol` must be positive, got {tol}.")
    if max_products < 1:
        raise ValueError(f"`max_products` must be at least 1, got {max_products}.")
    if b.shape != (operator.size,) or not torch.isfinite(b).all():
        raise ValueError(
            f"`b` must be a finite vector of length {operator.size}, got shape {list(b.shape)}"
            + ("." if b.shape != (operator.size,) else " with a NaN or an infinity.")
        )
    norm = float(b.to(torch.float64).norm())
    if norm == 0.0:
        return FunctionProduct(torch.zeros_like(b), 0.0, torch.zeros(0).double(), 0, True)

    basis = KrylovBasis(operator, b.to(dtype=operator.dtype, device=operator.device))
    while True:
        basis.extend()
        m = len(basis)
        done = basis.exhausted or m == max_products
        if not done and (m < FEWEST or m % max(5, m // 10)):
            continue
        coefficients = norm * _coefficients(f, basis, m)
        length = float(np.linalg.norm(coefficients))
        # Rounding in the basis leaves an error that no further step removes.
        error = math.sqrt(m) * torch.finfo(operator.dtype).eps * length
        if not basis.exhausted:
            error += norm * _remainder(f, basis, coefficients / norm)
        converged = error <= tol * length and (basis.exhausted or m >= FEWEST)
        if done or converged:
            break
    if not converged:
        warnings.warn(
            f"f(A) b has an estimated error of {error:.2e} after {len(basis)} products, the goal "
            f"was {tol * length:.2e}. Raise `max_products` or `tol`, or "
            "choose a smoother f.",
            ConvergenceWarning,
            stacklevel=2,
        )
    ritz_values = torch.from_numpy(basis.ritz()[0].copy())
    value = basis.combine(coefficients)
    if not torch.isfinite(value).all():
        raise NonFiniteError(
            f"f(A) b overflows {operator.dtype}: |f| reaches {_largest(f, basis):.3g} on the "
            f"spectrum seen, [{float(ritz_values[0]):.3g}, {float(ritz_values[-1]):.3g}]. Choose "
            "an f that stays bounded there."
        )
    return FunctionProduct(value, error, ritz_values, len(basis), converged)


def _largest(f: Response, basis: KrylovBasis) -> float:
    return float(np.abs(response_on(f, basis.ritz()[0])).max())


def _remainder(f: Response, basis: KrylovBasis, latest: Array) -> float:
    """Estimate how far f(T) e₁ still is from its limit, from its last two moves."""
    # Each value rests on two thirds of the steps of the next. A value that moves by d, and moved
    # by d / q before, has d q / (1 - q) to go: 2 d if the error falls like 1/m, more if slower.
    m = len(latest)
    # No more than a value can be off that is bounded like f on the spectrum seen so far.
    most = 2.0 * _largest(f, basis)
    values = [latest, _coefficients(f, basis, 2 * m // 3), _coefficients(f, basis, 4 * m // 9)]
    d, before = (
        float(np.linalg.norm(late - np.pad(early, (0, len(late) - len(early)))))
        for late, early in pairwise(values)
    )
    if d <= m * np.finfo(np.float64).eps * most:
        return 2.0 * d  # rounding, which has no trend
    to_go = d * d / (before - d) if d < before else math.inf
    return max(2.0 * d, min(2.0 * to_go, most))


def _coefficients(f: Response, basis: KrylovBasis, m: int) -> Array:
    """Return f(T) e₁ for the leading m x m block of T."""
    if m == 0:
        return np.zeros(0)
    values, vectors = basis.ritz(m)
    return np.asarray(vectors @ (response_on(f, values) * vectors[0]), dtype=np.float64)


def response_on(f: Response, values: Array) -> Array:
    """Return f at eigenvalues, ascending.

    Raises:
        ValueError: If the shape is lost or a value is not finite.
    """
    out = f(torch.from_numpy(values.copy())).to(torch.float64).cpu()
    if out.shape != values.shape or not torch.isfinite(out).all():
        raise ValueError(
            "`f` must map a vector of eigenvalues to finite values of the same shape, got shape "
            f"{list(out.shape)} for {len(values)} eigenvalues in "
            f"[{values[0]:.3g}, {values[-1]:.3g}]"
            + ("." if out.shape != values.shape else ", some not finite.")
        )
    return np.asarray(out.numpy(), dtype=np.float64)
