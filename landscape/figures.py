"""Publication figures of paths, planes and trajectories; data in, axes out."""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from landscape.evaluate import Evaluation
from landscape.paths import Path
from landscape.planes import Plane
from landscape.trajectory import Trajectory, random_share, random_share_interval

# Okabe & Ito (2008), Color universal design; without the yellow, which is lost on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
NOT_FINITE = "0.8"
# A residual above this share of a point's distance from the origin is printed.
VISIBLE_RESIDUAL = 0.01
# Without an explicit floor, the colours span at most this range below the cap.
DEFAULT_RANGE = 1e-6
OUTLINE = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def plot_profile(
    evaluations: Mapping[str, Evaluation],
    *,
    ax: Axes | None = None,
    ends: tuple[str, str] = ("start", "end"),
    ylabel: str = "loss",
    log: bool = False,
) -> Axes:
    """Draw the loss along paths, with bands of two standard errors.

    Points where the loss is not finite leave a gap, and are counted in the legend.

    Args:
        evaluations: Evaluations along paths, by the name for the legend.
        ax: Axes to draw into; default a new figure.
        ends: What to call t = 0 and t = 1.
        ylabel: Name of the loss, with its unit.
        log: Whether the loss axis is logarithmic.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, or an evaluation is of a plane.

    Example:
        >>> import torch
        >>> from landscape.evaluate import Evaluation
        >>> t = torch.linspace(0, 1, 5).double()
        >>> n = torch.full((5,), 9.0).double()
        >>> plot_profile({"line": Evaluation(t, n, n * t, 2 * n)}).get_xlabel()
        'position t along the path'
    """
    _require_some("evaluations", evaluations)
    ax = ax or _new_axes((5.0, 3.2))
    for i, (name, evaluation) in enumerate(evaluations.items()):
        if evaluation.points.ndim != 1:
            raise ValueError(
                f'`evaluations["{name}"]` must be along a path, got one over a plane. Use '
                "`plot_plane`."
            )
        order = evaluation.points.argsort()
        t, mean = _numpy(evaluation.points[order]), _numpy(evaluation.mean[order])
        band = 2 * _numpy(evaluation.standard_error[order])
        bad = evaluation.num_nonfinite
        style = _line_style(i)
        ax.plot(t, mean, label=f"{name} ({bad} not finite)" if bad else name, **style)
        ax.fill_between(t, mean - band, mean + band, color=style["color"], alpha=0.2, linewidth=0)
    if log:
        ax.set_yscale("log", nonpositive="clip")
    for t in (0, 1):
        ax.axvline(t, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xticklabels([f"0\n{ends[0]}", "0.25", "0.5", "0.75", f"1\n{ends[1]}"])
    ax.set_xlabel("position t along the path")
    ax.set_ylabel(ylabel)
    _legend_above(ax, title="band: ±2 standard errors")
    return ax


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
    xs, ys = _grid_axes(evaluation)
    ax = ax or _new_axes((5.6, 4.2))
    losses = np.ma.masked_invalid(_numpy(evaluation.mean))
    low, high = _color_range(losses, floor, cap)
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
    note = "" if equal_aspect else ", other scale than x"
    ax.set_xlabel("x (distance in weight space)")
    ax.set_ylabel(f"y (distance in weight space{note})")
    if ax.get_legend_handles_labels()[0]:
        _legend_above(ax)
    return ax


def plot_trajectory(
    trajectories: Mapping[str, Trajectory],
    times: Sequence[float] | Sequence[int] | Float[Tensor, " t"],
    *,
    axes: Sequence[Axes] | None = None,
    names: Sequence[str] | None = None,
    time_label: str = "epoch",
    ylabel: str = "distance in weight space",
) -> list[Axes]:
    """Draw coordinates against time, one small axes a direction, and the distance outside them.

    The last axes shows the residual, because what happens outside a few directions is usually the
    larger part of the motion.

    Args:
        trajectories: Trajectories in one basis, by the name for the legend.
        times: Time of every point, the same for all.
        axes: Axes to draw into, one more than directions; default a new figure.
        names: Names of the directions. Default: direction 1, 2, ….
        time_label: Name of the time, with its unit.
        ylabel: Unit of coordinates and residual; coordinates are distances if the directions have
            length one.

    Returns:
        The axes, one a direction and one for the residual.

    Raises:
        ValueError: If there is nothing to draw, or trajectories, times, names and axes do not fit.
    """
    _require_some("trajectories", trajectories)
    time = _numpy(torch.as_tensor(times))
    k = next(iter(trajectories.values())).coordinates.shape[1]
    names = list(names or [f"direction {j + 1}" for j in range(k)])
    for name, trajectory in trajectories.items():
        if trajectory.coordinates.shape != (len(time), k):
            raise ValueError(
                f'`trajectories["{name}"]` must have shape [{len(time)}, {k}] like `times` and '
                f"the first one, got {list(trajectory.coordinates.shape)}."
            )
    if axes is None:
        axes = _new_column(k + 1)
    if len(names) != k or len(axes) != k + 1:
        raise ValueError(
            f"`names` must hold {k} names and `axes` {k + 1} axes, one for the residual, got "
            f"{len(names)} and {len(axes)}."
        )
    for i, (name, trajectory) in enumerate(trajectories.items()):
        columns = [*trajectory.coordinates.unbind(dim=1), trajectory.residuals]
        for ax, column in zip(axes, columns, strict=True):
            ax.plot(time, _numpy(column), label=name, **_line_style(i))
    for ax, title in zip(axes, [*names, "distance outside"], strict=True):
        ax.set_title(title, loc="left", fontsize="medium", pad=3)
        ax.yaxis.set_major_locator(MaxNLocator(4))
    for ax in axes[:-1]:
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.tick_params(labelbottom=False)
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel(time_label)
    axes[(k + 1) // 2].set_ylabel(ylabel)
    axes[0].legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return list(axes)


def plot_share(
    shares: Mapping[str, Float[Tensor, "*repeats k"]],
    ks: Sequence[int],
    dimension: int,
    *,
    ax: Axes | None = None,
    level: float = 0.95,
    subspace: str = "top-k eigenspace",
) -> Axes:
    """Draw the share of differences in the top-k eigenspace against k, over the random floor.

    Args:
        shares: Shares |P_k δ| / |δ| by name: one value for every k, or one row of them for every
            repeat (seed). Of repeats, the line is the mean and bars reach from the smallest to the
            largest, which is all that a few repeats can tell.
        ks: Dimensions of the subspaces.
        dimension: Number of weights d.
        ax: Axes to draw into; default a new figure.
        level: Probability of the band of random directions.
        subspace: What the share is a share in.

    Returns:
        The axes, both scales logarithmic.

    Raises:
        ValueError: If there is nothing to draw, or a row is not as long as ``ks``.
    """
    _require_some("shares", shares)
    ax = ax or _new_axes((5.0, 3.6))
    for i, (name, share) in enumerate(shares.items()):
        rows = _numpy(share[None] if share.ndim == 1 else share)
        if rows.ndim != 2 or rows.shape[1] != len(ks):
            raise ValueError(
                f'`shares["{name}"]` must hold one value for each of the {len(ks)} entries of '
                f"`ks`, got shape {list(share.shape)}."
            )
        mean = rows.mean(axis=0)
        reach = np.stack([mean - rows.min(axis=0), rows.max(axis=0) - mean])
        many = len(rows) > 1
        ax.errorbar(
            ks,
            mean,
            yerr=reach if many else None,
            label=f"{name} ({len(rows)} runs)" if many else name,
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            capsize=2,
            elinewidth=1,
            **_line_style(i),
        )
    smooth = np.unique(np.geomspace(min(ks), max(ks), 100).round().astype(int)).tolist()
    low, high = zip(
        *(random_share_interval(k, dimension, level=level) for k in smooth), strict=True
    )
    ax.fill_between(smooth, low, high, color="0.5", alpha=0.3, linewidth=0)
    ax.plot(
        smooth,
        [random_share(k, dimension) for k in smooth],
        color="0.35",
        linewidth=1,
        label=f"random direction, {level:.0%}".replace("%", " %"),
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("k")
    ax.set_ylabel(f"share in the {subspace}")
    ax.legend(frameon=False)
    return ax


def save_figure(
    fig: Figure, path_without_suffix: str | FilePath, provenance: Mapping[str, str]
) -> tuple[FilePath, FilePath]:
    """Write a figure as PDF and PNG (200 dpi) that carry where they come from.

    Each file is complete or absent: it is written under a temporary name and then renamed. The
    same figure gives the same PDF, byte for byte, as no date is stored.

    Args:
        fig: The figure.
        path_without_suffix: Where to write; ``.pdf`` and ``.png`` are appended. The folder exists.
        provenance: What to store, e.g. commit, seeds, number of samples: in the PDF as *Subject*
            (to read) and *Keywords* (JSON), in the PNG as text chunks.

    Returns:
        The two paths, PDF first.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    base = FilePath(path_without_suffix)
    subject = "; ".join(f"{key}: {value}" for key, value in provenance.items())
    keywords = json.dumps(dict(provenance), ensure_ascii=False)
    pdf = {"Subject": subject, "Keywords": keywords, "CreationDate": None}
    # TrueType fonts: journals refuse Type 3.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        return (
            _write(fig, base.parent / f"{base.name}.pdf", "pdf", pdf),
            _write(fig, base.parent / f"{base.name}.png", "png", dict(provenance)),
        )


def _write(fig: Figure, path: FilePath, kind: str, metadata: dict[str, Any]) -> FilePath:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        fig.savefig(temporary, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _new_axes(size: tuple[float, float]) -> Axes:
    """One axes in a figure that pyplot does not know."""
    ax = Figure(figsize=size, layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _new_column(count: int) -> list[Axes]:
    """Small axes below each other with a common time axis."""
    fig = Figure(figsize=(5.0, 0.6 + 1.0 * count), layout="constrained")
    axes = [fig.add_subplot(count, 1, 1)]
    axes += [fig.add_subplot(count, 1, i + 1, sharex=axes[0]) for i in range(1, count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def _line_style(i: int) -> dict[str, Any]:
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": LINE_STYLES[i % len(LINE_STYLES)],
        "linewidth": 1.6,
    }


def _numpy(values: Tensor) -> Any:
    return values.detach().to(device="cpu", dtype=torch.float64).numpy()


def _require_some(name: str, values: Mapping[str, Any]) -> None:
    if not values:
        raise ValueError(f"`{name}` must hold at least one thing to draw, got none.")


def _grid_axes(evaluation: Evaluation) -> tuple[Any, Any]:
    """Values along both axes of a grid in "ij" order."""
    points = evaluation.points
    if points.ndim == 3 and min(points.shape[:2]) >= 2:
        xs, ys = points[:, 0, 0], points[0, :, 1]
        expected = torch.stack(torch.meshgrid(xs, ys, indexing="ij"), dim=-1)
        if torch.equal(points, expected) and bool((xs.diff() > 0).all() and (ys.diff() > 0).all()):
            return _numpy(xs), _numpy(ys)
    raise ValueError(
        "`evaluation` must be on a rectangular grid with at least two rising values an axis, as "
        f"`grid` makes it, got points of shape {list(points.shape)}."
    )


def _color_range(losses: Any, floor: float | None, cap: float | None) -> tuple[float, float]:
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
    for i, (name, w) in enumerate(points.items()):
        x, y, residual = plane.coordinates(w)
        off = residual > VISIBLE_RESIDUAL * _extent([(x, y, residual)])
        marker = MARKERS[i % len(MARKERS)]
        ax.plot(x, y, marker, color="white", markeredgecolor="black", markersize=8, zorder=5)
        # Towards the middle sideways, away from it upward, but not over the edge.
        rightward, height = x < (left + right) / 2, (y - bottom) / (top - bottom)
        upward = 0.5 <= height < 0.85 or height < 0.15
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


def _legend_above(ax: Axes, title: str | None = None) -> None:
    """One entry a row, over the axes: hides no data, and wide entries do not squeeze the axes."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        borderaxespad=0,
        frameon=False,
        fontsize="small",
        title=title,
        title_fontsize="small",
        alignment="left",
    )


def _extent(found: Sequence[tuple[float, float, float]]) -> float:
    """Largest distance from the origin of the plane."""
    return max(math.hypot(*point) for point in found)
