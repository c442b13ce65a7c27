"""Directional pruning past the first clip: the direction is renewed when weights reach zero."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import ConvergenceWarning, Eigenspace, Objective
from hessian.vector_rows import CHUNK, row_dots
from pruning.pruned import Pruned, wanted_zeros
from pruning.scores import require_weights

REFRESH = 50
"""Events after which the k x k inverse is computed anew, so that rounding does not add up."""

LEAST_LEFT = 1e-4
"""Eigenvalue of I − V_r M V_rᵀ below which an update would lose too many digits."""

SINGULAR = 1e-10
"""Share of the largest eigenvalue of V_Aᵀ V_A below which another counts as zero."""

STILL = 1e3
"""Multiples of the rounding error below which a rate of shrinking counts as none."""


@dataclass(frozen=True)
class PathPruned(Pruned):
    """Weights at the end of a directional path, and how they came about."""

    num_events: int
    """Times that the direction was renewed because weights had reached zero."""
    predicted_change: float
    """½ Σ λ_i (v_iᵀ (u − w))²: the quadratic change of the loss, as far as the eigenspace sees."""
    measured_change: float
    """L(u) − L(w); NaN without an objective."""
    num_products: int
    """Products that the eigenspace cost."""
    converged: bool
    """Whether the eigenspace met its tolerance."""


def directional_path(
    w: Float[Tensor, " d"],
    eigenspace: Eigenspace,
    *,
    sparsity: float | None = None,
    lam: float | None = None,
    batch: int = 1,
    ridge: float = 0.0,
    objective: Objective | None = None,
) -> PathPruned:
    """Shrink the weights along flat directions of the ones still alive, up to a λ or a sparsity.

    While no weight reaches zero, w moves by −Π_A sign(w) per unit of λ, with A the weights that
    are not zero and Π_A x = x − V_A (V_Aᵀ V_A)⁻¹ V_Aᵀ x: the flat directions that leave the zeros
    alone. A weight that reaches zero stays there and leaves A. The path is piecewise linear; up to
    the first clip it is ``directional_prune``, beyond it w stays in the valley, as the eigenspace
    knows it, where one-shot pruning leaves it.

    Every event costs O(k²) for the inverse and 2 d k flops for the rates.

    Args:
        w: Weights at the minimum, shape [d]. Zeros stay zero.
        eigenspace: The sharp directions V and their eigenvalues.
        sparsity: Share of zeros to stop at, in [0, 1]: ⌈sparsity · d⌉ zeros, no more.
        lam: λ ≥ 0 to stop at, in units of w. Exactly one of the two is given.
        batch: Weights that may reach zero before the direction is renewed. 1 is the exact path;
            some thousandth of d is much faster.
        ridge: Eigenvalue ρ that counts as half flat: Π_A = (I + V_A Λ V_Aᵀ / ρ)⁻¹ with Λ the
            magnitudes of the eigenvalues. 0 is the hard projector.
        objective: Measures the true change of the loss, by two forward passes.

    Returns:
        The weights and the λ reached.

    Raises:
        ValueError: If not exactly one of sparsity and lam is given, one is out of range, ``batch``
            is below 1, ``ridge`` is negative, w does not fit the eigenspace or is not finite, or
            the sparsity cannot be reached: with a hard projector at least k weights stay.

    Warns:
        ConvergenceWarning: If the eigenspace did not converge.

    Example:
        >>> import torch
        >>> from hessian import Operator, leading_eigenspace
        >>> H = Operator.from_matrix(torch.diag(torch.tensor([4.0, 0.0, 0.0])))
        >>> space = leading_eigenspace(H, k=1)
        >>> directional_path(torch.tensor([1.0, -1.0, 2.0]), space, lam=1.5).weights
        tensor([1.0000, 0.0000, 0.5000])
    """
    _check(w, eigenspace, sparsity, lam, batch, ridge)
    _warn_of(eigenspace)
    path = _Path(w, eigenspace, ridge)
    goal = math.inf if lam is None else lam
    path.follow(len(w) if sparsity is None else wanted_zeros(sparsity, len(w)), goal, batch)
    if sparsity is not None:
        path.require(sparsity)
    return path.result(w, eigenspace, objective)


def directional_paths(
    w: Float[Tensor, " d"],
    eigenspace: Eigenspace,
    sparsities: Sequence[float],
    *,
    batch: int = 1,
    ridge: float = 0.0,
    objective: Objective | None = None,
) -> Iterator[PathPruned]:
    """Yield the weights of one directional path where it passes sparsities.

    The price of the last one buys all. With ``batch`` = 1 each is what ``directional_path`` finds
    by itself; else the stops renew the direction once more.

    Args:
        w: Weights at the minimum, shape [d]. Zeros stay zero.
        eigenspace: The sharp directions V and their eigenvalues.
        sparsities: Shares of zeros, increasing, as ``directional_path`` takes one.
        batch: The same as there.
        ridge: The same as there.
        objective: The same as there.

    Raises:
        ValueError: As ``directional_path``, or if there are no sparsities or they do not increase.
            One that cannot be reached raises after those before it were yielded.

    Warns:
        ConvergenceWarning: If the eigenspace did not converge.

    Example:
        >>> import torch
        >>> from hessian import Operator, leading_eigenspace
        >>> H = Operator.from_matrix(torch.diag(torch.tensor([4.0, 0.0, 0.0])))
        >>> space = leading_eigenspace(H, k=1)
        >>> found = directional_paths(torch.tensor([1.0, -1.0, 2.0]), space, [0.3, 0.6])
        >>> [pruned.weights.round(decimals=3).tolist() for pruned in found]
        [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    for sparsity in sparsities:
        _check(w, eigenspace, sparsity, None, batch, ridge)
    wanted = [wanted_zeros(sparsity, len(w)) for sparsity in sparsities]
    if not sparsities or any(b <= a for a, b in pairwise(sparsities)):
        listed = ", ".join(f"{share:g}" for share in sparsities) or "none"
        raise ValueError(f"`sparsities` must be one or more that increase, got {listed}.")
    _warn_of(eigenspace)

    def walk() -> Iterator[PathPruned]:
        path = _Path(w, eigenspace, ridge)
        for sparsity, zeros in zip(sparsities, wanted, strict=True):
            path.follow(zeros, math.inf, batch)
            path.require(sparsity)
            yield path.result(w, eigenspace, objective)

    return walk()


class _Path:
    """Where the path is, with M = (ρ I + D V_Aᵀ V_A D)⁻¹ for the weights A that are alive.

    D is the root of |Λ|, or the identity for the hard projector.
    """

    def __init__(self, w: Tensor, space: Eigenspace, ridge: float) -> None:
        self.u, self.sign = w.clone(), w.sign()
        self.zeros, self.lam, self.num_events = int((w == 0).sum()), 0.0, 0
        self._V, self._ridge = space.vectors, ridge
        values = space.values.to(w.device, torch.float64)
        self._D = values.abs().sqrt() if ridge else torch.ones_like(values)
        k = len(values)
        self._gram, self._pull = values.new_zeros(k, k), values.new_zeros(k)
        for begin in range(0, len(w), CHUNK):
            alive = self.sign[begin : begin + CHUNK].abs().double()
            rows = self._V[begin : begin + CHUNK].double() * self._D * alive[:, None]
            self._gram += rows.T @ rows
            self._pull += rows.T @ self.sign[begin : begin + CHUNK].double()
        self._still = STILL * torch.finfo(w.dtype).eps
        self._refresh()

    def follow(self, wanted: int, goal: float, batch: int) -> None:
        """Go on until so many weights are zero, to λ = goal, or until all stand still."""
        while self.lam < goal and self.zeros < wanted:
            if not self.advance(min(batch, wanted - self.zeros), goal):
                return

    def require(self, sparsity: float) -> None:
        """Refuse a sparsity that the path did not reach."""
        if self.zeros < wanted_zeros(sparsity, len(self.u)):
            raise ValueError(
                f"`sparsity` must be at most {self.zeros / len(self.u):.4f}, where no weight on "
                f"the path shrinks any more, got {sparsity}. Take fewer eigenpairs "
                f"(`eigenspace.first(k)` with k below {self._V.shape[1]}), or a `ridge`."
            )

    def result(self, w: Tensor, space: Eigenspace, objective: Objective | None) -> PathPruned:
        """Return where the path is, and what it came to since w."""
        along = row_dots([space.vectors.T], self.u - w)
        predicted = float(0.5 * (space.values.to(along) * along.square()).sum())
        measured = math.nan if objective is None else objective.loss(self.u) - objective.loss(w)
        mask = self.u != 0
        return PathPruned(
            self.u,
            mask,
            1.0 - int(mask.sum()) / len(w),
            self.lam,
            self.num_events,
            predicted,
            measured,
            space.num_products,
            space.converged,
        )

    def advance(self, count: int, goal: float) -> bool:
        """Go on until ``count`` weights more are zero, or to λ = goal; false if all stand still."""
        c = self._D * (self._inverse @ self._pull)
        rates = self.sign.abs() - self.sign * (self._V @ c.to(self._V.dtype))
        size = self.u.abs()
        times = torch.where((rates > self._still) & (size > 0), size / rates, math.inf)
        soonest = times.topk(count, largest=False).values
        reached = soonest[torch.isfinite(soonest)]
        step = float(reached[-1]) if len(reached) else math.inf
        if min(step, goal) == math.inf:
            return False
        ends = self.lam + step >= goal
        step = goal - self.lam if ends else step
        moved = self.sign * (size - step * rates).clamp(min=0.0)
        moved[times <= step] = 0.0
        gone = ((moved == 0) & (self.u != 0)).nonzero()[:, 0]
        self.u, self.lam = moved, goal if ends else self.lam + step
        if len(gone):
            self._drop(gone)
        return True

    def _drop(self, gone: Tensor) -> None:
        rows = self._V[gone].double() * self._D
        self._gram -= rows.T @ rows
        self._pull -= rows.T @ self.sign[gone].double()
        self.sign[gone] = 0.0
        self.zeros += len(gone)
        self.num_events += 1
        bent = rows @ self._inverse
        left = torch.eye(len(gone), dtype=rows.dtype, device=rows.device) - bent @ rows.T
        # Sherman-Morrison-Woodbury, which loses as many digits as ``left`` is near singular.
        lowest = float(torch.linalg.eigvalsh(left)[0])
        if self.num_events % REFRESH == 0 or lowest < LEAST_LEFT or len(gone) > len(self._D):
            self._refresh()
        else:
            self._inverse += bent.T @ torch.linalg.solve(left, bent)

    def _refresh(self) -> None:
        eye = torch.eye(len(self._D), dtype=torch.float64, device=self._D.device)
        self._inverse = torch.linalg.pinv(
            self._gram + self._ridge * eye, rtol=SINGULAR, hermitian=True
        )


def _warn_of(space: Eigenspace) -> None:
    if not space.converged:
        warnings.warn(
            "The eigenspace did not converge: its largest residual is "
            f"{float(space.residuals.max()):.3g}, so directions count as flat that are not. "
            "Raise `max_products` or `tol` of `leading_eigenspace`.",
            ConvergenceWarning,
            stacklevel=3,
        )


def _check(
    w: Tensor,
    space: Eigenspace,
    sparsity: float | None,
    lam: float | None,
    batch: int,
    ridge: float,
) -> None:
    require_weights(w)
    if len(w) != len(space.vectors):
        raise ValueError(
            f"`w` must have {len(space.vectors)} entries like the eigenspace, got {len(w)}."
        )
    if (sparsity is None) == (lam is None):
        raise ValueError("Exactly one of `sparsity` and `lam` must be given.")
    if lam is not None and not 0.0 <= lam < math.inf:
        raise ValueError(f"`lam` must be finite and not negative, got {lam}.")
    if batch < 1:
        raise ValueError(f"`batch` must be at least 1, got {batch}.")
    if not 0.0 <= ridge < math.inf:
        raise ValueError(f"`ridge` must be finite and not negative, got {ridge}.")
