"""How networks start: from a seed, by the rules of the literature."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from ``seed`` inside the block, and put the global state back."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed every GPU, and for good.
        torch.default_generator.manual_seed(seed)
        yield


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, bias: bool = False
) -> nn.Conv2d:
    """Return a convolution that keeps the size at stride 1, started as in He et al. (2015)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
