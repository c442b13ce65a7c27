"""What becomes of the outputs of layers before they go through a ReLU."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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

SUMS = {torch.add, Tensor.add, Tensor.add_}

BATCH_NORM = inspect.signature(functional.batch_norm)

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

OUT, SCALED, SUMMED, MOVED = range(4)
"""How far outputs have come: as they are, after batch norm, after sums, after views or pooling."""


@dataclass
class Tail:
    """What is done to what comes out of one call of a layer, z, before a ReLU: s z + t + r."""

    call: LayerCall
    scale: Float[Tensor, " m"] | None = None
    """s, of a batch norm in evaluation mode; None for 1."""
    shift: Float[Tensor, " m"] | None = None
    """t; None for 0."""
    is_sum: bool = False
    """Whether there is an r."""
    added: Tensor | None = None
    """r, like the outputs, if it was to be kept."""

    def added_rows(self) -> Float[Tensor, "p m"]:
        """Return r, if it was kept, a row a sample or position, as the call's inputs are."""
        assert self.call.out is not None
        added = torch.zeros_like(self.call.out) if self.added is None else self.added
        rows = added.movedim(self.call.channel, -1)
        return rows.reshape(-1, rows.shape[-1])


@dataclass
class _Value:
    """A tensor that outputs of layers are in, one by one."""

    tensor: Tensor
    """Kept alive, so that no later tensor is taken for it."""
    tails: list[Tail]
    stage: int
    is_used: bool = False
    is_spent: bool = False
    """Whether it went into a batch norm or a sum, beside which nothing else may see it."""


class Tails(TorchFunctionMode):
    """Follows the outputs of layers in one forward pass.

    To be entered inside of a ``LayerCalls`` that calls ``hear``, and closed with ``end``.

    Args:
        keep: The layer, by weight, whose r are kept. Default: none.
    """

    def __init__(self, keep: str | None = None) -> None:
        super().__init__()
        self.not_relu: dict[str, str] = {}
        """Why the output of a layer is not one that goes through a ReLU alone, by weight."""
        self.tails: dict[str, list[Tail]] = {}
        """By weight, one for each call, in order."""
        self.sums: set[frozenset[str]] = set()
        """Pairs of layers of which outputs are added to each other before a ReLU."""
        self._keep = keep
        self._heard: list[LayerCall] = []
        """Calls inside of the present function."""
        self._open: dict[int, _Value] = {}

    def hear(self, call: LayerCall) -> None:
        """Take note of a layer's call that is under way."""
        self._heard.append(call)

    def end(self, result: Any) -> None:
        """Look at what the model returned."""
        for t in tensors_in(result):
            if id(t) in self._open:
                self._fail(self._open[id(t)], "it comes out of the network")
        for value in self._open.values():
            if not value.is_used:
                self._fail(value, "what comes out of it is not seen to be used")

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            return func(*args, **kwargs)
        self._heard.clear()
        found = {
            id(t): self._open[id(t)] for t in tensors_in((args, kwargs)) if id(t) in self._open
        }
        follow = self._next(func, args, kwargs, list(found.values()))
        out = func(*args, **kwargs)
        follow(out)
        for call in self._heard:
            if not isinstance(out, Tensor) or call.out is None:
                self.not_relu[call.weight] = "its outputs stay inside of a larger function"
            elif call.bias is None and bias_of(args, kwargs) is not None:
                self.not_relu[call.weight] = "its bias is computed, and is no parameter"
            tail = Tail(call)
            self.tails.setdefault(call.weight, []).append(tail)
            if isinstance(out, Tensor):
                self._open[id(out)] = _Value(out, [tail], OUT)
        return out

    def _next(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], values: Sequence[_Value]
    ) -> Callable[[Any], None]:
        """See what is about to be done with outputs; return what to note once it is done."""
        name = getattr(func, "__name__", func)
        if func in SUMS:
            return self._sum(name, values, *_terms(args, kwargs))
        if func is functional.batch_norm:
            return self._batch_norm(values, BATCH_NORM.bind(*args, **kwargs))
        return lambda out: self._through(func, args, kwargs, values, out)

    def _through(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], values: Sequence[_Value], out: Any
    ) -> None:
        """Note that values went through a function that is neither a batch norm nor a sum."""
        for value in values:
            moves = commutes(func, args, kwargs) and isinstance(out, Tensor)
            if value.is_spent or not (func in RELUS or moves):
                self._fail(value, f"it goes into `{getattr(func, '__name__', func)}`")
                continue
            value.is_used = True
            if moves:
                stage = value.stage if is_idle(func, args, kwargs) else MOVED
                self._open[id(out)] = _Value(out, value.tails, stage)
            elif out is value.tensor:  # in place: it is the ReLU's output from now on
                del self._open[id(out)]

    def _batch_norm(
        self, values: Sequence[_Value], bound: inspect.BoundArguments
    ) -> Callable[[Any], None]:
        bound.apply_defaults()
        given = bound.arguments
        for value in values:
            fits = (
                value.tensor is given["input"]
                and value.stage == OUT
                and not (value.is_used or value.is_spent or given["training"])
                and value.tails[0].call.channel + value.tensor.ndim == 1
            )
            if fits:
                value.tails[0].scale, value.tails[0].shift = affine(given)
            else:
                self._fail(value, "it goes into `batch_norm`")
            value.is_used = value.is_spent = True

        def note(out: Tensor) -> None:
            for value in values:
                self._open[id(out)] = _Value(out, value.tails, SCALED)

        return note

    def _sum(
        self, name: str, values: Sequence[_Value], terms: tuple[Any, Any], plain: bool
    ) -> Callable[[Any], None]:
        tails: list[Tail] = []
        for value in values:
            other = terms[1] if value.tensor is terms[0] else terms[0]
            fits = (
                plain
                and value.stage <= SUMMED
                and not (value.is_used or value.is_spent)
                and other is not value.tensor
                and _keeps(value.tensor, other)
                # Of calls that share weights, each would take the other one as known.
                and not {t.call.weight for t in value.tails} & {t.call.weight for t in tails}
            )
            if not fits:
                self._fail(value, f"it goes into `{name}`")
                value.is_spent = True
                continue
            for tail in value.tails:
                tail.is_sum = True
                if tail.call.weight == self._keep:
                    # A copy, before something is added in place.
                    added = torch.as_tensor(other).to(value.tensor).expand_as(value.tensor)
                    tail.added = added.clone() if tail.added is None else tail.added + added
                self.sums |= {frozenset((tail.call.weight, t.call.weight)) for t in tails}
            value.is_used = value.is_spent = True
            tails = [*tails, *value.tails]

        def note(out: Tensor) -> None:
            if tails:
                self._open[id(out)] = _Value(out, tails, SUMMED)

        return note

    def _fail(self, value: _Value, why: str) -> None:
        value.is_used = True
        for tail in value.tails:
            self.not_relu.setdefault(tail.call.weight, why)


def bias_of(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the bias of a linear layer or a convolution."""
    return args[2] if len(args) > 2 else kwargs.get("bias")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside of lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def commutes(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a ReLU after it does the same as one before it."""
    return func in VIEWS or func in POOLS or is_idle(func, args, kwargs)


def is_idle(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether it is dropout that is off."""
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    return func is functional.dropout and training is False


def affine(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in evaluation mode, in float64."""
    mean, var = given["running_mean"].double(), given["running_var"].double()
    scale = (var + given["eps"]).rsqrt()
    if given["weight"] is not None:
        scale = scale * given["weight"].detach().double()
    shift = -mean * scale
    if given["bias"] is not None:
        shift = shift + given["bias"].detach().double()
    return scale, shift


def _terms(args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, Any], bool]:
    """Return what is added, and whether it is added as it is."""
    named = [kwargs[key] for key in ("input", "other") if key in kwargs]
    first, second = [*args, *named][:2]
    return (first, second), kwargs.get("alpha", 1) == 1 and kwargs.get("out") is None


def _keeps(value: Tensor, other: Any) -> bool:
    """Return whether a sum is like one of its terms."""
    shape = other.shape if isinstance(other, Tensor) else ()
    ends = zip(reversed(shape), reversed(value.shape), strict=False)
    fits = len(shape) <= value.ndim and all(a in (1, b) for a, b in ends)
    return fits and torch.result_type(value, other) == value.dtype
