"""Leading eigenpairs by thick-restart Lanczos, certified by products made after the iteration."""

import math
import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hessian.checkpoint import Checkpoint, fingerprint
from hessian.distributed import Ranks
from hessian.errors import ConvergenceWarning
from hessian.exact_refinement import ExactRefinement
from hessian.iteration_state import Task
from hessian.lanczos import Shards
from hessian.memory import basis_size, free_memory
from hessian.missed_eigenvalues import RISK
from hessian.operators import Operator
from hessian.progress import ProgressOption, report_progress
from hessian.subspace import Eigenspace, Which
from hessian.thick_restart import ThickRestart


def leading_eigenspace(
    operator: Operator,
    *,
    k: int,
    exact: Operator | None = None,
    tol: float = 1e-6,
    max_products: int = 1000,
    max_basis: int | None = None,
    which: Which = "magnitude",
    multiple: bool = True,
    measure: bool = True,
    seed: int = 0,
    start: Eigenspace | Tensor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 5,
    progress: ProgressOption = False,
    shards: Shards | None = None,
    backend: Literal["lanczos", "pyhessian"] = "lanczos",
) -> Eigenspace:
    """Find the k leading eigenpairs of a symmetric matrix by thick-restart Lanczos.

    Every new vector is orthogonalised to the whole basis, and once more where that took much of it
    away, so no eigenvalue is a ghost of another.
    The iteration stops on its own residual estimates; the residuals returned are measured with
    k further products, unless ``measure=False``.

    A Krylov space holds one copy of a multiple eigenvalue, and nothing that its start does not
    see. So once the pairs have converged, ``multiple=True`` goes on from a random direction in
    the complement, and stops when an eigenvalue missed so far that belongs to the k leading ones,
    by more than tol · max |λ|, would have been seen but for a chance of 1 in 1000. What it finds
    is included, and the search begins anew. The chance is over the random direction and holds
    for exact copies in exact arithmetic; it is returned as ``missed``. The price is a few products
    where the spectrum has fallen behind the k leading ones (some 5 to 10 for the Hessian of a
    network), more where many eigenvalues crowd there.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        k: Number of pairs, 1 ≤ k ≤ n.
        exact: The matrix that ``operator`` stands for, where its products are cheaper and less
            precise, such as those of ``hessian_operator(..., precision="bfloat16")``. The pairs
            are found with ``operator``; then k products with ``exact`` give the best pairs in
            their space, with residuals that are true of ``exact``, and every pair that misses
            ``tol`` costs one more a round until it is met. See the guide for when it pays. The
            gap and ``missed`` are what the search with ``operator`` says.
        tol: Stop once ‖A v − λ v‖₂ ≤ tol · max |λ| for all pairs.
        max_products: Budget of products, with A and with ``exact`` together.
        max_basis: Most basis vectors of length n that are held, at least k + 6 (or n). When they
            are used up the basis is compressed to Ritz vectors, which keeps the answer and costs
            products. Default: as many as 256 MiB hold up to 1000, and no fewer than
            max(2 k + 20, 100); fewer only if they do not fit into 70 % of the free memory, and
            with a checkpoint as many as it was begun with. Beside them come k vectors for the
            result (twice as many if the operator has ``columns``) and about five to work with.
        which: Leading by ``"magnitude"`` (the sharp directions, whatever their sign), or the
            ``"largest"`` or ``"smallest"`` on the real line, or ``"both"`` ends: from the
            largest and the smallest in turn, so ⌈k/2⌉ of the largest and ⌊k/2⌋ of the smallest.
        multiple: Whether to look for missed copies. Without it, an eigenvalue of multiplicity m
            is found m times only if the Krylov space breaks down, as for a multiple of the
            identity, or rounding brings the copies up.
        measure: Whether to make the k products that measure the residuals. Without them the
            values are Ritz values and the residuals what the iteration concludes from its own
            products (a bound on that after it left a direction, as the search for copies does).
            That is true to rounding for a matrix that is linear, symmetric and the same in every
            product, and nothing is left that would notice if it is not. In float32 the
            estimates go on falling below what rounding lets the residuals reach.
        seed: Seed of the random directions, drawn on the CPU.
        start: Eigenspace of a similar matrix, such as the one some training steps ago, or a
            vector of shape [n]. The nearer, the fewer products. Default: a random vector.
        checkpoint: Folder that keeps the state of the iteration. If the process is killed, the
            same call goes on from there, after one product (not counted) that compares the
            operator, and gives the same bits. ``max_products`` and ``tol`` may be raised to go
            on after an exhausted budget, where no product is repeated, and ``measure`` may be
            passed later to certify what was found. The folder stays after success, so that a
            repeated call costs little; remove it once the result is safe. It takes as much disk
            as the basis takes memory. With ``shards``, every rank keeps its rows in a folder of
            its own inside, and as many ranks must go on; products with ``exact`` are not kept.
        checkpoint_every: Products between two writes.
        progress: True for a bar, or a function of a ``Step``; see ``hessian.progress``.
        shards: Rows of the basis spread over ranks, see ``hessian.distributed``; every rank
            makes this call, and gets full vectors.
        backend: ``"pyhessian"`` runs PyHessian's power iteration on the same products; it leads
            by magnitude only, knows no gap, and its residuals are always measured. It takes
            ``k``, ``tol``, ``max_products`` and ``seed``.

    Returns:
        The eigenspace, leading pair first. On an exhausted budget ``converged`` is False and a
        ``ConvergenceWarning`` names the residual reached; the warning comes, too, if the budget
        ended the search for missed copies.

    Raises:
        ValueError: If k, tol, max_products, max_basis or start cannot be met, an option is not
            known, or the checkpoint is damaged or belongs to another problem.
        TypeError: If ``start`` is neither an eigenspace nor a tensor.
        MemoryError: If the basis and the result do not fit into what is free, before the first
            product; the message says which ``max_basis`` or k would.
        NonFiniteError: If a product is not finite.
        NonDeterministicError: If the operator changes between products.

    Example:
        >>> import torch
        >>> A = Operator.from_matrix(torch.diag(torch.tensor([1.0, -3.0, 0.5])))
        >>> leading_eigenspace(A, k=2).values.round(decimals=4).tolist()
        [-3.0, 1.0]

    References:
        Parlett (1998), The Symmetric Eigenvalue Problem, chapter 13.
        Wu & Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems.
    """
    n = operator.size
    if not 1 <= k <= n:
        raise ValueError(f"`k` must be between 1 and {n}, the size of the operator, got {k}.")
    if not tol > 0:
        raise ValueError(f"`tol` must be positive, got {tol}.")
    fewest = 2 * k if measure else k
    if max_products < fewest:
        also = f" and {k} to measure them" if measure else ""
        raise ValueError(
            f"`max_products` must be at least {fewest}: {k} to span {k} pairs{also}, got "
            f"{max_products}."
        )
    if which not in ("magnitude", "largest", "smallest", "both"):
        raise ValueError(
            f'`which` must be "magnitude", "largest", "smallest" or "both", got "{which}".'
        )
    if checkpoint_every < 1:
        raise ValueError(f"`checkpoint_every` must be at least 1, got {checkpoint_every}.")
    if backend == "pyhessian":
        from hessian.pyhessian_backend import power_iteration

        if which != "magnitude":
            raise ValueError(f'`which` must be "magnitude" for PyHessian, got "{which}".')
        if start is not None or checkpoint is not None or shards is not None:
            raise ValueError(
                "`start`, `checkpoint` and `shards` must be left out for PyHessian, which knows "
                'nothing like them. Use `backend="lanczos"`.'
            )
        if exact is not None:
            raise ValueError(
                "`exact` must be left out for PyHessian, which measures with the same products."
            )
        if not measure:
            raise ValueError(
                "`measure` must be True for PyHessian, which has no residuals of its own, got "
                "False."
            )
        return power_iteration(operator, k=k, tol=tol, max_products=max_products, seed=seed)
    if backend != "lanczos":
        raise ValueError(f'`backend` must be "lanczos" or "pyhessian", got "{backend}".')
    if exact is not None:
        _require_alike(exact, operator, measure)
    direction = None if start is None else _direction(start, operator)
    local_size, free = (n, None) if shards is None else _smallest_rank(operator, shards)
    folder = None
    if checkpoint is not None:
        problem = {
            "n": n,
            "dtype": str(operator.dtype),
            "k": k,
            "which": which,
            "multiple": multiple,
            "seed": seed,
            "start": fingerprint(direction),
        }
        ranks = Ranks(None if shards is None else shards.group, operator.device)
        folder = Checkpoint(Path(checkpoint), problem, checkpoint_every, ranks)
        max_basis = folder.recorded_basis() if max_basis is None else max_basis
    basis = basis_size(
        max_basis,
        k=k,
        size=n,
        local_size=local_size,
        dtype=operator.dtype,
        device=operator.device,
        columns=operator.columns is not None,
        free=free,
    )
    if folder is not None:
        folder.problem["max_basis"] = basis
    reserve = 0 if exact is None else k
    plain = exact is None and measure
    task = Task(k, tol, max_products - reserve, basis, which, seed, multiple, plain)
    with report_progress(progress, f"{k} eigenpairs") as update:
        iteration = ThickRestart(operator, task, direction, shards, folder, update)
        space, state = iteration.run(), iteration.state
        stalled = state.stalled
        if exact is not None:
            del iteration  # and its basis, whose memory the refinement takes
            room = max(basis // 2, 2 * k)
            refinement = ExactRefinement(exact, space, tol, max_products, room, shards, update)
            space = refinement.run()
            stalled = refinement.stalled
    if not space.converged:
        _warn_of_residuals(space, tol, operator, stalled=stalled, room=basis < n)
    elif multiple and state.tested_merit is None:
        chance = "unknown" if math.isnan(space.missed) else f"up to {space.missed:.1e}"
        warnings.warn(
            f"The {k} pairs have converged, but the {max_products} products ended before the "
            f"search for further copies of multiple eigenvalues: the chance that one was missed "
            f"is {chance}, the goal {RISK:.0e}. Raise `max_products`, or pass `multiple=False`.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return space


def _warn_of_residuals(
    space: Eigenspace, tol: float, operator: Operator, *, stalled: bool, room: bool
) -> None:
    """Say how far the pairs came, and what would bring them further."""
    knobs = [] if stalled else ["`max_products`"]
    knobs += ["`max_basis`"] if knobs and room and not space.num_exact else []
    advice = "Raise " + ", ".join([*knobs, "`tol`"])
    if operator.dtype != torch.float64:
        advice += ", or work in float64"
    if space.num_exact and not stalled:
        advice += ", or pass the exact operator alone, if the other one is too far from it"
    if stalled:
        advice = "Rounding lets it fall no further. " + advice
    exactly = f", {space.num_exact} of them exact" if space.num_exact else ""
    warnings.warn(
        f"Lanczos reached a largest residual of {float(space.residuals.max()):.2e} after "
        f"{space.num_products} products{exactly}, for eigenvalues up to "
        f"{float(space.values.abs().max()):.2e} and tol={tol:.1e}. {advice}.",
        ConvergenceWarning,
        stacklevel=3,
    )


def _require_alike(exact: Operator, operator: Operator, measure: bool) -> None:
    ours, theirs = (f"{A.size} x {A.size}, {A.dtype} on {A.device}" for A in (operator, exact))
    if ours != theirs:
        raise ValueError(
            f"`exact` must have the size, type and device of `operator`, {ours}, got {theirs}."
        )
    if not measure:
        raise ValueError("`measure` must be True with `exact`, which is there to measure.")


def _smallest_rank(operator: Operator, shards: Shards) -> tuple[int, int]:
    """Return the most rows and the fewest free bytes of any rank, so that all choose alike."""
    empty = torch.zeros(operator.size, dtype=torch.float32, device=operator.device)
    part = shards.local(empty)
    rows = shards.full(torch.full_like(part, len(part))).max()
    mebibytes = free_memory(operator.device) >> 20
    return int(rows), int(shards.full(torch.full_like(part, mebibytes)).min()) << 20


def _direction(start: Eigenspace | Tensor, operator: Operator) -> Tensor:
    """Turn an eigenspace or a vector into the first direction."""
    if isinstance(start, Eigenspace):
        v = start.vectors.sum(dim=1)
    elif isinstance(start, Tensor):
        v = start
    else:
        raise TypeError(
            f"`start` must be an Eigenspace or a tensor of shape [{operator.size}], got "
            f"{type(start).__name__}."
        )
    if v.shape != (operator.size,):
        raise ValueError(
            f"`start` must belong to an operator of size {operator.size}, got vectors of shape "
            f"{list(v.shape)}."
        )
    v = v.detach().to(dtype=operator.dtype, device=operator.device)
    if not torch.isfinite(v).all() or not float(v.abs().max()) > 0:
        raise ValueError("`start` must be finite and not zero, got a vector that is not.")
    return v
