"""The trace of a symmetric matrix from random probes."""

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import chdtri, stdtrit
from torch import Tensor

from hessian.diagonals import exact_diagonal
from hessian.errors import ConvergenceWarning
from hessian.operators import Operator
from hessian.probes import CountedProducts, SignProbes, column_dots, deflated
from hessian.progress import ProgressOption, report_progress
from hessian.subspace import Eigenspace
from hessian.trace_estimators import ESTIMATORS, FEWEST, TraceMethod, price_of

FEWEST_TO_STOP = 20
"""Probes before a standard error is good enough to stop on."""

GROWTH = 1.5
"""Ratio of the numbers of probes at which `rtol` is checked: few looks, so few chances to err."""


@dataclass(frozen=True)
class TraceEstimate:
    """An unbiased estimate of a trace with its standard error."""

    value: float
    standard_error: float
    """Standard error of the value; see ``interval`` for what it covers.

    With ``rtol``, its upper 95 % confidence limit: where sampling stops, the spread tends to be
    one that happens to be small.
    """
    samples: Float[Tensor, " p"]
    """An estimate of the trace from every probe, in float64. Their mean is the value."""
    num_products: int
    converged: bool
    """Whether the tolerance was reached; True where none was asked for."""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval by Student's t with one degree of freedom a sample less one.

        It holds the trace about as often as ``level`` says, also for few probes, where two
        standard errors hold it less often. Samples far from normal (a single eigenvalue that
        outweighs all others) take some coverage away.

        Raises:
            ValueError: If ``level`` is not between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
        reach = float(stdtrit(len(self.samples) - 1, 0.5 + level / 2)) * self.standard_error
        return self.value - reach, self.value + reach


def trace(
    operator: Operator,
    *,
    method: TraceMethod = "hutchinson",
    eigenspace: Eigenspace | None = None,
    num_probes: int = 30,
    rtol: float | None = None,
    max_products: int = 1000,
    seed: int = 0,
    progress: ProgressOption = False,
) -> TraceEstimate:
    """Estimate the trace from random sign probes, with a standard error.

    Hutchinson's variance for one probe is 2 (‖A‖²_F − Σ A_jj²): a diagonal matrix needs one
    probe only, and a matrix with few large eigenvalues many. These are removed by an
    ``eigenspace`` that is already at hand, or found by Hutch++ and XTrace at a price. On a
    spectrum without large eigenvalues the price is lost, and Hutchinson is the best.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        method: ``"hutchinson"`` costs one product a probe. ``"hutch++"`` spends half of the probes
            on a sketch of the range, two products each, and the other half on what it misses, one
            product each. ``"xtrace"`` uses every probe for both, two products each. Memory, in
            vectors of length n: a chunk, or about one for each probe (with ``rtol``, Hutch++ two).
        eigenspace: Eigenpairs V, Λ at hand. Their part V Λ Vᵀ is traced exactly, the probes see
            A − V Λ Vᵀ only, which for exact pairs is (I − V Vᵀ) A (I − V Vᵀ). No product
            is spent on it. Unbiased also if the pairs are inexact, or of another matrix.
        num_probes: Number of probes; with ``rtol``, the number before the first look, at least 20.
        rtol: Add probes until the standard error is at most rtol · |value|. So as not to stop
            early, the standard error is then its own upper 95 % confidence limit, and looks are
            few, at geometrically growing numbers of probes. Where n products are fewer than the
            probes still to come, or the sketch would be as large as A, they give the exact trace.
        max_products: Budget of products with A when ``rtol`` is given.
        seed: Seed of the probes, drawn on the CPU; the global random state is not used.
        progress: A bar, or a function called with a ``Step``.

    Returns:
        The estimate. On an exhausted budget ``converged`` is False and a ``ConvergenceWarning``
        names the error reached.

    Raises:
        ValueError: If an option is not known or cannot be met, if the eigenspace has another
            length, or if Hutch++ or XTrace would cost as much as the exact trace.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import torch
        >>> trace(Operator.from_matrix(torch.diag(torch.tensor([1.0, 2.0])))).value
        3.0

    References:
        Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
        Meyer, Musco, Musco, Woodruff (2021), Hutch++: optimal stochastic trace estimation.
        Epperly, Tropp, Webber (2024), XTrace: making the most of every sample in stochastic
        trace estimation.
    """
    _require_options(operator, method, num_probes, rtol, max_products)
    rest, V, values = deflated(operator, eigenspace)
    captured = float(values.to(torch.float64).cpu() @ column_dots(V, V))
    price = price_of(method, num_probes)
    with report_progress(progress, "trace") as update:
        A = CountedProducts(rest, update, price)
        estimator = ESTIMATORS[method](A, SignProbes(operator, seed), growing=rtol is not None)
        probes = num_probes
        estimator.grow(probes)
        samples, error = estimator.outcome()
        converged = rtol is None
        while rtol is not None:
            goal = rtol * abs(captured + float(samples.mean()))
            error *= _upper_factor(len(samples))
            converged = error <= goal
            more = _affordable(operator, method, math.ceil(GROWTH * probes), max_products)
            if converged:
                break
            wanted = probes * (error / goal) ** 2 if goal > 0 else math.inf
            endless = more <= probes or (
                method == "hutchinson" and wanted - probes >= operator.size
            )
            if endless and A.spent + operator.size <= max_products:
                A.expect(A.spent + operator.size, error=error, goal=goal)
                samples = exact_diagonal(A).sum().cpu().expand(len(samples))
                error, converged = 0.0, True
                break
            if more <= probes:
                break
            within = _affordable(operator, method, int(min(wanted, max_products)), max_products)
            A.expect(price_of(method, max(more, within)), error=error, goal=goal)
            estimator.grow(more - probes)
            probes = more
            samples, error = estimator.outcome()
    if not converged:
        warnings.warn(
            f"The trace has a standard error of {error:.2e} after {A.spent} products, the goal "
            f"was {goal:.2e}. Raise "
            "`max_products` or `rtol`, or pass the leading `eigenspace`.",
            ConvergenceWarning,
            stacklevel=2,
        )
    samples = samples + captured
    return TraceEstimate(float(samples.mean()), error, samples, A.spent, converged)


def _affordable(operator: Operator, method: TraceMethod, wanted: int, max_products: int) -> int:
    """Most probes up to ``wanted`` within the budget, and worth it."""
    most = max_products if method == "hutchinson" else min(max_products, operator.size - 1)
    return min(
        wanted, {"hutchinson": most, "hutch++": (2 * most + 1) // 3, "xtrace": most // 2}[method]
    )


def _upper_factor(count: int) -> float:
    """Upper 95 % confidence limit of a standard deviation over its estimate, normal samples."""
    return math.sqrt((count - 1) / float(chdtri(count - 1, 0.95)))


def _require_options(
    operator: Operator,
    method: TraceMethod,
    num_probes: int,
    rtol: float | None,
    max_products: int,
) -> None:
    if method not in ESTIMATORS:
        raise ValueError(f'`method` must be "hutchinson", "hutch++" or "xtrace", got "{method}".')
    if num_probes < FEWEST[method]:
        raise ValueError(
            f"`num_probes` must be at least {FEWEST[method]} to give a standard error, got "
            f"{num_probes}."
        )
    price = price_of(method, num_probes)
    if method != "hutchinson" and price >= operator.size:
        raise ValueError(
            f"`num_probes` must cost fewer than {operator.size} products, which give the exact "
            f"trace; {num_probes} cost {price}. Choose fewer probes, or sum "
            '`diagonal(operator, method="exact").value`.'
        )
    if rtol is None:
        return
    if not rtol > 0:
        raise ValueError(f"`rtol` must be positive, got {rtol}.")
    if num_probes < FEWEST_TO_STOP:
        raise ValueError(
            f"`num_probes` must be at least {FEWEST_TO_STOP} with `rtol`, got {num_probes}: the "
            "spread of fewer samples is too uncertain to stop on."
        )
    if max_products < price:
        raise ValueError(
            f"`max_products` must be at least {price}, the price of `num_probes`={num_probes}, "
            f"got {max_products}."
        )
