"""How points are evaluated: what was tried, what won, and how far it is from the plain way."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

Speed = Literal["auto", "plain"]

WORTHWHILE_SECONDS = 4.0
WORTHWHILE_POINTS = 200.0
"""Work below these is done the plain way: choosing would cost more than it saves."""
BATCH_SIZES = (64, 256, 1024)
LARGEST_BATCH_SIZE = 2048
"""Tried where 1024 was the best; a probe has no more samples."""
TRIALS = 3
"""Timed runs of a probe, of which the best counts."""
REDUCED_TOLERANCE = 0.05
"""Largest relative difference of a loss beside a reduced precision, which moves it by itself."""
GAIN = 0.985
"""A way is taken if it takes at most this part of the time of the best so far."""


@dataclass(frozen=True)
class Plan:
    """How points are evaluated. The default is the plain way: the objective's batches, in order.

    The same plan gives the same bits, however the points are spread over processes.

    Args:
        batch_size: Samples in a batch; None: as the objective has them.
        channels_last: Whether images and kernels lie in memory with the channels last; on a CPU,
            windows of max pooling that do not overlap are then compared slice by slice.
        reuse_first_layer: Whether the first layer's outputs are combined from those at the origin
            and along the directions, which is exact but for rounding; and max pooled as that is
            done, if nothing but ReLU and such a pooling come after it.
        onednn_linear: Whether oneDNN runs the linear layers instead of torch's BLAS; for float32 on
            a CPU.
        compiled: Whether ``torch.compile`` runs the model, as one graph, with neither of the two
            options above nor slices for pooling. Never tried unasked: every process takes some ten
            seconds for each shape of batch, and a graph may differ by more than rounding.
        precision: ``"bfloat16"`` runs the forward passes for loss and error under autocast.
        threads: Threads within an operation; 0: as torch is set.
        deviation: Largest relative difference of a loss from the plain way, over the objectives
            and some probe points, on at most 2048 samples; NaN if it was not measured.

    Raises:
        ValueError: If a number is out of range, or two options exclude each other.
    """

    batch_size: int | None = None
    channels_last: bool = False
    reuse_first_layer: bool = False
    onednn_linear: bool = False
    compiled: bool = False
    precision: Literal["full", "bfloat16"] = "full"
    threads: int = 0
    deviation: float = math.nan

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("threads", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        for name in ("reuse_first_layer", "onednn_linear"):
            if self.compiled and getattr(self, name):
                raise ValueError(f"`{name}` must be False with `compiled`, got True.")

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        found = asdict(self)
        return found | {"deviation": None if math.isnan(self.deviation) else self.deviation}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """Return the plan that ``as_json`` wrote."""
        deviation = values["deviation"]
        return cls(**values | {"deviation": math.nan if deviation is None else deviation})


@dataclass(frozen=True)
class Probe:
    """A plan on trial.

    Args:
        losses: Returns the losses at some points far apart.
        run: Evaluates some points that follow each other.
        num_points: How many those are.
    """

    losses: Callable[[], Sequence[float]]
    run: Callable[[], object]
    num_points: int

    def seconds(self, clock: Callable[[], float]) -> float:
        """Time of a point, after the plan has warmed up: the best of a few runs."""
        best = math.inf
        for _ in range(TRIALS):
            began = clock()
            self.run()
            best = min(best, clock() - began)
        return best / self.num_points


class PlanWarning(UserWarning):
    """Losses by a plan that was asked for are not those of the plain way."""


class UnsuitableError(Exception):
    """A plan that does not fit the model, the data or the path; the message may say why."""


def refused(plan: Plan, error: UnsuitableError) -> ValueError:
    """Return what to tell those who asked for a plan that does not fit."""
    reason = f" ({error})" if str(error) else ""
    return ValueError(
        f"`speed` must be a plan that fits the model, the data and the path, got {plan}{reason}. "
        "Leave it out: then only ways that fit are taken."
    )


def choose_plan(
    make_probe: Callable[[Plan], Probe],
    model: nn.Module,
    base: Plan,
    *,
    fixed: Plan | None,
    work: float,
    tolerance: float,
) -> Plan:
    """Return the fastest plan whose losses at the probe points agree with the plain way.

    Args:
        make_probe: Prepares a plan.
        model: Whose layers decide what is worth trying.
        base: The plain way in the wanted precision.
        fixed: A plan to take without comparison; its deviation is measured.
        work: Points to evaluate, in units of one of the probe.
        tolerance: Largest relative difference of a loss that is accepted.

    Warns:
        PlanWarning: If the fixed plan does not agree.

    Raises:
        ValueError: If the fixed plan does not fit.
    """
    if fixed is None and base.precision == "full" and work < WORTHWHILE_POINTS:
        return replace(base, deviation=0.0)
    # No probe outlives its use: each holds weights.
    plain = make_probe(replace(base, precision="full"))
    truth = plain.losses()
    if fixed is not None:
        del plain
        try:
            found = make_probe(fixed).losses()
        except UnsuitableError as error:
            raise refused(fixed, error) from error
        deviation = relative_deviation(found, truth)
        allowed = tolerance if fixed.precision == "full" else REDUCED_TOLERANCE
        if not deviation <= allowed:
            warnings.warn(
                f"Losses by `speed`, {fixed}, are up to {deviation:.1e} off those of the plain "
                f"way, more than {allowed:g}. Leave it out: then only ways that agree are taken.",
                PlanWarning,
                stacklevel=4,
            )
        return replace(fixed, deviation=deviation)
    alone = base.threads == 1 and next(model.parameters()).device.type == "cpu"
    # What other processes do to the wall clock does not matter to one thread.
    clock = time.process_time if alone else time.perf_counter
    best, best_time = replace(base, deviation=0.0), plain.seconds(clock)
    del plain
    if base.precision != "full":
        probe = make_probe(base)
        best = replace(base, deviation=relative_deviation(probe.losses(), truth))
        best_time, tolerance = probe.seconds(clock), REDUCED_TOLERANCE
        del probe
    if best_time * work < WORTHWHILE_SECONDS:
        return best

    def consider(plan: Plan) -> None:
        nonlocal best, best_time
        try:
            probe = make_probe(plan)
            deviation = relative_deviation(probe.losses(), truth)
            if not deviation <= tolerance:
                return
            seconds = probe.seconds(clock)
        except Exception:  # the plain way has run: it is the plan that does not fit the model
            return
        if seconds <= GAIN * best_time:
            best, best_time = replace(plan, deviation=deviation), seconds

    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        consider(replace(best, channels_last=True))
    consider(replace(best, reuse_first_layer=True))
    consider(replace(best, onednn_linear=True))
    for batch_size in BATCH_SIZES:
        consider(replace(best, batch_size=batch_size))
    if best.batch_size == BATCH_SIZES[-1]:
        consider(replace(best, batch_size=LARGEST_BATCH_SIZE))
    return best


def relative_deviation(found: Sequence[float], truth: Sequence[float]) -> float:
    """Return the largest relative difference; NaN if one loss is finite where the other is not."""
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        if math.isfinite(a) != math.isfinite(b):
            return math.nan
        if math.isfinite(a) and a != b:
            worst = max(worst, abs(a - b) / max(abs(a), abs(b)))
    return worst
