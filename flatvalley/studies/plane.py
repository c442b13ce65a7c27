"""What ``flatvalley plane`` does: the loss in the plane through three networks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flatvalley.process_group import all_ranks, from_first, world
from flatvalley.run import Run
from flatvalley.studies.connect import ConnectConfig, curve_between
from flatvalley.studies.landscape_networks import Networks, Precision
from landscape import (
    Barrier,
    BezierCurve,
    Line,
    Plane,
    PolyChain,
    Sweep,
    barrier,
    save_sweep,
    sweep,
)
from landscape import grid as make_grid

Progress = Callable[[int, int], None]

MARGIN = 0.25
"""Of the triangle's width and height that is left free around it, on each side."""
BEND = "bend of the curve"


@dataclass(frozen=True)
class PlaneConfig:
    """Settings of one plane.

    Raises:
        ValueError: If one is out of range; the message says what it must be.

    Example:
        >>> PlaneConfig(points=(1, 41))
        Traceback (most recent call last):
        ...
        ValueError: `points` must be at least 2 an axis, got 1 x 41.
    """

    points: tuple[int, int] = (41, 41)
    epochs: int = 30
    """Of the curve's training, where there is no third network."""
    lr: float = 0.1
    seed: int = 0
    samples: int | None = None
    """Training samples; None for 10,000 or all."""
    batch_norm: str = "recompute"
    precision: str = "full"
    """Of forward passes for what is measured; the curve trains in full."""

    def __post_init__(self) -> None:
        if min(self.points) < 2:
            shown = " x ".join(map(str, self.points))
            raise ValueError(f"`points` must be at least 2 an axis, got {shown}.")
        if self.epochs < 1:
            raise ValueError(f"`epochs` must be at least 1, got {self.epochs}.")
        if self.batch_norm == "interpolated":
            raise ValueError("`batch_norm` interpolated is for a line, not for a plane.")
        self.curve  # noqa: B018  refuses what is out of range

    @property
    def curve(self) -> ConnectConfig:
        """How a curve is trained whose bend is the third point."""
        return ConnectConfig(
            epochs=self.epochs,
            lr=self.lr,
            seed=self.seed,
            samples=self.samples,
            batch_norm=self.batch_norm,
            precision=self.precision,
        )


@dataclass(frozen=True)
class PlaneFindings:
    """The loss on a grid of the plane through three points."""

    config: PlaneConfig
    networks: Networks
    marks: dict[str, Tensor]
    """The three points by name."""
    plane: Plane
    values: Sweep
    curve: BezierCurve | PolyChain | None
    line: Barrier
    """Of the train loss on the straight line from the first point to the second."""


def plane(
    run: Run,
    networks: Networks,
    names: tuple[str, ...],
    config: PlaneConfig,
    *,
    workers: int = 1,
    trains: Progress | None = None,
    measures: Progress | None = None,
) -> PlaneFindings:
    """Evaluate the loss in the plane of three networks, or of two and the bend of a curve.

    Finished epochs and points are kept in the run's folder; a plane that was cut off goes on with
    the others and ends with the same bits. Processes of ``torchrun`` share the points; the first
    one trains.

    Raises:
        ValueError: If points coincide, or lie on one line.
        NonFiniteError: If the training of the curve does not stay finite. A loss that is not
            finite in the plane is kept as such.
    """
    curve: Any = None
    marks = dict(zip(names, networks.weights, strict=True))
    if len(marks) == 2:
        curve, _ = curve_between(run, networks, config.curve, progress=trains)
        marks[BEND] = curve.control_points[1]
    a, b, c = marks.values()
    through = Plane.through(a, b, c)
    through = replace(through, u=from_first(through.u), v=from_first(through.v))
    corners = torch.tensor([through.coordinates(w)[:2] for w in (a, b, c)], dtype=torch.float64)
    low, high = corners.min(dim=0).values, corners.max(dim=0).values
    free = MARGIN * (high - low)
    xs, ys = (
        torch.linspace(float(low[i] - free[i]), float(high[i] + free[i]), n, dtype=torch.float64)
        for i, n in enumerate(config.points)
    )
    policy = networks.batch_norm(config.batch_norm)
    precision = cast(Precision, config.precision)
    values = sweep(
        networks.objectives,
        through,
        make_grid(xs, ys),
        metrics=networks.metrics,
        batch_norm=policy,
        precision=precision,
        folder=run.path / "points",
        workers=workers,
        group=all_ranks(),
        progress=measures,
    )
    if world()[0] == 0:
        save_sweep(values, run.path / "surface.safetensors")
    line = barrier(
        networks.train,
        Line(a, b),
        batch_norm=policy,
        precision=precision,
        folder=run.path / "line",
        workers=workers,
        group=all_ranks(),
    )
    return PlaneFindings(config, networks, marks, through, values, curve, line)
