"""The loss, and whatever else is asked for, at every point of a path or plane."""

import math
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from hessian.batch_statistics import batch_norm_layers
from hessian.determinism import require_fixed_modules
from hessian.distributed import Ranks
from hessian.objective import Objective
from landscape.agreement import agreed_plan, require_same_work
from landscape.batch_norm import BatchNorm, BatchNormKind, as_batch_norm
from landscape.combinations import describe_path
from landscape.paths import Path
from landscape.planes import Plane
from landscape.plans import (
    LARGEST_BATCH_SIZE,
    Plan,
    Probe,
    Speed,
    UnsuitableError,
    choose_plan,
    refused,
)
from landscape.point_meter import PER_SAMPLE, Metric, PointMeter, require_metrics
from landscape.records import Evaluation, Sweep
from landscape.shards import Shards, identity, probe_losses
from landscape.spread import Progress as Progress
from landscape.spread import Recipe, measure_all, threads

PROBE_SAMPLES = LARGEST_BATCH_SIZE
TOLERANCE = {torch.float64: 1e-10}
"""Largest relative difference of a loss from the plain way, by type; 1e-5 for others."""


class BatchNormWarning(UserWarning):
    """Running statistics of one model are used at points far from that model."""


def evaluate(
    objective: Objective,
    path: Path | Plane,
    ts: Sequence[float] | Float[Tensor, "..."],
    *,
    batch_norm: BatchNorm | BatchNormKind = "recompute",
    speed: Speed | Plan = "auto",
    precision: Literal["full", "bfloat16"] = "full",
    folder: str | FilePath | None = None,
    workers: int = 1,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate the loss at every point of a path or plane.

    A point where the loss is NaN or infinite is kept as NaN and counted, never replaced. For other
    metrics or several objectives at once, see `sweep`, which this is the short form of.

    Memory: one flat vector beyond model and path; the data, up to 4 GiB; and where they are reused
    the first layer's outputs, up to 2 GiB.

    Args:
        objective: The loss L.
        path: A map from t to weights, or a plane.
        ts: Values of t, shape [m], or coordinates [..., 2] in a plane, e.g. from `grid`. Any
            order, any spacing. Every point costs one forward pass over the data.
        batch_norm: What batch norm normalises by at a point, see `BatchNorm`.
        speed: ``"auto"`` tries ways that are faster, where the work is long enough, and takes
            those that are and that agree with the plain way to 1e-5 (1e-10 in float64) at three
            points. ``"plain"`` takes the objective's batches in order. A `Plan` is followed; its
            deviation is measured unless it is known, as in the provenance of an evaluation.
        precision: ``"bfloat16"`` runs forward passes for loss and error under autocast; how far
            that moves the loss is measured and recorded.
        folder: Keeps finished points. The same call goes on where a killed one stopped, and gives
            the same bits. Remove it once the result is safe.
        workers: Processes that share the points, on a CPU. Each gets a copy of model and data.
            Scripts need ``if __name__ == "__main__":``.
        group: Ranks that share the points, each with the same objective, built without a group;
            all get the result.
        progress: Called with the points done and their number after every point; with several
            processes after every few.

    Returns:
        Sums of losses and squared losses, with the points in the order given.

    Raises:
        ValueError: If ``ts`` has the wrong shape, or is empty; if an option is not known or does
            not fit; if the folder holds points of something else; if ranks were given different
            points, paths or data.
        RuntimeError: If a worker process dies.
        RankError: If another rank fails.

    Warns:
        BatchNormWarning: If the model normalises by running statistics and ``batch_norm`` is
            ``"frozen"``. They belong to the model's own weights; away from those, at other ends
            too, the loss is that of another function.
        PlanWarning: If ``speed`` is a plan whose losses are not those of the plain way.

    Example:
        >>> import torch
        >>> from landscape.paths import Line
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(2, 1), torch.zeros(2, 1)))
        >>> line = Line(torch.tensor([0.0]), torch.tensor([2.0]))
        >>> evaluate(objective, line, [0.0, 0.5, 1.0]).mean
        tensor([0., 1., 4.], dtype=torch.float64)
    """
    found = sweep(
        objective,
        path,
        ts,
        batch_norm=batch_norm,
        speed=speed,
        precision=precision,
        folder=folder,
        workers=workers,
        group=group,
        progress=progress,
    )
    return found["objective", "loss"]


def sweep(
    objectives: Objective | Mapping[str, Objective],
    path: Path | Plane,
    ts: Sequence[float] | Float[Tensor, "..."],
    *,
    metrics: Sequence[Metric] = ("loss",),
    batch_norm: BatchNorm | BatchNormKind = "recompute",
    speed: Speed | Plan = "auto",
    precision: Literal["full", "bfloat16"] = "full",
    folder: str | FilePath | None = None,
    workers: int = 1,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Measure several metrics of several objectives at every point of a path or plane.

    ``"loss"`` and ``"error"`` (the 0-1 loss of class scores) come from one forward pass over the
    data and have count, sum and sum of squares over samples. ``"gradient_norm"`` costs a gradient
    more; ``"top_eigenvalue"`` and ``"bottom_eigenvalue"``, the ends of the spectrum of the Hessian
    at the point, some 20 to 60 Hessian-vector products, to a relative residual of 1e-3: take few
    points and few samples. These three are single numbers, of count 1.

    Args:
        objectives: One, which is called ``"objective"``, or several by name, such as train and
            test, of one model and one selection of weights. Running statistics are gathered from
            the first.
        path: A map from t to weights, or a plane.
        ts: Values of t, shape [m], or coordinates [..., 2] in a plane.
        metrics: Of every objective.
        batch_norm: As in `evaluate`.
        speed: As in `evaluate`.
        precision: As in `evaluate`.
        folder: As in `evaluate`.
        workers: As in `evaluate`.
        group: As in `evaluate`.
        progress: As in `evaluate`.

    Returns:
        One `Evaluation` for each objective and metric.

    Raises:
        ValueError: As `evaluate`; if objectives differ in model or weights, or a metric is not
            known.
        RuntimeError: If a worker process dies.
        RankError: As `evaluate`.

    Warns:
        BatchNormWarning: As `evaluate`.

    Example:
        >>> import torch
        >>> from landscape.paths import Line
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(2, 1), torch.zeros(2, 1)))
        >>> line = Line(torch.tensor([0.0]), torch.tensor([2.0]))
        >>> found = sweep(objective, line, [0.0, 0.5, 1.0], metrics=("loss", "gradient_norm"))
        >>> found["objective", "gradient_norm"].mean
        tensor([0., 2., 4.], dtype=torch.float64)
    """
    named = as_named(objectives)
    points = torch.as_tensor(ts, dtype=torch.float64, device="cpu").detach()
    in_plane = isinstance(path, Plane)
    _require_points(points, in_plane)
    columns = tuple((name, metric) for name in named for metric in metrics)
    sums, provenance = measured(
        named,
        path,
        points.reshape(-1, 2) if in_plane else points,
        metrics,
        as_batch_norm(batch_norm),
        width=(len(columns), 3),
        speed=speed,
        precision=precision,
        folder=folder,
        workers=workers,
        group=group,
        progress=progress,
    )
    shape = points.shape[:-1] if in_plane else points.shape
    table = sums.permute(1, 2, 0).reshape(len(columns), 3, *shape)
    return Sweep(points, columns, table, provenance)


def measured(
    objectives: Mapping[str, Objective],
    path: Path | Plane,
    rows: Tensor,
    metrics: Sequence[str],
    policy: BatchNorm,
    *,
    width: tuple[int, ...],
    speed: Speed | Plan = "auto",
    precision: str = "full",
    folder: str | FilePath | None = None,
    workers: int = 1,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return what a meter says of every point, shape [m, *width], and how that was made."""
    first = _require_alike(objectives)
    chosen = require_metrics(metrics)
    _require_options(objectives, chosen, policy, workers, group)
    require_fixed_modules(first.model)
    # Other layers with running statistics, such as instance norm, have no policy.
    warn_about_batch_norm(first, {} if policy.kind == "frozen" else batch_norm_layers(first.model))
    recipe = {"objectives": objectives, "path": path, "metrics": chosen, "policy": policy}
    _require_speed(speed)
    ranks = Ranks(group, first.device)
    require_same_work(ranks, objectives, path, rows)
    about: dict[str, Any] = {}
    if folder is not None:
        about = identity(objectives, path, rows, chosen, policy, precision)
        about["numbers of a point"] = list(width)
    shards = Shards(None if folder is None else FilePath(folder), about)
    shards.require_losses(lambda: probe_losses(objectives, path, rows))
    base = Plan(precision=_require_precision(precision), threads=_threads(workers))
    plan = agreed_plan(ranks, lambda: _plan(recipe, rows, speed, base, shards))
    shards.begin(plan.as_json())
    with threads(plan.threads):
        try:
            numbers = measure_all(
                recipe | {"plan": plan},
                rows,
                shards,
                width=width,
                workers=workers,
                ranks=ranks,
                progress=progress,
            )
        except UnsuitableError as error:
            raise refused(plan, error) from error
    return numbers, _provenance(objectives, path, policy, plan)


def as_named(objectives: Objective | Mapping[str, Objective]) -> dict[str, Objective]:
    """Return objectives by name; a single one is called ``"objective"``."""
    return {"objective": objectives} if isinstance(objectives, Objective) else dict(objectives)


def warn_about_batch_norm(objective: Objective, renewed: Container[str] = ()) -> None:
    """Warn, naming the layers, if the model normalises by statistics that are not renewed."""
    names = [
        name or type(module).__name__
        for name, module in objective.model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor) and name not in renewed
    ]
    if names:
        listed = f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        warnings.warn(
            f"The model has running statistics in {listed}. They are used as they are at every "
            "point, but belong to the model's own weights: elsewhere the loss is that of another "
            "function. A barrier may be made up, or hidden by an end that looks worse than it is.",
            BatchNormWarning,
            stacklevel=3,
        )


def _plan(recipe: Recipe, rows: Tensor, speed: Speed | Plan, base: Plan, shards: Shards) -> Plan:
    """The plan that a folder holds, or the one wished for, or the best."""
    if shards.plan is not None:
        kept = Plan.from_json(shards.plan)
        wanted = replace(base, threads=kept.threads) if speed == "plain" else speed
        if isinstance(wanted, Plan) and replace(wanted, deviation=kept.deviation) != kept:
            raise ValueError(
                f"`speed` must be what the points in `folder` were evaluated with, {kept}, got "
                f"{speed}. Leave it out, or choose another folder."
            )
        return kept
    if isinstance(speed, Plan) and not math.isnan(speed.deviation):
        return speed  # measured before
    plain = speed == "plain" or any(o.ranks.size > 1 for o in recipe["objectives"].values())
    if plain and base.precision == "full":
        return replace(base, deviation=0.0)
    if not any(metric in PER_SAMPLE for metric in recipe["metrics"]):
        return base
    middle = len(rows) // 2
    far, near = rows[[0, middle, -1]], rows[max(0, middle - 1) :][:3]
    asked = [metric for metric in recipe["metrics"] if metric in PER_SAMPLE]
    quick = tuple(dict.fromkeys(("loss", *asked)))

    def make_probe(plan: Plan) -> Probe:
        meter = PointMeter(**{**recipe, "metrics": quick, "plan": plan, "limit": PROBE_SAMPLES})
        return Probe(
            lambda: [float(v) for point in far for v in meter.measure(point)[:: len(quick), 1]],
            lambda: [meter.measure(point) for point in near],
            len(near),
        )

    most = max(o.num_samples for o in recipe["objectives"].values())
    first = next(iter(recipe["objectives"].values()))
    with threads(base.threads):
        return choose_plan(
            make_probe,
            first.model,
            base,
            fixed=speed if isinstance(speed, Plan) else base if plain else None,
            work=len(rows) * max(1.0, most / PROBE_SAMPLES),
            tolerance=TOLERANCE.get(first.dtype, 1e-5),
        )


def _provenance(
    objectives: Mapping[str, Objective], path: Path | Plane, policy: BatchNorm, plan: Plan
) -> dict[str, Any]:
    first = next(iter(objectives.values()))
    normalises = bool(batch_norm_layers(first.model))
    return {
        "batch norm": policy.words if normalises else "none in the model",
        "samples": {name: objective.num_samples for name, objective in objectives.items()},
        "type": str(first.dtype),
        "device": first.device.type,
        "path": describe_path(path),
        "plan": plan.as_json(),
        "versions": {"flatvalley": version("flatvalley"), "torch": str(torch.__version__)},
    }


def _threads(workers: int) -> int:
    return max(1, torch.get_num_threads() // workers)


def _require_speed(speed: Speed | Plan) -> None:
    if not isinstance(speed, Plan) and speed not in get_args(Speed):
        raise ValueError(f'`speed` must be "auto", "plain" or a `Plan`, got {speed!r}.')


def _require_precision(precision: str) -> Literal["full", "bfloat16"]:
    if precision not in ("full", "bfloat16"):
        raise ValueError(f'`precision` must be "full" or "bfloat16", got "{precision}".')
    return precision  # type: ignore[return-value]


def _require_alike(objectives: Mapping[str, Objective]) -> Objective:
    if not objectives:
        raise ValueError("`objectives` must hold at least one objective, got none.")
    first = next(iter(objectives.values()))
    for name, objective in objectives.items():
        if objective.model is not first.model or objective.shapes != first.shapes:
            raise ValueError(
                "`objectives` must share one model and one selection of weights, but "
                f'"{name}" has others. Build them all with the same `model` and `parameters`.'
            )
    return first


def _require_options(
    objectives: Mapping[str, Objective],
    metrics: Sequence[Metric],
    policy: BatchNorm,
    workers: int,
    group: dist.ProcessGroup | None,
) -> None:
    first = next(iter(objectives.values()))
    shared = any(objective.ranks.size > 1 for objective in objectives.values())
    normalises = bool(batch_norm_layers(first.model))
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}.")
    if workers > 1 and (first.device.type != "cpu" or shared or group is not None):
        raise ValueError(
            "`workers` must be 1 for a model on a GPU, or with ranks, got "
            f"{workers}. Share the points over ranks with `group`, one a GPU."
        )
    if group is not None and shared:
        raise ValueError(
            "`group` shares the points, but the objective's own group shares the data. Build it "
            "without a group."
        )
    if shared and ("error" in metrics or (normalises and policy.kind != "frozen")):
        raise ValueError(
            "`objectives` that share their data over ranks have a loss and its derivatives with "
            'frozen batch norm, got `metrics` with "error" or `batch_norm` '
            f'"{policy.kind}". Build them without a group, and pass it to this call.'
        )
    others = [metric for metric in metrics if metric not in PER_SAMPLE]
    if normalises and policy.kind == "batch" and others:
        raise ValueError(
            f'`metrics` must be loss or error with `batch_norm="batch"`, got "{others[0]}": the '
            'loss is then no sum over samples. Take "recompute".'
        )


def _require_points(points: Tensor, in_plane: bool) -> None:
    good = points.shape[-1:] == (2,) if in_plane else points.ndim == 1
    if not good or points.numel() == 0:
        wanted = "coordinates of shape [..., 2] in a plane" if in_plane else "values of shape [m]"
        raise ValueError(
            f"`ts` must hold {wanted}, at least one point, got shape {list(points.shape)}."
        )
