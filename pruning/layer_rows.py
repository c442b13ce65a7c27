"""The weights of one layer as a matrix: a row for each output."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class LayerRows:
    """Where a layer's weights are among others."""

    weight: str
    bias: str | None
    """None where there is none, or it is not among these weights."""

    def rows(self, parts: Mapping[str, Tensor]) -> Shaped[Tensor, "m n"]:
        """Return a copy of values beside the weights as a matrix: a row an output, bias last."""
        weight = parts[self.weight]
        rows = weight.reshape(len(weight), -1)
        if self.bias is None:
            return rows.clone()
        return torch.cat([rows, parts[self.bias][:, None]], dim=1)

    def write_rows_(self, parts: Mapping[str, Tensor], rows: Shaped[Tensor, "m n"]) -> None:
        """Write a matrix of values, as ``rows`` gives it, into values beside the weights."""
        weight = parts[self.weight]
        weight.copy_(rows[:, : weight[0].numel()].reshape(weight.shape))
        if self.bias is not None:
            parts[self.bias].copy_(rows[:, -1])
