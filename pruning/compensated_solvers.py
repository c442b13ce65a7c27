"""The two ways to make one stage of compensated pruning: by products, or by an eigenspace."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from hessian import (
    Eigenspace,
    Objective,
    block_operator,
    gauss_newton_operator,
    leading_eigenspace,
)
from pruning.calibration import warn_of_few
from pruning.dense_distance import DenseDistance
from pruning.eigenspace_compensation import Choose, remove_compensated
from pruning.krylov_compensation import compensating_step
from pruning.preconditioners import (
    Preconditioning,
    diagonal_preconditioner,
    row_preconditioner,
)
from pruning.saliency import (
    KroneckerFactors,
    kronecker_factors,
    kronecker_saliency,
)
from pruning.surgical_ranking import surgical_ranking

Saliency: TypeAlias = Literal["surgery", "kronecker", "diagonal", "magnitude"]

Estimate: TypeAlias = Callable[[Tensor, Tensor], Eigenspace]
"""Called with w and the mask of weights alive, both of shape [d]: an eigenspace of shape [d, k]."""


@dataclass(frozen=True)
class Stage:
    """What one stage did, and what it says about itself."""

    sparsity: float
    predicted_change: float
    """Change of the loss by the stage's quadratic model, at the move that was made."""
    loss_before: float
    """NaN where the curvature knows no loss."""
    loss: float
    tau: float
    """Damping used, in units of the Hessian."""
    length: float
    """Share of the last compensating move that was taken; 0 if none lowered the loss."""
    residual: float
    """Krylov: ‖b − A x‖₂ / ‖b‖₂ of the last system. Eigenspace: its largest residual."""
    num_products: int
    num_losses: int
    """Forward passes for line searches."""
    converged: bool
    """Whether the linear solver or the eigensolver met its tolerance."""


@dataclass(frozen=True)
class KrylovSolver:
    """Compensation by conjugate gradients on the Gauss-Newton matrix; see ``compensating_step``.

    Args:
        products: Budget of products a stage, over all its steps.
        steps: Gauss-Newton steps a stage: the first removes the weights, further ones start from
            where it ended. More steps follow a curved loss better, with fewer products each.
        damping: τ as a share of the mean of diag G over the weights alive at the start. A larger
            one moves the weights less, and fits few calibration samples less closely.
        saliency: What goes at a stage: ``"surgery"``, the first of a ``surgical_ranking``;
            ``"kronecker"``, the least ``kronecker_saliency``; ``"diagonal"``, the least w² diag G;
            ``"magnitude"``, the smallest.
        saliency_damping: δ as a share of the mean of diag A, for the first two.
        num_draws: Draws of random targets for the saliencies of a stage.
        tol: Stop a system at this relative residual.
        progress: Stop it when an iteration lowers its value by less than this share.
        preconditioner: ``"none"``, ``"diagonal"``, or ``"rows"``: a block for every output, from
            the moments that the saliencies rest on; see ``row_preconditioner``.
        memory_budget: Bytes for kept graphs, as for ``gauss_newton_operator``.
        seed: Seed of the draws.

    Raises:
        ValueError: If a number is out of range.
    """

    products: int = 50
    steps: int = 1
    damping: float = 0.3
    saliency: Saliency = "surgery"
    saliency_damping: float = 0.01
    num_draws: int = 1
    tol: float = 1e-4
    progress: float = 5e-4
    preconditioner: Preconditioning = "none"
    memory_budget: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preconditioner not in get_args(Preconditioning):
            raise ValueError(
                f"`preconditioner` must be one of {get_args(Preconditioning)}, got "
                f"{self.preconditioner!r}."
            )
        if self.saliency not in get_args(Saliency):
            raise ValueError(
                f"`saliency` must be one of {get_args(Saliency)}, got {self.saliency!r}."
            )
        if self.steps < 1 or self.products < 2 * self.steps:
            raise ValueError(
                "`steps` must be at least 1 and `products` at least 2 a step, got "
                f"products={self.products} and steps={self.steps}."
            )
        _require_positive(damping=self.damping, saliency_damping=self.saliency_damping)

    def begin(self, w: Tensor, curvature: Any) -> "_KrylovStages":
        """Check the curvature, and return what makes the stages one after the other."""
        if not isinstance(curvature, DenseDistance):
            raise TypeError(
                '`curvature` must be a DenseDistance for `solver="krylov"`, got '
                f"{type(curvature).__name__}. Build one: `DenseDistance(model, inputs)`."
            )
        return _KrylovStages(self, curvature)


@dataclass(frozen=True)
class EigenspaceSolver:
    """Compensation on the k sharpest directions of the alive weights; see ``remove_compensated``.

    Args:
        k: Eigenpairs, at most as many as weights stay in the end. Memory: k vectors for them and
            about as many again for the eigensolver.
        damping: τ as a share of the lowest eigenvalue that is used and not zero but for rounding.
        batch: Share of the alive weights that goes before saliencies are computed anew.
        tol: Relative tolerance of the eigenpairs.
        max_products: Budget of products a stage.
        seed: Seed of the eigensolver's first vector.

    Raises:
        ValueError: If a number is out of range.
    """

    k: int = 100
    damping: float = 0.1
    batch: float = 0.02
    tol: float = 0.01
    max_products: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"`k` must be at least 1, got {self.k}.")
        _require_positive(damping=self.damping, batch=self.batch, tol=self.tol)

    def begin(self, w: Tensor, curvature: Any) -> "_EigenspaceStages":
        """Check the curvature, and return what makes the stages one after the other."""
        if isinstance(curvature, Objective):
            return _EigenspaceStages(self, _Sharpest(self, curvature), curvature)
        if not callable(curvature):
            raise TypeError(
                "`curvature` must be an Objective or a function of (w, alive) for "
                f'`solver="eigenspace"`, got {type(curvature).__name__}. For one eigenspace for '
                "all stages pass `lambda w, alive: eigenspace`."
            )
        return _EigenspaceStages(self, curvature, None)


class _KrylovStages:
    def __init__(self, options: KrylovSolver, distance: DenseDistance) -> None:
        self._options, self._distance = options, distance
        self._tau: float | None = None

    def next(
        self, w: Tensor, alive: Tensor, choose: Choose, count: int
    ) -> tuple[Tensor, Tensor, Stage]:
        o, distance = self._options, self._distance
        factors = kronecker_factors(distance, w, num_draws=o.num_draws, seed=o.seed)
        if self._tau is None:
            sizes = {f.weight: (f.num_rows, len(f.inputs)) for f in factors.layers}
            warn_of_few(sizes, "saliency_damping", stacklevel=3)
            mean = float(factors.diagonal[alive].double().mean())
            # Outputs that no weight moves leave G = 0, and any τ gives x = 0.
            self._tau = o.damping * mean if mean > 0 else 1.0
        if count > 0:
            alive = alive & choose(self._cost(w, factors), w, count)
        preconditioner = None
        if o.preconditioner == "diagonal":
            preconditioner = diagonal_preconditioner(factors, self._tau)
        elif o.preconditioner == "rows":
            preconditioner = row_preconditioner(factors, distance, alive, self._tau)
        steps = []
        for _ in range(o.steps):
            step = compensating_step(
                distance,
                w,
                alive,
                tau=self._tau,
                tol=o.tol,
                progress=o.progress,
                max_products=o.products // o.steps,
                preconditioner=preconditioner,
                memory_budget=o.memory_budget,
            )
            w = step.weights
            steps.append(step)
            if step.length == 0.0:
                break
        last = steps[-1]
        stage = Stage(
            1.0 - int(alive.sum()) / len(w),
            sum(step.predicted_change for step in steps),
            steps[0].loss_before,
            last.loss,
            self._tau,
            last.length,
            last.solution.residual,
            sum(step.num_products for step in steps),
            sum(step.num_losses for step in steps),
            all(step.solution.converged for step in steps),
        )
        return w, alive, stage

    def _cost(self, w: Tensor, factors: KroneckerFactors) -> Tensor:
        o = self._options
        if o.saliency == "magnitude":
            return w.abs()
        if o.saliency == "diagonal":
            return w.square() * factors.diagonal
        rank = surgical_ranking if o.saliency == "surgery" else kronecker_saliency
        return rank(w, factors, self._distance, damping=o.saliency_damping)


class _EigenspaceStages:
    def __init__(
        self, options: EigenspaceSolver, estimate: Estimate, objective: Objective | None
    ) -> None:
        self._options, self._estimate, self._objective = options, estimate, objective

    def next(
        self, w: Tensor, alive: Tensor, choose: Choose, count: int
    ) -> tuple[Tensor, Tensor, Stage]:
        o = self._options
        space = self._estimate(w, alive)
        if space.vectors.shape[0] != len(w):
            raise ValueError(
                f"`curvature` must give eigenvectors of {len(w)} entries, zero outside `alive`, "
                f"got {space.vectors.shape[0]}."
            )
        # Below this an eigenvalue is zero but for rounding, whatever its sign.
        rounding = int(alive.sum()) * torch.finfo(w.dtype).eps * float(space.values.abs().max())
        positive = space.values[space.values > rounding]
        tau = o.damping * float(positive.min()) if len(positive) else 1.0
        before = self._loss(w)
        removal = remove_compensated(
            w, alive, space, tau=tau, count=count, batch=o.batch, choose=choose
        )
        stage = Stage(
            1.0 - int(removal.alive.sum()) / len(w),
            removal.predicted_change,
            before,
            self._loss(removal.weights),
            tau,
            1.0,
            float(space.residuals.max()),
            space.num_products,
            0,
            space.converged,
        )
        return removal.weights, removal.alive, stage

    def _loss(self, w: Tensor) -> float:
        return math.nan if self._objective is None else self._objective.loss(w)


class _Sharpest:
    """The leading eigenspace of the Gauss-Newton matrix, restricted to the weights alive."""

    def __init__(self, options: EigenspaceSolver, objective: Objective) -> None:
        self._options, self._objective = options, objective
        self._last: Tensor | None = None

    def __call__(self, w: Tensor, alive: Tensor) -> Eigenspace:
        o = self._options
        places = alive.nonzero()[:, 0]
        block = block_operator(gauss_newton_operator(self._objective, w), places)
        space = leading_eigenspace(
            block,
            k=min(o.k, block.size),
            tol=o.tol,
            max_products=o.max_products,
            multiple=False,
            measure=False,
            seed=o.seed,
            start=None if self._last is None else self._last[places],
        )
        vectors = w.new_zeros(space.vectors.shape[1], len(w))
        vectors[:, places] = space.vectors.T
        self._last = vectors.sum(dim=0)
        return replace(space, vectors=vectors.T)


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {value}.")
