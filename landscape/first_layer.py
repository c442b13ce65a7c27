"""The first layer's output at any point of a path or plane, from its outputs at a few."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from hessian.batches import Batch, first_samples
from hessian.objective import Objective
from landscape.combinations import Combination, combine_

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
REUSE_BYTES = 2 << 30
"""Outputs that take more than this are computed at every point instead."""


@dataclass(frozen=True)
class FirstLayer:
    """The layer that alone stands between the inputs and everything else that has weights."""

    name: str
    module: nn.Module
    alone: bool = False
    """Whether nothing else in the model uses its weights."""

    @property
    def names(self) -> list[str]:
        """Full names of its parameters."""
        own = self.module.named_parameters(recurse=False)
        return [f"{self.name}.{leaf}".lstrip(".") for leaf, _ in own]

    def weights(self, objective: Objective, v: Tensor) -> dict[str, Tensor]:
        """Its part of a flat vector."""
        parts = objective.unflatten(v)
        return {name.rpartition(".")[2]: parts[name] for name in self.names}


def find_first_layer(objective: Objective, batch: Batch) -> FirstLayer | None:
    """Return the first layer if its output is affine in the weights on fixed inputs, else None.

    It must be linear or a convolution, run once in a forward pass, and see an input that depends on
    no weight and no running statistics. Costs two forward passes over a few samples.
    """
    few = first_samples(batch, 2)
    modules = {m: name for name, m in objective.model.named_modules() if _holds_state(m)}
    calls: list[tuple[nn.Module, Any]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen = arguments[0] if len(arguments) == 1 else None
        calls.append((module, seen.clone() if isinstance(seen, Tensor) else None))

    handles = [module.register_forward_pre_hook(note) for module in modules]
    w = objective.weights()
    try:
        with torch.no_grad():
            runs = []
            for other in (w, 0.5 * w + 0.01):
                calls.clear()
                objective.output(other, few)
                runs.append(list(calls))
    finally:
        for handle in handles:
            handle.remove()
    if not all(runs):
        return None
    (module, seen), (_, again) = runs[0][0], runs[1][0]
    layer = FirstLayer(modules[module], module)
    suits = (
        type(module) in AFFINE
        and sum(each is module for each, _ in runs[0]) == 1
        and all(name in objective.shapes for name in layer.names)
        and seen is not None
        and again is not None
        and torch.equal(seen, again)
    )
    return replace(layer, alone=_is_alone(layer, objective, few)) if suits else None


class ReusedOutputs:
    """Outputs of the first layer on some batches at every vector of a combination.

    Memory: as many outputs as there are vectors, one more, and that of one batch, which is where
    the layer's output is written on every batch, so that it stays in a cache.

    Args:
        layer: The first layer.
        objective: Whose model it belongs to.
        batches: What the model is run on.
        combination: Of the path or plane.
    """

    def __init__(
        self,
        layer: FirstLayer,
        objective: Objective,
        batches: list[Batch],
        combination: Combination,
        *,
        channels_last: bool = False,
    ) -> None:
        self._layer = layer
        self._coefficients: tuple[float, ...] = ()
        form = torch.channels_last if channels_last else torch.contiguous_format
        parts = [layer.weights(objective, v) for v in combination.vectors]
        self._terms: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for batch in batches:
                inputs = _input_of(layer.module, objective, batch)
                outputs = [functional_call(layer.module, part, inputs) for part in parts]
                self._terms.append(tuple(_in_format(out, form) for out in outputs))
        self._begun: list[tuple[tuple[float, ...], Tensor] | None] = [None] * len(batches)
        self._out = {terms[0].shape: torch.empty_like(terms[0]) for terms in self._terms}

    def move_to(self, coefficients: tuple[float, ...]) -> None:
        """Take another point."""
        self._coefficients = coefficients

    @contextmanager
    def standing_in(self, i: int) -> Iterator[None]:
        """Let the layer return its output on batch i at the point, instead of computing it."""
        with _standing_in(self._layer.module, self._output(i)):
            yield

    def _output(self, i: int) -> Tensor:
        # All terms but the last are the same along a row of a grid, and are kept.
        *head, last = self._terms[i]
        *front, c = self._coefficients
        begun = self._begun[i]
        if begun is None:
            begun = self._begun[i] = (), torch.empty_like(last)
        if begun[0] != tuple(front):
            combine_(begun[1], tuple(head), tuple(front))
            self._begun[i] = tuple(front), begun[1]
        return torch.add(begun[1], last, alpha=c, out=self._out[last.shape])


def bytes_per_sample(
    layer: FirstLayer, objective: Objective, batch: Batch, combination: Combination
) -> int:
    """Return what `ReusedOutputs` takes for each sample."""
    with torch.no_grad():
        out: Tensor = functional_call(
            layer.module,
            layer.weights(objective, combination.vectors[0]),
            _input_of(layer.module, objective, first_samples(batch, 2)),
        )
    return (len(combination.vectors) + 1) * out[:1].numel() * out.element_size()


class _ReachedError(Exception):
    """Ends a forward pass at the first layer."""


def _input_of(module: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    seen: list[Tensor] = []

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])
        raise _ReachedError

    handle = module.register_forward_pre_hook(stop)
    try:
        objective.output(objective.weights(), batch)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen[0]


def _is_alone(layer: FirstLayer, objective: Objective, batch: Batch) -> bool:
    """Whether the model's output stays what it is when only the layer's weights change."""
    w = objective.weights()
    weights = objective.unflatten(w)
    changed = weights | {name: torch.full_like(weights[name], torch.nan) for name in layer.names}
    outputs: list[Any] = []
    with torch.no_grad():
        inputs = _input_of(layer.module, objective, batch)
        first = functional_call(layer.module, layer.weights(objective, w), inputs)
        for each in (weights, changed):
            with _standing_in(layer.module, first.clone()):
                found = objective.run_at(each, lambda output: output(batch))
            outputs += tree_leaves(found)
    half = len(outputs) // 2
    pairs = zip(outputs[:half], outputs[half:], strict=True)
    return all(isinstance(a, Tensor) and torch.equal(a, b) for a, b in pairs)


@contextmanager
def _standing_in(module: nn.Module, out: Tensor) -> Iterator[None]:
    """Let a module return this instead of running."""
    module.forward = lambda *_: out
    try:
        yield
    finally:
        del module.forward


def _holds_state(module: nn.Module) -> bool:
    own = any(True for _ in module.named_parameters(recurse=False))
    return own or isinstance(module, _BatchNorm)


def _in_format(out: Tensor, form: torch.memory_format) -> Tensor:
    return out.contiguous(memory_format=form) if out.ndim == 4 else out.contiguous()
