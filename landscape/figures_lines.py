"""Figures over one axis: interpolations, random lines, barriers, shares and norms over time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from landscape.figure_style import (
    COLORS,
    MARKERS,
    legend_above,
    line_style,
    log_scale,
    new_axes,
    new_column,
    require_some,
    to_numpy,
)
from landscape.records import Evaluation
from landscape.trajectory import random_share, random_share_interval

DASHES = ("-", "--", ":", "-.")
NAIVE, MATCHED = "0.55", COLORS[2]


def plot_interpolation(
    losses: Mapping[str, Evaluation],
    errors: Mapping[str, Evaluation] | None = None,
    *,
    ax: Axes | None = None,
    ends: tuple[str, str] = ("A", "B"),
    ylabel: str = "loss",
    log: bool = False,
) -> Axes:
    """Draw loss and accuracy on the line through two models, beyond both of them.

    The loss has the left axis, the accuracy the right one. Bands are two standard errors.

    Args:
        losses: Evaluations along one line by part of the data, e.g. train (solid) and test
            (dashed).
        errors: Evaluations of the 0-1 loss under the same names; their complement is drawn.
        ax: Axes to draw into; default a new figure.
        ends: What to call t = 0 and t = 1.
        ylabel: Name of the loss, with its unit.
        log: Whether the loss axis is logarithmic.

    Returns:
        The axes of the loss; that of the accuracy is ``ax.child_axes[0]``.

    Raises:
        ValueError: If there is nothing to draw, or an evaluation is of a plane.
    """
    require_some("losses", losses)
    ax = ax or new_axes((5.2, 3.2))
    _draw_lines(ax, losses, COLORS[0])
    ax.set_xlabel("position t on the line")
    ax.set_ylabel(ylabel, color=COLORS[0])
    ax.tick_params(axis="y", colors=COLORS[0])
    if log:
        log_scale(ax)
    _mark_ends(ax, ends)
    if errors:
        # An inset that covers the axes, so that layouts and callers see one axes with a child.
        right = ax.inset_axes((0, 0, 1, 1), sharex=ax)
        right.patch.set_visible(False)
        right.spines[["top", "left", "bottom"]].set_visible(False)
        right.spines["right"].set_visible(True)
        right.yaxis.tick_right()
        right.yaxis.set_label_position("right")
        right.tick_params(axis="x", bottom=False, labelbottom=False)
        _draw_lines(right, errors, COLORS[1], lambda mean: 100 * (1 - mean), scale=100.0)
        right.set_ylim(0, 100)
        right.set_ylabel("accuracy (%)", color=COLORS[1])
        right.tick_params(axis="y", colors=COLORS[1])
    for name, dash in zip(losses, DASHES, strict=False):
        ax.plot([], [], color="0.3", linestyle=dash, label=name)
    legend_above(ax, title="band: ±2 standard errors")
    return ax


def plot_random_lines(
    evaluations: Mapping[str, Sequence[Evaluation]],
    *,
    ax: Axes | None = None,
    xlabel: str = "step α along a filter-normalised direction",
    ylabel: str = "loss",
    log: bool = False,
) -> Axes:
    """Draw the loss along random directions: the mean over them, with the band of all.

    Args:
        evaluations: Evaluations along one direction a seed, all at the same points, by the name of
            the model.
        ax: Axes to draw into; default a new figure.
        xlabel: What the position is, with the normalisation that gives it its unit.
        ylabel: Name of the loss, with its unit.
        log: Whether the loss axis is logarithmic.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, or evaluations of one model have other points.
    """
    require_some("evaluations", evaluations)
    ax = ax or new_axes((5.0, 3.2))
    for i, (name, found) in enumerate(evaluations.items()):
        points = found[0].points if len(found) else torch.zeros(0, 0)
        if points.ndim != 1 or not all(torch.equal(e.points, points) for e in found):
            raise ValueError(
                f'`evaluations["{name}"]` must be along lines, at the same points for every seed.'
            )
        order = points.argsort()
        rows = np.stack([to_numpy(e.mean[order]) for e in found])
        x, style = to_numpy(points[order]), line_style(i)
        ax.plot(x, rows.mean(axis=0), label=f"{name} ({len(rows)} directions)", **style)
        ax.fill_between(
            x, rows.min(axis=0), rows.max(axis=0), color=style["color"], alpha=0.2, linewidth=0
        )
    if log:
        log_scale(ax)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    legend_above(ax, title="line: mean, band: smallest to largest")
    return ax


def plot_barriers(
    barriers: Mapping[str, Float[Tensor, "*repeats k"]],
    xs: Sequence[float] | Sequence[int],
    *,
    errors: Mapping[str, Float[Tensor, " k"]] | None = None,
    ax: Axes | None = None,
    xlabel: str = "epoch",
    ylabel: str = "barrier",
    log_x: bool = False,
) -> Axes:
    """Draw barriers against epoch, width or sparsity; below zero, where there is none, hatched.

    Args:
        barriers: Barriers by name, e.g. train and test: one for each x, or one row of them for each
            repeat. Of repeats, the line is the mean and bars reach from the smallest to the
            largest.
        xs: Where they were measured.
        errors: Half widths of intervals for rows without repeats, by name.
        ax: Axes to draw into; default a new figure.
        xlabel: What ``xs`` is, with its unit.
        ylabel: Name of the barrier, with its unit.
        log_x: Whether the x axis is logarithmic, as for widths.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, or a row is not as long as ``xs``.
    """
    require_some("barriers", barriers)
    ax = ax or new_axes((5.0, 3.2))
    for i, (name, values) in enumerate(barriers.items()):
        rows = _rows(f'barriers["{name}"]', values, len(xs))
        mean, reach = _mean_and_reach(rows)
        if len(rows) == 1:
            reach = to_numpy(errors[name]) if errors and name in errors else None
        ax.errorbar(
            xs,
            mean,
            yerr=reach,
            label=f"{name} ({len(rows)} runs)" if len(rows) > 1 else name,
            marker=MARKERS[(0, 3)[i % 2]],
            markersize=5,
            capsize=2,
            elinewidth=1,
            **line_style(i),
        )
    if log_x:
        ax.set_xscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.06 * (high - min(low, 0.0))), high)
    ax.axhspan(ax.get_ylim()[0], 0, facecolor="none", edgecolor="0.75", hatch="////", linewidth=0)
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    legend_above(ax)
    return ax


def plot_matching(
    naive: Mapping[str, Evaluation],
    matched: Mapping[str, Evaluation],
    *,
    ax: Axes | None = None,
    ends: tuple[str, str] = ("A", "B"),
    ylabel: str = "loss",
    log: bool = False,
) -> Axes:
    """Draw the loss on the line between two runs, as they are and after `align`.

    Args:
        naive: Evaluations between the runs as they are by part of the data, e.g. train (solid)
            and test (dashed).
        matched: The same after the units of one were moved.
        ax: Axes to draw into; default a new figure.
        ends: What to call t = 0 and t = 1.
        ylabel: Name of the loss, with its unit.
        log: Whether the loss axis is logarithmic.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, the two have different names, or an evaluation is
            of a plane.
    """
    require_some("naive", naive)
    if set(naive) != set(matched):
        raise ValueError(
            f"`matched` must have the names of `naive`, {', '.join(naive)}, got "
            f"{', '.join(matched) or 'none'}."
        )
    ax = ax or new_axes((5.0, 3.2))
    _draw_lines(ax, naive, NAIVE)
    _draw_lines(ax, matched, MATCHED)
    for label, color in (("units as trained", NAIVE), ("units matched", MATCHED)):
        ax.plot([], [], color=color, linewidth=3, label=label)
    if len(naive) > 1:
        for name, dash in zip(naive, DASHES, strict=False):
            ax.plot([], [], color="0.3", linestyle=dash, label=name)
    if log:
        log_scale(ax)
    _mark_ends(ax, ends)
    ax.set_xlabel("position t on the line")
    ax.set_ylabel(ylabel)
    legend_above(ax, title="band: ±2 standard errors")
    return ax


def plot_share_over_time(
    shares: Mapping[str, Float[Tensor, "*repeats t"]],
    times: Sequence[float] | Sequence[int],
    k: int,
    dimension: int,
    *,
    ax: Axes | None = None,
    level: float = 0.95,
    time_label: str = "epoch",
    subspace: str = "top-{k} eigenspace",
) -> Axes:
    """Draw the share of a difference in the top-k eigenspace over time, above the random floor.

    Args:
        shares: Shares |P δ| / |δ| by name: one for each time, or one row of them for each seed.
            Of seeds, the line is the mean and the band reaches from the smallest to the largest.
        times: When they were measured.
        k: Dimension of the subspace.
        dimension: Number of weights d; √(k/d) is what a random difference scores.
        ax: Axes to draw into; default a new figure.
        level: Probability of the band of random directions.
        time_label: Name of the time, with its unit.
        subspace: What the share is a share in; ``{k}`` is filled in.

    Returns:
        The axes, the share logarithmic.

    Raises:
        ValueError: If there is nothing to draw, a row is not as long as ``times``, or k is not
            between 1 and d.
    """
    require_some("shares", shares)
    floor, band = random_share(k, dimension), random_share_interval(k, dimension, level=level)
    ax = ax or new_axes((5.0, 3.2))
    for i, (name, values) in enumerate(shares.items()):
        rows = _rows(f'shares["{name}"]', values, len(times))
        style = line_style(i)
        label = f"{name} ({len(rows)} seeds, band: all)" if len(rows) > 1 else name
        ax.plot(times, rows.mean(axis=0), marker=MARKERS[i % 7], markersize=3, label=label, **style)
        if len(rows) > 1:
            low, high = rows.min(axis=0), rows.max(axis=0)
            ax.fill_between(times, low, high, color=style["color"], alpha=0.2, linewidth=0)
    ax.axhspan(*band, color="0.5", alpha=0.3, linewidth=0)
    label = f"random direction √(k/d), {level:.0%}".replace("%", " %")
    ax.axhline(floor, color="0.35", linewidth=1, label=label)
    log_scale(ax)
    ax.set_xlabel(time_label)
    ax.set_ylabel(f"share in the {subspace.format(k=k)}")
    legend_above(ax)
    return ax


@dataclass(frozen=True)
class RunNorms:
    """Sizes of the weights of a run over time."""

    distance: Float64[Tensor, " t"]
    """Distance from the first point."""
    norm_ratio: Float64[Tensor, " t"]
    """|w|₂ / |w|₁: 1/√d for weights of one size, more the sparser they are."""
    sparsity: Float64[Tensor, " t"]
    """Share of weights that are zero."""
    dimension: int
    """Number of weights d."""


def run_norms(points: Float[Tensor, "t d"]) -> RunNorms:
    """Return distance from the start, |w|₂/|w|₁ and sparsity of the points of a run.

    Args:
        points: One checkpoint a row, shape [t, d].

    Raises:
        ValueError: If there is no point.

    Example:
        >>> import torch
        >>> found = run_norms(torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]]))
        >>> found.distance, found.norm_ratio, found.sparsity  # doctest: +NORMALIZE_WHITESPACE
        (tensor([0., 2.], dtype=torch.float64), tensor([0.5000, 1.0000], dtype=torch.float64),
         tensor([0.0000, 0.7500], dtype=torch.float64))
    """
    if len(points) == 0:
        raise ValueError("`points` must hold at least one checkpoint, got none.")
    start = points[0].to(torch.float64)
    rows = [
        torch.stack(
            [
                (w.to(torch.float64) - start).norm(),
                w.norm(dtype=torch.float64) / w.norm(p=1, dtype=torch.float64),
                (w == 0).to(torch.float64).mean(),
            ]
        )
        for w in points
    ]
    distance, ratio, sparsity = torch.stack(rows, dim=1).cpu()
    return RunNorms(distance, ratio, sparsity, points.shape[1])


def plot_norms(
    norms: Mapping[str, RunNorms],
    times: Sequence[float] | Sequence[int],
    *,
    axes: Sequence[Axes] | None = None,
    time_label: str = "epoch",
) -> list[Axes]:
    """Draw distance from the start, |w|₂/|w|₁ above its floor 1/√d, and sparsity over time.

    Args:
        norms: From `run_norms`, by the name of the run.
        times: Time of every point, the same for all.
        axes: Three axes to draw into; default a new figure.
        time_label: Name of the time, with its unit.

    Returns:
        The three axes.

    Raises:
        ValueError: If there is nothing to draw, or runs, times and axes do not fit.
    """
    require_some("norms", norms)
    axes = list(axes) if axes is not None else new_column(3)
    if len(axes) != 3:
        raise ValueError(f"`axes` must hold 3 axes, got {len(axes)}.")
    for i, (name, run) in enumerate(norms.items()):
        columns = run.distance, run.norm_ratio, 100 * run.sparsity
        for ax, column in zip(axes, columns, strict=True):
            (row,) = _rows(f'norms["{name}"]', column, len(times))
            ax.plot(times, row, label=name, **line_style(i))
    for dimension in {run.dimension for run in norms.values()}:
        axes[1].axhline(dimension**-0.5, color="0.35", linewidth=1, linestyle=":")
        axes[1].annotate(
            "$d^{-1/2}$", (1, dimension**-0.5), xycoords=("axes fraction", "data"),
            xytext=(3, 0), textcoords="offset points", va="center", fontsize="small",
        )  # fmt: skip
    titles = "distance from the start", "$|w|_2 / |w|_1$", "weights that are zero (%)"
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left", fontsize="medium", pad=3)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(4))
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False)
    axes[-1].set_xlabel(time_label)
    axes[0].legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return axes


def _draw_lines(
    ax: Axes,
    evaluations: Mapping[str, Evaluation],
    color: str,
    change: Any = lambda mean: mean,
    scale: float = 1.0,
) -> None:
    """Means along a path with bands, one dash a name."""
    for i, (name, evaluation) in enumerate(evaluations.items()):
        if evaluation.points.ndim != 1:
            raise ValueError(f'The evaluation "{name}" must be along a path, got one of a plane.')
        order = evaluation.points.argsort()
        t, mean = to_numpy(evaluation.points[order]), change(to_numpy(evaluation.mean[order]))
        band = 2 * scale * to_numpy(evaluation.standard_error[order])
        ax.plot(t, mean, color=color, linestyle=DASHES[i % len(DASHES)], linewidth=1.6)
        ax.fill_between(t, mean - band, mean + band, color=color, alpha=0.2, linewidth=0)


def _mark_ends(ax: Axes, ends: tuple[str, str]) -> None:
    """Lines at both models, with their names under the ticks."""
    low, high = ax.get_xlim()
    for t in (0, 1):
        ax.axvline(t, color="0.6", linewidth=0.8, zorder=0)
    ticks = [t for t in np.arange(-2, 3.25, 0.5).tolist() if low <= t <= high]
    names = {0.0: f"0\n{ends[0]}", 1.0: f"1\n{ends[1]}"}
    ax.set_xticks(ticks, [names.get(t, f"{t:g}") for t in ticks])


def _rows(name: str, values: Tensor, length: int) -> Any:
    rows = to_numpy(values[None] if values.ndim == 1 else values)
    if rows.ndim != 2 or rows.shape[1] != length:
        raise ValueError(
            f"`{name}` must hold one value for each of the {length} positions, or rows of them, "
            f"got shape {list(values.shape)}."
        )
    return rows


def _mean_and_reach(rows: Any) -> tuple[Any, Any]:
    mean = rows.mean(axis=0)
    return mean, np.stack([mean - rows.min(axis=0), rows.max(axis=0) - mean])
