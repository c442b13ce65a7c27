"""Planes, curves and surfaces from files of other tools: values without weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from landscape.paths import Line, Path, PolyChain
from landscape.planes import Plane
from landscape.records import Evaluation

LINE_POINTS = 1001


@dataclass(frozen=True)
class LineMaximum:
    """The largest value on the way from one model to another, read off a file."""

    name: str
    value: float
    t: float
    """Where on the way, from 0 to 1."""
    ends: tuple[float, float]
    """Values at both models."""
    along: str = "straight line"
    """Which way."""

    @property
    def barrier(self) -> float:
        """The largest value over the mean of both ends."""
        return self.value - sum(self.ends) / 2

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return f"{self.name}: a value is missing on the {self.along}"
        return (
            f"{self.name}: at most {self.value:.4g} on the {self.along}, at t = {self.t:.2f}; "
            f"{self.ends[0]:.4g} and {self.ends[1]:.4g} at its ends, "
            f"{self.barrier:.4g} above their mean"
        )


@dataclass(frozen=True)
class PublishedPlane:
    """Values over a plane from a file, without the weights.

    Pass ``evaluation(name)``, ``plane``, ``points`` and ``curve`` to `plot_plane`: the plane stands
    for itself, and a point of it is its two coordinates.
    """

    grid: Float64[Tensor, "nx ny 2"]
    """Coordinates of entry [i, j]."""
    values: Mapping[str, Float64[Tensor, "nx ny"]]
    """What was measured, by name; NaN where it is missing."""
    points: Mapping[str, Float64[Tensor, "2"]]
    """Coordinates of the models, by name: start, bends, end; empty if the file has none."""
    curve: PolyChain | None
    """The trained curve in the plane, through the points that the file holds."""

    @property
    def plane(self) -> Plane:
        """The plane of the coordinates themselves."""
        e = torch.eye(2, dtype=torch.float64)
        unit = None if self.points else "multiples of the direction"  # of unknown length
        return Plane(torch.zeros(2, dtype=torch.float64), e[0], e[1], unit=unit)

    def evaluation(self, name: str) -> Evaluation:
        """Return one measure as our figures take it; the file has no standard errors.

        Raises:
            ValueError: If there is no such measure; the message lists what there is.
        """
        _require_name(name, self.values)
        return _without_errors(self.grid, self.values[name])

    def line_maximum(self, name: str) -> LineMaximum:
        """Return the largest value on the straight line from start to end.

        Interpolates linearly between grid points, in logarithms where all values are positive: a
        peak between them is missed, and the ends are as good as the grid around them. NaN if the
        line passes a cell with a missing value.

        Raises:
            ValueError: If there is no such measure, or the plane does not hold start and end.
        """
        start, end = self._ends()
        return self._maximum(name, Line(start, end), "straight line")

    def curve_maximum(self, name: str) -> LineMaximum:
        """Return the largest value along the trained curve, by the same interpolation.

        Raises:
            ValueError: If there is no such measure, or the plane does not hold the curve.
        """
        self._ends()
        if self.curve is None:
            raise ValueError("The file must hold a curve, and does not.")
        return self._maximum(name, self.curve, "curve")

    def _ends(self) -> tuple[Tensor, Tensor]:
        if len(self.points) < 2:
            raise ValueError("The file must say where two models are, and does not.")
        if len(self.points) > 3:
            raise ValueError(
                "The plane must hold both ends, but its writer puts it through the first three of "
                f"{len(self.points)} control points: what it shows at the end is another model."
            )
        start, *_, end = self.points.values()
        return start, end

    def _maximum(self, name: str, path: Path, along: str) -> LineMaximum:
        _require_name(name, self.values)
        values = self.values[name].numpy()
        positive = bool((values[np.isfinite(values)] > 0).all())
        field = RegularGridInterpolator(
            (self.grid[:, 0, 0].numpy(), self.grid[0, :, 1].numpy()),
            np.log(values) if positive else values,
            bounds_error=False,
            fill_value=np.nan,
        )
        ts = np.linspace(0, 1, LINE_POINTS)
        found = field(torch.stack([path(t) for t in ts.tolist()]).numpy())
        return _largest(name, ts, np.exp(found) if positive else found, along)


@dataclass(frozen=True)
class PublishedLine:
    """Values along a path from a file."""

    ts: Float64[Tensor, " m"]
    """Positions: t on a curve, or multiples of a direction."""
    values: Mapping[str, Float64[Tensor, " m"]]
    """What was measured, by name; NaN where it is missing."""
    length: float
    """Length of the curve in weight space, NaN if the file does not say."""
    between_models: bool = True
    """Whether it is known to run from one model at t = 0 to another at t = 1."""

    def evaluation(self, name: str) -> Evaluation:
        """Return one measure as our figures take it; the file has no standard errors.

        Raises:
            ValueError: If there is no such measure; the message lists what there is.
        """
        _require_name(name, self.values)
        return _without_errors(self.ts, self.values[name])

    def maximum(self, name: str) -> LineMaximum:
        """Return the largest value from one end of the path to the other.

        Raises:
            ValueError: If there is no such measure, or the file does not say that there are models
                at both ends.
        """
        _require_name(name, self.values)
        if not self.between_models:
            raise ValueError("The file must say that its line runs between models, and does not.")
        return _largest(name, self.ts.numpy(), self.values[name].numpy(), "path")


def _largest(name: str, ts: Any, values: Any, along: str) -> LineMaximum:
    ends = float(values[0]), float(values[-1])
    if not np.isfinite(values).all():
        return LineMaximum(name, np.nan, np.nan, ends, along)
    k = int(values.argmax())
    return LineMaximum(name, float(values[k]), float(ts[k]), ends, along)


def _without_errors(points: Tensor, values: Tensor) -> Evaluation:
    one = torch.ones_like(values)
    return Evaluation(points, one, values, values.square())


def _require_name(name: str, values: Mapping[str, Tensor]) -> None:
    if name not in values:
        raise ValueError(f'`name` must be one of {", ".join(values)}, got "{name}".')
