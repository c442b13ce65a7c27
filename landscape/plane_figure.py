"""The loss on a plane, as filled contours with the models and the path drawn in it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from landscape.figure_style import MARKERS, OUTLINE, legend_above, new_axes, to_numpy
from landscape.paths import Path
from landscape.planes import Plane
from landscape.records import Evaluation

NOT_FINITE = "0.8"
# A residual above this share of a point's distance from the origin is printed.
VISIBLE_RESIDUAL = 0.01
# Without an explicit floor, the colours span at most this range below the cap.
DEFAULT_RANGE = 1e-6


def plot_plane(
    evaluation: Evaluation,
    plane: Plane,
    points: Mapping[str, Tensor],
    *,
    curve: Path | None = None,
    cap: float | None = None,
    floor: float | None = None,
    num_levels: int = 20,
    equal_aspect: bool = True,
    label: str = "loss",
    ax: Axes | None = None,
) -> Axes:
    """Draw the loss over a plane as filled contours in logarithmic colours.

    Marked points are drawn where they fall on the plane. One that lies off it, by more than 1 % of
    its distance from the origin, says by how much: the colour under it is not its loss.

    Args:
        evaluation: Evaluation on a `grid`, points of shape [nx, ny, 2].
        plane: The plane of the evaluation.
        points: Weights to mark, by label.
        curve: A path to draw, with the chord between its ends dashed.
        cap: Losses from here on share one colour, marked in the colour bar. Default: no cap.
        floor: Losses up to here share the lowest colour. Default: the smallest positive loss, at
            most six decades below the largest.
        num_levels: Number of contour levels.
        equal_aspect: Whether a unit is as long upward as sideways. If not, the axes say so.
        label: Name of the loss, with its unit.
        ax: Axes to draw into; default a new figure.

    Returns:
        The axes; the colour bar is ``ax.child_axes[0]``.

    Raises:
        ValueError: If the evaluation is not on a rectangular grid of at least two values an axis,
            has no finite loss, or the floor is not positive and below the cap.
    """
    xs, ys = grid_axes(evaluation)
    ax = ax or new_axes((5.6, 4.2))
    losses = np.ma.masked_invalid(to_numpy(evaluation.mean))
    low, high = color_range(losses, floor, cap)
    over, under = bool((losses > high).any()), bool((losses < low).any())
    extend = {(0, 0): "neither", (0, 1): "max", (1, 0): "min", (1, 1): "both"}[under, over]
    colors = matplotlib.colormaps["viridis"].with_extremes(over="#fff7bc", under="#2d004b")
    levels = np.geomspace(low, high, num_levels)
    levels[[0, -1]] = low, high  # geomspace rounds; the extremes must be inside
    # LogNorm would blank a loss of zero, as if it were missing.
    drawn: Any = losses.clip(min=1e-3 * low)
    # Values are [x, y]; contourf wants rows of equal y.
    filled = ax.contourf(
        xs, ys, drawn.T, levels=levels, norm=LogNorm(low, high), cmap=colors, extend=extend
    )
    ax.contour(xs, ys, drawn.T, levels=levels, colors="white", linewidths=0.3, alpha=0.5)
    if evaluation.num_nonfinite:
        ax.set_facecolor(NOT_FINITE)
        ax.plot([], [], "s", color=NOT_FINITE, label=f"not finite ({evaluation.num_nonfinite})")
    _add_colorbar(ax, filled, label, cap=high if over else None, floor=low if under else None)
    if curve is not None:
        _draw_curve(ax, plane, curve)
    ax.set_xlim(xs[0], xs[-1])
    ax.set_ylim(ys[0], ys[-1])
    _draw_points(ax, plane, points)
    if equal_aspect:
        ax.set_aspect("equal")
    xlabel, ylabel = axis_labels(plane)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel if equal_aspect else f"{ylabel[:-1]}, other scale than x)")
    if ax.get_legend_handles_labels()[0]:
        legend_above(ax)
    return ax


def axis_labels(plane: Plane) -> tuple[str, str]:
    """What the axes of a plane are, with their unit."""
    if plane.unit is not None:
        units = [plane.unit] * 2
    elif plane.is_orthonormal:
        units = ["distance in weight space"] * 2
    else:
        units = [f"1 is a distance of {length:.3g}" for length in plane.lengths]
    return f"{plane.labels[0]} ({units[0]})", f"{plane.labels[1]} ({units[1]})"


def grid_axes(evaluation: Evaluation) -> tuple[Any, Any]:
    """Values along both axes of a grid in "ij" order; refuses anything else."""
    points = evaluation.points
    if points.ndim == 3 and min(points.shape[:2]) >= 2:
        xs, ys = points[:, 0, 0], points[0, :, 1]
        expected = torch.stack(torch.meshgrid(xs, ys, indexing="ij"), dim=-1)
        if torch.equal(points, expected) and bool((xs.diff() > 0).all() and (ys.diff() > 0).all()):
            return to_numpy(xs), to_numpy(ys)
    raise ValueError(
        "`evaluation` must be on a rectangular grid with at least two rising values an axis, as "
        f"`grid` makes it, got points of shape {list(points.shape)}."
    )


def color_range(losses: Any, floor: float | None, cap: float | None) -> tuple[float, float]:
    """Smallest and largest loss that have a colour of their own."""
    if losses.count() == 0:
        raise ValueError("`evaluation` must have a finite loss somewhere to draw, got none.")
    high = float(losses.max()) if cap is None else cap
    positive = losses[losses > 0].compressed()
    if floor is None:
        smallest = float(positive.min()) if len(positive) else 1.0
        floor = max(smallest, high * DEFAULT_RANGE)
        if cap is None and high <= floor:  # a constant loss
            high = 10 * floor
    if not 0 < floor < high:
        raise ValueError(
            f"`floor` must be positive and below `cap`, got {floor:.3g} and {high:.3g}."
        )
    return floor, high


def _add_colorbar(
    ax: Axes, filled: Any, label: str, *, cap: float | None, floor: float | None
) -> None:
    figure = ax.get_figure()
    assert figure is not None
    # Inset, so that it is as tall as the plane whatever the aspect.
    bar = figure.colorbar(filled, cax=ax.inset_axes((1.03, 0, 0.035, 1)), label=label)
    bar.ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    # Beyond the arrows that stand for the two extremes.
    if cap is not None:
        bar.ax.text(
            0.5,
            1.08,
            f"≥ {cap:.2g}",
            ha="center",
            va="bottom",
            transform=bar.ax.transAxes,
            fontsize="small",
        )
    if floor is not None:
        bar.ax.text(
            0.5,
            -0.08,
            f"≤ {floor:.2g}",
            ha="center",
            va="top",
            transform=bar.ax.transAxes,
            fontsize="small",
        )


def _draw_curve(ax: Axes, plane: Plane, curve: Path) -> None:
    found = [plane.coordinates(curve(i / 100)) for i in range(101)]
    xs, ys, residuals = zip(*found, strict=True)
    far = max(residuals)
    off = f" (up to {far:.2g} off the plane)" if far > VISIBLE_RESIDUAL * _extent(found) else ""
    around = [patheffects.withStroke(linewidth=4, foreground="black")]
    ax.plot(
        [xs[0], xs[-1]], [ys[0], ys[-1]], "--", color="white", linewidth=1.4, label="straight line",
        path_effects=[patheffects.withStroke(linewidth=2.6, foreground="black")],
    )  # fmt: skip
    ax.plot(xs, ys, color="white", linewidth=2.2, path_effects=around, label=f"curve{off}")


def _draw_points(ax: Axes, plane: Plane, points: Mapping[str, Tensor]) -> None:
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    places = [plane.coordinates(w) for w in points.values()]
    middle = sum(y for _, y, _ in places) / max(len(places), 1)
    for i, (name, (x, y, residual)) in enumerate(zip(points, places, strict=True)):
        off = residual > VISIBLE_RESIDUAL * _extent([(x, y, residual)])
        marker = MARKERS[i % len(MARKERS)]
        ax.plot(x, y, marker, color="white", markeredgecolor="black", markersize=8, zorder=5)
        # Towards the middle sideways, away from the other points upward, but not over the edge.
        rightward, height = x < (left + right) / 2, (y - bottom) / (top - bottom)
        upward = height < 0.85 and (y > middle or height < 0.15)
        ax.annotate(
            f"{name}\n{residual:.2g} off the plane" if off else name,
            (x, y),
            xytext=(7 if rightward else -7, 5 if upward else -5),
            textcoords="offset points",
            ha="left" if rightward else "right",
            va="bottom" if upward else "top",
            path_effects=OUTLINE,
            zorder=6,
            annotation_clip=True,
        )


def _extent(found: Sequence[tuple[float, float, float]]) -> float:
    """Largest distance from the origin of the plane."""
    return max(math.hypot(*point) for point in found)
