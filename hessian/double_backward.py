"""Settings under which gradients can be differentiated again, and cheaply."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hessian.convolutions import (
    CONVOLUTIONS,
    ConvolutionCall,
    Geometry,
    bind_convolution,
    convolution,
    frozen_batch_norm,
)
from hessian.errors import SecondDerivativeError
from hessian.rectifiers import relu
from hessian.torch_settings import eager, math_attention, without_fused_recurrence

ONCE = once_differentiable(lambda ctx: None).__code__
"""Code of the wrapper that ``once_differentiable`` puts around every backward pass."""
RECTIFIERS = {torch.relu, Tensor.relu, functional.relu}
RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Run layers inside the block by kernels that have cheap second derivatives.

    Attention runs by plain matrix products and recurrent layers without cuDNN, because the fused
    kernels, which torch prefers, have no second derivative at all: pytorch/pytorch#116350, #5261.
    Compiled modules and functions run as they were written, for the same reason.
    Convolutions and batch norm with running statistics run as in `hessian.convolutions`, ReLU as in
    `hessian.rectifiers`. Values change by rounding only, third derivatives are not there, and the
    global settings are put back.
    """
    require_autograd()
    with eager(), math_attention(), _Substitution():
        yield


def require_second_derivative(*tensors: Tensor) -> None:
    """Refuse the graph of a loss, and of its gradient, that holds ``once_differentiable`` parts.

    Torch would raise there, were it not that its own marker is cut off from the weights, or left
    out at the end of the loss: the second derivative comes back without that function's part, and
    nothing is said.

    Raises:
        SecondDerivativeError: If such a function is in the graph.
    """
    if any(_ends_there(node) for node in graph_nodes(*tensors)):
        raise SecondDerivativeError(
            "A custom autograd function in the model is marked `once_differentiable`, so its part "
            "of the Hessian would be missing. Write its backward pass with differentiable "
            'operations, or use `hessian_operator(..., method="forward")` or "differences".'
        )


def _ends_there(node: Any) -> bool:
    """Whether a node is torch's marker, or a custom function that would leave one."""
    if node.name().endswith("::Error"):
        return True
    function = getattr(node, "_forward_cls", None)
    if function is None or function.__module__.startswith("hessian."):
        return False
    return getattr(function.backward, "__code__", None) is ONCE


def require_autograd() -> None:
    """Refuse inference mode, in which every derivative would silently be zero.

    Raises:
        RuntimeError: Inside ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Derivatives cannot be taken inside `torch.inference_mode()`, which records nothing. "
            "Leave it, or use `torch.no_grad()`, which is overridden where it must be."
        )


def graph_nodes(*tensors: Tensor) -> Iterator[Node]:
    """Yield every node of the graph that made some tensors, once."""
    stack, seen = [tensor.grad_fn for tensor in tensors], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
            yield node


@contextmanager
def differentiable_forward() -> Iterator[None]:
    """Run layers inside the block by kernels whose backward pass has a forward derivative.

    Attention runs by plain matrix products, recurrent layers without mkldnn and cuDNN, the squared
    error by elementary operations. The global settings are put back.
    """
    require_autograd()
    with eager(), math_attention(), _ForwardSubstitution():
        yield


class _ForwardSubstitution(TorchFunctionMode):
    """Replaces calls of functions whose backward pass forward mode cannot enter."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RECURRENT:
            with without_fused_recurrence(mkldnn=True):
                return func(*args, **kwargs)
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        if func is functional.mse_loss:
            given = {name: value for name, value in kwargs.items() if value is not None}
            if len(args) == 2 and given.keys() <= {"reduction"}:
                return _squared_error(*args, **given)
        return func(*args, **kwargs)


def _squared_error(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Return `mse_loss`, whose own backward pass raises on dual numbers, pytorch/pytorch#123996."""
    squares = (input - target).square()
    if reduction == "none":
        return squares
    return squares.mean() if reduction == "mean" else squares.sum()


class _Substitution(TorchFunctionMode):
    """Replaces calls of layers' functions as the model makes them."""

    def __init__(self) -> None:
        super().__init__()
        self._last: (
            tuple[Tensor, list[int], tuple[Tensor, Tensor, Tensor | None, Geometry]] | None
        ) = None
        """The latest convolution: its output, versions of its tensors, its arguments."""

    def __exit__(self, *exc: Any) -> None:
        self._last = None
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            bound = _bound(bind_convolution(CONVOLUTIONS[func], *args, **kwargs))
            if bound is not None:
                out = _convolve(*bound)
                self._last = out, _versions(out, bound), bound
                return out
        elif func in RECTIFIERS and len(args) == 1 and not kwargs.get("inplace"):
            return relu(args[0])
        elif func is functional.batch_norm:
            normalised = self._batch_norm(*args, **kwargs)
            if normalised is not None:
                return normalised
        elif func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        elif func in RECURRENT and torch.backends.cudnn.enabled:
            with without_fused_recurrence(mkldnn=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        """Return x normalised by running statistics, by its convolution where it just had one."""
        if training or mean is None or var is None or mean.dtype != var.dtype:
            return None
        if x.dtype not in (mean.dtype, _autocast_type(mean)):
            return None
        scale = torch.rsqrt(var + eps) * (1.0 if weight is None else weight)
        shift = -mean * scale if bias is None else bias - mean * scale
        if self._last is None or self._last[0] is not x:
            return frozen_batch_norm(x, scale.to(x.dtype), shift.to(x.dtype))
        _, versions, bound = self._last
        if versions != _versions(x, bound):  # something was changed in place since
            return frozen_batch_norm(x, scale.to(x.dtype), shift.to(x.dtype))
        inputs, W, offset, geometry = bound
        if offset is not None:
            shift = shift + offset * scale
        return _convolve(inputs, W * scale.view(-1, *[1] * (W.ndim - 1)), shift, geometry)


def _convolve(x: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return a convolution in the type that autocast asks for, where it is on."""
    low = _autocast_type(W)
    return convolution(x.to(low), W.to(low), None if bias is None else bias.to(low), geometry)


def _autocast_type(weight: Tensor) -> torch.dtype:
    """Return the type in which autocast runs a layer with this weight; its own if it is off."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # Torch differentiates its own a second time as if |v| were constant (seen up to 2.13).
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _versions(out: Tensor, bound: tuple[Tensor, Tensor, Tensor | None, Geometry]) -> list[int]:
    return [t._version for t in (out, *bound[:3]) if t is not None]


def _bound(
    call: ConvolutionCall,
) -> tuple[Tensor, Tensor, Tensor | None, Geometry] | None:
    """Return the arguments of a convolution, or None for what is left to torch."""
    x, weight, bias, stride, padding, dilation, groups = call
    if isinstance(padding, str) or x.ndim != weight.ndim:
        return None
    return x, weight, bias, (stride, padding, dilation, groups)
