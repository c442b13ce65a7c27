"""The libraries of the peer benchmark: how each makes a product, and how each finds eigenpairs.

Peers are imported only where they are used, so that a process holds one of them at a time.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peer_problems import Problem, plain_product
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from hessian import (
    Objective,
    Operator,
    gauss_newton_operator,
    hessian_operator,
    leading_eigenspace,
)

K, GOAL = 10, 1e-3
Product = Callable[[Tensor], Tensor]
"""Maps v of shape [d] to H v; ours map [d, k], too."""


@dataclass(frozen=True)
class Library:
    """A way to make products."""

    title: str
    build: Callable[[Problem, int, int], Product]
    """From the problem, the batch size and a memory budget in bytes to the product."""
    one_batch: bool = False
    """Whether it works on all data as a single batch."""


def objective(problem: Problem, batch_size: int) -> Objective:
    """Return our view of the problem."""
    data = problem.inputs, problem.labels
    return Objective(problem.model, problem.criterion, data, batch_size=batch_size)


def ours_kept(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build ours with the graph of the gradient kept between products."""
    return hessian_operator(objective(problem, batch_size), memory_budget=budget).__matmul__


def ours_anew(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build ours with nothing kept."""
    return hessian_operator(objective(problem, batch_size), memory_budget=0).__matmul__


def ours_forward(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build ours by forward over reverse, which keeps nothing either."""
    return hessian_operator(objective(problem, batch_size), method="forward").__matmul__


def gauss_newton_kept(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build our generalised Gauss-Newton matrix with its graphs kept."""
    return gauss_newton_operator(objective(problem, batch_size), memory_budget=budget).__matmul__


def gauss_newton_anew(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build our generalised Gauss-Newton matrix with nothing kept."""
    return gauss_newton_operator(objective(problem, batch_size), memory_budget=0).__matmul__


def plain(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build reverse over reverse in plain torch."""
    return plain_product(problem, batch_size)


def pyhessian_loader(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build PyHessian on a list of batches, which is faster than a ``DataLoader``."""
    import pyhessian

    peer: Any = pyhessian.hessian(
        problem.model,
        problem.criterion,
        dataloader=problem.batches(batch_size),
        cuda=problem.inputs.is_cuda,
    )
    return lambda v: _flat(peer.dataloader_hv_product(problem.split(v))[1])


def pyhessian_kept(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build PyHessian on one batch of all data, where it keeps the graph of the gradient."""
    import pyhessian
    from pyhessian.utils import hessian_vector_product

    data = problem.inputs, problem.labels
    peer: Any = pyhessian.hessian(
        problem.model, problem.criterion, data=data, cuda=problem.inputs.is_cuda
    )

    def product(v: Tensor) -> Tensor:
        problem.model.zero_grad()
        return _flat(hessian_vector_product(peer.gradsH, peer.params, problem.split(v)))

    return product


def eigenthings(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build hessian-eigenthings with exact products; it weights batches evenly, so does the cut."""
    from hessian_eigenthings.operators import HessianOperator

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return problem.criterion(model(batch[0]), batch[1])

    return HessianOperator(problem.model, problem.batches(batch_size), loss).matvec


def curvlinops(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build curvlinops without its checks at the start, exported to SciPy as its users do."""
    from curvlinops import HessianLinearOperator

    return _through_scipy(problem, batch_size, HessianLinearOperator)


def curvlinops_gauss_newton(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build the Gauss-Newton matrix of curvlinops."""
    from curvlinops import GGNLinearOperator

    return _through_scipy(problem, batch_size, GGNLinearOperator)


def _through_scipy(problem: Problem, batch_size: int, kind: Any) -> Product:
    operator = kind(
        problem.model,
        problem.criterion,
        problem.parameters,
        problem.batches(batch_size),
        check_deterministic=False,
        num_data=len(problem.inputs),
    ).to_scipy()
    return lambda v: torch.from_numpy(operator @ v.cpu().numpy()).to(v.device)


LIBRARIES = {
    "kept": Library("flatvalley, graph kept", ours_kept),
    "anew": Library("flatvalley, computed anew", ours_anew),
    "forward": Library("flatvalley, forward over reverse", ours_forward),
    "pyhessian-kept": Library("PyHessian, all data one batch", pyhessian_kept, one_batch=True),
    "pyhessian": Library("PyHessian, batches", pyhessian_loader),
    "eigenthings": Library("hessian-eigenthings", eigenthings),
    "curvlinops": Library("curvlinops", curvlinops),
    "plain": Library("plain reverse over reverse", plain),
    "gauss-newton": Library("flatvalley, Gauss-Newton kept", gauss_newton_kept),
    "gauss-newton-anew": Library("flatvalley, Gauss-Newton anew", gauss_newton_anew),
    "curvlinops-ggn": Library("curvlinops, Gauss-Newton", curvlinops_gauss_newton),
}


def start(problem: Problem, seed: int) -> Tensor:
    """Return the starting vector of all Lanczos methods: as hessian-eigenthings draws it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(problem.size, generator=generator).to(problem.inputs.device)


def lanczos(
    product: Product, problem: Problem, seed: int, *, multiple: bool, measure: bool
) -> Tensor:
    """Run ours: the products that measure the residuals are in its count."""
    device = problem.inputs.device
    H = Operator(product, problem.size, torch.float32, device, columns=product)
    first = start(problem, seed)
    return leading_eigenspace(
        H,
        k=K,
        tol=GOAL,
        start=first,
        seed=seed,
        max_products=2000,
        multiple=multiple,
        measure=measure,
    ).vectors


def pyhessian_power(product: Product, problem: Problem, seed: int, *, tol: float) -> Tensor:
    """Run PyHessian's deflated power iteration, its own code from start to end."""
    import pyhessian

    peer: Any = pyhessian.hessian.__new__(pyhessian.hessian)
    peer.params, peer.model, peer.full_dataset = problem.parameters, torch.nn.Module(), True
    peer.device = problem.inputs.device

    def replaced(v: list[Tensor]) -> tuple[float, list[Tensor]]:
        flat = _flat(v)
        out = product(flat)
        return float(torch.dot(out, flat)), problem.split(out)

    peer.dataloader_hv_product = replaced
    torch.manual_seed(seed)
    _, vectors = peer.eigenvalues(maxIter=2000, tol=tol, top_n=K)
    return torch.stack([_flat(v) for v in vectors], dim=1)


def eigenthings_lanczos(product: Product, problem: Problem, seed: int, *, steps: int) -> Tensor:
    """Run the Lanczos iteration of hessian-eigenthings, reorthogonalised as it does by default."""
    from hessian_eigenthings.algorithms import lanczos as run
    from hessian_eigenthings.operators.base import LambdaOperator

    device = problem.inputs.device
    operator = LambdaOperator(product, problem.size, device, torch.float32)
    return run(operator, k=K, max_iter=steps, tol=GOAL, which="LM", seed=seed).eigenvectors.T


def arpack(
    product: Product, problem: Problem, seed: int, *, tol: float, basis: int | None
) -> Tensor:
    """Run ARPACK's implicitly restarted Lanczos through SciPy."""
    n, device = problem.size, problem.inputs.device

    def matvec(x: Any) -> Any:
        return product(torch.from_numpy(x.reshape(-1)).to(device)).cpu().numpy()

    operator = LinearOperator((n, n), matvec=matvec, dtype=np.float32)
    first = start(problem, seed).cpu().numpy()
    vectors = eigsh(operator, k=K, which="LM", tol=tol, ncv=basis, v0=first)[1]
    return torch.from_numpy(np.ascontiguousarray(vectors)).to(device)


Solver = Callable[..., Tensor]

SOLVERS: dict[str, tuple[Solver, list[dict[str, Any]]]] = {
    # No peer measures residuals or looks for copies of multiple eigenvalues; by default we do both.
    "lanczos": (lanczos, [{"multiple": False, "measure": False}]),
    "lanczos-measured": (lanczos, [{"multiple": False, "measure": True}]),
    "lanczos-copies": (lanczos, [{"multiple": True, "measure": True}]),
    "pyhessian": (
        pyhessian_power,
        # Its default is 1e-3.
        [{"tol": m * 10.0**-e} for e in range(3, 9) for m in (1.0, 0.3)],
    ),
    "eigenthings": (eigenthings_lanczos, [{"steps": 50}]),
    "eigenthings-fewest": (eigenthings_lanczos, [{"steps": m} for m in range(12, 51, 2)]),
    "eigsh": (
        arpack,
        # The default basis has 21 vectors.
        [{"tol": t, "basis": b} for t in (0.3, 0.1, 0.03, 0.01, 1e-3) for b in (None, 30, 40, 50)],
    ),
}
"""Each solver with its settings, those that take fewer products first where that is known."""


@contextlib.contextmanager
def counted(product: Product) -> Iterator[tuple[Product, dict[str, Any]]]:
    """Yield a product that counts what it does, and the counts.

    They are the products, those of them that came as columns of matrices, and CPU seconds.
    """
    spent: dict[str, Any] = {"products": 0, "in_columns": 0, "seconds": 0.0}

    def wrapped(v: Tensor) -> Tensor:
        began = time.process_time()
        out = product(v)
        spent["seconds"] += time.process_time() - began
        spent["products"] += v.shape[1] if v.ndim == 2 else 1
        spent["in_columns"] += v.shape[1] if v.ndim == 2 else 0
        return out

    yield wrapped, spent


def _flat(parts: Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])
