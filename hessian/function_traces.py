"""The trace of f(A) and the log-determinant, by stochastic Lanczos quadrature."""

import math
import warnings
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hessian.errors import ConvergenceWarning
from hessian.functions import FEWEST, response_on
from hessian.lanczos import KrylovBasis, Response
from hessian.operators import Operator
from hessian.progress import ProgressOption, report_progress
from hessian.quadrature import lanczos_runs, require_sizes
from hessian.subspace import Eigenspace
from hessian.traces import TraceEstimate


def function_trace(
    operator: Operator,
    f: Response,
    *,
    num_probes: int = 10,
    num_steps: int = 80,
    eigenspace: Eigenspace | None = None,
    seed: int = 0,
    progress: ProgressOption = False,
) -> TraceEstimate:
    """Estimate the trace of f(A) by stochastic Lanczos quadrature.

    The standard error has two parts. The spread over probes falls with their number. The error of
    the quadratures, which is common to all probes, falls with ``num_steps``: it is estimated from
    what the last third of the steps changed, and how much the third before it had.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        f: Function of eigenvalues, from a float64 vector to one of the same shape.
        num_probes: Number of probes, ``num_steps`` products each.
        num_steps: Products a probe; also the most vectors of length n in memory.
        eigenspace: Eigenpairs that enter exactly; the probes then see their complement only.
            Checked with one product.
        seed: Seed of the probes, drawn on the CPU; the global random state is not used.
        progress: A bar, or a function called with a ``Step``.

    Returns:
        The estimate; ``samples`` has one entry a probe. ``converged`` says whether the error of
        the quadratures is at most the spread over probes, after ten steps or more; if not, a
        ``ConvergenceWarning`` names both.

    Raises:
        ValueError: If there are fewer than two probes or no step, f is not finite on the spectrum,
            or the eigenspace is not one of this operator.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import torch
        >>> A = Operator.from_matrix(torch.diag(torch.tensor([1.0, 1.0, 3.0]).double()))
        >>> round(function_trace(A, torch.square).value, 6)
        11.0

    References:
        Ubaru, Chen, Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.
    """
    return _function_trace(operator, f, "f(A)", num_probes, num_steps, eigenspace, seed, progress)


def logdet(
    operator: Operator,
    *,
    shift: float,
    num_probes: int = 10,
    num_steps: int = 80,
    eigenspace: Eigenspace | None = None,
    seed: int = 0,
    progress: ProgressOption = False,
) -> TraceEstimate:
    """Estimate log det(A + shift I) for a positive definite A + shift I.

    A negative eigenvalue of A + shift I is an error if a Lanczos run comes across it. One that
    fills little of every probe may stay unseen: the smallest eigenvalues of A, by
    ``leading_eigenspace(A, which="smallest")``, tell with certainty what shift is enough.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        shift: Number τ added to all eigenvalues, in units of A.
        num_probes: Number of probes, ``num_steps`` products each.
        num_steps: Products a probe; the smaller the shift, the more are needed.
        eigenspace: Eigenpairs that enter exactly. Checked with one product.
        seed: Seed of the probes, drawn on the CPU; the global random state is not used.
        progress: A bar, or a function called with a ``Step``.

    Returns:
        The estimate, with errors as for ``function_trace``.

    Raises:
        ValueError: If A + shift I has an eigenvalue at or below zero, or as ``function_trace``.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import math, torch
        >>> A = Operator.from_matrix(torch.diag(torch.tensor([1.0, 1.0, 3.0]).double()))
        >>> round(math.exp(logdet(A, shift=1.0).value), 6)
        16.0

    References:
        Ubaru, Chen, Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.
    """
    if not math.isfinite(shift):
        raise ValueError(f"`shift` must be finite, got {shift}.")

    def log_shifted(values: Tensor) -> Tensor:
        # Ritz values lie within the spectrum, so one of them is proof.
        lowest = float(values.min())
        if lowest + shift <= 0.0:
            raise ValueError(
                f"`shift` must make A + shift I positive definite, got {shift}, but A has an "
                f"eigenvalue at or below {lowest:.6g}. Choose a shift above {-lowest:.6g}."
            )
        return torch.log(values + shift)

    return _function_trace(
        operator, log_shifted, "log(A + shift I)", num_probes, num_steps, eigenspace, seed, progress
    )


def _function_trace(
    operator: Operator,
    f: Response,
    name: str,
    num_probes: int,
    num_steps: int,
    eigenspace: Eigenspace | None,
    seed: int,
    progress: ProgressOption,
) -> TraceEstimate:
    require_sizes(num_probes, num_steps)
    captured, coupling, rest = 0.0, 0.0, operator.size
    products = 0
    if eigenspace is not None:
        products = 1
        rest -= len(eigenspace.values)
        captured, coupling = _pairs(f, eigenspace)
    samples = torch.full((num_probes,), captured, dtype=torch.float64, device="cpu")
    short_of = torch.zeros(num_probes, dtype=torch.float64, device="cpu")
    exhausted = True
    with report_progress(progress, f"trace of {name}") as update:
        runs = lanczos_runs(
            operator,
            num_probes=num_probes,
            num_steps=num_steps,
            eigenspace=eigenspace,
            seed=seed,
            update=update,
        )
        for i, basis in enumerate(runs):
            value, error = _quadrature(f, basis)
            samples[i] += rest * value
            short_of[i] = rest * error
            exhausted &= basis.exhausted
            products += len(basis)
    spread = float(samples.std()) / math.sqrt(num_probes)
    # The quadratures err together, whatever the number of probes.
    bias = float(short_of.mean()) + coupling
    value = float(samples.mean())
    converged = bias <= max(spread, 1e-10 * abs(value)) and (exhausted or num_steps >= FEWEST)
    if not converged:
        warnings.warn(
            f"The trace of {name} has an estimated error of {bias:.2e} from its quadratures and "
            f"{spread:.2e} from its probes after {num_steps} steps. Raise `num_steps`, which "
            f"should be {FEWEST} at least, choose a smoother f"
            + (", or converge the eigenspace further." if coupling > bias / 2 else "."),
            ConvergenceWarning,
            stacklevel=3,
        )
    return TraceEstimate(value, math.hypot(spread, bias), samples, products, converged)


def _quadrature(f: Response, basis: KrylovBasis) -> tuple[float, float]:
    """Return qᵀ f(A) q for the unit start q, and an estimate of what further steps would change."""
    m = len(basis)
    steps = [m] if basis.exhausted else [m, 2 * m // 3, 4 * m // 9]
    values = []
    for count in steps:
        nodes, vectors = basis.ritz(count) if count else (np.zeros(1), np.ones((1, 1)))
        values.append(float(vectors[0] ** 2 @ response_on(f, nodes)))
    if basis.exhausted:
        return values[0], 0.0
    moved, before = (abs(late - early) for late, early in pairwise(values))
    to_go = moved * moved / (before - moved) if moved < before else math.inf
    # Twice, as for f(A) b: an estimate, no bound.
    return values[0], 2.0 * max(moved, min(to_go, before + moved))


def _pairs(f: Response, space: Eigenspace) -> tuple[float, float]:
    """Return Σ f(λ), and what the pairs' residuals may have changed in the whole trace."""
    values = space.values.to(device="cpu", dtype=torch.float64)
    residuals = space.residuals.to(device="cpu", dtype=torch.float64)
    # Setting V apart moves an eigenvalue by at most r, and by r² / gap where a gap is known.
    shifts = residuals
    if space.gap > 0:
        shifts = torch.minimum(residuals, residuals.square() / space.gap)
    order = values.argsort()
    exact = response_on(f, values[order].numpy())
    # To the right, where a logarithm or a square root stays defined.
    moved = response_on(f, (values + shifts)[order].numpy())
    # Twice: the rest of the spectrum moves as much the other way.
    return float(exact.sum()), 2.0 * float(np.abs(moved - exact).sum())
