"""Names beside the ends of lines, in place of a legend."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

GAP = 1.15
"""Distance of two labels in heights of the text."""


@dataclass(frozen=True)
class EndLabel:
    """A text beside the last point of a line, in data coordinates."""

    text: str
    x: float
    y: float
    color: str


def label_ends(ax: Axes, labels: Sequence[EndLabel], *, size: float = 8.0) -> None:
    """Write labels to the right of the axes, apart from each other, with a line to their points.

    Call it when scales and limits are as they will stay.

    Args:
        ax: The axes; room at its right is the caller's to leave.
        labels: What to write, in any order.
        size: Of the text, in points.
    """
    if not labels:
        return
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    height = ax.get_window_extent().height
    step = GAP * size * figure.dpi / 72.0 / height
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = [(float(to_axes.transform((e.x, e.y))[1]), e) for e in labels]
    ends.sort(key=lambda end: end[0])
    places = spread([min(max(at, 0.0), 1.0) for at, _ in ends], step)
    for place, (at, label) in zip(places, ends, strict=True):
        ax.annotate(
            label.text,
            xy=(float(to_axes.transform((label.x, label.y))[0]), min(max(at, 0.0), 1.0)),
            xycoords="axes fraction",
            xytext=(1.04, place),
            textcoords="axes fraction",
            color=label.color,
            fontsize=size,
            va="center",
            ha="left",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),
                "color": label.color,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1.0,
                "shrinkB": 3.0,
            },
        )


def spread(places: Sequence[float], step: float) -> list[float]:
    """Return places in increasing order at least ``step`` apart, near the given ones.

    Args:
        places: Where labels should be, in increasing order.
        step: Least distance of two.

    Example:
        >>> spread([0.0, 0.0, 1.0], 0.5)
        [-0.25, 0.25, 1.0]
    """
    groups: list[tuple[float, int]] = []  # the centre of labels that touch, and their number
    for place in places:
        centre, count = place, 1
        while groups and centre - groups[-1][0] < step * (count + groups[-1][1]) / 2 - 1e-12:
            other, size = groups.pop()
            centre, count = (centre * count + other * size) / (count + size), count + size
        groups.append((centre, count))
    return [centre + step * (i - (count - 1) / 2) for centre, count in groups for i in range(count)]
