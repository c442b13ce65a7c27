"""What one layer of a network is given and must give, gathered by forward passes."""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from pruning.layer_calls import LayerCall, LayerCalls
from pruning.layer_tails import Tail, Tails
from pruning.layer_trim import RESOLUTION, LayerTrim
from pruning.net_trim_program import Ball, LayerProgram
from pruning.net_trim_survey import FoundLayer
from pruning.net_trim_targets import outputs

SMALLEST_SCALE = 0.1
"""Scales of a batch norm below this share of the median count as much in the penalty: so little
comes out of these channels that their weights go in any case, and zero has no inverse. Penalties
that are farther apart make the iteration slow."""

OFF = 1e-3
"""Channels with scales below this share of the largest one are not in that median."""


@dataclass(frozen=True)
class GroupProblem:
    """The program of the outputs that share their inputs, and what its ε is measured by."""

    program: LayerProgram
    norm: float
    """‖Y‖_F of what the dense network gives."""
    drift: float | None
    """The discrepancy of the dense weights themselves; None where inputs are those of the dense
    network."""
    scale: Float[Tensor, " m"] | None = None
    """By which the rows of the program's weights are multiples of the layer's own."""
    dtype: torch.dtype = torch.float64
    """Of the layer's own weights, where they are scaled."""
    fixed: float = 0.0
    """Discrepancy of outputs that a scale of zero takes out of the layer's hands."""

    def sparse(self, epsilon: float, *, before_refit: bool, **goal: Any) -> LayerTrim:
        """Return the program's sparse weights for the layer's ε, as ``LayerProgram.sparse``."""
        radius = math.sqrt(max(epsilon**2 - self.fixed**2, 0.0))
        return self.program.sparse(radius, before_refit=before_refit, **goal)

    def epsilon(self, share: float, gamma: float) -> float:
        """Return ε: a share of ‖Y‖_F on dense inputs, and √γ times the drift on others."""
        return share * self.norm if self.drift is None else math.sqrt(gamma) * self.drift

    def own(self, trim: LayerTrim) -> LayerTrim:
        """Return a trim of the program as one of the layer's own weights."""
        if self.scale is None:
            return trim
        own = (trim.weights / self.scale[:, None]).masked_fill_(self.scale[:, None] == 0, 0.0)
        return replace(
            trim,
            weights=own.to(self.dtype),
            epsilon=math.hypot(trim.epsilon, self.fixed),
            discrepancy=math.hypot(trim.discrepancy, self.fixed),
            output_discrepancy=math.hypot(trim.output_discrepancy, self.fixed),
        )


@torch.no_grad()
def group_problems(
    objective: Objective,
    layer: FoundLayer,
    dense: Float[Tensor, " d"],
    now: Float[Tensor, " d"] | None,
    *,
    ball: Ball,
    penalise_bias: bool,
    options: Mapping[str, Any],
) -> list[GroupProblem]:
    """Return the programs of a layer, one for each group of outputs.

    A linear layer with more rows of inputs than inputs is streamed: its moments are held. All rows
    are held of others. Costs one forward pass, or two with pruned weights.

    Args:
        objective: Model and calibration inputs.
        layer: Which layer.
        dense: Weights of which the layer keeps the outputs.
        now: Weights that give the layer its inputs. Default: the dense ones.
        ball: As for ``net_trim_layer``.
        penalise_bias: Whether a bias has a penalty.
        options: Others of ``LayerProgram``.
    """
    parts = objective.unflatten(dense)
    W = layer.rows(parts)
    penalty = torch.ones(W.shape[1], dtype=torch.float64, device=W.device)
    if layer.bias is not None and not penalise_bias:
        penalty[-1] = 0.0
    S = None
    if layer.fixed_bias is not None:
        S = {**objective.constants(), **parts}[layer.fixed_bias].to(W)
    if layer.kind == "linear" and layer.num_rows > layer.num_inputs:
        rest = {key: value for key, value in options.items() if key != "chunk"}
        return _by_moments(objective, layer, W, S, dense, now, {**rest, "penalty": penalty})
    before = _given(objective, layer, dense)
    after = before if now is None else _given(objective, layer, now)
    folded, weighted = _folded(W, penalty, before.scale)
    found = []
    for i, rows in enumerate(torch.arange(len(W), device=W.device).chunk(layer.groups)):
        U, given = folded[rows], after.X[i]
        Y = outputs(U, before.X[i], layer.kind, before.offset(S, rows))
        s = after.offset(S, rows)
        norm, bound, drift, fixed = _norm(Y), None, None, 0.0
        scale = None if before.scale is None else before.scale[rows]
        if scale is not None and s is not None and bool((scale == 0).any()):
            # Nothing of these outputs is the weights' doing: their goal is what comes by itself.
            itself = torch.where(scale == 0, s.expand_as(Y).relu(), Y)
            fixed, Y = _norm(itself - Y), itself
        if now is not None:
            Z = outputs(U, given, "linear", s)
            off = Z - Y
            if layer.kind == "relu":
                off = torch.where(Y > 0, off, Z.clamp(min=0.0))
            drift = _changed(math.hypot(_norm(off), fixed), norm)
            if drift is not None and layer.kind == "relu" and ball == "split":
                # Outputs above zero count by their bound here, which W meets, not in the ball. The
                # ReLU makes nothing of what is below zero, so W need not be met there.
                bound, drift = Z.clamp(min=0.0), math.hypot(_norm(off * (Y > 0)), fixed)
        program = LayerProgram(
            U,
            given,
            Y,
            kind=layer.kind,
            bound=bound,
            offset=s,
            penalty=weighted[rows],
            ball=ball,
            **options,
        )
        found.append(GroupProblem(program, norm, drift, scale, W.dtype, fixed))
    return found


@dataclass(frozen=True)
class _Given:
    """All that a layer multiplies its weights by, and what happens before the ReLU."""

    X: Float[Tensor, "groups p n"]
    scale: Float[Tensor, " m"] | None = None
    shift: Float[Tensor, " m"] | None = None
    added: Float[Tensor, "p m"] | None = None

    def offset(self, bias: Tensor | None, rows: Tensor) -> Tensor | None:
        """Return what is added to products with folded weights: s b + t + r, or None for 0."""
        total = None if bias is None else bias[rows].double()
        if self.scale is not None and self.shift is not None:
            total = self.shift[rows] + (0.0 if total is None else self.scale[rows] * total)
        if self.added is not None:
            part = self.added[:, rows]
            total = part if total is None else part + total
        return None if total is None else total.to(self.X.dtype)


def _folded(W: Tensor, penalty: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return s W and λ / |s|, so that the penalty is that of W."""
    if scale is None:
        return W, penalty.expand(W.shape)
    size = scale.abs()
    on = size[size > OFF * size.max()]
    size = size.clamp(min=SMALLEST_SCALE * float(on.median()) if len(on) else 1.0)
    return scale[:, None] * W, penalty / size[:, None]


def _changed(drift: float, norm: float) -> float | None:
    """Return a drift that is more than rounding makes."""
    return drift if drift > RESOLUTION * norm else None


def _by_moments(
    objective: Objective,
    layer: FoundLayer,
    W: Tensor,
    S: Tensor | None,
    dense: Tensor,
    now: Tensor | None,
    options: Mapping[str, Any],
) -> list[GroupProblem]:
    """Return programs from sums over rows, in float64."""
    groups, n = layer.groups, W.shape[1]
    U = W.double().view(groups, -1, n)
    bias = 0.0 if S is None else S.double().view(groups, 1, -1)
    gram = U.new_zeros(groups, n, n)
    cross = torch.zeros_like(U)
    squares, sizes, drifts = (U.new_zeros(groups) for _ in range(3))
    for batch in objective.batches():
        before = _inputs(objective, layer, dense, batch)
        after = None if now is None else _inputs(objective, layer, now, batch)
        for X in before:
            X = X.double()
            given = X if after is None else next(after).double()
            T = X @ U.mT
            gram += given.mT @ given
            cross += T.mT @ given
            squares += T.square().sum(dim=(1, 2))
            sizes += (T + bias).square().sum(dim=(1, 2))
            if now is not None:
                drifts += (given @ U.mT - T).square().sum(dim=(1, 2))
    found = []
    for i, rows in enumerate(W.chunk(groups)):
        own = (None, None) if now is None else (cross[i], float(squares[i]))
        program = LayerProgram.from_gram(rows, gram[i], *own, **options)
        norm = math.sqrt(sizes[i])
        drift = None if now is None else _changed(math.sqrt(drifts[i]), norm)
        found.append(GroupProblem(program, norm, drift))
    return found


def _given(objective: Objective, layer: FoundLayer, w: Tensor) -> _Given:
    """Return all that a layer multiplies its weights by, and what is known of what follows."""
    one = None if layer.bias is None else 1.0
    inputs: list[Tensor] = []
    tails: list[Tail] = []
    added: list[Tensor] = []
    for batch in objective.batches():
        follow = Tails(layer.weight) if layer.between else None
        for call in _calls(objective, layer, w, batch, follow):
            inputs += [p.to(torch.promote_types(p.dtype, torch.float32)) for p in call.parts(one)]
        if follow is not None:
            tails = follow.tails[layer.weight]
            added += [tail.added_rows() for tail in tails if "sum" in layer.between]
    X = torch.cat(inputs, dim=1)
    if not tails:
        return _Given(X)
    return _Given(X, tails[0].scale, tails[0].shift, torch.cat(added).to(X) if added else None)


def _inputs(objective: Objective, layer: FoundLayer, w: Tensor, batch: Any) -> Iterator[Tensor]:
    """Yield what a layer multiplies its weights by in a batch, [groups, rows, inputs]."""
    one = None if layer.bias is None else 1.0
    for call in _calls(objective, layer, w, batch):
        yield from call.parts(one)


def _calls(
    objective: Objective, layer: FoundLayer, w: Tensor, batch: Any, follow: Tails | None = None
) -> list[LayerCall]:
    """Return the calls of a layer in a batch; what follows them is seen as well."""
    calls: list[LayerCall] = []

    def hear(call: LayerCall) -> None:
        calls.append(call)
        if follow is not None:
            follow.hear(call)

    parts = objective.unflatten(w)
    with LayerCalls({layer.weight: parts[layer.weight]}, hear), follow or nullcontext():
        objective.output(w, batch)
    return calls


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
