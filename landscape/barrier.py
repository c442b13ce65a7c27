"""The height of the loss barrier along a path, by both definitions in use, with errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist

from hessian.objective import Objective
from landscape.bands import simultaneous_band
from landscape.batch_norm import BatchNorm, BatchNormKind, as_batch_norm
from landscape.evaluate import Progress, as_named, measured
from landscape.paths import Line, Path
from landscape.plans import Plan, Speed
from landscape.point_meter import sums, without_infinities
from landscape.records import Evaluation


@dataclass(frozen=True)
class Excess:
    """The largest excess of the loss along a path over a reference drawn from its ends."""

    value: float
    """In units of the loss; NaN if the loss is not finite at a point of the path."""
    location: float
    """The t of the largest excess, or the first t at which the loss is not finite."""
    standard_error: float
    """Of the excess at that t, from per-sample differences; zero where it vanishes identically."""
    low: float = math.nan
    """Lower end of the confidence interval of the maximum. Above zero: there is a barrier."""
    high: float = math.nan
    """Upper end of the confidence interval of the maximum, over the points of the grid."""
    earliest: float = math.nan
    """First t of the grid at which the maximum may lie, at the same confidence."""
    latest: float = math.nan
    """Last t of the grid at which the maximum may lie."""


@dataclass(frozen=True)
class Barrier:
    """Barrier heights along a path, and the losses they are read from."""

    excess_over_chord: Excess
    """max_t L(t) − ((1 − t) L(0) + t L(1)). At least 0: the chord meets the loss at both ends."""
    excess_over_mean: Excess
    """max_t L(t) − (L(0) + L(1)) / 2. At least |L(0) − L(1)| / 2, whatever lies between."""
    evaluation: Evaluation


@dataclass(frozen=True)
class BarrierTable:
    """Barriers of several paths, objectives and metrics: ``table["path", "test", "error"]``."""

    barriers: Mapping[tuple[str, str, str], Barrier]

    def __getitem__(self, key: tuple[str, str, str]) -> Barrier:
        """Return the barrier of a path, an objective and a metric."""
        return self.barriers[key]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each barrier, of JSON values, ready for a table or a data frame."""
        return [
            {"path": path, "objective": objective, "metric": metric}
            | {f"over_chord_{key}": v for key, v in asdict(found.excess_over_chord).items()}
            | {f"over_mean_{key}": v for key, v in asdict(found.excess_over_mean).items()}
            for (path, objective, metric), found in self.barriers.items()
        ]


def barrier(
    objective: Objective,
    path: Path,
    *,
    num_points: int = 61,
    confidence: float = 0.95,
    batch_norm: BatchNorm | BatchNormKind = "recompute",
    speed: Speed | Plan = "auto",
    precision: Literal["full", "bfloat16"] = "full",
    folder: str | FilePath | None = None,
    workers: int = 1,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> Barrier:
    """Measure the loss barrier along a path.

    The two definitions agree where the ends are equally good. Where they are not, the excess over
    the mean is positive even for a loss that falls all the way; the excess over the chord is not.

    The standard errors are paired: every sample is its own control, so what makes a sample hard
    along the whole path drops out. They hold for a fixed t. The maximum is *selected*: over a noisy
    flat profile it is biased upward. The interval from ``low`` to ``high`` allows for that, see
    `simultaneous_band`: a barrier is shown where ``low`` is above zero. It speaks of the points
    that were measured; a peak narrower than the grid is missed.

    Args:
        objective: The loss L.
        path: A map from t to weights.
        num_points: Equally spaced t in [0, 1], both ends among them; at least 3. Costs one forward
            pass over the data each. Memory: one float64 a sample and point.
        confidence: Of the interval of the maximum and of its location.
        batch_norm: What batch norm normalises by at a point, see `BatchNorm`.
        speed: As in `evaluate`.
        precision: As in `evaluate`.
        folder: As in `evaluate`; it keeps every sample's loss.
        workers: As in `evaluate`.
        group: As in `evaluate`; every rank then holds all samples' losses.
        progress: As in `evaluate`.

    Returns:
        Both excesses with location, errors and interval, and the evaluation along the path.

    Raises:
        ValueError: If ``num_points`` is below 3, ``confidence`` is not between 0 and 1, or an
            option does not fit.
        RuntimeError: If a worker process dies.
        RankError: If another rank fails.

    Warns:
        BatchNormWarning: If the model normalises by running statistics that are frozen.

    Example:
        >>> import torch
        >>> from landscape.paths import Line
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.ones(2, 1), torch.ones(2, 1)
        >>> objective = Objective(model, lambda y, x: ((y**2 - x) ** 2).mean(dim=1), data)
        >>> found = barrier(objective, Line(torch.tensor([-1.0]), torch.tensor([1.0])))
        >>> found.excess_over_chord.value, found.excess_over_chord.location
        (1.0, 0.5)

    References:
        Entezari et al. (2022), The role of permutation invariance in linear mode connectivity.
        Frankle et al. (2020), Linear mode connectivity and the lottery ticket hypothesis.
        Ainsworth et al. (2023), Git Re-Basin.
    """
    found = barrier_table(
        objective,
        path,
        num_points=num_points,
        confidence=confidence,
        batch_norm=batch_norm,
        speed=speed,
        precision=precision,
        folder=folder,
        workers=workers,
        group=group,
        progress=progress,
    )
    return found["path", "objective", "loss"]


def barrier_table(
    objectives: Objective | Mapping[str, Objective],
    path: Path,
    *,
    controls: Mapping[str, Tensor | Path] | None = None,
    metrics: Sequence[Literal["loss", "error"]] = ("loss",),
    num_points: int = 61,
    confidence: float = 0.95,
    batch_norm: BatchNorm | BatchNormKind = "recompute",
    speed: Speed | Plan = "auto",
    precision: Literal["full", "bfloat16"] = "full",
    folder: str | FilePath | None = None,
    workers: int = 1,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> BarrierTable:
    """Measure barriers of several objectives and metrics, with controls to hold them against.

    A flat path means something only beside one that is not: to a second minimum from another start
    (a ridge is expected), or to the start pruned by magnitude to the same sparsity.

    Args:
        objectives: One, called ``"objective"``, or several by name, e.g. train and test; batch
            norm is recomputed on samples of the first.
        path: A map from t to weights; called ``"path"`` in the table.
        controls: Other ends by name: weights, to which a straight line leads from the path's start,
            or whole paths.
        metrics: ``"loss"``, ``"error"`` (of class scores) or both, from one forward pass.
        num_points: As in `barrier`, for each path.
        confidence: As in `barrier`.
        batch_norm: As in `barrier`.
        speed: As in `barrier`.
        precision: As in `barrier`.
        folder: As in `barrier`; holds one folder for each path.
        workers: As in `barrier`.
        group: As in `barrier`.
        progress: Called after every point of each path with those done and their number on it.

    Returns:
        A `Barrier` for each path, objective and metric.

    Raises:
        ValueError: As `barrier`; if a control is called ``"path"``, or has other weights.
        RuntimeError: If a worker process dies.
        RankError: If another rank fails.

    Warns:
        BatchNormWarning: As `barrier`.

    Example:
        >>> import torch
        >>> from landscape.paths import Line
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.ones(2, 1), torch.ones(2, 1)
        >>> objective = Objective(model, lambda y, x: ((y**2 - x) ** 2).mean(dim=1), data)
        >>> line = Line(torch.tensor([1.0]), torch.tensor([1.1]))
        >>> table = barrier_table(objective, line, controls={"mirrored": torch.tensor([-1.0])})
        >>> table["mirrored", "objective", "loss"].excess_over_chord.value
        1.0
    """
    if num_points < 3:
        raise ValueError(
            f"`num_points` must be at least 3 to see anything between the ends, got {num_points}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    for metric in metrics:
        if metric not in ("loss", "error"):
            raise ValueError(f'`metrics` must be "loss" or "error", got "{metric}".')
    named = as_named(objectives)
    ts = torch.linspace(0, 1, num_points, dtype=torch.float64)
    lengths = [o.num_samples for o in named.values() for _ in metrics]
    columns = [(name, metric) for name in named for metric in metrics]
    barriers: dict[tuple[str, str, str], Barrier] = {}
    for k, (title, each) in enumerate(_paths(path, controls).items()):
        values, provenance = measured(
            named,
            each,
            ts,
            metrics,
            as_batch_norm(batch_norm),
            width=(sum(lengths),),
            speed=speed,
            precision=precision,
            folder=None if folder is None else FilePath(folder) / f"path-{k}",
            workers=workers,
            group=group,
            progress=progress,
        )
        parts = torch.split(values, lengths, dim=1)
        for (name, metric), samples in zip(columns, parts, strict=True):
            about = provenance | {"objective": name, "metric": metric}
            barriers[title, name, metric] = _barrier(samples, ts, confidence, about)
    return BarrierTable(barriers)


def _barrier(samples: Tensor, ts: Tensor, confidence: float, about: dict[str, Any]) -> Barrier:
    """Both excesses from every sample's loss, shape [m, n], which is used up."""
    table = without_infinities(torch.stack([sums(row) for row in samples]))
    count, total, squares = table.unbind(dim=1)
    evaluation = Evaluation(ts, count, total, squares, about)
    if evaluation.num_nonfinite:
        first = int((~torch.isfinite(evaluation.mean)).nonzero()[0])
        nothing = Excess(math.nan, float(ts[first]), math.nan)
        return Barrier(nothing, nothing, evaluation)
    start, end = samples[0].clone(), samples[-1].clone()
    middle = (start + end) / 2
    samples -= middle
    over_mean = _excess(samples, ts, confidence)
    # From one reference to the other, in place.
    samples -= torch.outer(0.5 - ts, start - end)
    samples[0], samples[-1] = 0.0, 0.0
    return Barrier(_excess(samples, ts, confidence), over_mean, evaluation)


def _excess(differences: Tensor, ts: Tensor, confidence: float) -> Excess:
    band = simultaneous_band(differences, confidence=confidence)
    best = int(band.mean.argmax())
    value, location = float(band.mean[best]), float(ts[best])
    error = float(band.standard_error[best])
    if math.isnan(error):
        return Excess(value, location, error)
    low, high = float(band.low.max()), float(band.high.max())
    possible = ts[band.high >= low]
    return Excess(value, location, error, low, high, float(possible[0]), float(possible[-1]))


def _paths(path: Path, controls: Mapping[str, Tensor | Path] | None) -> dict[str, Path]:
    found: dict[str, Path] = {"path": path}
    for name, control in (controls or {}).items():
        if name in found:
            raise ValueError('`controls` must have other names than "path".')
        found[name] = Line(path(0.0), control) if isinstance(control, Tensor) else control
    return found
