"""Follows tensors through a forward pass: whether a network is a chain of layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hessian.convolutions import CONVOLUTIONS, bind_convolution
from pruning.layer_calls import LayerCall
from pruning.layer_tails import (
    BATCH_NORM,
    POOLS,
    READS,
    RELUS,
    VIEWS,
    Tails,
    affine,
    is_idle,
    tensors_in,
)

SMOOTH = {torch.tanh, torch.sigmoid, Tensor.tanh, Tensor.sigmoid, functional.relu6}
"""Elementwise functions with slopes in [0, 1], beside ReLU."""


@dataclass(frozen=True)
class Link:
    """One call of a layer in a chain."""

    weight: str
    groups: int
    overlap: float
    """How many positions an input goes into at most; 1 for a linear layer."""
    scale: tuple[float, ...] | None = None
    """Of a batch norm right after it, by output."""


class Flow(Tails):
    """Sees what is done with the outputs of layers in one forward pass, and what is a chain.

    Args:
        inputs: The model's arguments.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.chain: list[Link] | None = []
        """Calls of layers, each fed by the one before through functions that bring no two inputs
        farther apart; None if that is not all there is between the arguments and the result."""
        given = list(tensors_in(inputs))
        # Kept alive, so that no later tensor is taken for one of them.
        self._derived = {id(t): t for t in given}
        self._last = given[0] if len(given) == 1 else None
        self._linked: Tensor | None = None
        """What came out of the last layer of the chain."""

    def end(self, result: Any) -> None:
        """Look at what the model returned."""
        super().end(result)
        out = list(tensors_in(result))
        if len(out) != 1 or out[0] is not self._last:
            self.chain = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [t for t in tensors_in((args, kwargs)) if id(t) in self._derived]
        out = super().__torch_function__(func, types, args, kwargs)
        if func in READS:
            return out
        if used:
            self._extend(func, args, kwargs, used, out, tuple(self._heard))
        if used or self._heard:
            self._derived |= {id(t): t for t in tensors_in(out)}
        return out

    def _extend(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        used: Sequence[Tensor],
        out: Any,
        calls: Sequence[LayerCall],
    ) -> None:
        """Make the chain longer, or give it up."""
        if self.chain is None:
            return
        follows = len(used) == 1 and used[0] is self._last and isinstance(out, Tensor)
        if follows and calls and func is functional.linear:
            self.chain.append(Link(calls[0].weight, 1, 1.0))
            self._linked = out
        elif follows and calls and func in CONVOLUTIONS:
            overlap = _overlap(CONVOLUTIONS[func], args, kwargs)
            self.chain.append(Link(calls[0].weight, calls[0].groups, overlap))
            self._linked = out
        elif follows and func is functional.batch_norm and self._last is self._linked:
            scale = self._scale(BATCH_NORM.bind(*args, **kwargs))
            if scale is None:
                self.chain = None
            else:
                self.chain[-1] = replace(self.chain[-1], scale=scale)
        elif not follows or calls or not _contracts(func, args, kwargs):
            self.chain = None
        self._last = out

    def _scale(self, bound: BoundArguments) -> tuple[float, ...] | None:
        """Return the scales of a batch norm, if they are those of the last layer's outputs."""
        assert self.chain is not None and self._linked is not None
        bound.apply_defaults()
        tail = self.tails[self.chain[-1].weight][-1]
        if bound.arguments["training"] or tail.call.channel + self._linked.ndim != 1:
            return None
        return tuple(affine(bound.arguments)[0].tolist())


def _contracts(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether two inputs are never farther apart after it."""
    if func in POOLS:
        return _is_disjoint(*args, **kwargs)
    if func is functional.leaky_relu:
        slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
        return bool(abs(slope) <= 1)
    return func in RELUS | VIEWS | SMOOTH or is_idle(func, args, kwargs)


def _is_disjoint(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    *_: Any,
    **__: Any,
) -> bool:
    """Return whether no input is in two windows of a pool."""
    size, step, gap = (
        _listed(v, input.ndim) for v in (kernel_size, stride or kernel_size, dilation)
    )
    return all(s >= k and g == 1 for k, s, g in zip(size, step, gap, strict=False))


def _listed(value: Any, length: int) -> list[int]:
    listed = [value] if isinstance(value, int) else list(value)
    return listed * length if len(listed) == 1 else listed


def _overlap(dimensions: int, args: Any, kwargs: Mapping[str, Any]) -> float:
    """Return how many patches of a convolution an input is in at most."""
    call = bind_convolution(dimensions, *args, **kwargs)
    sizes = zip(call.weight.shape[2:], call.stride, call.dilation, strict=True)
    # Of the places in a kernel, those that meet an input at whole strides.
    return float(math.prod(-(-k * math.gcd(s, d) // s) for k, s, d in sizes))
