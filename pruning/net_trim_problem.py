"""What one layer of a network is given and must give, gathered by forward passes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from pruning.layer_calls import LayerCall, LayerCalls
from pruning.layer_trim import RESOLUTION, LayerTrim
from pruning.net_trim_program import Ball, LayerProgram
from pruning.net_trim_survey import FoundLayer
from pruning.net_trim_targets import outputs


@dataclass(frozen=True)
class GroupProblem:
    """The program of the outputs that share their inputs, and what its ε is measured by."""

    program: LayerProgram
    norm: float
    """‖Y‖_F of what the dense network gives."""
    drift: float | None
    """The discrepancy of the dense weights themselves; None where inputs are those of the dense
    network."""

    def epsilon(self, share: float, gamma: float) -> float:
        """Return ε: a share of ‖Y‖_F on dense inputs, and √γ times the drift on others."""
        return share * self.norm if self.drift is None else math.sqrt(gamma) * self.drift

    def solve(self, epsilon: float, **options: Any) -> LayerTrim:
        """Return the sparse weights for one ε, with options of ``LayerProgram.solve``."""
        return self.program.solve(epsilon, **options)


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
    options = {**options, "penalty": penalty}
    S = None
    if layer.fixed_bias is not None:
        S = {**objective.constants(), **parts}[layer.fixed_bias].to(W)
    if layer.kind == "linear" and layer.num_rows > layer.num_inputs:
        options.pop("chunk", None)
        return _by_moments(objective, layer, W, S, dense, now, options)
    dense_rows = _rows(objective, layer, dense)
    now_rows = dense_rows if now is None else _rows(objective, layer, now)
    biases = [None] * layer.groups if S is None else list(S.chunk(layer.groups))
    found = []
    for X, given, U, s in zip(dense_rows, now_rows, W.chunk(layer.groups), biases, strict=True):
        Y = outputs(U, X, layer.kind, s)
        norm, bound, drift = _norm(Y), None, None
        if now is not None:
            Z = outputs(U, given, "linear", s)
            off = Z - Y
            if layer.kind == "relu":
                off = torch.where(Y > 0, off, Z.clamp(min=0.0))
            drift = _changed(_norm(off), norm)
            if drift is not None and layer.kind == "relu" and ball == "split":
                # Outputs above zero count by their bound here, which W meets, not in the ball.
                bound, drift = Z, _norm(off * (Y > 0))
        program = LayerProgram(
            U, given, Y, kind=layer.kind, bound=bound, offset=s, ball=ball, **options
        )
        found.append(GroupProblem(program, norm, drift))
    return found


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


def _rows(objective: Objective, layer: FoundLayer, w: Tensor) -> Float[Tensor, "groups p n"]:
    """Return all that a layer multiplies its weights by."""
    return torch.cat(
        [
            part.to(torch.promote_types(part.dtype, torch.float32))
            for batch in objective.batches()
            for part in _inputs(objective, layer, w, batch)
        ],
        dim=1,
    )


def _inputs(objective: Objective, layer: FoundLayer, w: Tensor, batch: Any) -> Iterator[Tensor]:
    """Yield what a layer multiplies its weights by in a batch, [groups, rows, inputs]."""
    calls: list[LayerCall] = []
    parts = objective.unflatten(w)
    with LayerCalls({layer.weight: parts[layer.weight]}, calls.append):
        objective.output(w, batch)
    one = None if layer.bias is None else 1.0
    for call in calls:
        yield from call.parts(one)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
