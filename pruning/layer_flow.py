"""Follows tensors through a forward pass: what goes straight into a ReLU, and what is a chain."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hessian.convolutions import CONVOLUTIONS, bind_convolution
from pruning.layer_calls import LayerCall

RELUS = {functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}

VIEWS = {torch.flatten, torch.reshape, Tensor.flatten, Tensor.reshape, Tensor.view}

POOLS = {
    functional.max_pool1d,
    functional.max_pool2d,
    functional.max_pool3d,
    torch.max_pool1d,
    torch.max_pool2d,
    torch.max_pool3d,
}

SMOOTH = {torch.tanh, torch.sigmoid, Tensor.tanh, Tensor.sigmoid, functional.relu6}
"""Elementwise functions with slopes in [0, 1], beside ReLU."""

READS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.__len__,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad")
    ),
}
"""What may be asked of a tensor without using its values."""


@dataclass(frozen=True)
class Link:
    """One call of a layer in a chain."""

    weight: str
    groups: int
    overlap: float
    """How many positions an input goes into at most; 1 for a linear layer."""


class Flow(TorchFunctionMode):
    """Sees what is done with the outputs of layers in one forward pass.

    To be entered inside of a ``LayerCalls`` that calls ``hear``, and closed with ``end``.

    Args:
        inputs: The model's arguments.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.not_relu: dict[str, str] = {}
        """Why the output of a layer is not one that goes through a ReLU alone, by weight."""
        self.chain: list[Link] | None = []
        """Calls of layers, each fed by the one before through functions that bring no two inputs
        farther apart; None if that is not all there is between the arguments and the result."""
        self._calls: list[LayerCall] = []
        self._open: dict[int, str] = {}
        self._used: set[int] = set()
        given = list(_tensors(inputs))
        # Kept alive, so that no later tensor is taken for one of them.
        self._derived = {id(t): t for t in given}
        self._last = given[0] if len(given) == 1 else None

    def hear(self, call: LayerCall) -> None:
        """Take note of a layer's call that is under way."""
        self._calls.append(call)

    def end(self, result: Any) -> None:
        """Look at what the model returned."""
        out = list(_tensors(result))
        for t in out:
            self._not_relu(t, "it comes out of the network")
        for key, name in self._open.items():
            if key not in self._used:
                self.not_relu.setdefault(name, "what comes out of it is not seen to be used")
        if len(out) != 1 or out[0] is not self._last:
            self.chain = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            return func(*args, **kwargs)
        used = [t for t in _tensors((args, kwargs)) if id(t) in self._derived]
        self._calls.clear()
        out = func(*args, **kwargs)
        calls = tuple(self._calls)
        self._follow(func, args, kwargs, used, out)
        if used:
            self._extend(func, args, kwargs, used, out, calls)
        if used or calls:
            self._derived |= {id(t): t for t in _tensors(out)}
        for call in calls:
            if not isinstance(out, Tensor) or call.out is None:
                self.not_relu[call.weight] = "its outputs stay inside of a larger function"
            elif call.bias is None and _bias(args, kwargs) is not None:
                self.not_relu[call.weight] = "its bias is computed, and is no parameter"
            else:
                self._open[id(out)] = call.weight
        return out

    def _follow(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], used: Sequence[Tensor], out: Any
    ) -> None:
        """See what becomes of outputs of layers."""
        for t in used:
            if id(t) not in self._open:
                continue
            if func in RELUS:
                self._used.add(id(t))
                if out is t:  # in place: it is the ReLU's output from now on
                    del self._open[id(t)]
            elif _commutes(func, args, kwargs) and isinstance(out, Tensor):
                self._used.add(id(t))
                self._open[id(out)] = self._open[id(t)]
            else:
                self._not_relu(t, f"it goes into `{getattr(func, '__name__', func)}`")

    def _not_relu(self, t: Tensor, why: str) -> None:
        if id(t) in self._open:
            self._used.add(id(t))
            self.not_relu.setdefault(self._open[id(t)], why)

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
        elif follows and calls and func in CONVOLUTIONS:
            overlap = _overlap(CONVOLUTIONS[func], args, kwargs)
            self.chain.append(Link(calls[0].weight, calls[0].groups, overlap))
        elif not follows or calls or not _contracts(func, args, kwargs):
            self.chain = None
        self._last = out


def _bias(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the bias of a linear layer or a convolution."""
    return args[2] if len(args) > 2 else kwargs.get("bias")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _commutes(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a ReLU after it does the same as one before it."""
    return func in VIEWS or func in POOLS or _is_idle(func, args, kwargs)


def _contracts(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether two inputs are never farther apart after it."""
    if func in POOLS:
        return _is_disjoint(*args, **kwargs)
    if func is functional.leaky_relu:
        slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
        return bool(abs(slope) <= 1)
    return func in RELUS | VIEWS | SMOOTH or _is_idle(func, args, kwargs)


def _is_idle(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether it is dropout that is off."""
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    return func is functional.dropout and training is False


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
