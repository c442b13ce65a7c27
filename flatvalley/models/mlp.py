"""Smooth fully connected networks."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from flatvalley.models.start import seeded


def tanh_mlp(sizes: Sequence[int], *, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a fully connected network with tanh between its layers.

    Smooth, so that its Hessian exists everywhere. Weights and biases start uniform on
    ±1/√fan_in, torch's default; the global random state is put back.

    Args:
        sizes: Widths from input to output, at least two.
        seed: Seed of the initial weights.
        dtype: Type of the weights.

    Raises:
        ValueError: If fewer than two widths are given, or one is not positive.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"`sizes` must be two or more positive widths, got {list(sizes)}.")
    with seeded(seed):
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def digits_mlp(
    *, seed: int, num_classes: int = 10, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return a network for the digits: 64-100-50-10 with tanh, 12,060 weights.

    Args:
        seed: Seed of the initial weights; the global random state is put back.
        num_classes: Length of the output.
        dtype: Type of the weights.

    Example:
        >>> sum(p.numel() for p in digits_mlp(seed=0).parameters())
        12060
    """
    return tanh_mlp([64, 100, 50, num_classes], seed=seed, dtype=dtype)
