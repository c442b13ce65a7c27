"""Lanczos runs from random directions: the quadratures behind densities and traces of functions."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hessian.lanczos import KrylovBasis
from hessian.operators import Operator
from hessian.probes import SignProbes, require_eigenspace
from hessian.progress import Update
from hessian.subspace import Eigenspace


def lanczos_runs(
    operator: Operator,
    *,
    num_probes: int,
    num_steps: int,
    eigenspace: Eigenspace | None,
    seed: int,
    update: Update,
) -> Iterator[KrylovBasis]:
    """Yield the Krylov basis of every probe, one at a time; only one is in memory.

    The probe is a vector of random signs, of which all have the same length. With an eigenspace
    it is a random direction in the complement, and the matrix is (I − V Vᵀ) A (I − V Vᵀ).
    """
    V = None
    products = 0
    if eigenspace is not None:
        require_same_matrix(operator, eigenspace)
        V = eigenspace.vectors.to(device=operator.device, dtype=operator.dtype)
        products = 1
    steps = min(num_steps, operator.size - (0 if V is None else V.shape[1]))
    expected = products + num_probes * steps

    def product(v: Tensor) -> Tensor:
        nonlocal products
        out = operator @ v if V is None else _outside(V, operator @ v)
        products += 1
        update(products, expected=expected)
        return out

    counted = Operator(product, operator.size, operator.dtype, operator.device)
    signs = SignProbes(operator, seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_probes if steps else 0):
        if V is None:
            start = signs.draw(1)[:, 0]
        else:
            draw = torch.randn(
                operator.size, generator=generator, dtype=torch.float64, device="cpu"
            )
            start = _outside(V, draw.to(device=operator.device, dtype=operator.dtype))
        basis = KrylovBasis(counted, start)
        while len(basis) < steps and not basis.exhausted:
            basis.extend()
        yield basis


def require_same_matrix(operator: Operator, space: Eigenspace) -> None:
    """Check with one product that an eigenspace is one of this operator.

    Raises:
        ValueError: If it has another length, or its pairs leave more than they did when measured.
    """
    require_eigenspace(operator, space)
    V = space.vectors.to(device=operator.device, dtype=operator.dtype)
    values = space.values.to(device=operator.device, dtype=torch.float64)
    signs = SignProbes(Operator(lambda v: v, V.shape[1], V.dtype, V.device), 0).draw(1)[:, 0]
    expected = V.to(torch.float64) @ (values * signs.to(torch.float64))
    found = float(((operator @ (V @ signs)).to(torch.float64) - expected).norm())
    # The residual of a signed sum of pairs is at most the sum of their residuals.
    rounding = math.sqrt(torch.finfo(operator.dtype).eps) * float(values.abs().max())
    measured = float(space.residuals.sum())
    if found > 2.0 * measured + rounding:
        raise ValueError(
            f"`eigenspace` must be one of this operator, but its pairs leave a residual of "
            f"{found:.2e} where {measured:.2e} at most was measured. Was it computed at other "
            "weights, or for other data?"
        )


def require_sizes(num_probes: int, num_steps: int) -> None:
    """Check that there are probes for a standard error, and steps for a quadrature.

    Raises:
        ValueError: If not.
    """
    if num_probes < 2:
        raise ValueError(
            f"`num_probes` must be at least 2 to give a standard error, got {num_probes}."
        )
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")


def _outside(V: Tensor, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x - V @ (V.T @ x)
    return x
