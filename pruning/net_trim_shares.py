"""The share ε of the norm of outputs to try next, where a number of zeros is wanted."""

import math
from collections.abc import Mapping

LOWEST, HIGHEST = 1e-3, 1.0
"""Shares between which one is looked for; at 1, nothing is left of a layer in parallel to which
nothing is added."""

EDGE = 0.1
"""Tries stay off the ends of the interval that is left by this share of it."""


def next_share(
    zeros: Mapping[float, int],
    wanted: int,
    aim: float | None,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
) -> float:
    """Return the share ε to try next, between those that gave fewer and more zeros than wanted.

    Args:
        zeros: What shares that were tried gave.
        wanted: Zeros of which there may be no more.
        aim: Zeros to interpolate for, in the logarithm of the share, where both ends were tried.
            Default: the middle.
        lowest: Where shares begin.
        highest: Where they end.

    Example:
        >>> round(next_share({0.01: 100, 0.1: 300}, 250, 200.0), 4)
        0.0316
    """
    high = min((g for g, count in zeros.items() if count > wanted), default=highest)
    low = max((g for g, count in zeros.items() if count <= wanted and g < high), default=lowest)
    part = 0.5
    if aim is not None and low in zeros and high in zeros:
        part = (aim - zeros[low]) / (zeros[high] - zeros[low])
    part = min(max(part, EDGE), 1.0 - EDGE)
    return math.exp((1.0 - part) * math.log(low) + part * math.log(high))
