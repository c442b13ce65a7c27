"""An axis of sparsities that tells 98 % from 99 %: logarithmic in the weights that are left."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

ROUND = (0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
"""Sparsities to label, about evenly spaced in the logarithm of what is left."""
LEAST_GAP = 0.15
"""Between two labels, in the natural logarithm of what is left."""


def sparsity_axis(ax: Axes, shares: Sequence[float], *, margin: float = 1.08) -> None:
    """Make x the share of weights left, logarithmic, falling to the right, labelled in zeros.

    Args:
        ax: The axes; points are drawn at x = 1 − sparsity.
        shares: The sparsities that are shown. Few ones are all labelled, else round ones.
        margin: Factor by which the axis goes beyond the first and the last one.
    """
    first, last = min(shares), max(shares)
    ax.set_xscale("log")
    ax.set_xlim((1.0 - first) * margin, (1.0 - last) / margin)
    inside = [share for share in ROUND if first <= share <= last]
    ticks = sorted(set(shares)) if len(set(shares)) <= 8 else inside
    ticks = _apart(ticks if len(ticks) > 1 else sorted(set(shares)))
    ax.set_xticks([1.0 - share for share in ticks], [percent_zeros(share) for share in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("share of zeros")


def percent_zeros(share: float) -> str:
    """Return a sparsity with as many digits as it needs.

    Example:
        >>> percent_zeros(0.9), percent_zeros(0.985), percent_zeros(0.9995)
        ('90 %', '98.5 %', '99.95 %')
    """
    return f"{100 * share:.6g} %"


def _apart(ticks: Sequence[float]) -> list[float]:
    """The last tick, and of the others those that stand apart."""
    kept: list[float] = []
    for share in reversed(ticks):
        if not kept or math.log((1.0 - share) / (1.0 - kept[-1])) >= LEAST_GAP:
            kept.append(share)
    return kept[::-1]
