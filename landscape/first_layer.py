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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessian.batches import Batch, first_samples
from hessian.objective import Objective
from landscape.max_pooling import pair, poolings, window_places
from landscape.stand_ins import Function, has_hooks, is_patched, standing_in

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATEN = torch.ops.aten
KEEP_ORDER = (ATEN.relu.default, ATEN.relu_.default, ATEN.hardtanh.default, ATEN.hardtanh_.default)
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
        return self.part(objective.unflatten(v))

    def part(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Its part of all weights, by the names that it has for them."""
        return {name.rpartition(".")[2]: weights[name] for name in self.names}

    def outputs(self, weights: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what comes out: its maximum is what is pooled, if that is all that is seen."""
        out: Tensor = functional_call(self.module, weights, inputs)
        if self.pooling is None:
            return (out,)
        return window_places(pair(self.pooling.kernel_size), out)

    def returning(self, out: Tensor) -> AbstractContextManager[None]:
        """Let the layer return this, and the pooling in its first call what it is given."""
        forwards: dict[nn.Module, Function] = {self.module: lambda *_: out}
        if self.pooling is not None:
            forwards[self.pooling] = _pass_at_first(self.pooling.forward)
        return standing_in(forwards)


def find_first_layer(objective: Objective, batch: Batch, scratch: Tensor) -> FirstLayer | None:
    """Return the first layer if its output is affine in the weights on fixed inputs, else None.

    It must be linear or a convolution and nothing else (no hook, no weight normalisation), run once
    in a forward pass, and see an input that depends on no weight and no running statistics. Costs
    some forward passes over a few samples. No copy of the weights is made: the scratch space, a
    flat vector, is written instead.
    """
    few = first_samples(batch, 2)
    candidates = {m for m in objective.model.modules() if _is_affine(m)}
    modules = {m: name for name, m in objective.model.named_modules() if _holds_state(m)}
    calls: list[tuple[nn.Module, Any]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen = arguments[0] if len(arguments) == 1 else None
        calls.append((module, seen.clone() if isinstance(seen, Tensor) else None))

    handles = [module.register_forward_pre_hook(note) for module in modules]
    own = _own_weights(objective)
    try:
        with torch.no_grad():
            runs = []
            for moved in (False, True):
                calls.clear()
                if moved:
                    for name, part in objective.unflatten(scratch).items():
                        torch.mul(own[name], 0.5, out=part).add_(0.01)
                objective.run_at(objective.unflatten(scratch) if moved else own, on(few))
                runs.append(list(calls))
    finally:
        for handle in handles:
            handle.remove()
    if not all(runs):
        return None
    (module, seen), (_, again) = runs[0][0], runs[1][0]
    layer = FirstLayer(modules[module], module)
    suits = (
        module in candidates
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
        objective.run_at(_own_weights(objective), on(batch))
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen[0]


def _own_weights(objective: Objective) -> dict[str, Tensor]:
    """The model's own, by name; no copies."""
    return {name: objective.model.get_parameter(name).detach() for name in objective.shapes}


def on(batch: Batch) -> Callable[[Callable[[Batch], Any]], Any]:
    """What `Objective.run_at` is to do: run the model on one batch."""
    return lambda output: output(batch)


def _is_alone(layer: FirstLayer, objective: Objective, batch: Batch) -> bool:
    """Whether the model's output stays what it is when only the layer's weights change."""
    weights = _own_weights(objective)
    nan = next(iter(weights.values())).new_tensor(torch.nan)
    changed = weights | {name: nan.expand_as(weights[name]) for name in layer.names}
    outputs: list[Any] = []
    with torch.no_grad():
        inputs = input_of(layer.module, objective, batch)
        first = functional_call(layer.module, layer.part(weights), inputs)
        for each in (weights, changed):
            with layer.returning(first.clone()):
                found = objective.run_at(each, on(batch))
            outputs.append(found)
    return _equal(*outputs)


def _pooling_of(layer: FirstLayer, objective: Objective, batch: Batch) -> nn.MaxPool2d | None:
    """Return the max pooling that alone sees a layer's outputs, changed by `KEEP_ORDER` at most."""
    if any(map(has_hooks, objective.model.modules())):  # they may look, or change things unseen
        return None
    reach = _Reach()
    found: list[nn.MaxPool2d] = []

    def pools(module: nn.MaxPool2d, arguments: tuple[Any, ...]) -> None:
        if arguments and reach.holds(arguments[0]):
            found.append(module)

    handles = [module.register_forward_pre_hook(pools) for module in poolings(objective.model)]
    handles.append(layer.module.register_forward_hook(lambda _, __, out: reach.follow(out)))
    try:
        with torch.no_grad(), reach:
            objective.run_at(_own_weights(objective), on(batch))
    finally:
        for handle in handles:
            handle.remove()
    alone = len(found) == reach.num_poolings == 1 and not reach.others
    return found[0] if alone else None


class _Reach(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is done with a tensor, and with what `KEEP_ORDER` makes of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_poolings = 0
        self.others: list[str] = []
        self._followed: list[Tensor] = []

    def follow(self, tensor: Tensor) -> None:
        self._followed.append(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor shares memory with one that is followed."""
        place = tensor.untyped_storage().data_ptr()
        return any(place == known.untyped_storage().data_ptr() for known in self._followed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        seen = any(map(self.holds, given))
        out = func(*args, **(kwargs or {}))
        if seen and func in KEEP_ORDER:
            self.follow(out)
        elif seen and func is ATEN.max_pool2d_with_indices.default:
            self.num_poolings += 1
        elif seen:
            self.others.append(str(func))
        return out


def _is_seen_through(layer: FirstLayer, objective: Objective, batch: Batch) -> bool:
    """Whether the model's output is the same if maxima stand in for all that the layer gives.

    It is not where something asks for the size of the outputs.
    """
    if layer.pooling is None:
        return False
    weights = _own_weights(objective)
    with torch.no_grad():
        expected = objective.run_at(weights, on(batch))
        inputs = input_of(layer.module, objective, batch)
        places = layer.outputs(layer.part(weights), inputs)
        try:
            with layer.returning(reduce(torch.maximum, places)):
                found = objective.run_at(weights, on(batch))
        except Exception:  # whatever the model raises at a size that it does not know
            return False
    return _equal(found, expected)


def _equal(found: Any, expected: Any) -> bool:
    """Whether two outputs of a model are the same to the bit."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return all(isinstance(a, Tensor) and torch.equal(a, b) for a, b in pairs)


def _pass_at_first(pool: Function) -> Function:
    """What returns its argument when it is called the first time, and pools it later."""
    calls = count()

    def forward(*arguments: Any, **named: Any) -> Any:
        return pool(*arguments, **named) if next(calls) else (*arguments, *named.values())[0]

    return forward


def _is_affine(module: nn.Module) -> bool:
    return type(module) in AFFINE and not (has_hooks(module) or is_patched(module))


def _holds_state(module: nn.Module) -> bool:
    own = any(True for _ in module.named_parameters(recurse=False))
    return own or isinstance(module, _BatchNorm)
