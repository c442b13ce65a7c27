"""Exact Optimal Brain Surgeon of each layer's outputs: OBC, the best layer-wise one-shot pruner."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hessian import Objective
from hessian.finiteness import finite_vector
from pruning.allocation import Allocation
from pruning.calibration import warn_of_few
from pruning.layer_allocation import keep_in_layers
from pruning.layer_fit import by_group, damped, fitted_rows, mean_square
from pruning.layer_inputs import LayerInputs, changed_moments, input_moments
from pruning.pruned import Pruned, as_pruned
from pruning.row_surgery import removal_order

LayerAllocation: TypeAlias = Literal["pooled", "relative", "uniform"] | Mapping[str, float]


@dataclass(frozen=True)
class LayerError:
    """What pruning did to one layer."""

    weight: str
    sparsity: float
    """Share of zeros among the layer's weights, without the bias."""
    predicted_error: float
    """What the removals were to cost: the squared change of the layer's output, summed over
    positions, in the mean over samples, and the damping's share."""
    error: float
    """That change, without damping, by the moments of the layer's inputs; with ``inputs="pruned"``
    all that the output has changed since the dense network."""
    relative_error: float
    """The change as a share of the mean squared output; NaN if that is 0."""


@dataclass(frozen=True)
class ObcPruned(Pruned):
    """Weights after exact layer-wise surgery, and what it did to every layer."""

    layers: tuple[LayerError, ...]
    num_passes: int
    """Forward passes through the data, without gradients."""


@dataclass(frozen=True)
class LayerTrace:
    """In which order the weights of a layer go, output by output."""

    inputs: LayerInputs
    order: Int[Tensor, "m n"]
    """Inputs of every output in the order in which their weights go; the bias is the last input,
    and goes last, unless it is zero."""
    losses: Float[Tensor, "m n"]
    """By how much each removal raises the squared error of the layer's output, by sample, with
    its share of damping; infinity for a bias that is not zero."""


@dataclass(frozen=True)
class ObcTraces:
    """Greedy removals in all layers, from which weights of any sparsity come cheaply."""

    w: Float[Tensor, " d"]
    """Weights before."""
    objective: Objective
    layers: tuple[LayerTrace, ...]
    damping: float

    def prune(
        self,
        sparsity: float,
        allocation: LayerAllocation = "pooled",
        *,
        inputs: Literal["dense", "pruned"] = "dense",
        exclude: Sequence[str] = (),
    ) -> ObcPruned:
        """Return the weights at a sparsity: those left of every output fit its dense output best.

        Within a layer, the outputs' removals are pooled: next goes what costs least. Weights come
        from one Cholesky factorisation for each output, of as many rows as it keeps; after greedy
        removal with an update at each step they would be the same.

        ============== ======================================================================
        allocation     which layers give how much
        ============== ======================================================================
        ``"pooled"``   removals of all layers in one ranking, by squared error of the layer's
                       output: what the layers' outputs lose in sum is small
        ``"relative"`` the same, by errors as shares of the layer's mean squared output
        ``"uniform"``  all layers give the same share of their weights
        a mapping      of glob patterns to sparsities of the weights they fit; all others are
                       pooled to meet the total
        ============== ======================================================================

        Args:
            sparsity: Share of zeros wanted among all d weights, in [0, 1], biases and the rest
                included, of which only weights of layers go. Zeros stay zero.
            allocation: See the table.
            inputs: What the weights that are left fit the dense outputs on: the ``"dense"`` inputs
                of each layer, or those that come from the ``"pruned"`` layers before it, which
                makes up for what these have lost. That takes two forward passes a layer.
            exclude: Glob patterns of parameters in which nothing goes.

        Raises:
            ValueError: If the sparsity is outside [0, 1] or above what the layers' weights can
                reach (the message says how far they reach), or the allocation is not known or a
                pattern matches nothing; if ``inputs`` is not known.
            NonFiniteError: If what goes into a layer after pruned ones is not finite.
        """
        if inputs not in ("dense", "pruned"):
            raise ValueError(f'`inputs` must be "dense" or "pruned", got {inputs!r}.')
        competing: Allocation = "global"
        if isinstance(allocation, Mapping) or allocation == "uniform":
            competing = allocation
        elif allocation not in ("pooled", "relative"):
            raise ValueError(
                '`allocation` must be "pooled", "relative", "uniform" or a mapping of glob '
                f"patterns to sparsities, got {allocation!r}."
            )
        keep = keep_in_layers(
            self._ranks(relative=allocation == "relative"),
            self.w,
            self.objective,
            [layer.inputs for layer in self.layers],
            sparsity=sparsity,
            allocation=competing,
            exclude=exclude,
        )
        weights = self.w.clone()
        parts, keeps = self.objective.unflatten(weights), self.objective.unflatten(keep.to(weights))
        errors, num_passes = [], 1
        for trace in self.layers:
            layer = trace.inputs
            W, kept = layer.rows(parts).double(), layer.rows(keeps) != 0
            moments = None
            if inputs == "pruned" and layer.moments.ndim == 3:
                moments = changed_moments(self.objective, layer, weights, self.w)
                num_passes += 2
            fitted, error = fitted_rows(layer, W, kept, self.damping, moments)
            layer.write_rows_(parts, fitted.to(weights.dtype))
            errors.append(_layer_error(trace, W, fitted, kept, error))
        pruned = as_pruned(finite_vector(weights, "weight vector after pruning", self.objective))
        return ObcPruned(
            pruned.weights, pruned.mask, pruned.sparsity, pruned.lam, tuple(errors), num_passes
        )

    def _ranks(self, *, relative: bool) -> Tensor:
        """Return the place of every weight in one ranking of all removals; infinity elsewhere."""
        # Each row gives its cheapest removal that is next; those that a dear one opens up follow
        # it at once. So costs count as the largest so far, and equal ones keep their order.
        units = [1.0] * len(self.layers)
        if relative:
            parts = self.objective.unflatten(self.w)
            outputs = [mean_square(t.inputs, t.inputs.rows(parts).double()) for t in self.layers]
            units = [output or 1.0 for output in outputs]
        costs = torch.cat(
            [
                (layer.losses.cummax(dim=1).values / unit).flatten()
                for layer, unit in zip(self.layers, units, strict=True)
            ]
        )
        places = torch.empty_like(costs)
        places[costs.argsort(stable=True)] = torch.arange(len(costs)).to(costs)
        ranks = torch.full_like(self.w, math.inf, dtype=torch.float64)
        parts = self.objective.unflatten(ranks)
        start = 0
        for layer in self.layers:
            count = layer.order.numel()
            own = places[start : start + count].view(layer.order.shape)
            rows = torch.empty_like(own).scatter_(1, layer.order.long(), own)
            layer.inputs.write_rows_(parts, rows)
            start += count
        return ranks


def obc_traces(
    objective: Objective,
    w: Float[Tensor, " d"] | None = None,
    *,
    damping: float = 0.01,
    rows_at_once: int | None = None,
) -> ObcTraces:
    """Return the order in which weights go if each layer is to keep its outputs on dense inputs.

    For every output of every layer: remove the weight w_j that raises the squared error of the
    output least, w_j² / [H⁻¹]_jj, let the others answer, and go on until none is left, where
    H = A + δ I for the second moments A of the layer's inputs at w. One run of removals serves all
    sparsities: see ``ObcTraces.prune``.

    All layers that ``input_moments`` sees take part. A bias is the weight of an input that is
    always one: it answers, but never goes, unless it is zero, and then it stays zero. Inputs that
    are never active cost nothing and go first. A table of embeddings has no answers: what a row
    costs is its square times how often it is looked up. Normalisation and all other parameters
    stay as they are; renew the statistics of batch norm afterwards. Nothing is written into a
    model: ``objective.write_(result.weights)`` does that.

    Args:
        objective: Model and calibration inputs, e.g. a ``DenseDistance``; labels are not used.
        w: Weights before, shape [d]. Default: the model's.
        damping: δ as a share of the mean of diag A, over inputs that are ever active.
        rows_at_once: Outputs of a layer that are worked on together. A layer of n inputs takes
            8 n² bytes for each, and about (2/3) n³ flops in float64. Default: as fit 128 MiB.

    Raises:
        ValueError: If damping is not positive or too small for a layer's moments, ``rows_at_once``
            is not positive, w does not fit or is not finite, or anything that ``input_moments``
            refuses.
        NonDeterministicError: If dropout is on, or batch norm in training mode.
        NonFiniteError: If what goes into a layer is not finite.

    Warns:
        CalibrationWarning: If a layer has more inputs than there are calibration rows for it.

    Example:
        >>> import torch
        >>> from pruning import DenseDistance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.1]]))
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9]])  # almost the same input twice
        >>> traces = obc_traces(DenseDistance(model, X, kind="squared"))
        >>> traces.prune(0.5).weights.round(decimals=1)  # magnitude pruning leaves 1.0
        tensor([1.1000, 0.0000])

    References:
        Frantar & Alistarh (2022), Optimal Brain Compression: a framework for accurate
        post-training quantization and pruning.
        Hassibi & Stork (1993), Second order derivatives for network pruning.
    """
    if not 0 < damping < math.inf:
        raise ValueError(f"`damping` must be positive and finite, got {damping}.")
    if rows_at_once is not None and rows_at_once < 1:
        raise ValueError(f"`rows_at_once` must be at least 1, got {rows_at_once}.")
    w = objective.weights() if w is None else w.detach().clone()
    layers = input_moments(objective, w)
    sizes = {layer.weight: (layer.num_rows, layer.moments.shape[-1]) for layer in layers}
    tables = {layer.weight for layer in layers if layer.moments.ndim == 1}
    warn_of_few({k: v for k, v in sizes.items() if k not in tables}, "damping", stacklevel=2)
    parts = objective.unflatten(w)
    traces = [
        _trace(inputs, inputs.rows(parts).double(), damping, rows_at_once) for inputs in layers
    ]
    return ObcTraces(w, objective, tuple(traces), damping)


def _trace(inputs: LayerInputs, W: Tensor, damping: float, rows_at_once: int | None) -> LayerTrace:
    if inputs.moments.ndim == 1:
        by_cost = (W.square() * inputs.moments).sort(dim=1, stable=True)
        return LayerTrace(inputs, by_cost.indices.int(), by_cost.values)
    orders, losses = [], []
    for A, rows in by_group(inputs, W):
        active = A.diagonal() > 0
        dead, live = (~active).nonzero()[:, 0], active.nonzero()[:, 0]
        stays = torch.zeros_like(rows, dtype=torch.bool)
        if inputs.bias is not None:
            stays[:, -1] = rows[:, -1] != 0
        H = damped(A, damping, inputs.weight)[live][:, live]
        order, costs = removal_order(H, rows[:, live], stays[:, live], rows_at_once=rows_at_once)
        free = dead.expand(len(rows), -1)
        orders.append(torch.cat([free, live[order]], dim=1).int())
        losses.append(torch.cat([costs.new_zeros(free.shape), costs], dim=1))
    return LayerTrace(inputs, torch.cat(orders), torch.cat(losses))


def _layer_error(
    trace: LayerTrace, W: Tensor, fitted: Tensor, keep: Tensor, error: float
) -> LayerError:
    inputs = trace.inputs
    went = ~keep.gather(1, trace.order.long())
    whole = mean_square(inputs, W)
    weights = fitted if inputs.bias is None else fitted[:, :-1]
    return LayerError(
        inputs.weight,
        float((weights == 0).double().mean()),
        float(trace.losses.masked_fill(~went, 0.0).sum()),
        error,
        error / whole if whole > 0 else math.nan,
    )
