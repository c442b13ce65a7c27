"""Residual networks: ResNet-20 for CIFAR-10 and ResNet-50 for ImageNet."""

import torch
from torch import Tensor, nn

from flatvalley.models.start import convolution, seeded


def resnet20(*, seed: int, num_classes: int = 10, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return ResNet-20 for CIFAR-10 images: 269,722 weights, in training mode.

    Three stages of three basic blocks with 16, 32 and 64 channels. Shortcuts are the identity,
    subsampled and padded with zero channels where the shape changes ("option A" of the paper, as
    it uses for CIFAR-10). Convolutions start as in He et al. (2015); the global random state is
    put back.

    Args:
        seed: Seed of the initial weights.
        num_classes: Length of the output.
        dtype: Type of the weights.

    Example:
        >>> sum(p.numel() for p in resnet20(seed=0).parameters())
        269722

    References:
        He, Zhang, Ren, Sun (2016), Deep residual learning for image recognition, section 4.2.
        He, Zhang, Ren, Sun (2015), Delving deep into rectifiers.
    """
    with seeded(seed):
        layers: list[nn.Module] = [convolution(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
        inputs = 16
        for width in (16, 32, 64):
            for _ in range(3):
                layers.append(_BasicBlock(inputs, width))
                inputs = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)]
    return nn.Sequential(*layers).to(dtype)


def resnet50(
    *, seed: int, num_classes: int = 1000, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return ResNet-50 for ImageNet images: 25,557,032 weights for 1,000 classes.

    The usual variant, in which the 3x3 convolution of a block does the subsampling. Parameters
    have the names that public weights have (``layer1.0.conv1.weight``, …). Convolutions start as
    in He et al. (2015); the global random state is put back. In training mode.

    Args:
        seed: Seed of the initial weights.
        num_classes: Length of the output.
        dtype: Type of the weights.

    References:
        He, Zhang, Ren, Sun (2016), Deep residual learning for image recognition.
        He, Zhang, Ren, Sun (2015), Delving deep into rectifiers.
    """
    with seeded(seed):
        return _ResNet50(num_classes).to(dtype)


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.stride, self.missing = (1, 0) if inputs == width else (2, width - inputs)
        self.conv1, self.bn1 = convolution(inputs, width, 3, self.stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            half = self.missing // 2
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return torch.relu(out + x)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if inputs != outputs:
            self.downsample = nn.Sequential(
                convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class _ResNet50(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 3, stride=1)
        self.layer2 = _stage(256, 128, 4, stride=2)
        self.layer3 = _stage(512, 256, 6, stride=2)
        self.layer4 = _stage(1024, 512, 3, stride=2)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out


def _stage(inputs: int, width: int, depth: int, *, stride: int) -> nn.Module:
    first = _Bottleneck(inputs, width, stride)
    return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1) for _ in range(depth - 1)))
