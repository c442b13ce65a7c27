"""The layer that alone stands between a model's inputs and all else that has weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from hessian.batches import Batch, first_samples
from hessian.objective import Objective
from landscape.max_pooling import pair, poolings, window_places
from landscape.stand_ins import standing_in

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
KEEP_ORDER = (nn.ReLU, nn.ReLU6)
"""Functions that do not care whether the maximum is taken before or after them, to the bit."""


@dataclass(frozen=True)
class FirstLayer:
    """The layer that alone stands between the inputs and everything else that has weights."""

    name: str
    module: nn.Module
    alone: bool = False
    """Whether nothing else in the model uses its weights."""
    pooling: nn.MaxPool2d | None = None
    """What alone sees its outputs, changed by nothing but `KEEP_ORDER`."""

    @property
    def names(self) -> list[str]:
        """Full names of its parameters."""
        own = self.module.named_parameters(recurse=False)
        return [f"{self.name}.{leaf}".lstrip(".") for leaf, _ in own]

    def weights(self, objective: Objective, v: Tensor) -> dict[str, Tensor]:
        """Its part of a flat vector."""
        parts = objective.unflatten(v)
        return {name.rpartition(".")[2]: parts[name] for name in self.names}

    def outputs(self, weights: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what comes out: its maximum is what is pooled, if that is all that is seen."""
        out: Tensor = functional_call(self.module, weights, inputs)
        if self.pooling is None:
            return (out,)
        return window_places(pair(self.pooling.kernel_size), out)

    def returning(self, out: Tensor) -> AbstractContextManager[None]:
        """Let the layer return this, and the pooling in its first call what it is given."""
        forwards: dict[nn.Module, Callable[..., Tensor]] = {self.module: lambda *_: out}
        if self.pooling is not None:
            pool, calls = self.pooling.forward, count()
            forwards[self.pooling] = lambda x: pool(x) if next(calls) else x
        return standing_in(forwards)


def find_first_layer(objective: Objective, batch: Batch) -> FirstLayer | None:
    """Return the first layer if its output is affine in the weights on fixed inputs, else None.

    It must be linear or a convolution, run once in a forward pass, and see an input that depends on
    no weight and no running statistics. Costs some forward passes over a few samples.
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
            for other in (w, _elsewhere(w)):
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
    if not suits:
        return None
    layer = replace(layer, alone=_is_alone(layer, objective, few))
    pooled = replace(layer, pooling=_pooling_of(layer, objective, few))
    return pooled if _is_seen_through(pooled, objective, few) else layer


class _ReachedError(Exception):
    """Ends a forward pass at the first layer."""


def input_of(module: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    """Return what a module is given in a forward pass, which ends there."""
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
        inputs = input_of(layer.module, objective, batch)
        first = functional_call(layer.module, layer.weights(objective, w), inputs)
        for each in (weights, changed):
            with layer.returning(first.clone()):
                found = objective.run_at(each, lambda output: output(batch))
            outputs.append(found)
    return _equal(*outputs)


def _pooling_of(layer: FirstLayer, objective: Objective, batch: Batch) -> nn.MaxPool2d | None:
    """Return the max pooling that a layer's outputs reach, changed by nothing but `KEEP_ORDER`."""
    pools = poolings(objective.model)
    known = [m for m in objective.model.modules() if type(m) in KEEP_ORDER]
    now: list[tuple[Tensor, int]] = []
    found: list[nn.MaxPool2d] = []

    def hear(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if module is layer.module:
            now[:] = [(output, output._version)]
        elif now and not found and len(arguments) == 1 and arguments[0] is now[0][0]:
            # Changes in place are counted; a module that makes one itself returns its argument.
            as_it_was = arguments[0]._version == now[0][1] + (output is arguments[0])
            if as_it_was and isinstance(module, nn.MaxPool2d):
                found.append(module)
            now[:] = [(output, output._version)] if as_it_was else []

    handles = [module.register_forward_hook(hear) for module in (layer.module, *pools, *known)]
    try:
        with torch.no_grad():
            objective.output(objective.weights(), batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_seen_through(layer: FirstLayer, objective: Objective, batch: Batch) -> bool:
    """Whether the model's output is the same if maxima stand in for all that the layer gives."""
    if layer.pooling is None:
        return False
    at_the_weights = objective.weights()
    with torch.no_grad():
        inputs = input_of(layer.module, objective, batch)
        for w in (at_the_weights, _elsewhere(at_the_weights)):
            expected = objective.output(w, batch)
            places = layer.outputs(layer.weights(objective, w), inputs)
            try:
                with layer.returning(reduce(torch.maximum, places)):
                    found = objective.output(w, batch)
            except RuntimeError:  # of shapes: something else has seen it
                return False
            if not _equal(found, expected):
                return False
    return True


def _elsewhere(w: Tensor) -> Tensor:
    """Return weights none of which is 0 where it was, such as those that switch a branch off."""
    return 0.5 * w + 0.01


def _equal(found: Any, expected: Any) -> bool:
    """Whether two outputs of a model are the same to the bit."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return all(isinstance(a, Tensor) and torch.equal(a, b) for a, b in pairs)


def _holds_state(module: nn.Module) -> bool:
    own = any(True for _ in module.named_parameters(recurse=False))
    return own or isinstance(module, _BatchNorm)
