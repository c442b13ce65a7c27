"""ReLU whose second derivative is left out of the graph, where torch adds zeros."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0); differentiable twice, in reverse mode.

    Torch's derivative of the backward pass in its mask is a tensor of zeros, which is filled and
    added up for every layer.
    """
    return cast(Tensor, _ReLU.apply(x))  # type: ignore[no-untyped-call]


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.relu(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return _Masked.apply(g, out.detach())  # type: ignore[no-untyped-call]


class _Masked(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        return torch.ops.aten.threshold_backward(g, out, 0)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(h, out, 0), None
