"""A dense surface from few points: a spline of the log-loss, refined until it predicts others."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.interpolate import RectBivariateSpline
from torch import Tensor
from torch import distributed as dist

from hessian.errors import ConvergenceWarning
from hessian.objective import Objective
from landscape.batch_norm import BatchNorm, BatchNormKind
from landscape.evaluate import Progress, evaluate
from landscape.planes import Plane, grid
from landscape.plans import Plan, Speed
from landscape.records import Evaluation

COARSE = 9
"""Lines of the first grid along each axis."""
HELD_OUT = (20, 39)
"""Points that the spline has to predict, in two parts, of which the second is measured only if it
predicts the first. If it predicts all 59, then with 95 % confidence it predicts 95 % of all points:
0.95^59 is below 0.05."""
SHARE = 0.25
"""Intervals are halved that score at least this part of the worst one, of either axis."""


@dataclass(frozen=True)
class AdaptiveSurface:
    """A surface on a dense grid, measured at some points and interpolated at the others."""

    evaluation: Evaluation
    """On the whole grid. Where it is interpolated there is a loss, but no standard error."""
    measured: Bool[Tensor, "nx ny"]
    """The points at which the loss was measured."""
    error: float
    """Largest |Δ log L| at points that played no part in the spline or its refinement. With 59 of
    them, no more than 5 % of the interpolated points are further off, with 95 % confidence. 0 if
    all points were measured."""
    num_held_out: int
    """Number of those points; 20 where they already showed that ``tol`` is not met."""
    num_evaluations: int
    """Points measured, the held-out ones included."""
    converged: bool
    """Whether the error is within ``tol``, with all 59 points."""


def adaptive_surface(
    objective: Objective,
    plane: Plane,
    xs: Sequence[float] | Float[Tensor, " nx"],
    ys: Sequence[float] | Float[Tensor, " ny"],
    *,
    tol: float = 0.01,
    max_evaluations: int | None = None,
    batch_norm: BatchNorm | BatchNormKind = "recompute",
    speed: Speed | Plan = "auto",
    precision: Literal["full", "bfloat16"] = "full",
    folder: str | Path | None = None,
    workers: int = 1,
    group: dist.ProcessGroup | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AdaptiveSurface:
    """Return the loss on a dense grid of a plane from a fraction of its points.

    The loss is measured on a coarse grid of whole lines, and a bicubic spline through its logarithm
    predicts some random points of the dense grid, which are then measured, too. Where they
    disagree, or where leaving a line out shows that an axis is too coarse, lines are added, and
    fresh points are held out; the error reported is theirs alone. A smooth network needs some 140
    to 300 points, whatever the grid. Structure
    narrower than the coarse grid that no held-out point happens to hit is not seen: for a rough
    surface measure all points with `evaluate`.

    Args:
        objective: The loss L.
        plane: The plane.
        xs: Values along the first axis, increasing, at least 2.
        ys: Values along the second axis, increasing, at least 2.
        tol: Goal for |Δ log L| at 95 % of the points; 0.01 is 1 % of the loss.
        max_evaluations: Budget of points. Default: an eighth of the grid, and at least what the
            coarse grid and the points held out take.
        batch_norm: As in `evaluate`.
        speed: As in `evaluate`.
        precision: As in `evaluate`.
        folder: As in `evaluate`.
        workers: As in `evaluate`.
        group: As in `evaluate`.
        seed: Of the points held out.
        progress: Called with the points done and the budget.

    Returns:
        The surface with its error. If the loss is not finite somewhere, or the grid is so small
        that nothing would be saved, all points are measured. On an exhausted budget ``converged``
        is False, and a ``ConvergenceWarning`` names the error reached.

    Raises:
        ValueError: If an axis is not increasing, ``tol`` is not positive, or the budget does not
            suffice to begin; as `evaluate`.
        RuntimeError: If a worker process dies.
        RankError: If another rank fails.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.eye(2), torch.full((2, 1), 3.0)
        >>> objective = Objective(model, torch.nn.MSELoss(), data)
        >>> plane = Plane(torch.zeros(2), *torch.eye(2))
        >>> axis = torch.linspace(-1, 1, 41)
        >>> surface = adaptive_surface(objective, plane, axis, axis)
        >>> surface.converged, surface.num_evaluations < 250
        (True, True)
    """
    axes = [torch.as_tensor(axis, dtype=torch.float64, device="cpu") for axis in (xs, ys)]
    for name, axis in zip(("xs", "ys"), axes, strict=True):
        if axis.ndim != 1 or len(axis) < 2 or not bool((axis.diff() > 0).all()):
            raise ValueError(f"`{name}` must hold at least two increasing values, got {axis}.")
    if not tol > 0:
        raise ValueError(f"`tol` must be positive, got {tol}.")
    points = grid(*axes)
    size = points.shape[0] * points.shape[1]
    first = min(COARSE, len(axes[0])) * min(COARSE, len(axes[1]))
    least = first + sum(HELD_OUT)
    budget = max(size // 8, least) if max_evaluations is None else max_evaluations
    if budget < least:
        raise ValueError(
            f"`max_evaluations` must be at least {least} for a coarse grid and the points held "
            f"out, got {budget}."
        )
    options = {
        "batch_norm": batch_norm,
        "precision": precision,
        "workers": workers,
        "group": group,
    }
    table = _Table(objective, plane, points, speed, options, folder, progress, min(budget, size))
    if size <= budget or not _refine(table, axes, tol, budget, seed):
        table.measure(torch.ones(points.shape[:2], dtype=torch.bool))
        return AdaptiveSurface(table.evaluation(), table.done, 0.0, 0, size, True)
    found = table.outcome
    assert found is not None
    error, held, prediction = found
    if error > tol:
        warnings.warn(
            f"The surface is known to {error:.3g} in log L (largest of {held} points), not "
            f"to {tol:.3g}, after {int(table.done.sum())} of {size} points. Raise "
            "`max_evaluations`, or measure all points with `evaluate`.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return AdaptiveSurface(
        table.evaluation(prediction),
        table.done,
        error,
        held,
        int(table.done.sum()),
        error <= tol,
    )


class _Table:
    """What is measured so far on the dense grid."""

    def __init__(
        self,
        objective: Objective,
        plane: Plane,
        points: Tensor,
        speed: Speed | Plan,
        options: dict[str, Any],
        folder: str | Path | None,
        progress: Progress | None,
        total: int,
    ) -> None:
        self._objective, self._plane, self._points = objective, plane, points
        self._speed, self._options, self._folder = speed, options, folder
        self._progress, self._total, self._round = progress, total, 0
        self.sums = torch.full((*points.shape[:2], 3), torch.nan, dtype=torch.float64)
        self.done = torch.zeros(points.shape[:2], dtype=torch.bool)
        self._provenance: dict[str, Any] = {}
        self.outcome: tuple[float, int, Tensor] | None = None
        """Error, points that it is from, and the spline's prediction on the grid."""

    def measure(self, wanted: Tensor) -> None:
        """Measure the points of a mask that are not measured yet."""
        new = wanted & ~self.done
        if not bool(new.any()):
            return
        before = int(self.done.sum())

        def show(done: int, _: int) -> None:
            if self._progress is not None:
                self._progress(before + done, max(self._total, before + done))

        found = evaluate(
            self._objective,
            self._plane,
            self._points[new],
            speed=self._speed,
            folder=None if self._folder is None else Path(self._folder) / f"round-{self._round}",
            progress=show,
            **self._options,
        )
        self._round += 1
        self._provenance = dict(found.provenance)
        if not isinstance(self._speed, Plan):  # chosen once for all rounds
            self._speed = Plan.from_json(self._provenance["plan"])
        self.sums[new] = torch.stack([found.count, found.total, found.total_squares], dim=-1)
        self.done |= new

    @property
    def losses(self) -> Tensor:
        """The loss, NaN where it is not finite or not measured."""
        return self.sums[..., 1] / self.sums[..., 0]

    def evaluation(self, prediction: Tensor | None = None) -> Evaluation:
        """The whole grid, with a prediction where nothing was measured."""
        count, total, squares = self.sums.unbind(dim=-1)
        about = self._provenance
        if prediction is not None:
            n = float(count[self.done][0])
            count = torch.where(self.done, count, n)
            total = torch.where(self.done, total, n * prediction)
            about = about | {"interpolated points": int((~self.done).sum())}
        return Evaluation(self._points, count, total, squares, about)


def _refine(table: _Table, axes: list[Tensor], tol: float, budget: int, seed: int) -> bool:
    """Add lines until fresh points are predicted; False if the loss is not finite somewhere."""
    generator = torch.Generator().manual_seed(seed)
    lines = [_spaced(len(axis)) for axis in axes]
    shape = table.done.shape
    guides = torch.zeros(shape, dtype=torch.bool)
    while True:
        table.measure(_on_lines(lines, shape))
        if not bool(torch.isfinite(table.losses[table.done]).all()):
            return False
        floor = _floor(table.losses[_on_lines(lines, shape)])
        prediction = _predicted(table.losses, axes, lines, floor)
        error, held = 0.0, 0
        for number in HELD_OUT:
            fresh = _draw(~table.done, number, generator)
            table.measure(fresh)
            losses = table.losses
            if not bool(torch.isfinite(losses[table.done]).all()):
                return False
            deviations = torch.log((losses + floor) / (prediction + floor)).square()
            error, held = max(error, float(deviations[fresh].max().sqrt())), held + number
            guides |= fresh
            if error > tol:
                break
        table.outcome = error, held, prediction
        seen = torch.where(guides & ~_on_lines(lines, shape), deviations, 0.0)
        scores = [_scores(losses, axes, lines, floor, seen, axis) for axis in (0, 1)]
        wanted = _halved(lines, scores)
        cost = int((_on_lines(wanted, shape) & ~table.done).sum()) + sum(HELD_OUT)
        if error <= tol or wanted == lines or int(table.done.sum()) + cost > budget:
            return True
        lines = wanted


def _spaced(size: int) -> list[int]:
    """Places of the first lines, both ends among them."""
    number = min(COARSE, size)
    return [round(k * (size - 1) / (number - 1)) for k in range(number)]


def _on_lines(lines: list[list[int]], shape: Sequence[int]) -> Tensor:
    mask = torch.zeros(*shape, dtype=torch.bool)
    mask[torch.tensor(lines[0])[:, None], torch.tensor(lines[1])] = True
    return mask


def _draw(candidates: Tensor, number: int, generator: torch.Generator) -> Tensor:
    places = candidates.reshape(-1).nonzero()[:, 0]
    chosen = places[torch.randperm(len(places), generator=generator)[:number]]
    mask = torch.zeros(candidates.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask.view_as(candidates)


def _floor(losses: Tensor) -> float:
    """What is added before the logarithm: a loss of zero counts as the smallest one beside it."""
    positive = losses[losses > 0]
    if len(positive) == len(losses):
        return 0.0
    return float(positive.min()) if len(positive) else 1.0


def _predicted(losses: Tensor, axes: list[Tensor], lines: list[list[int]], floor: float) -> Tensor:
    """The loss on the dense grid by a spline of its logarithm through the lines."""
    own = losses[torch.tensor(lines[0])[:, None], torch.tensor(lines[1])]
    x, y = (axis[torch.tensor(k)].numpy() for axis, k in zip(axes, lines, strict=True))
    kx, ky = (min(3, len(k) - 1) for k in lines)
    values = np.log(np.maximum(own.numpy(), 0.0) + floor)
    fit = RectBivariateSpline(x, y, values, kx=kx, ky=ky, s=0)
    dense = torch.from_numpy(fit(axes[0].numpy(), axes[1].numpy()))
    return (dense.exp() - floor).clamp(min=0.0)


def _scores(
    losses: Tensor,
    axes: list[Tensor],
    lines: list[list[int]],
    floor: float,
    seen: Tensor,
    axis: int,
) -> list[float]:
    """How badly the spline does in each interval of an axis.

    What it gets wrong on a line of this axis that is left out says which axis is too coarse, and
    where. What it gets wrong at points between the lines speaks of both axes.
    """
    own = lines[axis]
    missed = [0.0] * len(own)
    for k in range(1, len(own) - 1):
        fewer = list(lines)
        fewer[axis] = own[:k] + own[k + 1 :]
        prediction = _predicted(losses, axes, fewer, floor)
        line = _on_lines([[own[k]], lines[1]] if axis == 0 else [lines[0], [own[k]]], losses.shape)
        ratio = torch.log((losses[line] + floor) / (prediction[line] + floor))
        missed[k] = float(ratio.square().mean())
    between = seen.sum(dim=1 - axis)
    return [
        max(missed[k], missed[k + 1]) + float(between[a : b + 1].mean())
        for k, (a, b) in enumerate(pairwise(own))
    ]


def _halved(lines: list[list[int]], scores: list[list[float]]) -> list[list[int]]:
    """The lines, with one more in the intervals where the spline does worst."""
    intervals = [
        (score, axis, a, b)
        for axis in (0, 1)
        for score, (a, b) in zip(scores[axis], pairwise(lines[axis]), strict=True)
        if b - a > 1
    ]
    worst = max((score for score, *_ in intervals), default=math.inf)
    added: list[set[int]] = [set(), set()]
    for score, axis, a, b in intervals:
        if score >= SHARE * worst:
            added[axis].add((a + b) // 2)
    return [sorted({*own, *new}) for own, new in zip(lines, added, strict=True)]
