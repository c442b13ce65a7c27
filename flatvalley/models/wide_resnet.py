"""Wide residual networks, for CIFAR."""

import torch
from torch import Tensor, nn

from flatvalley.models.start import convolution, seeded


def wrn_28_10(
    *,
    seed: int,
    num_classes: int = 10,
    dropout: float = 0.0,
    late_stride: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return the wide residual network WRN-28-10 for CIFAR: 36,479,194 weights for ten classes.

    Three stages of four blocks with 160, 320 and 640 channels; a block is batch norm, ReLU,
    convolution, twice, and its sum with the input. Convolutions start as in He et al. (2015);
    the global random state is put back. In training mode.

    Args:
        seed: Seed of the initial weights.
        num_classes: Length of the output.
        dropout: Share of activations dropped between the convolutions of a block, in [0, 1). The
            paper uses 0.3 on CIFAR where it uses it at all.
        late_stride: Whether to build the variant of the experiments on directional pruning
            instead: the second convolution of a block subsamples in place of the first, a
            shortcut by convolution takes the block's input as it is, and convolutions have biases
            (36,489,290 weights), at 14 % more multiplications.
        dtype: Type of the weights.

    Raises:
        ValueError: If ``dropout`` is outside [0, 1).

    References:
        Zagoruyko, Komodakis (2016), Wide residual networks. Chao, Wang, Xing, Cheng (2020),
        Directional pruning of deep neural networks.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
    with seeded(seed):
        layers: list[nn.Module] = [convolution(3, 16, 3, bias=late_stride)]
        inputs = 16
        for width, stride in ((160, 1), (320, 2), (640, 2)):
            for block in range(4):
                layers.append(
                    _WideBlock(inputs, width, stride if block == 0 else 1, dropout, late_stride)
                )
                inputs = width
        layers += [nn.BatchNorm2d(640), nn.ReLU(inplace=True)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(640, num_classes)]
    return nn.Sequential(*layers).to(dtype)


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, dropout: float, late: bool) -> None:
        super().__init__()
        self.late = late
        first, second = (1, stride) if late else (stride, 1)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, width, 3, first, bias=late)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, second, bias=late)
        self.shortcut: nn.Module | None = None
        if inputs != width:
            self.shortcut = convolution(inputs, width, 1, stride, bias=late)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        out = self.dropout(self.conv1(active))
        out = self.conv2(torch.relu(self.bn2(out)))
        if self.shortcut is not None:
            x = self.shortcut(x if self.late else active)
        result: Tensor = out + x
        return result
