"""Which axes of which tensors of a model can be permuted together without changing its function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from landscape.channel_groups import channel_groups

Axes = Mapping[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class Permutations:
    """The groups of axes that are permuted together, by tensor name.

    Args:
        axes: For each parameter and buffer, the name of the group of each axis, None for an axis
            that stays. An axis may be longer than its group by a factor, as the inputs of a linear
            layer after flattened channels: it then holds one block a channel.

    Example:
        >>> Permutations({"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h")}).names
        ('h',)
    """

    axes: Axes

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, in the order in which they appear."""
        found = dict.fromkeys(name for groups in self.axes.values() for name in groups if name)
        return tuple(found)

    @classmethod
    def of(cls, model: nn.Module) -> "Permutations":
        """Return the groups of a model, from its graph of operations.

        Knows linear and convolutional layers (depthwise ones, too), batch norm, functions of
        single entries, pooling, flattening, sums of branches (which then share a permutation) and
        tied weights. Channels that go through any other operation stay in their order, which is
        always right, and finds fewer permutations.

        Raises:
            ValueError: If the model's forward pass cannot be traced.
        """
        return cls(channel_groups(model))

    def without(self, missing: Callable[[str], bool]) -> "Permutations":
        """Return the groups that have no axis in a tensor that is missing."""
        lost = {group for name, groups in self.axes.items() if missing(name) for group in groups}
        return Permutations(
            {
                name: tuple(None if group in lost else group for group in groups)
                for name, groups in self.axes.items()
                if not missing(name)
            }
        )

    def sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of channels of every group.

        Raises:
            ValueError: If a tensor is missing or has another number of axes, or an axis is no
                multiple of its group.
        """
        lengths: dict[str, dict[str, int]] = {}
        for name, groups in self.axes.items():
            if name not in tensors or tensors[name].ndim != len(groups):
                shape = list(tensors[name].shape) if name in tensors else "no such tensor"
                raise ValueError(
                    f"`permutations` names {len(groups)} axes of `{name}`, but the weights have "
                    f"{shape}. Are they of another architecture?"
                )
            for i, group in enumerate(groups):
                if group is not None:
                    lengths.setdefault(group, {})[f"{name}, axis {i}"] = tensors[name].shape[i]
        sizes = {group: min(found.values()) for group, found in lengths.items()}
        for group, found in lengths.items():
            for where, length in found.items():
                if length % sizes[group]:
                    raise ValueError(
                        f"`permutations` must join axes of multiples of one length, but group "
                        f"{group} has {sizes[group]} channels and {where} has {length}."
                    )
        return sizes

    def permuted(
        self, tensors: Mapping[str, Tensor], orders: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return copies of the tensors, every axis in the order of its group."""
        found = {name: tensor.clone() for name, tensor in tensors.items()}
        for name, groups in self.axes.items():
            for i, group in enumerate(groups):
                if group is not None:
                    found[name] = reorder(found[name], i, orders[group])
        return found


def reorder(tensor: Tensor, axis: int, order: Tensor) -> Tensor:
    """Return a tensor with the blocks of an axis in another order."""
    block = tensor.shape[axis] // len(order)
    entries = (order[:, None] * block + torch.arange(block)).reshape(-1)
    return tensor.index_select(axis, entries.to(tensor.device))
