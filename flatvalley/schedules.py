"""Learning-rate schedules: what the base rate is multiplied by, as a function of the step."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate

from flatvalley.specs import parse_spec
from pruning.sparsity_target import LANDING

SCHEDULES: dict[str, Mapping[str, type]] = {
    "constant": {},
    "paper": {},
    "step": {"every": int, "at": str, "factor": float},
    "cosine": {},
}
"""Names and their settings, as ``schedule`` parses them."""

Factor = Callable[[int], float]
"""From the number of steps made so far to the factor of the next step's learning rate."""


def schedule(text: str, *, epochs: int, steps_per_epoch: int, warmup: float = 0.0) -> Factor:
    """Return a schedule by its name.

    Args:
        text: ``"constant"``. ``"paper"``: the base rate for the first half of the epochs, then
            falling linearly to a hundredth at nine tenths, and constant from there; it changes
            between epochs only, and epoch e of E counts as e/E. ``"step:every=30,factor=0.1"`` or
            ``"step:at=80/120"``: times ``factor`` (0.1 if left out) after every so many epochs, or
            after those. ``"cosine"``: half a cosine from the base rate towards 0, step by step.
        epochs: Epochs in all.
        steps_per_epoch: Steps of one epoch.
        warmup: Epochs at the start in which the rate rises linearly; the schedule's own factor
            is multiplied by it.

    Raises:
        ValueError: If the text is not understood, or a number is out of range.

    Example:
        >>> factor = schedule("paper", epochs=10, steps_per_epoch=2)
        >>> [round(factor(step), 4) for step in (0, 9, 10, 16, 19)]
        [1.0, 1.0, 0.7525, 0.01, 0.01]

    References:
        Chao, Wang, Xing, Cheng (2020), Directional Pruning of Deep Neural Networks: "paper", in
        the code of Garipov et al. (2018), Loss surfaces, mode connectivity.
        Loshchilov & Hutter (2017), SGDR: cosine. Goyal et al. (2017): warmup.
    """
    if not 0.0 <= warmup < math.inf:
        raise ValueError(f"`warmup` must be a number of epochs, finite and ≥ 0, got {warmup}.")
    spec = parse_spec(text, "schedule", SCHEDULES)
    total = epochs * steps_per_epoch
    if spec.name == "step":
        factor = spec.settings.get("factor", 0.1)
        if not 0.0 < factor <= 1.0:
            raise ValueError(f"`schedule` needs 0 < factor <= 1, got {factor}.")
        base = _steps(factor, _milestones(spec.settings, epochs), steps_per_epoch)
    elif spec.name == "paper":
        base = lambda step: _paper((step // steps_per_epoch + 1) / epochs)  # noqa: E731
    elif spec.name == "cosine":
        base = lambda step: 0.5 * (1.0 + math.cos(math.pi * step / total))  # noqa: E731
    else:
        base = lambda step: 1.0  # noqa: E731
    rising = round(warmup * steps_per_epoch)
    return lambda step: base(step) * min((step + 1) / rising if rising else 1.0, 1.0)


def horizon_by_time(factor: Factor, num_steps: int) -> int:
    """Return the horizon with which gRDA lands after three quarters of the training time.

    Training time is the sum of the rates. ``GRDA`` lands after three quarters of the horizon's
    steps; under a decaying rate that is late, when weights hardly move any more to make up for
    those that go.

    Args:
        factor: The schedule.
        num_steps: Steps of the whole training.

    Example:
        >>> horizon_by_time(schedule("constant", epochs=4, steps_per_epoch=10), 40)
        40
        >>> horizon_by_time(schedule("step:at=2", epochs=4, steps_per_epoch=10), 40)
        22
    """
    times = [0.0, *accumulate(factor(step) for step in range(num_steps))]
    time = LANDING * times[-1]
    step = bisect_left(times, time, lo=1) - 1
    landing = step + (time - times[step]) / (times[step + 1] - times[step] or 1.0)
    return min(max(1, round(landing / LANDING)), num_steps)


def _paper(progress: float) -> float:
    """Constant to one half, then linear to a hundredth at nine tenths."""
    if progress <= 0.5:
        return 1.0
    return max(1.0 - (progress - 0.5) / 0.4 * 0.99, 0.01)


def _steps(factor: float, milestones: list[int], steps_per_epoch: int) -> Factor:
    def at(step: int) -> float:
        epoch = step // steps_per_epoch
        return float(factor ** sum(epoch >= milestone for milestone in milestones))

    return at


def _milestones(settings: Mapping[str, object], epochs: int) -> list[int]:
    """Read after which epochs the rate falls."""
    if len(settings.keys() & {"every", "at"}) != 1:
        raise ValueError(
            "`schedule` step needs one of `every` and `at`, such as step:every=30 or "
            "step:at=80/120."
        )
    if "every" in settings:
        every = int(str(settings["every"]))
        if every < 1:
            raise ValueError(f"`schedule` needs every >= 1 epoch, got {every}.")
        return list(range(every, epochs, every))
    text = str(settings["at"])
    try:
        return [int(part) for part in text.split("/")]
    except ValueError:
        raise ValueError(f"`schedule` needs epochs such as at=80/120, got at={text}.") from None
