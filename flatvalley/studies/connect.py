"""What ``flatvalley connect`` does: the loss on the line and on a curve between two networks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from flatvalley.process_group import all_ranks, from_first, world
from flatvalley.run import Run
from flatvalley.studies.landscape_networks import POLICIES, PRECISIONS, Networks, Precision
from hessian import Objective
from landscape import (
    Barrier,
    BarrierTable,
    BezierCurve,
    ConnectedCurve,
    Line,
    Path,
    PolyChain,
    barrier_table,
    train_curve,
)
from pruning import magnitude_prune

CURVES = {"bezier": BezierCurve, "chain": PolyChain}
Progress = Callable[[int, int], None]

LINE, CURVE = "line", "curve"
BATCH = 128
"""Samples of a step in the training of a curve."""
SPARSER = 0.01
"""By how much the end must have more zeros than the start to be held against magnitude pruning."""
LOW = 0.2
"""Share of the line's barrier that a curve may keep to be called connected."""


@dataclass(frozen=True)
class ConnectConfig:
    """Settings of one connection.

    Raises:
        ValueError: If one is out of range; the message says what it must be.

    Example:
        >>> ConnectConfig(points=2)
        Traceback (most recent call last):
        ...
        ValueError: `points` must be at least 3, got 2.
    """

    curve: str = "bezier"
    bends: int = 1
    epochs: int = 30
    lr: float = 0.1
    points: int = 61
    """On each path, both ends among them."""
    keep_zeros: bool = False
    """Whether weights that are zero at both ends stay zero on the curve."""
    seed: int = 0
    samples: int | None = None
    """Training samples; None for 10,000 or all."""
    batch_norm: str = "recompute"
    precision: str = "full"
    """Of forward passes for what is measured; the curve trains in full."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("curve", self.curve, tuple(CURVES)),
            ("batch_norm", self.batch_norm, POLICIES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        for name, least in (("bends", 1), ("epochs", 0), ("points", 3), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite, got {self.lr}.")


@dataclass(frozen=True)
class ConnectFindings:
    """Losses along paths between two networks, and along those of the controls."""

    config: ConnectConfig
    networks: Networks
    names: tuple[str, ...]
    """Of the networks."""
    barriers: Mapping[tuple[str, str, str], Barrier]
    """By path, samples and metric."""
    trained: ConnectedCurve[Any] | None
    """The curve; None if no epochs were asked for, and where another process trained it."""
    controls: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of all paths: the line, the curve, the controls."""
        return tuple(dict.fromkeys(path for path, _, _ in self.barriers))

    @property
    def connected(self) -> bool | None:
        """Whether the curve keeps at most a fifth of the line's barrier; None if there is none.

        Of the train loss over the chord, and a barrier only where its interval is above zero.
        """
        line = self.barriers[LINE, "train", "loss"].excess_over_chord
        if self.trained is None or not line.low > 0:
            return None
        curve = self.barriers[CURVE, "train", "loss"].excess_over_chord
        return bool(curve.value <= LOW * line.value)


def connect(
    run: Run,
    networks: Networks,
    names: tuple[str, ...],
    config: ConnectConfig,
    *,
    workers: int = 1,
    trains: Progress | None = None,
    measures: Progress | None = None,
) -> ConnectFindings:
    """Train a curve between the first two networks, and measure all paths that leave the first.

    A run that was cut off goes on: with the epochs that are left, and with the points. Processes
    of ``torchrun`` share the points; the first one trains.

    Args:
        run: The folder.
        networks: Start, end, and networks to which a straight line leads for control.
        names: What to call them.
        config: Settings.
        workers: Processes that share the points.
        trains: Called with epochs done and in all.
        measures: Called with points done on a path and in all.

    Raises:
        ValueError: If both ends are the same, or an option does not fit.
        NonFiniteError: If the training of the curve does not stay finite.
    """
    start, end = networks.weights[:2]
    if torch.equal(start, end):
        raise ValueError("`A` and `B` must be different networks, but all their weights agree.")
    trained = None
    others: dict[str, Tensor | Path] = {}
    if config.epochs:
        others[CURVE], trained = curve_between(run, networks, config, progress=trains)
    controls: dict[str, Tensor] = dict(zip(names[2:], networks.weights[2:], strict=True))
    pruned = _pruned_alike(start, end)
    if pruned is not None:
        controls[f"{names[0]} pruned by magnitude"] = pruned
    table: BarrierTable = barrier_table(
        networks.objectives,
        Line(start, end),
        controls=others | controls,
        metrics=networks.metrics,
        num_points=config.points,
        batch_norm=networks.batch_norm(config.batch_norm),
        precision=cast(Precision, config.precision),
        folder=run.path / "points",
        workers=workers,
        group=all_ranks(),
        progress=measures,
    )
    barriers = {
        (LINE if path == "path" else path, samples, metric): found
        for (path, samples, metric), found in table.barriers.items()
    }
    return ConnectFindings(config, networks, names, barriers, trained, tuple(controls))


def curve_between(
    run: Run, networks: Networks, config: ConnectConfig, *, progress: Progress | None = None
) -> tuple[Any, ConnectedCurve[Any] | None]:
    """Return a curve between the first two networks, and on the process that trained it more.

    Raises:
        NonFiniteError: If the loss or its gradient is not finite.
    """
    start = networks.weights[0]
    if world()[0] > 0:
        points = from_first(start.new_empty(config.bends + 2, len(start)))
        return CURVES[config.curve](points), None
    trained = _train_between(run, networks, config, progress=progress)
    from_first(trained.curve.control_points)
    return trained.curve, trained


def _train_between(
    run: Run, networks: Networks, config: ConnectConfig, *, progress: Progress | None = None
) -> ConnectedCurve[Any]:
    """Return a trained curve between the first two networks; goes on with what the folder holds.

    Raises:
        NonFiniteError: If the loss or its gradient is not finite.
    """
    start, end = networks.weights[:2]
    inputs, labels = (torch.cat(parts) for parts in zip(*networks.dense.batches, strict=True))
    objective = Objective(
        networks.train.model, networks.dense.criterion, (inputs, labels), batch_size=BATCH
    )
    kind: Any = CURVES[config.curve]
    found: ConnectedCurve[Any] = train_curve(
        objective,
        start,
        end,
        kind=kind,
        epochs=config.epochs,
        lr=config.lr,
        num_bends=config.bends,
        keep_zeros=config.keep_zeros,
        seed=config.seed,
        checkpoint=run.path / "curve.state",
        progress=progress,
    )
    run.write_tensors("curve.safetensors", {"control_points": found.curve.control_points})
    return found


def connect_tables(findings: ConnectFindings) -> dict[str, list[dict[str, Any]]]:
    """Return the study's tables by name: rows of plain numbers."""
    profiles: list[dict[str, Any]] = []
    for (path, samples, metric), found in findings.barriers.items():
        values = found.evaluation
        profiles += [
            {
                "path": path,
                "samples": samples,
                "metric": metric,
                "t": t,
                "mean": mean,
                "standard_error": error,
            }
            for t, mean, error in zip(
                values.points.tolist(),
                values.mean.tolist(),
                values.standard_error.tolist(),
                strict=True,
            )
        ]
    return {"profiles": profiles, "barriers": BarrierTable(findings.barriers).rows()}


def _pruned_alike(start: Float[Tensor, " d"], end: Float[Tensor, " d"]) -> Tensor | None:
    """The start, pruned by magnitude to the end's sparsity, if the end is the sparser one."""
    zeros = [int((w == 0).sum()) / len(w) for w in (start, end)]
    if zeros[1] < zeros[0] + SPARSER:
        return None
    return magnitude_prune(start, zeros[1]).weights
