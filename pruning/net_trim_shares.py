"""Which share ε of the norm of outputs to try next, and to take, for a number of zeros."""

import math
from collections.abc import Mapping

LOWEST, HIGHEST = 1e-3, 1.0
"""Shares between which one is looked for; at 1, nothing is left of a layer in parallel to which
nothing is added."""

EDGE = 0.1
"""Tries stay off the ends of the interval that is left by this share of it."""


def between(
    zeros: Mapping[float, int], wanted: int, lowest: float, highest: float
) -> tuple[float, float]:
    """Return the interval of shares that gave at most as many zeros as wanted, and more.

    Its ends are the lowest and the highest share where none was tried.
    """
    high = min((g for g, count in zeros.items() if count > wanted), default=highest)
    low = max((g for g, count in zeros.items() if count <= wanted and g < high), default=lowest)
    return low, high


def is_reached(zeros: Mapping[float, int], wanted: int, slack: float) -> bool:
    """Whether a try has the zeros that are wanted, or fewer by no more than the slack."""
    return any(0 <= wanted - count <= slack for count in zeros.values())


def nearest_share(zeros: Mapping[float, int], wanted: int) -> float:
    """Return the share that came nearest from below, or from above if none is below."""
    return min(zeros, key=lambda g: (zeros[g] > wanted, abs(wanted - zeros[g])))


def aim_of(num_tries: int, wanted: int, slack: float) -> float | None:
    """Return the zeros to interpolate for; None to halve, since where zeros jump the rest creeps.

    Example:
        >>> [aim_of(tries, 100, 4.0) for tries in range(4)]
        [98.0, 98.0, None, 98.0]
    """
    return None if num_tries % 3 == 2 else wanted - slack / 2


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
    low, high = between(zeros, wanted, lowest, highest)
    part = 0.5
    if aim is not None and low in zeros and high in zeros:
        part = (aim - zeros[low]) / (zeros[high] - zeros[low])
    part = min(max(part, EDGE), 1.0 - EDGE)
    return math.exp((1.0 - part) * math.log(low) + part * math.log(high))
