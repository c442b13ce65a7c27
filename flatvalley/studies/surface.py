"""What ``flatvalley surface`` does: the loss around one network, in a plane of two directions."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from flatvalley.process_group import all_ranks, from_first, world
from flatvalley.run import Run
from flatvalley.studies.landscape_networks import (
    POLICIES,
    PRECISIONS,
    Networks,
    Precision,
    read_path,
)
from hessian import ConvergenceWarning, Eigenspace, hessian_operator, leading_eigenspace
from landscape import (
    Directions,
    Evaluation,
    Plane,
    Sweep,
    Trajectory,
    eigenvector_directions,
    grid,
    orthogonalized,
    principal_components,
    project_trajectory,
    random_directions,
    save_sweep,
    sweep,
)
from landscape.adaptive import AdaptiveSurface, adaptive_surface

Scaled = Literal["filter", "layer", "model", "weight"]
KINDS: tuple[str, ...] = (*get_args(Scaled), "eigen", "saddle", "pca")
Progress = Callable[[int, int], None]

MARGIN = 0.2
"""Of the way of a training that is left free around it, on each side."""
EIGEN_RISE = 1.0
"""By how much the quadratic model rises or falls at the ends of an eigenvector's axis."""


@dataclass(frozen=True)
class SurfaceConfig:
    """Settings of one surface.

    Raises:
        ValueError: If one is out of range; the message says what it must be.

    Example:
        >>> SurfaceConfig(points=(51, 1))
        Traceback (most recent call last):
        ...
        ValueError: `points` must be at least 2 an axis, got 51 x 1.
    """

    directions: str = "filter"
    """Random ones by their normalisation; ``eigen``: the two sharpest eigenvectors of the Hessian;
    ``saddle``: the ones of most positive and most negative curvature; ``pca``: of the training."""
    points: tuple[int, int] = (51, 51)
    reach: float | None = None
    """Coordinates go from −reach to reach; None: 1 for random directions, and what there is to
    see for others."""
    seed: int = 0
    """Of random directions, and of the eigensolver."""
    samples: int | None = None
    """Training samples; None for 10,000 or all."""
    batch_norm: str = "recompute"
    adaptive: bool = False
    """Whether to measure only points that a spline through the others does not predict, and of
    those only the train loss."""
    precision: str = "full"
    """Of forward passes for what is measured."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("directions", self.directions, KINDS),
            ("batch_norm", self.batch_norm, POLICIES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        if self.batch_norm == "interpolated":
            raise ValueError(
                "`batch_norm` interpolated needs two networks, got one. Take recompute."
            )
        if min(self.points) < 2:
            shown = " x ".join(map(str, self.points))
            raise ValueError(f"`points` must be at least 2 an axis, got {shown}.")
        if self.reach is not None and not 0 < self.reach < math.inf:
            raise ValueError(f"`reach` must be positive and finite, got {self.reach}.")
        if self.reach is not None and self.directions == "pca":
            raise ValueError(
                "`reach` cannot go with directions pca, whose axes are as long as the way of the "
                "training. Leave it out."
            )
        if self.seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {self.seed}.")


@dataclass(frozen=True)
class SurfaceFindings:
    """The loss on a grid around a network."""

    config: SurfaceConfig
    networks: Networks
    directions: Directions
    plane: Plane
    values: Sweep
    path: Trajectory | None
    """The way of the training in the plane, for ``pca``."""
    space: Eigenspace | None
    adaptive: AdaptiveSurface | None
    """What a spline filled in, if it did."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the losses that were measured."""
        return tuple(dict.fromkeys(objective for objective, _ in self.values.columns))

    @property
    def description(self) -> str:
        """What the surface lies around, in a line."""
        return self.networks.sources[0].description

    def lowest(self, objective: str) -> tuple[float, tuple[float, float]]:
        """Return the least loss on the grid, and where it is."""
        mean = self.values[objective, "loss"].mean
        finite = torch.where(torch.isfinite(mean), mean, math.inf)
        at = int(finite.argmin())
        x, y = self.values.points.reshape(-1, 2)[at].tolist()
        return float(finite.flatten()[at]), (x, y)


def draw_plane(networks: Networks, config: SurfaceConfig) -> tuple[Directions, Eigenspace | None]:
    """Return the directions that the settings ask for.

    Raises:
        ValueError: If a training kept no way, or an eigenvalue is no curvature.
        NonFiniteError: If a product is not finite.
    """
    w = networks.weights[0]
    if config.directions == "pca":
        way = read_path(networks.sources[0])
        return principal_components(way.to(w), num=2, center="last").directions, None
    if config.directions in ("eigen", "saddle"):
        space = leading_eigenspace(
            hessian_operator(networks.train, w),
            k=2,
            tol=1e-3,
            which="largest" if config.directions == "eigen" else "both",
            seed=config.seed,
        )
        return eigenvector_directions(space), space
    drawn = random_directions(
        networks.train, normalization=cast(Scaled, config.directions), at=w, seed=config.seed
    )
    return orthogonalized(drawn), None


def surface(
    run: Run,
    networks: Networks,
    config: SurfaceConfig,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> SurfaceFindings:
    """Evaluate the loss and, where there are classes, the error on a grid around a network.

    Finished points are kept in the run's folder; a surface that was cut off goes on with the
    others and ends with the same bits. Processes of ``torchrun`` share the points.

    Raises:
        ValueError: As ``draw_plane``.
        NonFiniteError: If a product is not finite. A loss that is not finite is kept as such.
    """
    directions, space = draw_plane(networks, config)
    w = networks.weights[0]
    # Eigenvectors of two GPUs differ by rounding.
    u, v = (from_first(direction) for direction in directions.vectors)
    plane = replace(Plane.along(w, directions), u=u, v=v)
    way = None
    if config.directions == "pca":
        points = read_path(networks.sources[0]).to(w)
        way = project_trajectory(points, directions.basis, w)
    xs, ys = map(from_first, _axes(config, way, space))
    policy = networks.batch_norm(config.batch_norm)
    filled = None
    if config.adaptive:
        with warnings.catch_warnings():  # the findings say it
            warnings.simplefilter("ignore", ConvergenceWarning)
            filled = adaptive_surface(
                networks.train,
                plane,
                xs,
                ys,
                batch_norm=policy,
                precision=cast(Precision, config.precision),
                folder=run.path / "points",
                workers=workers,
                group=all_ranks(),
                seed=config.seed,
                progress=progress,
            )
        values = _as_sweep(filled.evaluation)
    else:
        values = sweep(
            networks.objectives,
            plane,
            grid(xs, ys),
            metrics=networks.metrics,
            batch_norm=policy,
            precision=cast(Precision, config.precision),
            folder=run.path / "points",
            workers=workers,
            group=all_ranks(),
            progress=progress,
        )
    if world()[0] == 0:
        save_sweep(values, run.path / "surface.safetensors")
    return SurfaceFindings(config, networks, directions, plane, values, way, space, filled)


def _as_sweep(found: Evaluation) -> Sweep:
    sums = torch.stack([found.count, found.total, found.total_squares])[None]
    return Sweep(found.points, (("train", "loss"),), sums, found.provenance)


def _axes(
    config: SurfaceConfig, way: Trajectory | None, space: Eigenspace | None
) -> tuple[Tensor, Tensor]:
    """Values along both axes; an odd number of points around 0 has one at it."""
    ends: list[tuple[float, float]] = [(-1.0, 1.0)] * 2
    if way is not None:
        ends = []
        for column in way.coordinates.unbind(dim=1):
            low, high = float(column.min()), float(column.max())
            ends.append((low - MARGIN * (high - low), high + MARGIN * (high - low)))
    elif config.reach is not None:
        ends = [(-config.reach, config.reach)] * 2
    elif space is not None:
        ends = []
        for value in space.values.tolist():
            reach = math.sqrt(2.0 * EIGEN_RISE / max(abs(value), 1e-12))
            ends.append((-reach, reach))
    xs, ys = (_axis(*end, count) for end, count in zip(ends, config.points, strict=True))
    return xs, ys


def _axis(low: float, high: float, count: int) -> Tensor:
    values = torch.linspace(low, high, count, dtype=torch.float64)
    if low == -high and count % 2:
        values[count // 2] = 0.0  # where rounding may leave a trifle
    return values


def sweep_tables(values: Sweep) -> Mapping[str, list[dict[str, float]]]:
    """Return the tables of what was measured on a grid: rows of plain numbers."""
    columns = {
        f"{objective}_{metric}": values[objective, metric] for objective, metric in values.columns
    }
    rows = []
    for i, (x, y) in enumerate(values.points.reshape(-1, 2).tolist()):
        row = {"x": x, "y": y}
        for name, column in columns.items():
            row[name] = float(column.mean.flatten()[i])
            row[f"{name}_standard_error"] = float(column.standard_error.flatten()[i])
        rows.append(row)
    return {"points": rows}


def center_of(evaluation: Evaluation) -> float | None:
    """Return the loss at coordinates 0, where the grid has such a point."""
    points = evaluation.points.reshape(-1, 2)
    at = (points == 0.0).all(dim=1).nonzero()[:, 0]
    return float(evaluation.mean.flatten()[at[0]]) if len(at) else None
