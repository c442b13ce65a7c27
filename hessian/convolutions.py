"""Convolution and frozen batch norm whose second derivatives cost what their flops do.

Torch differentiates a convolution's backward pass by convolutions with kernels as large as the
image, and batch norm's by a dozen passes over the activations. The same derivatives are written
here with torch's own backward kernels; a frozen batch norm that follows a convolution becomes part
of its kernel and costs nothing.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding and dilation by dimension, and the number of groups."""

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
"""The functions behind the layers, and how many dimensions they move in."""


class ConvolutionCall(NamedTuple):
    """The arguments of a convolution in one form."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int] | str
    dilation: list[int]
    groups: int


def bind_convolution(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> ConvolutionCall:
    """Return the arguments of a call of ``torch.conv1d`` and the like, defaults filled in."""

    def each(value: Any) -> list[int]:
        listed = [value] if isinstance(value, int) else list(value)
        return listed * dimensions if len(listed) == 1 else listed

    ends = padding if isinstance(padding, str) else each(padding)
    return ConvolutionCall(input, weight, bias, each(stride), ends, each(dilation), groups)


def convolution(x: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of x [n, c, ...] with W; differentiable twice, in reverse mode."""
    return cast(Tensor, _apply(_Convolution, x, W, bias, geometry))


def frozen_batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x · scale + shift by channel, the second dimension of x; differentiable twice."""
    return cast(Tensor, _apply(_ChannelAffine, x, scale, shift))


def _forward(x: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(
        x, W, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )


def _backward(
    g: Tensor, x: Tensor, W: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients in x, W and the bias, where wanted, for the gradient g in the output."""
    stride, padding, dilation, groups = geometry
    out: tuple[Tensor | None, Tensor | None, Tensor | None]
    out = torch.ops.aten.convolution_backward(
        g, x, W, [W.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, wanted
    )
    return out


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.geometry = geometry
        return _forward(x, W, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, W = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        return *_apply(_ConvolutionBackward, g, x, W, ctx.geometry, wanted), None


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, W: Tensor, geometry: Geometry, wanted: Any) -> Any:
        ctx.save_for_backward(g, x, W)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _backward(g, x, W, geometry, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, hx: Tensor | None, hW: Tensor | None, hb: Tensor | None) -> Any:
        # The gradients are bilinear in g, x and W; hx, hW and hb take the place of x, W, the bias.
        g, x, W = ctx.saved_tensors
        in_g, in_x, in_W = ctx.needs_input_grad[:3]
        out_g = None
        if in_g:
            if hW is not None:
                out_g = _forward(x, hW, hb, ctx.geometry)
            elif hb is not None:
                out_g = hb.view(-1, *[1] * (g.ndim - 2)).expand_as(g)
            if hx is not None:
                part = _forward(hx, W, None, ctx.geometry)
                out_g = part if out_g is None else part.add_(out_g)
        in_x, in_W = in_x and hW is not None, in_W and hx is not None
        out_x, out_W = None, None
        if in_x or in_W:
            out_x, out_W, _ = _backward(
                g,
                x if hx is None else hx,
                W if hW is None else hW,
                ctx.geometry,
                (in_x, in_W, False),
            )
        return out_g, out_x, out_W, None, None


class _ChannelAffine(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.addcmul(_by_channel(shift, x), x, _by_channel(scale, x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _apply(_ChannelAffineBackward, g, *ctx.saved_tensors)


class _ChannelAffineBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, scale: Tensor) -> Any:
        ctx.save_for_backward(g, x, scale)
        return g * _by_channel(scale, x), _channel_sums(g * x), _channel_sums(g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, hx: Tensor, hscale: Tensor, hshift: Tensor) -> Any:
        g, x, scale = ctx.saved_tensors
        in_g, in_x, in_scale = ctx.needs_input_grad
        out_g = out_x = out_scale = None
        if in_g:
            out_g = torch.addcmul(_by_channel(hshift, x), x, _by_channel(hscale, x))
            out_g = out_g.addcmul_(hx, _by_channel(scale, x))
        if in_x:
            out_x = g * _by_channel(hscale, x)
        if in_scale:
            out_scale = _channel_sums(g * hx)
        return out_g, out_x, out_scale


def _apply(function: type[Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def _channel_sums(x: Tensor) -> Tensor:
    return x.sum(dim=[d for d in range(x.ndim) if d != 1])
