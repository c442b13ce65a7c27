"""The diagonal of a symmetric matrix, from random probes or exactly."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.operators import Operator
from hessian.probes import CountedProducts, SignProbes, deflated, row_blocks
from hessian.progress import ProgressOption, report_progress
from hessian.sketches import (
    RangeBasis,
    leave_one_out_error,
    left_out_directions,
    pair_directions,
)
from hessian.subspace import Eigenspace

DiagonalMethod = Literal["hutchinson", "xdiag", "exact"]


@dataclass(frozen=True)
class DiagonalEstimate:
    """An unbiased estimate of a diagonal with a standard error for every entry."""

    value: Float[Tensor, " n"]
    """A_jj for every j, in float64."""
    standard_error: Float[Tensor, " n"]
    """Standard error of every entry, to be taken with ``num_probes − 1`` degrees of freedom.

    Entries share the probes, so they err together. Zero for the exact diagonal.
    """
    num_probes: int
    num_products: int


def diagonal(
    operator: Operator,
    *,
    method: DiagonalMethod = "hutchinson",
    eigenspace: Eigenspace | None = None,
    num_probes: int = 30,
    max_products: int = 10_000,
    seed: int = 0,
    progress: ProgressOption = False,
) -> DiagonalEstimate:
    """Estimate the diagonal from random sign probes, or take it exactly.

    Hutchinson's variance of entry j for one probe is Σ_{i≠j} A_ij²: entries of large rows are
    hard to tell, however small they are themselves.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        method: ``"hutchinson"`` averages v ∘ A v, one product a probe. ``"xdiag"`` also finds the
            range of A with the same probes, two products each, and three vectors of length n in
            memory for each. ``"exact"`` multiplies all n unit vectors.
        eigenspace: Eigenpairs V, Λ at hand. The diagonal of V Λ Vᵀ is added exactly, the probes
            see A − V Λ Vᵀ only. Unbiased also if the pairs are inexact. Not used if exact.
        num_probes: Number of probes.
        max_products: Most products that ``"exact"`` may cost.
        seed: Seed of the probes, drawn on the CPU; the global random state is not used.
        progress: A bar, or a function called with a ``Step``.

    Returns:
        The diagonal with a standard error for every entry.

    Raises:
        ValueError: If an option is not known, there are fewer than two probes, the eigenspace has
            another length, the exact diagonal costs more than ``max_products``, or XDiag would
            cost as much.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import torch
        >>> diagonal(Operator.from_matrix(torch.diag(torch.tensor([1.0, 2.0])))).value
        tensor([1., 2.], dtype=torch.float64)

    References:
        Bekas, Kokiopoulou, Saad (2007), An estimator for the diagonal of a matrix.
        Epperly, Tropp, Webber (2024), XTrace: making the most of every sample in stochastic
        trace estimation.
    """
    n = operator.size
    if method not in ("hutchinson", "xdiag", "exact"):
        raise ValueError(f'`method` must be "hutchinson", "xdiag" or "exact", got "{method}".')
    if method == "exact":
        if n > max_products:
            raise ValueError(
                f"`max_products` must be at least {n}, the price of the exact diagonal, got "
                f'{max_products}. Raise it, or choose the method "hutchinson" or "xdiag".'
            )
        with report_progress(progress, "diagonal") as update:
            value = exact_diagonal(CountedProducts(operator, update, n))
        return DiagonalEstimate(value, torch.zeros_like(value), 0, n)
    if num_probes < 2:
        raise ValueError(
            f"`num_probes` must be at least 2 to give a standard error, got {num_probes}."
        )
    if method == "xdiag" and 2 * num_probes >= n:
        raise ValueError(
            f"`num_probes` must cost fewer than {n} products, which give the exact diagonal; "
            f'{num_probes} cost {2 * num_probes}. Choose fewer probes, or the method "exact".'
        )
    rest, V, values = deflated(operator, eigenspace)
    captured = V.to(torch.float64).square() @ values.to(torch.float64)
    price = 2 * num_probes if method == "xdiag" else num_probes
    with report_progress(progress, "diagonal") as update:
        A, probes = CountedProducts(rest, update, price), SignProbes(operator, seed)
        estimate = _xdiag if method == "xdiag" else _hutchinson
        value, error = estimate(A, probes, num_probes)
    return DiagonalEstimate(value + captured, error, num_probes, A.spent)


def _hutchinson(A: CountedProducts, probes: SignProbes, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of v ∘ A v, merged chunk by chunk in float64."""
    mean = torch.zeros(A.operator.size, dtype=torch.float64, device=A.operator.device)
    squares = torch.zeros_like(mean)
    seen = 0
    for size in A.chunks(count):
        X = probes.draw(size)
        samples = X.to(torch.float64) * (A @ X).to(torch.float64)
        chunk_mean = samples.mean(dim=1)
        off = chunk_mean - mean
        squares += (samples - chunk_mean[:, None]).square().sum(dim=1)
        squares += off.square() * (seen * size / (seen + size))
        mean += off * (size / (seen + size))
        seen += size
    return mean, (squares / (count - 1) / count).sqrt()


def _xdiag(A: CountedProducts, probes: SignProbes, count: int) -> tuple[Tensor, Tensor]:
    X = probes.draw(count)
    basis = RangeBasis(X)
    Q = basis.add(A @ X)
    Z = A @ Q
    S = left_out_directions(basis.R)
    g, c = (matrix.to(X.device) for matrix in pair_directions(S))
    reach = (S * basis.R).sum(dim=0).to(X.device)
    S = S.to(X.device)
    value, error = (torch.empty(len(X), dtype=torch.float64, device=X.device) for _ in range(2))
    for rows in row_blocks(len(X), 8 * count):
        Qr, Zr, Xr = (M[rows].to(torch.float64) for M in (Q, Z, X))
        U, AU = Qr @ S, Zr @ S
        known = (Qr * Zr).sum(dim=1, keepdim=True)
        samples = known - U * AU + Xr * U * reach
        without = torch.empty_like(samples)
        for j in range(count):
            # What also goes when probe j leaves after probe i, for all i at once.
            b = (U[:, j, None] - g[j] * U) / c[j]
            Ab = (AU[:, j, None] - g[j] * AU) / c[j]
            pairs = samples - b * Ab - Xr * b * (g[j] * reach / c[j])
            pairs[:, j] = 0.0
            without[:, j] = pairs.sum(dim=1) / (count - 1)
        value[rows] = samples.mean(dim=1)
        error[rows] = leave_one_out_error(samples.T, without.T)
    return value, error


def exact_diagonal(A: CountedProducts) -> Float[Tensor, " n"]:
    """Return the diagonal in float64 from n products with unit vectors, in chunks."""
    op = A.operator
    value = torch.empty(op.size, dtype=torch.float64, device=op.device)
    start = 0
    for size in A.chunks(op.size):
        E = torch.zeros((op.size, size), dtype=op.dtype, device=op.device)
        E[start : start + size].fill_diagonal_(1.0)
        value[start : start + size] = (A @ E)[start : start + size].diag().to(torch.float64)
        start += size
    return value
