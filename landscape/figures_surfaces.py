"""Figures over a plane beside the filled one: lines, a surface in space, curvature, a run on it."""

from collections.abc import Mapping
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]

from landscape.figure_style import COLORS, OUTLINE, legend_above, new_axes, to_numpy
from landscape.plane_figure import NOT_FINITE, axis_labels, color_range, grid_axes
from landscape.planes import Plane
from landscape.records import Evaluation
from landscape.trajectory import Trajectory

# Elevation and azimuth of every surface, so that two of them can be held side by side.
CAMERA = (32.0, -60.0)
# Li et al. (2018) show ratios up to here.
LARGEST_RATIO = 0.5


def plot_contours(
    evaluation: Evaluation,
    plane: Plane,
    *,
    num_levels: int = 12,
    floor: float | None = None,
    cap: float | None = None,
    spacing: Literal["log", "linear"] = "log",
    origin: str | None = "minimum",
    equal_aspect: bool = True,
    label: str = "loss",
    ax: Axes | None = None,
) -> Axes:
    """Draw the loss over a plane as lines that carry their values.

    Args:
        evaluation: Evaluation on a `grid`, points of shape [nx, ny, 2].
        plane: The plane of the evaluation.
        num_levels: Number of lines.
        floor: Lowest level. Default: the smallest positive loss, at most six decades below the
            largest.
        cap: Highest level. Default: the largest loss.
        spacing: Whether levels have equal ratios or equal differences.
        origin: What to call the point at x = y = 0; None leaves it out.
        equal_aspect: Whether a unit is as long upward as sideways. If not, the axes say so.
        label: Name of the loss, with its unit.
        ax: Axes to draw into; default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If the evaluation is not on a rectangular grid, has no finite loss, or the floor
            is not positive and below the cap.
    """
    xs, ys = grid_axes(evaluation)
    ax = ax or new_axes((4.6, 4.4))
    losses = np.ma.masked_invalid(to_numpy(evaluation.mean))
    low, high = color_range(losses, floor, cap)
    make = np.geomspace if spacing == "log" else np.linspace
    levels = make(low, high, num_levels + 2)[1:-1]
    norm = LogNorm(low, high) if spacing == "log" else Normalize(low, high)
    # LogNorm would blank a loss of zero, as if it were missing.
    drawn: Any = losses.clip(min=1e-3 * low) if spacing == "log" else losses
    # Values are [x, y]; contour wants rows of equal y.
    lines = ax.contour(xs, ys, drawn.T, levels=levels, norm=norm, cmap="viridis", linewidths=1.2)
    ax.clabel(lines, fontsize=7, fmt=lambda value: f"{value:.2g}", inline_spacing=3)
    _note_not_finite(ax, evaluation)
    if origin is not None and xs[0] <= 0 <= xs[-1] and ys[0] <= 0 <= ys[-1]:
        ax.plot(0, 0, "o", color="black", markersize=4, label=origin)
    _name_axes(ax, plane, equal_aspect)
    ax.plot([], [], color="0.4", label=f"{label}, lines in equal {_STEPS[spacing]}")
    legend_above(ax)
    return ax


def plot_surface(
    evaluation: Evaluation,
    plane: Plane,
    *,
    floor: float | None = None,
    cap: float | None = None,
    label: str = "loss",
    camera: tuple[float, float] = CAMERA,
    ax: Axes3D | None = None,
) -> Axes3D:
    """Draw the loss over a plane as a surface in space, its height logarithmic.

    Good for a first impression; heights are read off `plot_plane` or `plot_contours`.

    Args:
        evaluation: Evaluation on a `grid`, points of shape [nx, ny, 2].
        plane: The plane of the evaluation.
        floor: Losses up to here are drawn at this height. Default as in `plot_plane`.
        cap: Losses from here on are drawn at this height, and the axis says so.
        label: Name of the loss, with its unit.
        camera: Elevation and azimuth in degrees.
        ax: Axes in space to draw into, ``figure.add_subplot(projection="3d")``; default a new
            figure.

    Returns:
        The axes.

    Raises:
        ValueError: If the evaluation is not on a rectangular grid, has no finite loss, or the floor
            is not positive and below the cap.
    """
    xs, ys = grid_axes(evaluation)
    if ax is None:
        figure = Figure(figsize=(5.6, 4.6))
        # Added as a subplot: an Axes3D that is made on its own no longer joins the figure.
        ax = figure.add_subplot(projection="3d")
    assert isinstance(ax, Axes3D)
    losses = np.ma.masked_invalid(to_numpy(evaluation.mean))
    low, high = color_range(losses, floor, cap)
    over = bool((losses > high).any())
    heights = np.log10(losses.clip(low, high)).filled(np.nan)
    X, Y = np.meshgrid(xs, ys, indexing="ij")
    ax.plot_surface(
        X,
        Y,
        heights,
        cmap="viridis",
        norm=Normalize(np.log10(low), np.log10(high)),
        rcount=100,
        ccount=100,
        linewidth=0.15,
        edgecolor=(1, 1, 1, 0.3),
        antialiased=True,
    )
    ax.view_init(*camera)
    ticks = _log_ticks(low, high)
    names = [f"{tick:g}" for tick in ticks]
    if over:  # the highest tick is the cap
        ticks = [*(tick for tick in ticks if tick < 0.8 * high), high]
        names = [*(f"{tick:g}" for tick in ticks[:-1]), f"≥ {high:.2g}"]
    ax.set_zticks(np.log10(ticks).tolist(), names)
    # Two lines each, so that neighbours do not run into each other at the corner.
    xlabel, ylabel = (name.replace(" (", "\n(") for name in axis_labels(plane))
    ax.set_xlabel(xlabel, fontsize="small", labelpad=10)
    ax.set_ylabel(ylabel, fontsize="small", labelpad=10)
    ax.set_zlabel(f"{label} (log)", fontsize="small")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    ax.tick_params(labelsize=7)
    ax.set_box_aspect((1, 1, 0.7), zoom=0.84)
    return ax


def plot_eigen_ratio(
    largest: Evaluation,
    smallest: Evaluation,
    plane: Plane,
    *,
    cap: float = LARGEST_RATIO,
    equal_aspect: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw |λ_min / λ_max| of the Hessian over a plane: near zero, the loss is convex there.

    A random slice shows mean curvature and hides saddles; this map shows where it does.

    Args:
        largest: Largest eigenvalues on a `grid`, as a ``"top_eigenvalue"`` sweep has them.
        smallest: Smallest eigenvalues at the same points.
        plane: The plane of both.
        cap: Ratios from here on share one colour.
        equal_aspect: Whether a unit is as long upward as sideways.
        ax: Axes to draw into; default a new figure.

    Returns:
        The axes; the colour bar is ``ax.child_axes[0]``.

    Raises:
        ValueError: If the evaluations are not on one rectangular grid, or ``cap`` is not positive.

    References:
        Li et al. (2018), Visualizing the loss landscape of neural nets, section 6.
    """
    xs, ys = grid_axes(largest)
    if largest.points.shape != smallest.points.shape or not bool(
        (largest.points == smallest.points).all()
    ):
        raise ValueError("`largest` and `smallest` must be on one grid, got different points.")
    if not cap > 0:
        raise ValueError(f"`cap` must be positive, got {cap}.")
    ratio = np.ma.masked_invalid(abs(to_numpy(smallest.mean / largest.mean)))
    ax = ax or new_axes((5.2, 4.2))
    ax.set_facecolor(NOT_FINITE)
    over = bool((ratio > cap).any())
    colors = matplotlib.colormaps["cividis"].with_extremes(over="#fff7bc")
    drawn = ax.pcolormesh(xs, ys, ratio.T, cmap=colors, vmin=0, vmax=cap, shading="nearest")
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(
        drawn,
        cax=ax.inset_axes((1.03, 0, 0.035, 1)),
        extend="max" if over else "neither",
        label="|smallest / largest eigenvalue|",
    )
    if over:
        bar.ax.text(
            0.5, 1.08, f"≥ {cap:.2g}", transform=bar.ax.transAxes, ha="center", fontsize="small"
        )
    missing = ratio.size - int(ratio.count())
    if missing:
        ax.plot([], [], "s", color=NOT_FINITE, label=f"not finite ({missing})")
        legend_above(ax)
    _name_axes(ax, plane, equal_aspect)
    return ax


def plot_run_on_plane(
    trajectory: Trajectory,
    plane: Plane,
    *,
    evaluation: Evaluation | None = None,
    marks: Mapping[int, str] | None = None,
    cap: float | None = None,
    floor: float | None = None,
    num_levels: int = 15,
    equal_aspect: bool = True,
    label: str = "loss",
    ax: Axes | None = None,
) -> Axes:
    """Draw a training run on a plane, such as that of its principal components.

    A point of the run lies off the plane, and the contours under it are not its loss. The fainter
    a point is, the smaller the share of its squared distance that the plane explains.

    Args:
        trajectory: Coordinates in the two directions of the plane, from `project_trajectory`.
        plane: The plane, e.g. ``Plane.along(found.center, found.directions)`` for
            `principal_components`, whose names with their shares label the axes.
        evaluation: The loss on a `grid` of the plane, drawn as lines.
        marks: Points to mark by their number, with what to call them, e.g. a drop of the learning
            rate. Start and end are always marked.
        cap: Highest level of the lines.
        floor: Lowest level of the lines.
        num_levels: Number of lines, in equal ratios.
        equal_aspect: Whether a unit is as long upward as sideways.
        label: Name of the loss, with its unit.
        ax: Axes to draw into; default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If the trajectory has other than two coordinates, a mark is not one of its
            points, or the evaluation is not on a rectangular grid.
    """
    xy = to_numpy(trajectory.coordinates)
    if xy.shape[1] != 2:
        raise ValueError(f"`trajectory` must have two coordinates, got {xy.shape[1]}.")
    for i in marks or {}:
        if not 0 <= i < len(xy):
            raise ValueError(f"`marks` must number the {len(xy)} points from 0, got {i}.")
    ax = ax or new_axes((5.2, 4.4))
    if evaluation is not None:
        xs, ys = grid_axes(evaluation)
        losses = np.ma.masked_invalid(to_numpy(evaluation.mean))
        low, high = color_range(losses, floor, cap)
        levels, norm = np.geomspace(low, high, num_levels + 2)[1:-1], LogNorm(low, high)
        lines = ax.contour(
            xs, ys, losses.T, levels=levels, norm=norm, cmap="viridis", linewidths=0.9
        )
        ax.clabel(lines, fontsize=6, fmt=lambda value: f"{value:.2g}", inline_spacing=2)
        _note_not_finite(ax, evaluation)
    ax.plot(*xy.T, color=COLORS[1], linewidth=1, alpha=0.6, zorder=3)
    share = np.nan_to_num(to_numpy(trajectory.explained_fraction), nan=1.0).clip(0, 1)
    explained = f"run; the plane explains {100 * share.min():.0f} to {100 * share.max():.0f} %"
    ax.scatter(
        xy[:, 0],
        xy[:, 1],
        s=14,
        color=COLORS[1],
        alpha=0.15 + 0.85 * share,
        zorder=4,
        linewidths=0,
        label=explained,
    )
    named = {0: "start", len(xy) - 1: "end"} | dict(marks or {})
    for i, name in named.items():
        end = i in (0, len(xy) - 1)
        ax.plot(*xy[i], "s" if end else "D", color="white", markeredgecolor="black", zorder=5)
        ax.annotate(
            name, xy[i], xytext=(6, 5), textcoords="offset points", path_effects=OUTLINE, zorder=6
        )
    _name_axes(ax, plane, equal_aspect)
    if evaluation is not None:
        ax.plot([], [], color="0.4", linewidth=0.9, label=f"{label}, lines in equal ratios")
    legend_above(ax)
    return ax


_STEPS = {"log": "ratios", "linear": "differences"}


def _name_axes(ax: Axes, plane: Plane, equal_aspect: bool) -> None:
    x, y = axis_labels(plane)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if equal_aspect:
        ax.set_aspect("equal")
    ax.set_xlabel(x)
    ax.set_ylabel(y if equal_aspect else f"{y[:-1]}, other scale than x)")


def _note_not_finite(ax: Axes, evaluation: Evaluation) -> None:
    """Grey cells around these points alone: between lines, the rest is bare axes."""
    if not evaluation.num_nonfinite:
        return
    xs, ys = grid_axes(evaluation)
    finite = np.isfinite(to_numpy(evaluation.mean))
    # Values are [x, y]; pcolormesh wants rows of equal y.
    cells: Any = np.ma.masked_where(finite, np.zeros(finite.shape)).T
    ax.pcolormesh(xs, ys, cells, cmap=ListedColormap([NOT_FINITE]), shading="nearest", zorder=0)
    ax.set_xlim(xs[0], xs[-1])
    ax.set_ylim(ys[0], ys[-1])
    ax.plot([], [], "s", color=NOT_FINITE, label=f"not finite ({evaluation.num_nonfinite})")


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values between two losses, a handful of them."""
    steps = [
        float(m * 10.0**e)
        for e in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        for m in (1, 2, 5)
    ]
    inside = [tick for tick in steps if low <= tick <= high] or [low, high]
    decades = [tick for tick in inside if np.isclose(np.log10(tick) % 1, 0)]
    return decades if len(decades) >= 3 else inside
