"""Figures over one axis: interpolations, random lines, barriers, shares and norms over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from landscape.figure_style import (
    COLORS,
    MARKERS,
    legend_above,
    line_style,
    log_scale,
    mean_and_reach,
    new_axes,
    require_some,
    rows_of,
    to_numpy,
)
from landscape.records import Evaluation

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
        several = f" ({len(rows)} directions)" if len(rows) > 1 else ""
        ax.plot(x, rows.mean(axis=0), label=f"{name}{several}", **style)
        ax.fill_between(
            x, rows.min(axis=0), rows.max(axis=0), color=style["color"], alpha=0.2, linewidth=0
        )
    if log:
        log_scale(ax)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    averaged = any(len(found) > 1 for found in evaluations.values())
    legend_above(ax, title="line: mean, band: smallest to largest" if averaged else None)
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
        rows = rows_of(f'barriers["{name}"]', values, len(xs))
        mean, reach = mean_and_reach(rows)
        if len(rows) == 1:
            reach = to_numpy(errors[name]) if errors and name in errors else None
        ax.errorbar(
            xs,
            mean,
            yerr=reach,
            label=f"{name} ({len(rows)} runs, mean and range)" if len(rows) > 1 else name,
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
