"""Which channels of a model belong together, read off its graph of operations."""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as fn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

ELEMENTWISE_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Tanhshrink, nn.Softshrink, nn.Hardshrink,
)  # fmt: skip
POOLING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
ELEMENTWISE = (
    torch.relu, torch.tanh, torch.sigmoid, fn.relu, fn.relu6, fn.leaky_relu, fn.elu, fn.selu,
    fn.celu, fn.gelu, fn.silu, fn.mish, fn.tanh, fn.sigmoid, fn.softplus, fn.hardtanh,
    fn.hardswish, fn.dropout, torch.relu_, torch.tanh_, operator.neg,
)  # fmt: skip
POOLING = (
    fn.max_pool1d, fn.max_pool2d, fn.max_pool3d, fn.avg_pool1d, fn.avg_pool2d, fn.avg_pool3d,
    fn.adaptive_avg_pool1d, fn.adaptive_avg_pool2d, fn.adaptive_avg_pool3d,
    fn.adaptive_max_pool1d, fn.adaptive_max_pool2d, fn.adaptive_max_pool3d,
)  # fmt: skip
ELEMENTWISE_METHODS = ("relu", "relu_", "tanh", "sigmoid", "contiguous", "clone", "neg")
SUMS = (operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.sub, torch.mul)
FLAT = ((1,), (1, -1))
MEANS = ((2, 3), (-1, -2), (-2, -1), (3, 2))


def channel_groups(model: nn.Module) -> dict[str, tuple[str | None, ...]]:
    """Return the group of each axis of each tensor, None for an axis that must stay.

    Raises:
        ValueError: If the model's forward pass cannot be traced.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the tracer raises whatever the model does with a proxy
        raise ValueError(
            f"`model` must have a forward pass that torch.fx can trace, got {error}. Write down "
            "its `Permutations` by hand."
        ) from error
    walk = _Walk(model)
    for node in graph.nodes:
        walk.visit(node)
    return walk.named_axes()


class _Tracer(fx.Tracer):
    """Looks into modules of the user, not into those of torch."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


@dataclass(frozen=True)
class _Channels:
    """What is known of a value's channels: their group, and where they stand."""

    group: int
    width: int
    last: bool
    """Whether they are the last axis, as after a linear layer, or the second."""
    flat: bool = False
    """Whether each has become a block of entries of a flattened axis."""


class _Walk:
    """Goes through the graph and joins groups; group 0 stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        # Tied tensors under their first name.
        first: dict[int, str] = {}
        for kind in (model.named_parameters, model.named_buffers):
            for name, tensor in kind(remove_duplicate=False):
                first.setdefault(id(tensor), name)
        self._names, self._shapes = first, {n: p.ndim for n, p in model.named_parameters()}
        self._shapes |= {n: b.ndim for n, b in model.named_buffers()}
        self._axes: dict[str, list[int | None]] = {
            name: [None] * ndim for name, ndim in self._shapes.items()
        }
        self._parents = [0]
        self._values: dict[fx.Node, _Channels | None] = {}

    def named_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Axes by tensor, with groups numbered in the order of the tensors."""
        numbers: dict[int, str] = {}

        def name_of(group: int | None) -> str | None:
            if group is None or self._find(group) == self._find(0):
                return None
            return numbers.setdefault(self._find(group), f"p{len(numbers)}")

        return {
            name: tuple(name_of(group) for group in groups) for name, groups in self._axes.items()
        }

    def visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":  # used in ways that are not followed
            tensor = _attribute(self._modules[""], str(node.target))
            for axis in range(tensor.ndim if id(tensor) in self._names else 0):
                self._join(tensor, axis, 0)
        if _reads_shape(node):
            return
        inputs = [self._values.get(n) for n in node.all_input_nodes]
        found = self._after(node, inputs)
        if found is None:  # unknown: what goes in stays in order
            for value in inputs:
                self._fix(value)
        self._values[node] = found

    def _after(self, node: fx.Node, inputs: list[_Channels | None]) -> _Channels | None:
        known = len(inputs) == 1 and isinstance(inputs[0], _Channels)
        x = inputs[0] if known else None
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            if hasattr(module, "parametrizations"):
                return None
            if isinstance(module, nn.Linear):
                return self._linear(module, inputs)
            if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
                return self._convolution(module, inputs)
            if x is None:
                return None
            if isinstance(module, _BatchNorm):
                return self._normalization(module, x, module.num_features)
            if isinstance(module, nn.LayerNorm) and x.last and len(module.normalized_shape) == 1:
                return self._normalization(module, x, module.normalized_shape[0])
            if type(module) in ELEMENTWISE_MODULES:
                return x
            plain = not (getattr(module, "affine", False) or _tracks(module))
            if type(module) in POOLING_MODULES and plain and not x.last and not x.flat:
                return x
            if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
                return _flattened(x)
            return None
        if node.op == "call_function":
            return self._function(node, x, inputs)
        if node.op == "call_method":
            return self._method(node, x)
        return None

    def _linear(self, module: nn.Linear, inputs: list[_Channels | None]) -> _Channels:
        source = self._source(inputs, module.in_features, last=True)
        out = self._new()
        self._join(module.weight, 0, out)
        self._join(module.weight, 1, source)
        if module.bias is not None:
            self._join(module.bias, 0, out)
        return _Channels(out, module.out_features, last=True)

    def _convolution(self, module: _ConvNd, inputs: list[_Channels | None]) -> _Channels:
        source = self._source(inputs, module.in_channels, last=False)
        depthwise = module.groups == module.in_channels == module.out_channels
        if depthwise and module.groups > 1:
            out, joined = source, 0
        elif module.groups > 1:
            self._union(source, 0)
            out, joined = 0, 0
        else:
            out, joined = self._new(), source
        self._join(module.weight, 0, out)
        self._join(module.weight, 1, joined)
        if module.bias is not None:
            self._join(module.bias, 0, out)
        return _Channels(out, module.out_channels, last=False)

    def _source(self, inputs: list[_Channels | None], length: int, *, last: bool) -> int:
        """Group of a layer's input axis of some length; what does not fit stays in order."""
        x = inputs[0] if len(inputs) == 1 else None
        if x is None:
            return 0
        if x.last != last or not _fits(x, length):  # such as a linear layer over an image's width
            self._fix(x)
        return x.group

    def _normalization(self, module: nn.Module, x: _Channels, length: int) -> _Channels | None:
        if not _fits(x, length):
            return None
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if tensor is not None:
                self._join(tensor, 0, x.group)
        return x

    def _function(
        self, node: fx.Node, x: _Channels | None, inputs: list[_Channels | None]
    ) -> _Channels | None:
        if node.target in SUMS and len(inputs) == 2 and len(node.args) == 2:
            a, b = inputs
            if a is None or b is None or replace(a, group=b.group) != b:
                return None
            self._union(a.group, b.group)
            return a
        if node.target in SUMS and len(inputs) == 1 and x is not None:  # with a number, or itself
            numbers = [a for a in node.args if not isinstance(a, fx.Node)]
            return x if all(isinstance(a, int | float) for a in numbers) else None
        if x is None:
            return None
        if node.target in ELEMENTWISE:
            return x
        if node.target in POOLING and not x.last and not x.flat:
            return x
        if node.target is torch.flatten:
            return _flattened(x) if _arguments(node, ("start_dim", "end_dim")) in FLAT else None
        if node.target is operator.getitem and not x.last and not x.flat:
            where = node.args[1]
            whole = slice(None, None, None)
            if isinstance(where, tuple) and where[:2] == (whole, whole):
                return x if all(isinstance(part, slice) for part in where) else None
        return None

    def _method(self, node: fx.Node, x: _Channels | None) -> _Channels | None:
        if node.target in ("view", "reshape"):
            first = self._values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            rest = node.args[1:]
            batch_kept = len(rest) == 2 and isinstance(rest[0], fx.Node) and rest[1] == -1
            return _flattened(first) if first is not None and batch_kept else None
        if x is None:
            return None
        if node.target in ELEMENTWISE_METHODS:
            return x
        if node.target == "flatten":
            return _flattened(x) if _arguments(node, ("start_dim", "end_dim")) in FLAT else None
        if node.target == "mean" and not x.last and not x.flat:
            dims = _arguments(node, ("dim",))
            if dims and tuple(dims[0] if isinstance(dims[0], tuple | list) else dims) in MEANS:
                return replace(x, last=True) if "keepdim" not in node.kwargs else None
        return None

    def _join(self, tensor: Tensor, axis: int, group: int) -> None:
        """Say that an axis of a tensor belongs to a group."""
        axes = self._axes[self._names[id(tensor)]]
        old = axes[axis]
        axes[axis] = group
        if old is not None:
            self._union(old, group)

    def _new(self) -> int:
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def _find(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def _union(self, a: int, b: int) -> None:
        roots = sorted((self._find(a), self._find(b)))
        self._parents[roots[1]] = roots[0]

    def _fix(self, value: _Channels | None) -> None:
        if value is not None:
            self._union(value.group, 0)


def _flattened(x: _Channels) -> _Channels:
    """Channels after all axes but the first were flattened to one."""
    return x if x.last else replace(x, last=True, flat=True)


def _fits(x: _Channels, length: int) -> bool:
    """Whether an axis holds one entry, or after flattening one block, a channel."""
    return length % x.width == 0 if x.flat else length == x.width


def _reads_shape(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in ("size", "dim")) or (
        node.target is getattr and node.args[1:] in (("shape",), ("ndim",))
    )


def _attribute(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), leaf)
    return found


def _tracks(module: nn.Module) -> bool:
    return bool(getattr(module, "track_running_stats", False))


def _arguments(node: fx.Node, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Arguments after the first, whether given by place or by name."""
    return (*node.args[1:], *(node.kwargs[name] for name in names if name in node.kwargs))
