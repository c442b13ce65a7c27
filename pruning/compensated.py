"""Pruning in stages, where the weights that stay move to make up for those that go."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hessian import ConvergenceWarning, Objective
from pruning.allocation import Allocation, keep_mask, zeros_by_parameter
from pruning.compensated_solvers import EigenspaceSolver, Estimate, KrylovSolver, Stage
from pruning.dense_distance import DenseDistance
from pruning.pruned import Pruned, wanted_zeros
from pruning.scores import require_weights
from pruning.stages import stage_counts

DEFAULT_STAGES = 12


@dataclass(frozen=True)
class CompensatedPruned(Pruned):
    """Weights after compensated pruning, and how they came about."""

    stages: tuple[Stage, ...]
    predicted_change: float
    """Sum of the stages' predictions of the change of the loss."""
    measured_change: float
    """Loss at the end less loss at the start; NaN where the curvature knows no loss."""
    num_products: int
    num_losses: int
    """Forward passes for line searches."""
    converged: bool
    """Whether there are no notes. Conjugate gradients that used up their budget make none: the
    stage's ``residual`` and ``converged`` tell."""
    notes: tuple[str, ...]
    """What went otherwise than planned."""


def compensated_prune(
    w: Float[Tensor, " d"],
    curvature: Objective | Estimate,
    *,
    sparsity: float,
    solver: Literal["krylov", "eigenspace"] | KrylovSolver | EigenspaceSolver = "krylov",
    stages: int | Sequence[float] = DEFAULT_STAGES,
    allocation: Allocation = "global",
    exclude: Sequence[str] = (),
    on_stage: Callable[[Stage, Tensor], None] | None = None,
) -> CompensatedPruned:
    """Remove weights stage by stage, moving the ones that stay to keep the outputs or the loss.

    All weights in w compete in one ranking, biases and normalisation included, and all count for
    the sparsity. Nothing is written into a model: ``objective.write_(result.weights)`` does that.

    ============== =========================== ===========================================
    ``solver``     ``curvature``               the weights that stay
    ============== =========================== ===========================================
    ``krylov``     a ``DenseDistance``         solve a system with the Gauss-Newton matrix
                                               by conjugate gradients; no labels
    ``eigenspace`` an ``Objective``, or a      keep the removed weights' effect on the k
                   function of (w, alive)      sharpest directions
    ============== =========================== ===========================================

    Args:
        w: Weights before, shape [d]. Zeros stay zero. For a ``DenseDistance``, usually
            ``distance.weights()``.
        curvature: See the table. Evaluated anew at every stage.
        sparsity: Share of zeros wanted, in [0, 1): ⌈sparsity · d⌉ zeros result, exactly.
        solver: A name for its defaults, or a ``KrylovSolver`` or ``EigenspaceSolver``.
        stages: Sparsities on the way, increasing; the last one may be left out. A number n cuts
            the way so that every stage removes the same share of the weights that are left.
        allocation: ``"global"``, ``"uniform"``, or sparsities by glob pattern; as for
            ``keep_mask``. All but the first need an ``Objective`` as curvature.
        exclude: Glob patterns of parameters that stay as many as they are. They may move, and
            count for the sparsity. Needs an ``Objective`` as curvature.
        on_stage: Called after every stage with its evidence and the weights; do not change them.

    Returns:
        The weights, with the evidence of every stage.

    Raises:
        ValueError: If w is not finite or does not fit, the sparsity is out of range or cannot be
            reached with what is excluded or allocated or is below that of w, stages do not
            increase, or a pattern matches nothing.
        TypeError: If the curvature is not what the solver takes.
        NonFiniteError: If a loss or a product is not finite.

    Warns:
        ConvergenceWarning: If a stage's move did not lower the loss and was left out, or an
            eigenspace did not converge; the notes say which.
        CalibrationWarning: If a layer has more inputs than there are calibration rows for it.

    Example:
        >>> import torch
        >>> from pruning import DenseDistance, KrylovSolver
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.1]]))
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9]])  # almost the same input twice
        >>> distance = DenseDistance(model, X, kind="squared")
        >>> solver = KrylovSolver(damping=1e-3)
        >>> w = distance.weights()
        >>> pruned = compensated_prune(w, distance, sparsity=0.5, solver=solver, stages=1)
        >>> pruned.weights.round(decimals=1)  # magnitude pruning leaves 1.0
        tensor([1.1000, 0.0000])

    References:
        Hassibi & Stork (1993), Second order derivatives for network pruning: Optimal Brain
        Surgeon.
        Singh & Alistarh (2020), WoodFisher.
    """
    require_weights(w)
    options = _solver(solver)
    objective = curvature if isinstance(curvature, Objective) else None
    if objective is not None:
        objective.require_vector(w, "w")
    run = options.begin(w, curvature)
    goals = _counts(w, sparsity, stages)
    shares = _Shares(sparsity, objective, allocation, exclude)
    shares.require(w)
    alive = w != 0
    made: list[Stage] = []
    notes: list[str] = []
    for goal in goals:
        gone = len(w) - int(alive.sum())
        w, alive, stage = run.next(w, alive, shares.keep, goal - gone)
        made.append(stage)
        if stage.length == 0.0:
            notes.append(
                f"At sparsity {stage.sparsity:.4f} no move of the weights that stay lowered the "
                "loss, so they were left where they were: raise `damping` or take more stages."
            )
        if not stage.converged and isinstance(options, EigenspaceSolver):
            notes.append(
                f"At sparsity {stage.sparsity:.4f} the eigenspace did not converge (largest "
                f"residual {stage.residual:.3g}): raise `max_products` or `tol`."
            )
        if on_stage is not None:
            on_stage(stage, w)
    for note in notes:
        warnings.warn(note, ConvergenceWarning, stacklevel=2)
    return _result(w, made, notes)


def compensate(
    w: Float[Tensor, " d"], distance: DenseDistance, *, solver: KrylovSolver | None = None
) -> CompensatedPruned:
    """Return weights that another method pruned, moved so that the outputs come near again.

    One stage of ``compensated_prune`` that removes nothing: damped Gauss-Newton steps over all
    weights that are left, where layer-wise methods made each layer answer for itself. The distance
    to the dense network's outputs on the calibration samples never grows. Costs ``solver.products``
    products.

    Args:
        w: Pruned weights, shape [d]. Zeros stay zero, all others move.
        distance: To the dense network's outputs.
        solver: Its saliency is not used. Default: ``KrylovSolver()``.

    Raises:
        ValueError: If w is not finite, does not fit, or holds nothing but zeros.
        TypeError: If the distance is another objective.
        NonFiniteError: If a loss or a product is not finite.

    Warns:
        ConvergenceWarning: If no move lowered the distance.
        CalibrationWarning: If a layer has more inputs than there are calibration rows for it.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.1]]))
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9]])
        >>> distance = DenseDistance(model, X, kind="squared")
        >>> solver = KrylovSolver(damping=1e-3)
        >>> compensate(torch.tensor([1.0, 0.0]), distance, solver=solver).weights.round(decimals=1)
        tensor([1.1000, 0.0000])
    """
    require_weights(w)
    run = (solver or KrylovSolver()).begin(w, distance)
    distance.require_vector(w, "w")
    alive = w != 0
    if not bool(alive.any()):
        raise ValueError("`w` must hold weights that can move, but all are zero.")
    w, _, stage = run.next(w, alive, lambda cost, w, count: alive, 0)
    notes = []
    if stage.length == 0.0:
        notes = ["No move of the weights lowered the distance: raise `damping`."]
        warnings.warn(notes[0], ConvergenceWarning, stacklevel=2)
    return _result(w, [stage], notes)


def _result(w: Tensor, made: Sequence[Stage], notes: Sequence[str]) -> CompensatedPruned:
    mask = w != 0
    return CompensatedPruned(
        w,
        mask,
        1.0 - int(mask.sum()) / len(w),
        math.nan,
        tuple(made),
        sum(stage.predicted_change for stage in made),
        made[-1].loss - made[0].loss_before if made else 0.0,
        sum(stage.num_products for stage in made),
        sum(stage.num_losses for stage in made),
        not notes,
        tuple(notes),
    )


@dataclass(frozen=True)
class _Shares:
    """Which weights stay in the end, and on the way there."""

    sparsity: float
    objective: Objective | None
    allocation: Allocation
    exclude: Sequence[str]

    def require(self, w: Tensor) -> None:
        """See that there are weights enough to go."""
        zeros_by_parameter(
            w,
            sparsity=self.sparsity,
            objective=self.objective,
            allocation=self.allocation,
            exclude=self.exclude,
        )

    def keep(self, cost: Tensor, w: Tensor, count: int) -> Tensor:
        """Return True for the weights that stay when about ``count`` more go."""
        left = wanted_zeros(self.sparsity, len(w)) - int((w == 0).sum())
        return keep_mask(
            cost,
            w,
            sparsity=self.sparsity,
            objective=self.objective,
            allocation=self.allocation,
            exclude=self.exclude,
            progress=min(1.0, count / max(left, 1)),
        )


def _solver(solver: object) -> KrylovSolver | EigenspaceSolver:
    if isinstance(solver, KrylovSolver | EigenspaceSolver):
        return solver
    if solver == "krylov":
        return KrylovSolver()
    if solver == "eigenspace":
        return EigenspaceSolver()
    raise ValueError(
        '`solver` must be "krylov", "eigenspace", a KrylovSolver or an EigenspaceSolver, got '
        f"{solver!r}."
    )


def _counts(w: Tensor, sparsity: float, stages: int | Sequence[float]) -> list[int]:
    """Return the number of zeros after every stage."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"`sparsity` must be in [0, 1), the share of zeros, got {sparsity}.")
    zeros = int((w == 0).sum())
    if wanted_zeros(sparsity, len(w)) < zeros:
        raise ValueError(
            f"`sparsity` must be at least {zeros / len(w):.4f}, the share of zeros in `w` already, "
            f"got {sparsity}. Zeros do not come back."
        )
    return stage_counts(len(w), zeros=zeros, sparsity=sparsity, stages=stages)
