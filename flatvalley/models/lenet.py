"""The two LeNets of the literature on pruning, for MNIST."""

import torch
from torch import nn

from flatvalley.models.start import seeded


def lenet_300_100(
    *, seed: int, num_classes: int = 10, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return LeNet-300-100 for MNIST: 784-300-100-10 with ReLU, 266,610 weights.

    With ReLU between the layers, as in the literature on pruning. Weights and biases start uniform
    on ±1/√fan_in, torch's default; the global random state is put back.

    Args:
        seed: Seed of the initial weights.
        num_classes: Length of the output.
        dtype: Type of the weights.

    Example:
        >>> model = lenet_300_100(seed=0)
        >>> sum(p.numel() for p in model.parameters())
        266610

    References:
        LeCun, Bottou, Bengio, Haffner (1998), Gradient-based learning applied to document
        recognition. Han, Pool, Tran, Dally (2015), Learning both weights and connections.
    """
    with seeded(seed):
        first, second, last = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, num_classes)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)
    return model.to(dtype)


def lenet_5(*, seed: int, num_classes: int = 10, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return LeNet-5 for MNIST as the literature on pruning has it: 431,080 weights.

    Two convolutions with 5x5 kernels to 20 and 50 channels, each followed by max pooling over
    2x2, then 800-500-10, with ReLU after every layer but the last. Not the network of 1998, whose
    61,000 weights feed radial basis functions. Weights and biases start uniform on ±1/√fan_in,
    torch's default; the global random state is put back.

    Args:
        seed: Seed of the initial weights.
        num_classes: Length of the output.
        dtype: Type of the weights.

    Example:
        >>> sum(p.numel() for p in lenet_5(seed=0).parameters())
        431080

    References:
        LeCun, Bottou, Bengio, Haffner (1998), Gradient-based learning applied to document
        recognition. Han, Pool, Tran, Dally (2015), Learning both weights and connections.
    """
    with seeded(seed):
        layers = [
            # ReLU after the maximum instead of before it gives the same for a quarter of the work.
            nn.Conv2d(1, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(20, 50, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(800, 500),
            nn.ReLU(),
            nn.Linear(500, num_classes),
        ]
    return nn.Sequential(*layers).to(dtype)
