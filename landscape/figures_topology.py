"""The basins of a loss side by side: how wide each is at every level, and where they meet."""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from landscape.figure_style import COLORS, legend_above, log_scale, new_axes, to_numpy
from landscape.merge_tree import MergeTree

COMMON = "0.75"
"""Where basins have met that the standard errors tell apart."""


def plot_merge_tree(
    tree: MergeTree, *, label: str = "loss", log: bool = True, ax: Axes | None = None
) -> Axes:
    """Draw the topological profile: valleys as wide as the share of points up to each level.

    Where two valleys meet, one as wide as both goes on above. Minima of valleys that two standard
    errors could close are hollow. Of two that meet, the one with the lower minimum is on the left.
    Widths are exact at the losses that were measured, and joined by lines; points whose loss is not
    finite are below no level. (Geniesse et al. 2024, arXiv 2411.12136.)

    Args:
        tree: From `merge_tree`.
        label: Name of the loss, with its unit.
        log: Whether the loss is drawn on a logarithmic axis; if so, all must be positive.
        ax: Axes to draw into; default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If a loss is not positive on a logarithmic axis.
    """
    losses = to_numpy(tree.losses).ravel()
    finite = np.sort(losses[np.isfinite(losses)])
    if log and finite[0] <= 0:
        raise ValueError(
            f"`log` needs losses above 0, got {finite[0]:g} at a minimum. Pass log=False."
        )
    ax = ax or new_axes((4.6, 4.0))
    profile = _Profile(tree, losses, ax)
    roots = [b for b, parent in enumerate(tree.parents.tolist()) if parent < 0]
    left = 0.0
    for b in roots:  # several only where missing losses part the grid
        width = profile.width(profile.subtree(b), finite[-1])
        profile.draw(b, left + width / 2, finite[-1])
        left += width
    if log:
        log_scale(ax)
    ax.set_xlim(0, 1)
    ax.set_ylabel(label)
    ax.set_xlabel("share of the points of the grid below the level")
    ax.plot([], [], "v", color="black", markersize=5, label=_count(tree))
    doubtful = int((~tree.is_certain).sum())
    if doubtful:
        text = f"{doubtful} of them within two standard errors"
        ax.plot([], [], "v", color="black", markerfacecolor="white", markersize=5, label=text)
    legend_above(ax)
    return ax


class _Profile:
    """Draws valleys of one tree."""

    def __init__(self, tree: MergeTree, losses: Any, ax: Axes) -> None:
        self._tree, self._ax = tree, ax
        basins = tree.basins.flatten().numpy()
        self._sorted = [np.sort(losses[basins == b]) for b in range(len(tree.minima))]
        self._size = len(losses)
        self._certain = tree.is_certain.tolist()
        self._deaths, self._births = tree.deaths.tolist(), tree.births.tolist()
        self._children: list[list[int]] = [[] for _ in self._sorted]
        for b, parent in enumerate(tree.parents.tolist()):
            if parent >= 0:
                self._children[parent].append(b)
        for children in self._children:
            children.sort(key=lambda b: self._deaths[b])

    def subtree(self, b: int) -> list[int]:
        """A branch and all that end in it, directly or not."""
        found = [b]
        for each in found:
            found += self._children[each]
        return found

    def width(self, branches: list[int], level: float) -> float:
        """Share of the grid's points in some basins that are not above a level."""
        counts = (np.searchsorted(self._sorted[b], level, side="right") for b in branches)
        return float(sum(counts)) / self._size

    def draw(self, root: int, center: float, top: float) -> None:
        """Draw a branch from the top of its valley downward, and what ends in it."""
        waiting = [(root, center, top)]
        while waiting:
            waiting += self._draw_one(*waiting.pop())

    def _draw_one(self, b: int, center: float, top: float) -> list[tuple[int, float, float]]:
        """Draw a branch; return those that end in it, with the centers and tops of theirs."""
        found = []
        branches = self.subtree(b)
        certain = bool(self._certain[b])
        for child in reversed(self._children[b]):
            level = self._deaths[child]
            shared = any(self._certain[each] for each in branches if each != b)
            color = COMMON if shared else self._color(b)
            self._valley(branches, center, level, top, color, certain)
            own = set(self.subtree(child))
            branches = [each for each in branches if each not in own]
            left, right = self.width(branches, level), self.width(list(own), level)
            start = center - (left + right) / 2
            found.append((child, start + left + right / 2, level))
            center, top = start + left / 2, level
        self._valley([b], center, self._births[b], top, self._color(b), certain)
        self._ax.plot(
            center,
            self._births[b],
            "v",
            color="black",
            markerfacecolor="black" if certain else "white",
            markersize=5,
            zorder=3 if certain else 4,
        )
        return found

    def _color(self, b: int) -> str:
        return COLORS[b % len(COLORS)]

    def _valley(
        self,
        branches: list[int],
        center: float,
        low: float,
        high: float,
        color: str,
        certain: bool,
    ) -> None:
        values = np.sort(np.concatenate([self._sorted[each] for each in branches]))
        inside = values[(values >= low) & (values <= high)]
        levels = np.unique(np.concatenate([[low], inside, [high]]))
        half = np.searchsorted(values, levels, side="right") / self._size / 2
        self._ax.fill_betweenx(
            levels,
            center - half,
            center + half,
            facecolor=color if certain else "white",
            edgecolor=color,
            hatch=None if certain else "////",
            linewidth=0.8,
        )


def _count(tree: MergeTree) -> str:
    number = len(tree.minima)
    text = f"{number} minim{'um' if number == 1 else 'a'}"
    missing = int((~torch.isfinite(tree.losses)).sum())
    return text + (f" ({missing} losses are not finite)" if missing else "")
