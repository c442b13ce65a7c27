"""Figures over time: shares in sharp directions, distances and norms of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from landscape.figure_style import (
    MARKERS,
    legend_above,
    line_style,
    log_scale,
    new_axes,
    new_column,
    require_some,
    rows_of,
)
from landscape.trajectory import random_share, random_share_interval


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
        rows = rows_of(f'shares["{name}"]', values, len(times))
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
            (row,) = rows_of(f'norms["{name}"]', column, len(times))
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
