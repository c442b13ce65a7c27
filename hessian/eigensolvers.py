"""Leading eigenpairs by Lanczos, certified by products made after the iteration."""

import math
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessian.errors import ConvergenceWarning
from hessian.lanczos import Array, KrylovBasis
from hessian.operators import Operator
from hessian.subspace import Eigenspace

Which = Literal["magnitude", "largest", "smallest"]


def leading_eigenspace(
    operator: Operator,
    *,
    k: int,
    tol: float = 1e-6,
    max_products: int = 1000,
    seed: int = 0,
    which: Which = "magnitude",
    backend: Literal["lanczos", "pyhessian"] = "lanczos",
) -> Eigenspace:
    """Find the k leading eigenpairs of a symmetric matrix by Lanczos.

    The basis is reorthogonalised fully and in two passes, so no eigenvalue is a ghost of another.
    The iteration stops on its own residual estimates; the residuals returned are measured with
    k further products. An eigenvalue of exact multiplicity m is found m times only if the Krylov
    space breaks down, as it does for a multiple of the identity; otherwise it is found once.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        k: Number of pairs, 1 ≤ k ≤ n.
        tol: Stop once ‖A v − λ v‖₂ ≤ tol · max |λ| for all pairs.
        max_products: Budget of products with A; also the most vectors of length n in memory.
        seed: Seed of the starting vector, drawn on the CPU.
        which: Leading by ``"magnitude"`` (the sharp directions, whatever their sign), or the
            ``"largest"`` or ``"smallest"`` on the real line.
        backend: ``"pyhessian"`` runs PyHessian's power iteration on the same products; it leads
            by magnitude only, knows no gap, and its residuals are measured like ours.

    Returns:
        The eigenspace, leading pair first. On an exhausted budget ``converged`` is False and a
        ``ConvergenceWarning`` names the residual reached.

    Raises:
        ValueError: If k, tol or max_products cannot be met, or an option is not known.
        NonFiniteError: If a product is not finite.
        NonDeterministicError: If the operator changes between products.

    Example:
        >>> import torch
        >>> A = Operator.from_matrix(torch.diag(torch.tensor([1.0, -3.0, 0.5])))
        >>> leading_eigenspace(A, k=2).values.round(decimals=4).tolist()
        [-3.0, 1.0]

    References:
        Parlett (1998), The Symmetric Eigenvalue Problem, chapter 13.
    """
    n = operator.size
    if not 1 <= k <= n:
        raise ValueError(f"`k` must be between 1 and {n}, the size of the operator, got {k}.")
    if not tol > 0:
        raise ValueError(f"`tol` must be positive, got {tol}.")
    if max_products < 2 * k:
        raise ValueError(
            f"`max_products` must be at least {2 * k}: {k} to span {k} pairs and {k} to measure "
            f"them, got {max_products}."
        )
    if which not in ("magnitude", "largest", "smallest"):
        raise ValueError(f'`which` must be "magnitude", "largest" or "smallest", got "{which}".')
    if backend == "pyhessian":
        from hessian.pyhessian_backend import power_iteration

        if which != "magnitude":
            raise ValueError(f'`which` must be "magnitude" for PyHessian, got "{which}".')
        return power_iteration(operator, k=k, tol=tol, max_products=max_products, seed=seed)
    if backend != "lanczos":
        raise ValueError(f'`backend` must be "lanczos" or "pyhessian", got "{backend}".')

    space = _lanczos(operator, k, tol, max_products, seed, which)
    if not space.converged:
        warnings.warn(
            f"Lanczos reached a largest residual of {float(space.residuals.max()):.2e} after "
            f"{space.num_products} products, for eigenvalues up to "
            f"{float(space.values.abs().max()):.2e} and tol={tol:.1e}. Raise `max_products` or "
            "`tol`" + (", or work in float64." if operator.dtype != torch.float64 else "."),
            ConvergenceWarning,
            stacklevel=2,
        )
    return space


def _lanczos(
    operator: Operator, k: int, tol: float, max_products: int, seed: int, which: Which
) -> Eigenspace:
    generator = torch.Generator().manual_seed(seed)
    basis = KrylovBasis(operator, _random_direction(operator, generator))
    spent = 0
    restarted = False
    retry_below = math.inf
    last_leading: Array | None = None
    while True:
        basis.extend()
        spent += 1
        final = spent + k >= max_products
        m = len(basis)
        check = m >= k and not restarted and m % max(1, m // 10) == 0
        if not (check or final or basis.exhausted):
            continue
        values, vectors = basis.ritz()
        order = _order(values, which)
        if basis.exhausted and not final:
            # One Krylov space holds every eigenvalue once. Copies of a multiple eigenvalue come
            # from further starts, until one of them leaves the k leading values as they were.
            found = values[order[:k]] if m >= k else None
            settled = (
                found is not None
                and last_leading is not None
                and np.allclose(found, last_leading, rtol=1e-6, atol=basis.rounding)
            )
            if not settled and basis.restart(_random_direction(operator, generator)):
                restarted, last_leading = True, found
                continue
        goal = tol * float(np.abs(values).max())
        estimate = float(np.abs(basis.beta * vectors[-1, order[:k]]).max())
        done = final or basis.exhausted
        # Each measuring costs k products: only when the estimates promise success, and after a
        # disappointment (rounding in float32) only when they have fallen by ten.
        if not done and estimate > min(goal, retry_below):
            continue
        spent += k
        space = _measure(basis, values, vectors, order[:k], spent, goal)
        if space.converged or done or spent + k >= max_products:
            return space
        retry_below = 0.1 * estimate


def measured_eigenspace(
    operator: Operator, vectors: Tensor, *, gap: float, num_products: int, goal: float
) -> Eigenspace:
    """Measure orthonormal vectors [n, k] with k products: Rayleigh quotients and residuals."""
    V = vectors.to(torch.float64)
    AV = (operator @ vectors).to(torch.float64)
    values = (V * AV).sum(dim=0)
    residuals = (AV - V * values).norm(dim=0)
    return Eigenspace(
        values, vectors, residuals, gap, num_products, bool(float(residuals.max()) <= goal)
    )


def _measure(
    basis: KrylovBasis,
    values: Array,
    vectors: Array,
    leading: npt.NDArray[np.intp],
    num_products: int,
    goal: float,
) -> Eigenspace:
    found = basis.combine(vectors[:, leading])
    # One sign convention, so that figures and resumed runs agree.
    flips = found.gather(0, found.abs().argmax(dim=0, keepdim=True)).sign()
    rest = np.delete(values, leading)
    if len(rest):
        gap = float(np.abs(values[leading, None] - rest[None, :]).min())
    else:
        gap = math.inf if len(leading) == basis.operator.size else math.nan
    return measured_eigenspace(
        basis.operator, found * flips, gap=gap, num_products=num_products, goal=goal
    )


def _order(values: Array, which: Which) -> npt.NDArray[np.intp]:
    keys = {"magnitude": -np.abs(values), "largest": -values, "smallest": values}
    return np.argsort(keys[which], kind="stable")


def _random_direction(operator: Operator, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU: the same direction on every device.
    draw = torch.randn(operator.size, generator=generator, dtype=torch.float64)
    return draw.to(device=operator.device, dtype=operator.dtype)
