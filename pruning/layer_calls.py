"""Hears every call of a layer, whichever module makes it, and what its weights multiply."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hessian.convolutions import CONVOLUTIONS, ConvolutionCall, bind_convolution

PATCH_ELEMENTS = 1 << 24
"""Entries of unfolded patches that are held at a time."""

ATTENTION = inspect.signature(functional.multi_head_attention_forward)


Parts = Callable[[float | None], Iterator[Tensor]]


class LayerCall(NamedTuple):
    """One call of a layer whose weights are known by name."""

    weight: str
    bias: str | None
    parts: Parts
    """Gives the inputs a part at a time, [groups, rows, inputs], with a number for the bias put in
    the last place of each row, unless it is None. Where there are several groups, each feeds an
    equal share of the outputs, in order. For a table of embeddings: how often each of its rows was
    looked up, [inputs]."""
    groups: int
    out: Tensor | None
    """What came out; None for projections inside attention and for embeddings."""
    channel: int
    """The dimension of ``out`` that counts the outputs, from the end."""


class LayerCalls(TorchFunctionMode):
    """Tells of the calls of linear, convolution, attention and embedding layers while it is on.

    Args:
        parts: The weights to listen for, by name: views of one vector, as they will be used.
        heard: Called after every call, before the model goes on with its output.
    """

    def __init__(self, parts: dict[str, Tensor], heard: Callable[[LayerCall], None]) -> None:
        super().__init__()
        # Views of one vector: the place in memory tells them apart, also after they are cut anew.
        self._names = {_place(t): name for name, t in parts.items() if t.numel()}
        self._heard = heard

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is functional.linear:
            self._tell(*_linear(out, *args, **kwargs))
        elif func in CONVOLUTIONS:
            self._tell(*_convolution(out, bind_convolution(CONVOLUTIONS[func], *args, **kwargs)))
        elif func is functional.embedding:
            self._tell(*_embedding(*args, **kwargs))
        elif func is functional.multi_head_attention_forward:
            for call in _projections(dict(ATTENTION.bind(*args, **kwargs).arguments)):
                self._tell(*call)
        return out

    def _tell(
        self,
        weight: Tensor,
        bias: Tensor | None,
        parts: Parts,
        groups: int = 1,
        out: Tensor | None = None,
        channel: int = -1,
    ) -> None:
        name = self._names.get(_place(weight))
        if name is not None:
            own = None if bias is None else self._names.get(_place(bias))
            self._heard(LayerCall(name, own, parts, groups, out, channel))


def _place(t: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from all others, its transpose among them."""
    return t.data_ptr(), t.shape, t.stride()


def _linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return weight, bias, _one_group(input), 1, out, -1


def _convolution(out: Tensor, call: ConvolutionCall) -> Any:
    dims = call.weight.ndim - 2
    x = call.input if call.input.ndim == dims + 2 else call.input[None]
    size = call.weight.shape[2:]
    spans = [d * (k - 1) for d, k in zip(call.dilation, size, strict=True)]
    if call.padding == "same":
        ends = [(span // 2, span - span // 2) for span in spans]
    elif isinstance(call.padding, str):
        ends = [(0, 0)] * dims
    else:
        ends = [(p, p) for p in call.padding]

    def patches(x: Tensor) -> Tensor:
        x = functional.pad(x, [p for pair in reversed(ends) for p in pair])
        for i in range(dims):
            x = x.unfold(2 + i, spans[i] + 1, call.stride[i])[..., :: call.dilation[i]]
        order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
        rows = x.permute(order).reshape(-1, call.groups, call.weight[0].numel())
        return rows.transpose(0, 1)

    def parts(last: float | None) -> Iterator[Tensor]:
        step = max(1, PATCH_ELEMENTS // patches(x.detach()[:1]).numel())
        for part in torch.split(x.detach(), step):
            yield _ended(patches(part), last)

    return call.weight, call.bias, parts, call.groups, out, -1 - dims


def _embedding(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Any:
    def parts(_: float | None) -> Iterator[Tensor]:
        counts = torch.bincount(input.reshape(-1), minlength=len(weight))
        yield counts.to(torch.promote_types(weight.dtype, torch.float32))

    return weight, None, parts


def _projections(given: dict[str, Any]) -> Iterator[Any]:
    """Yield the projections of one call of attention: of queries, keys and values, and the last."""
    inputs = [given[name] for name in ("query", "key", "value")]
    if given.get("use_separate_proj_weight"):
        # Their biases are parts of one parameter: they stay as they are.
        for name, x in zip("qkv", inputs, strict=True):
            yield given[f"{name}_proj_weight"], None, _one_group(x)
    else:

        def stacked(last: float | None) -> Iterator[Tensor]:
            rows = [_ended(_rows(x), last) for x in inputs]
            longest = max(map(len, rows))
            # Rows of zeros add nothing to a moment.
            yield torch.stack([functional.pad(x, (0, 0, 0, longest - len(x))) for x in rows])

        yield given["in_proj_weight"], given["in_proj_bias"], stacked, 3
    weight, bias = given["out_proj_weight"], given["out_proj_bias"]

    def attended(last: float | None) -> Iterator[Tensor]:
        # The same call with nothing done to what the last projection is given.
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        plain = given | {"out_proj_weight": identity, "out_proj_bias": None}
        yield from _one_group(functional.multi_head_attention_forward(**plain)[0])(last)

    yield weight, bias, attended


def _one_group(x: Tensor) -> Parts:
    return lambda last: iter([_ended(_rows(x), last)[None]])


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _ended(rows: Tensor, last: float | None) -> Tensor:
    return rows if last is None else functional.pad(rows, (0, 1), value=last)
