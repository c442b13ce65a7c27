"""One layer's Net-Trim program: factorised once, solved for as many discrepancies as wanted."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.errors import ConvergenceWarning
from pruning.layer_trim import DUAL_SHARE, RESOLUTION, LayerTrim, shortfall
from pruning.net_trim_admm import Measures, Splitting
from pruning.net_trim_certificate import certify, lower_bound
from pruning.net_trim_checks import (
    penalties,
    require_goal,
    require_layer,
    require_moments,
    require_ones,
    require_options,
    require_start,
)
from pruning.net_trim_refit import refitted
from pruning.net_trim_setup import Precision, SplitOptions, mean_penalty, splitting_of
from pruning.net_trim_targets import (
    Kind,
    LayerTargets,
    from_moments,
    outputs,
    reduced,
    second_moments,
    target_size,
)

Ball: TypeAlias = Literal["split", "joint"]
Progress: TypeAlias = Callable[[int, int], None]

RHO, RELAXATION, TOL, MAX_ITERATIONS = 1.0, 1.6, 1e-4, 3000

CHECK = 20
"""Iterations between two looks at the residuals."""

ANCHOR = 3 * CHECK
"""Iterations between two anchors, which with float32 products cost as much as one."""


class LayerProgram:
    """Net-Trim's program of one layer, with a factor that serves every ε and every ρ.

    Args:
        W: As for ``net_trim_layer``, like all the others.
        X: Inputs.
        Y: Targets.
        kind: Of the layer.
        bound: Of inactive outputs.
        offset: Added to the products.
        penalty: λ.
        penalise_bias: Whether the last column has a penalty.
        ball: What shares the discrepancy.
        rho: ρ to begin with.
        relaxation: α.
        chunk: Samples at a time.
        precision: Of products.
        gram: Whether to solve a linear layer by Xᵀ X and Xᵀ Y alone, which takes the same number
            of flops as n samples. Default: where there are more samples.

    Raises:
        ValueError: As ``net_trim_layer``.
        TypeError: As ``net_trim_layer``.
        NonFiniteError: As ``net_trim_layer``.
    """

    _options: SplitOptions

    @torch.no_grad()
    def __init__(
        self,
        W: Float[Tensor, "m n"],
        X: Float[Tensor, "p n"],
        Y: Float[Tensor, "p m"] | None = None,
        *,
        kind: Kind = "relu",
        bound: Float[Tensor, "p m"] | None = None,
        offset: Tensor | None = None,
        penalty: Tensor | float | None = None,
        penalise_bias: bool = True,
        ball: Ball = "split",
        rho: float = RHO,
        relaxation: float = RELAXATION,
        chunk: int | None = None,
        precision: Precision = "full",
        gram: bool | None = None,
    ) -> None:
        require_layer(W, X, Y, kind, bound, offset)
        require_options(ball=ball, precision=precision, rho=rho, relaxation=relaxation, chunk=chunk)
        if not penalise_bias:
            require_ones(X)
        if gram and kind != "linear":
            raise ValueError(
                '`gram` must be None or False with kind="relu": which outputs are active is not in '
                "the moments."
            )
        W, X = W.detach(), X.detach()
        given = outputs(W, X, kind, offset) if Y is None else Y.detach()
        targets = LayerTargets(X, given, kind, bound, offset, chunk=chunk)
        G = second_moments(targets)
        if gram or (gram is None and kind == "linear" and len(X) > X.shape[1]):
            targets = reduced(targets, W, G, own=Y is None)
        self._set_up(W, targets, G, penalties(W, penalty, penalise_bias))
        self._options = SplitOptions(ball == "joint", rho, relaxation, precision, chunk)

    @classmethod
    @torch.no_grad()
    def from_gram(
        cls,
        W: Float[Tensor, "m n"],
        gram: Float[Tensor, "n n"],
        cross: Float[Tensor, "m n"] | None = None,
        square: float | None = None,
        *,
        penalty: Tensor | float | None = None,
        penalise_bias: bool = True,
        rho: float = RHO,
        relaxation: float = RELAXATION,
        precision: Precision = "full",
    ) -> "LayerProgram":
        """Return the program of a linear layer, by moments that were summed over its samples.

        Args:
            W: Weights of the layer.
            gram: Xᵀ X, a sum over samples.
            cross: Yᵀ X. Default: that of W's own outputs.
            square: ‖Y‖²_F, needed with ``cross``. How near weights can come to Y is a difference
                of sums as large as this: sum all in float64.
            penalty: As for ``net_trim_layer``, like the rest.
            penalise_bias: Whether the last column has a penalty.
            rho: ρ to begin with.
            relaxation: α.
            precision: Of products.

        Raises:
            ValueError: If shapes do not fit, ``gram`` is not symmetric with eigenvalues of at
                least 0, ``cross`` or ``square`` is missing or ``square`` too small, or as
                ``net_trim_layer``.
            NonFiniteError: If something is not finite.
        """
        require_moments(W, gram, cross, square)
        require_options(ball="split", precision=precision, rho=rho, relaxation=relaxation)
        program = cls.__new__(cls)
        W, G = W.detach(), gram.detach().double()
        program._set_up(
            W, from_moments(W, G, cross, square), G, penalties(W, penalty, penalise_bias)
        )
        program._options = SplitOptions(False, rho, relaxation, precision)
        return program

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, with one for a bias."""
        return self._W.shape[0], self._W.shape[1]

    @property
    def target_norm(self) -> float:
        """‖(Y − S)_Ω‖_F: zero weights have this discrepancy."""
        return self._size.norm

    def _set_up(self, W: Tensor, targets: LayerTargets, G: Tensor, penalty: Tensor) -> None:
        self._W, self._targets, self._penalty, self._G = W, targets, penalty, G
        self._size = target_size(targets)
        self._splitting: Splitting | None = None

    def solve(
        self,
        epsilon: float,
        *,
        refit: bool = False,
        start: Float[Tensor, "m n"] | None = None,
        tol: float = TOL,
        max_iterations: int = MAX_ITERATIONS,
        progress: Progress | None = None,
        stacklevel: int = 2,
    ) -> LayerTrim:
        """Return the sparse weights for one ε, starting where the last solve ended.

        Args:
            epsilon: As for ``net_trim_layer``, like all the others.
            refit: Whether to fit the weights that are left anew.
            start: Weights to start from instead.
            tol: Of the primal residual; the dual one may be ten times as large.
            max_iterations: Budget.
            progress: Called with the iterations done and the budget.
            stacklevel: Of the warning, as seen by the caller.

        Raises:
            ValueError: As ``net_trim_layer``.

        Warns:
            ConvergenceWarning: As ``net_trim_layer``.
        """
        require_goal(epsilon, tol, max_iterations)
        if start is not None:
            require_start(start, self._W)
        trim = self.sparse(
            epsilon,
            before_refit=refit,
            start=start,
            tol=tol,
            max_iterations=max_iterations,
            progress=progress,
        )
        if refit:
            trim = self.refit(trim, tol=tol, max_iterations=max_iterations)
        if not trim.converged:
            warnings.warn(shortfall(trim, tol), ConvergenceWarning, stacklevel=stacklevel)
        return trim

    @torch.no_grad()
    def sparse(
        self,
        epsilon: float,
        *,
        before_refit: bool,
        start: Float[Tensor, "m n"] | None = None,
        tol: float = TOL,
        max_iterations: int = MAX_ITERATIONS,
        progress: Progress | None = None,
    ) -> LayerTrim:
        """Return the sparse weights for one ε, as ``solve`` does, without a warning.

        Args:
            epsilon: As for ``solve``, like all the others.
            before_refit: Whether a refit will see to it that inactive outputs keep to their bounds.
            start: Weights to start from instead.
            tol: Of the primal residual.
            max_iterations: Budget.
            progress: Called with the iterations done and the budget.

        Raises:
            ValueError: If ε is less than what any weights of a linear layer reach.
        """
        began = time.perf_counter()
        squared = epsilon**2 - self._targets.hidden
        if squared < -((RESOLUTION * self._size.norm) ** 2):
            raise ValueError(
                "`epsilon` must be at least the distance of the targets from what the inputs can "
                f"give, {math.sqrt(self._targets.hidden):.6g}, got {epsilon}."
            )
        if self._size.zero_fits and self._size.norm <= epsilon:
            zero = torch.zeros_like(self._W)
            trim = self._trim(zero, epsilon, Measures(0.0, 0.0), 0, 0.0)
        else:
            radius = math.sqrt(max(squared, 0.0))
            trim = self._iterate(
                epsilon, radius, start, tol, max_iterations, progress, before_refit=before_refit
            )
        return replace(trim, seconds=time.perf_counter() - began)

    def _iterate(
        self,
        epsilon: float,
        radius: float,
        start: Tensor | None,
        tol: float,
        max_iterations: int,
        progress: Progress | None,
        *,
        before_refit: bool,
    ) -> LayerTrim:
        """Iterate until the residuals are small and what is returned is feasible.

        Before a refit inactive outputs need not keep to their bounds.
        """
        if self._splitting is None:
            self._splitting = self.split()
        work = self._splitting
        if start is not None:
            work.start_at(start)
        m, n = self._W.shape
        once = 4.0 * len(self._targets.X) * m * n + 2.0 * n * n * m
        balanced = 0
        for k in range(1, max_iterations + 1):
            last = k == max_iterations
            if k % CHECK and not last:
                work.step(radius / work.c0)
                continue
            measures = work.measured_step(radius / work.c0)
            if progress is not None:
                progress(k, max_iterations)
            small = measures.primal <= tol and measures.dual <= DUAL_SHARE * tol
            if small or last:
                sparse = work.sparse.to(self._W.dtype, copy=True)  # the next steps overwrite it
                trim = self._trim(sparse, epsilon, measures, k, k * once, converged=small)
                # A ball that holds is touched; what is off it is off in the objective as well.
                touches = epsilon == 0.0 or abs(trim.ratio - 1.0) <= tol or work.ball_is_loose
                enough = trim.converged or (small and before_refit and not self._options.joint)
                if last or (touches and enough):
                    break
            if k % ANCHOR == 0 or k >= balanced:  # a change of ρ would multiply what has drifted
                work.anchor()
            if k >= balanced:
                balanced = k + k // 4
                work.balance(measures)
        return replace(trim, lower_bound=self._lower_bound(work, radius))

    def split(self) -> Splitting:
        """Return the iteration at its start: a factorisation, and a copy of the targets."""
        return splitting_of(self._W, self._targets, self._G, self._penalty, self._options)

    def _lower_bound(self, work: Splitting, radius: float) -> float:
        """Return the bound that the multipliers left by a look prove."""
        multipliers = work.multipliers().mul_(mean_penalty(self._penalty) / work.c0)
        joint = self._options.joint
        return lower_bound(multipliers, self._targets, self._penalty, radius, joint=joint)

    def _trim(
        self,
        weights: Tensor,
        epsilon: float,
        measures: Measures,
        iterations: int,
        flops: float,
        *,
        converged: bool = True,
    ) -> LayerTrim:
        """Return weights with what they do, measured in float64."""
        joint = self._options.joint
        seen = certify(weights, self._targets, self._size.scale)
        trim = LayerTrim(
            weights=weights,
            epsilon=epsilon,
            discrepancy=math.hypot(seen.active, seen.above if joint else 0.0),
            violation=seen.violation,
            output_discrepancy=seen.outputs,
            scale=self._size.scale,
            target_norm=self._size.norm,
            objective=float((self._penalty * weights.double().abs()).sum()),
            lower_bound=0.0,
            iterations=iterations,
            primal_residual=measures.primal,
            dual_residual=measures.dual,
            converged=converged,
            joint=joint,
            seconds=0.0,
            flops=flops,
        )
        return replace(trim, converged=converged and trim.feasible)

    @torch.no_grad()
    def refit(
        self, trim: LayerTrim, *, tol: float = TOL, max_iterations: int = MAX_ITERATIONS
    ) -> LayerTrim:
        """Return a trim with its weights fitted anew, and what they do then.

        If what is left of them cannot keep to the bounds of inactive outputs within ε, iterates on
        until the weights themselves do.

        Args:
            trim: Of this program.
            tol: As for ``solve``: residuals above it stay a reason not to have converged.
            max_iterations: Budget, of which the trim's are a part.
        """
        fitted = self._fitted(trim, tol)
        left = max_iterations - trim.iterations
        if fitted.converged or trim.converged or left <= 0:
            return fitted
        more = self.sparse(trim.epsilon, before_refit=False, tol=tol, max_iterations=left)
        sums = {key: getattr(trim, key) + getattr(more, key) for key in ("iterations", "flops")}
        return self._fitted(replace(more, **sums, seconds=fitted.seconds + more.seconds), tol)

    def _fitted(self, trim: LayerTrim, tol: float) -> LayerTrim:
        began = time.perf_counter()
        scale = None if trim.joint else trim.scale
        weights = refitted(trim.weights, self._targets, scale=scale)
        measures = Measures(trim.primal_residual, trim.dual_residual)
        small = measures.primal <= tol and measures.dual <= DUAL_SHARE * tol
        fitted = self._trim(
            weights, trim.epsilon, measures, trim.iterations, trim.flops, converged=small
        )
        seconds = trim.seconds + time.perf_counter() - began
        # Outputs may come no nearer, by rounding or because only those far off keep to the bounds.
        worse = fitted.discrepancy > trim.discrepancy
        worse = worse or fitted.output_discrepancy > trim.output_discrepancy
        if worse and (trim.feasible or not fitted.feasible):
            return replace(trim, seconds=seconds)
        return replace(fitted, lower_bound=trim.lower_bound, seconds=seconds)
