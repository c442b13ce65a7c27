"""How all figures look: colours, lines, fresh axes; shared by the drawing modules."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

# Okabe & Ito (2008), Color universal design; without the yellow, which is lost on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
OUTLINE = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def new_axes(size: tuple[float, float]) -> Axes:
    """One axes in a figure that pyplot does not know."""
    ax = Figure(figsize=size, layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def new_column(count: int) -> list[Axes]:
    """Small axes below each other with a common time axis."""
    fig = Figure(figsize=(5.0, 0.6 + 1.0 * count), layout="constrained")
    axes = [fig.add_subplot(count, 1, 1)]
    axes += [fig.add_subplot(count, 1, i + 1, sharex=axes[0]) for i in range(1, count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def line_style(i: int) -> dict[str, Any]:
    """Colour, dash and width of the i-th line."""
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": LINE_STYLES[i % len(LINE_STYLES)],
        "linewidth": 1.6,
    }


def log_scale(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 of every decade, or fewer."""
    ax.set_yscale("log", nonpositive="clip")
    low, high = ax.get_ylim()
    wide = high > 1e3 * low
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def to_numpy(values: Tensor) -> Any:
    """The values in float64 on the CPU, for matplotlib."""
    return values.detach().to(device="cpu", dtype=torch.float64).numpy()


def rows_of(name: str, values: Tensor, length: int) -> Any:
    """One row a repeat, each with one value a position; refuses anything else."""
    rows = to_numpy(values[None] if values.ndim == 1 else values)
    if rows.ndim != 2 or rows.shape[1] != length:
        raise ValueError(
            f"`{name}` must hold one value for each of the {length} positions, or rows of them, "
            f"got shape {list(values.shape)}."
        )
    return rows


def mean_and_reach(rows: Any) -> tuple[Any, Any]:
    """Mean over repeats, and how far the smallest and the largest are from it."""
    mean = rows.mean(axis=0)
    return mean, np.stack([mean - rows.min(axis=0), rows.max(axis=0) - mean])


def require_some(name: str, values: Mapping[str, Any]) -> None:
    """Refuse to draw nothing."""
    if not values:
        raise ValueError(f"`{name}` must hold at least one thing to draw, got none.")


def legend_above(ax: Axes, title: str | None = None) -> None:
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
