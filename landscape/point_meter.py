"""Every metric of every objective at one point after the other, through one flat buffer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from hessian.batches import Batch, batch_length, first_samples
from hessian.eigensolvers import leading_eigenspace
from hessian.errors import NonFiniteError
from hessian.objective import Objective
from hessian.precision import in_precision
from hessian.products import hessian_operator
from landscape.batch_norm import BatchNorm, PointStatistics
from landscape.channels_last import ChannelsLastKernels, with_channels_last
from landscape.combinations import Combination, as_combination, write_weights_
from landscape.compiled_model import CompiledModel, require_few_forms
from landscape.first_layer import FirstLayer, find_first_layer
from landscape.max_pooling import sliced_forwards
from landscape.onednn_linear import onednn_forwards
from landscape.paths import Path
from landscape.planes import Plane
from landscape.plans import Plan, UnsuitableError
from landscape.resident import ResidentData
from landscape.reused_outputs import REUSE_BYTES, ReusedOutputs, bytes_per_sample
from landscape.stand_ins import Forwards, standing_in
from landscape.zero_one import zero_one_loss

Metric: TypeAlias = Literal["loss", "error", "gradient_norm", "top_eigenvalue", "bottom_eigenvalue"]

PER_SAMPLE: tuple[Metric, ...] = ("loss", "error")
EIGENVALUE_TOL = 1e-3
"""An eigenvalue at a point is for a map in colours."""
EIGENVALUE_PRODUCTS = 300


class PointMeter:
    """Measures points of a path or plane.

    Memory: one flat vector beyond model, path and data, and all kernels once more if they lie with
    the channels last and a metric needs derivatives. Reused outputs of the first layer grow with
    the data, as `ReusedOutputs` says.

    Args:
        objectives: By name; all of one model and one selection of weights.
        path: Where the points lie.
        metrics: What is measured of every objective.
        policy: What batch norm normalises by.
        plan: How it is done.
        limit: Most samples of each objective, for a trial; sums are then over those.

    Raises:
        UnsuitableError: If the plan does not fit the model or the path.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        path: Path | Plane,
        metrics: Sequence[Metric],
        policy: BatchNorm,
        plan: Plan,
        *,
        limit: int | None = None,
    ) -> None:
        first = next(iter(objectives.values()))
        self._path, self._metrics = path, tuple(metrics)
        self._combination = as_combination(path)
        self._statistics = PointStatistics(policy, first)
        buffers = self._statistics.buffers
        self._objectives = {
            name: objective.with_buffers(buffers) if buffers else objective
            for name, objective in objectives.items()
        }
        for v in () if self._combination is None else self._combination.vectors:
            first.require_vector(v, "w")
        self._w = torch.empty(first.size, dtype=first.dtype, device=first.device)
        self._views = first.unflatten(self._w)
        in_place = set(metrics) <= set(PER_SAMPLE) and all(
            objective.ranks.size == 1 for objective in objectives.values()
        )
        self._kernels = (
            ChannelsLastKernels(self._views, in_place=in_place) if plan.channels_last else None
        )
        self._weights = self._views | (self._kernels.kernels if self._kernels else {})
        self._model_at = _ModelAt(self._weights, _forwards(first, plan), self._combination)
        compiled = CompiledModel(first.model) if plan.compiled else None
        layer = self._first_layer(first) if plan.reuse_first_layer else None
        self._written = [slice(0, first.size)]
        if layer is not None and layer.alone and set(metrics) <= set(PER_SAMPLE):
            self._written = _entries_without(first, layer.names)
            if self._kernels is not None:
                self._kernels.leave_out(layer.names)
        self._data = {
            name: _PreparedData(self._model_at, objective, plan, layer, compiled, limit)
            for name, objective in self._objectives.items()
            if objective.ranks.size == 1
        }
        if compiled is not None:
            if len(self._data) < len(self._objectives):
                raise UnsuitableError("data that are shared over ranks")
            require_few_forms(batch for data in self._data.values() for batch in data.batches)
        samples = self._statistics.samples
        self._normalisers = (
            _PreparedBatches(
                self._model_at, in_precision(self._with_buffers(first), plan.precision)
            )
            if samples
            else None
        )
        if self._normalisers is not None:
            self._normalisers.take(samples, plan, layer, sum(map(batch_length, samples)))

    @property
    def columns(self) -> list[tuple[str, Metric]]:
        """What `measure` returns, row by row."""
        return [(name, metric) for name in self._objectives for metric in self._metrics]

    def measure(self, point: Tensor) -> Tensor:
        """Return count, sum and sum of squares of every column, shape [columns, 3], float64.

        A number that is not one of samples counts once. Sums may be infinite.
        """
        self._move_to(point)
        rows: list[Tensor] = []
        for name, objective in self._objectives.items():
            found: dict[str, Tensor] = {}
            if objective.ranks.size > 1:
                found["loss"] = self._shared_loss(objective)
            elif any(metric in PER_SAMPLE for metric in self._metrics):
                found |= self._of_samples(name, objective)
            if any(metric not in PER_SAMPLE for metric in self._metrics):
                found |= self._of_derivatives(objective)
            rows += [found[metric] for metric in self._metrics]
        return torch.stack(rows)

    def samples(self, point: Tensor) -> Tensor:
        """Return every sample's value of one column after the other, float64 on the CPU.

        Samples are in the order of the data. For metrics that are means over samples.
        """
        self._move_to(point)
        parts = []
        for name, objective in self._objectives.items():
            if objective.ranks.size > 1:
                parts.append(objective.sample_losses(self._w))
            else:
                parts += self._values(name, objective).values()
        return torch.cat(parts).cpu()

    def _move_to(self, point: Tensor) -> None:
        if self._combination is None:
            w = self._path(float(point))
            next(iter(self._objectives.values())).require_vector(w, "w")
            self._w.copy_(w)
            coefficients = None
        else:
            for entries in self._written:
                write_weights_(self._w, self._combination, point, entries)
            coefficients = self._combination.coefficients(point)
        if self._kernels is not None:
            self._kernels.take_()
        for data in [*self._data.values(), *([self._normalisers] if self._normalisers else [])]:
            data.move_to(coefficients)
        self._statistics.begin_(float(point) if point.ndim == 0 else None)
        if self._normalisers is not None:
            with self._statistics.gathering() as gathering:
                self._normalisers.visit(before=gathering.next_batch)

    def _of_samples(self, name: str, objective: Objective) -> dict[str, Tensor]:
        return {metric: sums(values) for metric, values in self._values(name, objective).items()}

    def _values(self, name: str, objective: Objective) -> dict[str, Tensor]:
        """Every sample's loss and error from one forward pass, in the order of the metrics."""
        found: dict[str, list[Tensor]] = {
            metric: [] for metric in self._metrics if metric in PER_SAMPLE
        }

        def take(output: Any, batch: Batch) -> None:
            for metric, parts in found.items():
                if metric == "loss":
                    values = objective.sample_losses_from_output(output, batch)
                    parts.append(values.to(torch.float64))
                else:
                    parts.append(_errors(output, batch).to(torch.float64))

        with self._statistics.forward_mode(), torch.no_grad():
            self._data[name].visit(take)
        whole = {metric: torch.cat(parts) for metric, parts in found.items()}
        if "loss" in whole and objective.normalizer != objective.num_samples:
            # What makes the mean over samples the loss, where they count unevenly.
            whole["loss"] *= objective.num_samples / objective.normalizer
        return whole

    def _shared_loss(self, objective: Objective) -> Tensor:
        """The loss of an objective whose batches are spread over ranks."""
        try:
            found = objective.statistics(self._w)
            numbers = [found.count, found.total, found.total_squares]
        except NonFiniteError:
            numbers = [objective.num_samples, torch.nan, torch.nan]
        return torch.tensor(numbers, dtype=torch.float64)

    def _of_derivatives(self, objective: Objective) -> dict[str, Tensor]:
        found: dict[str, float] = {}
        wanted = [m for m in self._metrics if m not in PER_SAMPLE]
        for metric in wanted:
            try:
                found[metric] = (
                    float(objective.gradient(self._w).norm())
                    if metric == "gradient_norm"
                    else self._eigenvalue(objective, largest=metric == "top_eigenvalue")
                )
            except NonFiniteError:
                found[metric] = torch.nan
        return {
            metric: torch.tensor([1.0, value, value**2], dtype=torch.float64)
            for metric, value in found.items()
        }

    def _eigenvalue(self, objective: Objective, *, largest: bool) -> float:
        space = leading_eigenspace(
            hessian_operator(objective, self._w),
            k=1,
            which="largest" if largest else "smallest",
            tol=EIGENVALUE_TOL,
            max_products=EIGENVALUE_PRODUCTS,
            multiple=False,
            measure=False,
        )
        return float(space.values[0])

    def _with_buffers(self, objective: Objective) -> Objective:
        return objective.with_buffers(self._statistics.buffers)

    def _first_layer(self, objective: Objective) -> FirstLayer:
        """The first layer, if it can be reused."""
        if self._combination is None or objective.ranks.size > 1:
            raise UnsuitableError
        layer = find_first_layer(objective, next(iter(objective.batches())), self._w)
        if layer is None:
            raise UnsuitableError
        return layer


@dataclass(frozen=True)
class _ModelAt:
    """What the model runs with at the meter's point."""

    weights: dict[str, Tensor]
    forwards: Forwards
    combination: Combination | None


class _PreparedBatches:
    """Batches, and the model's outputs on them at the meter's point."""

    def __init__(
        self, model_at: _ModelAt, objective: Objective, forward: CompiledModel | None = None
    ) -> None:
        # Not the meter itself, whose weights would then wait for the garbage collector.
        self._model_at, self._objective, self._forward = model_at, objective, forward
        self.batches: Iterable[Batch] = []
        self._reused: ReusedOutputs | None = None

    def take(
        self, batches: list[Batch], plan: Plan, layer: FirstLayer | None, num_samples: int
    ) -> None:
        """Hold these batches, in the plan's layout; there may be more samples later."""
        if plan.channels_last:
            batches = [with_channels_last(batch) for batch in batches]
        self.batches = batches
        combination = self._model_at.combination
        if layer is not None and combination is not None:
            each = bytes_per_sample(layer, self._objective, batches[0], combination)
            if each * num_samples > REUSE_BYTES:
                raise UnsuitableError
            self._reused = ReusedOutputs(
                layer,
                self._objective,
                batches,
                combination,
                channels_last=plan.channels_last,
            )

    def move_to(self, coefficients: tuple[float, ...] | None) -> None:
        if self._reused is not None and coefficients is not None:
            self._reused.move_to(coefficients)

    def visit(
        self,
        take: Callable[[Any, Batch], None] = lambda output, batch: None,
        before: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        """Hand the output on every batch on; gradients are not recorded."""

        def work(output: Callable[[Batch], Any]) -> None:
            for i, batch in enumerate(self.batches):
                before(batch)
                with nullcontext() if self._reused is None else self._reused.standing_in(i):
                    found = output(batch)
                take(found, batch)

        with torch.no_grad(), standing_in(self._model_at.forwards):
            self._objective.run_at(self._model_at.weights, work, forward=self._forward)


class _PreparedData(_PreparedBatches):
    """The data of an objective."""

    def __init__(
        self,
        model_at: _ModelAt,
        objective: Objective,
        plan: Plan,
        layer: FirstLayer | None,
        compiled: CompiledModel | None,
        limit: int | None,
    ) -> None:
        super().__init__(model_at, in_precision(objective, plan.precision), compiled)
        data = ResidentData(objective, plan.batch_size)
        if data.held is not None:
            held = data.held if limit is None else _first(data.held, limit)
            self.take(held, plan, layer, objective.num_samples)
        elif (
            plan.channels_last or plan.compiled or layer is not None or plan.batch_size is not None
        ):
            raise UnsuitableError
        else:
            self.batches = data


def without_infinities(table: Tensor) -> Tensor:
    """Make sums NaN that are not finite, in a table with count, sum and sum of squares as rows."""
    broken = ~torch.isfinite(table).all(dim=-1)
    table[..., 1:][broken] = torch.nan
    return table


def sums(values: Tensor) -> Tensor:
    """Return count, sum and sum of squares of every sample's value, on the CPU."""
    return torch.stack([values.new_tensor(len(values)), values.sum(), values.square().sum()]).cpu()


def require_metrics(metrics: Sequence[str]) -> tuple[Metric, ...]:
    """Return the metrics, if all are known and none is named twice.

    Raises:
        ValueError: Naming the one that is not.
    """
    known = get_args(Metric)
    for metric in metrics:
        if metric not in known:
            raise ValueError(f'`metrics` must be among {", ".join(known)}, got "{metric}".')
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"`metrics` must name each metric once, got {list(metrics)}.")
    return tuple(metrics)  # type: ignore[arg-type]


def _entries_without(objective: Objective, names: Sequence[str]) -> list[slice]:
    """The entries of the flat vector that belong to other parameters."""
    found: list[slice] = []
    start = 0
    for name, shape in objective.shapes.items():
        end = start + shape.numel()
        if name not in names:
            if found and found[-1].stop == start:
                found[-1] = slice(found[-1].start, end)
            else:
                found.append(slice(start, end))
        start = end
    return found


def _forwards(objective: Objective, plan: Plan) -> Forwards:
    """What stands in for modules of the model, by the plan."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    if plan.channels_last and not plan.compiled and objective.device.type == "cpu":
        forwards |= sliced_forwards(objective.model)
    if plan.onednn_linear:
        linear = onednn_forwards(objective) if plan.precision == "full" else {}
        if not linear:
            raise UnsuitableError
        forwards |= linear
    return forwards


def _first(batches: list[Batch], limit: int) -> list[Batch]:
    """The first batches, with about so many samples."""
    found: list[Batch] = []
    seen = 0
    for batch in batches:
        if seen < limit:
            found.append(first_samples(batch, limit) if not found else batch)
        seen += batch_length(batch)
    return found


def _errors(output: Any, batch: Batch) -> Tensor:
    """1 for a wrong sample, 0 for a right one, their mean over positions; NaN without an output."""
    if not isinstance(output, Tensor) or isinstance(batch, Mapping):
        raise ValueError(
            '`metrics` may hold "error" for a model that returns scores and tuple batches '
            f"`(*inputs, target)`, got {type(output).__name__} and {type(batch).__name__}. Pass "
            "an objective whose criterion counts errors."
        )
    wrong = zero_one_loss(output, batch[-1]).reshape(len(output), -1).mean(dim=1)
    finite = torch.isfinite(output).reshape(len(output), -1).all(dim=1)
    return torch.where(finite, wrong, torch.nan)
