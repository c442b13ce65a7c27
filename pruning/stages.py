"""How many zeros there are after every stage of pruning in stages."""

import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from pruning.pruned import wanted_zeros

Schedule: TypeAlias = Literal["geometric", "cubic"]


def stage_counts(
    size: int,
    *,
    zeros: int,
    sparsity: float,
    stages: int | Sequence[float],
    schedule: Schedule = "geometric",
) -> list[int]:
    """Return the numbers of zeros after every stage, increasing, the last as wanted.

    Args:
        size: Weights in all.
        zeros: Zeros before.
        sparsity: Share of zeros wanted in the end.
        stages: Sparsities on the way, increasing; the last one may be left out. Those that are
            there before count for nothing. Or a number of stages.
        schedule: How a number cuts the way. ``"geometric"``: every stage removes the same share of
            the weights that are left. ``"cubic"``: the weights to go fall with the cube of the
            stages to go.

    Returns:
        At least one number where there is anything to remove, and none else.

    Raises:
        ValueError: If a sparsity is out of range, stages do not increase or are fewer than one, or
            the schedule is not known.
    """
    wanted = wanted_zeros(sparsity, size)
    if schedule not in get_args(Schedule):
        raise ValueError(f"`schedule` must be one of {get_args(Schedule)}, got {schedule!r}.")
    if not isinstance(stages, int):
        shares = [share for share in stages if share != sparsity]
        if any(not a < b for a, b in itertools.pairwise([0.0, *shares, sparsity])):
            raise ValueError(
                f"`stages` must increase from above 0 up to `sparsity`={sparsity}, got "
                f"{list(stages)}."
            )
        counts = [wanted_zeros(share, size) for share in shares]
    elif stages < 1:
        raise ValueError(f"`stages` must be at least 1, got {stages}.")
    else:
        to_go = (1.0 - i / stages for i in range(1, stages))
        if schedule == "cubic":
            left = (size - wanted + (wanted - zeros) * share**3 for share in to_go)
        else:
            last = max(size - wanted, 1)
            left = (last * ((size - zeros) / last) ** share for share in to_go)
        counts = [size - round(number) for number in left]
    return sorted({count for count in [*counts, wanted] if zeros < count <= wanted})
