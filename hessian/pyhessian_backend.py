"""PyHessian's power iteration, run on the products of any operator, for comparison."""

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hessian.errors import ConvergenceWarning
from hessian.operators import Operator
from hessian.subspace import Eigenspace, measured_eigenspace


def power_iteration(
    operator: Operator, *, k: int, tol: float, max_products: int, seed: int
) -> Eigenspace:
    """Find k eigenpairs, leading by magnitude, with PyHessian's deflated power iteration.

    PyHessian stops on the change of the eigenvalue between two iterations, relative to it, which
    says little about the vector: the residuals, measured here with k more products, do. The
    global random state is put back.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        k: Number of pairs.
        tol: PyHessian's tolerance on the change; ``converged`` holds it against the residuals.
        max_products: Budget, shared evenly by the k pairs.
        seed: Seed of PyHessian's starting vectors.

    Returns:
        The eigenspace as PyHessian leaves it, sorted by magnitude; its gap is unknown (NaN).

    References:
        Yao, Gholami, Keutzer, Mahoney (2020), PyHessian. https://github.com/amirgholami/PyHessian
    """
    import pyhessian

    # PyHessian's solver needs a model and data only to make its products. Those are replaced.
    solver: Any = pyhessian.hessian.__new__(pyhessian.hessian)
    solver.params = [torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)]
    solver.model = torch.nn.Module()
    solver.device = operator.device
    solver.full_dataset = True
    spent = 0

    def product(v: list[Tensor]) -> tuple[float, list[Tensor]]:
        nonlocal spent
        spent += 1
        out = operator @ v[0]
        return float(torch.dot(out, v[0])), [out]

    solver.dataloader_hv_product = product
    devices = [operator.device] if operator.device.type == "cuda" else []
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(operator.dtype)
            values, found = solver.eigenvalues(maxIter=max_products // k - 1, tol=tol, top_n=k)
        finally:
            torch.set_default_dtype(default)
    vectors = torch.linalg.qr(torch.stack([v[0] for v in found], dim=1))[0]
    scale = max(abs(float(value)) for value in values)
    space = measured_eigenspace(
        operator, vectors, gap=math.nan, num_products=spent + k, goal=tol * scale
    )
    # Deflation may find a smaller pair first when it stops early.
    order = space.values.abs().argsort(descending=True)
    space = replace(
        space,
        values=space.values[order],
        vectors=space.vectors[:, order],
        residuals=space.residuals[order],
    )
    if not space.converged:
        warnings.warn(
            f"PyHessian's power iteration left a largest residual of "
            f"{float(space.residuals.max()):.2e} after {space.num_products} products.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return space
