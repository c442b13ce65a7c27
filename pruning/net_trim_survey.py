"""The layers of a network that Net-Trim can prune, what follows each, and why others cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hessian import Objective
from pruning.layer_calls import LayerCall, LayerCalls
from pruning.layer_flow import Flow, Link
from pruning.layer_rows import LayerRows
from pruning.layer_tails import Tail
from pruning.net_trim_targets import Kind, Mode

Between: TypeAlias = Literal["batch norm", "sum"]


@dataclass(frozen=True)
class FoundLayer(LayerRows):
    """A layer of a network: where its weights are, and how it is used."""

    fixed_bias: str | None
    """Its bias where that stays as it is."""
    kind: Kind
    reason: str
    """Why it does not count as one with a ReLU after it; empty where it does."""
    between: tuple[Between, ...]
    """What is between it and its ReLU, and is known."""
    groups: int
    num_rows: int
    """Samples times positions."""
    num_inputs: int
    """Of every output, with one for a bias to be pruned."""


@dataclass(frozen=True)
class Survey:
    """What one pass through a network finds."""

    layers: tuple[FoundLayer, ...]
    """In the order of their first calls."""
    skipped: Mapping[str, str]
    """Why weights of two dimensions or more stay as they are, by name."""
    chain: tuple[Link, ...] | None
    """All calls of layers, if the network is a chain of them and of functions that bring no two
    inputs farther apart; otherwise None."""


class _Calls:
    """What is heard of the calls of one layer."""

    def __init__(self) -> None:
        self.biases: set[str | None] = set()
        self.kinds_of_groups: set[int] = set()
        self.groups, self.rows, self.inputs, self.is_table = 1, 0, 0, False
        self.tails: list[Tail] = []

    def add(self, call: LayerCall) -> None:
        self.biases.add(call.bias)
        for part in call.parts(None):
            if part.ndim == 1:
                self.is_table = True
            else:
                self.groups, rows, self.inputs = part.shape
                self.kinds_of_groups.add(self.groups)
                self.rows += rows

    @property
    def between(self) -> tuple[Between, ...]:
        found: list[Between] = [] if self.tails[0].scale is None else ["batch norm"]
        return (*found, "sum") if any(tail.is_sum for tail in self.tails) else tuple(found)

    @property
    def are_alike(self) -> bool:
        """Whether the same is made of the outputs of all calls before something is added."""
        first = self.tails[0]
        return all(
            _equal(tail.scale, first.scale) and _equal(tail.shift, first.shift)
            for tail in self.tails
        )


@torch.no_grad()
def survey(
    objective: Objective,
    w: Float[Tensor, " d"],
    exclude: Sequence[str],
    mode: Mode = "parallel",
) -> Survey:
    """Return the layers of a network, by one pass without gradients.

    Args:
        objective: Model and calibration inputs.
        w: Weights, shape [d].
        exclude: Glob patterns of parameters that stay as they are.
        mode: Of pruning: of layers that are added to each other, one counts as having a ReLU after
            it in parallel.

    Raises:
        ValueError: If a pattern matches no parameter, or no layer is left.
    """
    _require_matches(exclude, objective)
    parts = {**objective.unflatten(w), **_constants(objective)}
    heard: dict[str, _Calls] = {}
    not_relu: dict[str, str] = {}
    chains: list[tuple[Link, ...] | None] = []
    sums: set[frozenset[str]] = set()
    for batch in objective.batches():
        flow = Flow(list(batch.values()) if isinstance(batch, Mapping) else batch[:-1])

        def hear(call: LayerCall, flow: Flow = flow) -> None:
            flow.hear(call)
            heard.setdefault(call.weight, _Calls()).add(call)

        with LayerCalls(parts, hear), flow:
            out = objective.output(w, batch)
        flow.end(out)
        not_relu = flow.not_relu | not_relu
        chains.append(None if flow.chain is None else tuple(flow.chain))
        sums |= flow.sums
        for name, tails in flow.tails.items():
            # What is added was not kept; the outputs need not be either.
            heard[name].tails += [replace(t, call=t.call._replace(out=None)) for t in tails]
    layers, skipped = [], {}
    for name, calls in heard.items():
        why = _why_not(name, calls, objective, exclude)
        if why:
            skipped[name] = why
        else:
            layers.append(_layer(name, calls, not_relu.get(name, ""), objective, exclude))
    skipped |= _not_heard(objective.model, set(heard))
    if mode == "parallel":
        layers = _one_of_each_sum(layers, sums, objective)
    if not layers:
        listed = "; ".join(f"`{name}`: {why}" for name, why in skipped.items())
        raise ValueError(
            "`model` must call a linear, convolution or attention layer that may be pruned, got "
            f"none. {listed or 'It has no weights of two dimensions.'}"
        )
    same = all(chain == chains[0] for chain in chains)
    return Survey(tuple(layers), skipped, chains[0] if same else None)


def _constants(objective: Objective) -> dict[str, Tensor]:
    return {name: t for name, t in objective.constants().items() if t.is_floating_point()}


def _layer(
    name: str, calls: _Calls, reason: str, objective: Objective, exclude: Sequence[str]
) -> FoundLayer:
    (bias,) = calls.biases
    fixed = bias is not None and (bias not in objective.shapes or _fits(bias, exclude))
    if not (reason or calls.are_alike):
        reason = "its calls have different batch norms after them"
    return FoundLayer(
        name,
        None if fixed else bias,
        bias if fixed else None,
        "linear" if reason else "relu",
        reason,
        () if reason else calls.between,
        calls.groups,
        calls.rows,
        calls.inputs + (bias is not None and not fixed),
    )


def _one_of_each_sum(
    layers: Sequence[FoundLayer], sums: set[frozenset[str]], objective: Objective
) -> list[FoundLayer]:
    """Return layers of which no two are added to each other and count as having a ReLU.

    What is silent may come nearer to zero. If both terms did, each by all that the other leaves,
    their sum could be positive by as much. The largest one counts, of equal ones the last.
    """
    order = sorted(
        range(len(layers)), key=lambda i: (objective.shapes[layers[i].weight].numel(), i)
    )
    found = list(layers)
    count: set[str] = set()
    for i in reversed(order):
        layer = layers[i]
        others = [name for name in count if frozenset((name, layer.weight)) in sums]
        if layer.kind == "relu" and others:
            reason = f"it is added to what comes out of `{min(others)}`, which is larger"
            found[i] = replace(layer, kind="linear", reason=reason, between=())
        elif layer.kind == "relu":
            count.add(layer.weight)
    return found


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _why_not(name: str, calls: _Calls, objective: Objective, exclude: Sequence[str]) -> str:
    if name not in objective.shapes:
        return "it is not among the parameters"
    if _fits(name, exclude):
        return "it is excluded"
    if calls.is_table:
        return "it is a table of embeddings"
    if len(calls.biases) > 1:
        return "it is called with more than one bias"
    if len(calls.kinds_of_groups) > 1:
        return "it is called with different numbers of groups"
    return "" if calls.rows else "no sample goes into it"


def _not_heard(model: nn.Module, heard: set[str]) -> dict[str, str]:
    """Say of weights that no layer was heard to multiply with why."""
    found = {}
    for name, p in model.named_parameters():
        if p.ndim < 2 or name in heard:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        called = isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding)
        found[name] = (
            "it is not called on the calibration inputs"
            if called
            else f"{type(owner).__name__} is no linear, convolution or attention layer"
        )
    return found


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _require_matches(exclude: Sequence[str], objective: Objective) -> None:
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in objective.shapes):
            raise ValueError(
                f'`exclude` pattern "{pattern}" matches none of {", ".join(objective.shapes)}.'
            )
