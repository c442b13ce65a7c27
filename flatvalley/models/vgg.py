"""VGG16 with the names that public weights have, for CIFAR-10 and for ImageNet."""

import torch
from torch import nn

from flatvalley.models.start import convolution, seeded

# Table 1, column D of the paper: widths of the convolutions, stage by stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(
    *,
    seed: int,
    num_classes: int = 10,
    batch_norm: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return VGG16 for images of 32x32 pixels, as directional pruning was tried on.

    The 13 convolutions of the paper, then a classifier 512-512-``num_classes`` with dropout of
    one half before its first two layers: 15,245,130 weights for ten classes. Without batch norm
    by default, as in the experiments on directional pruning; with it, 15,253,578. Names are
    ``features.N`` and ``classifier.1``, ``4`` and ``6``, those of the usual public weights for
    CIFAR-10. Convolutions start as in He et al. (2015) with zero biases; the global random state
    is put back. In training mode.

    Args:
        seed: Seed of the initial weights.
        num_classes: Length of the output.
        batch_norm: Whether batch norm follows each convolution.
        dtype: Type of the weights.

    References:
        Simonyan, Zisserman (2015), Very deep convolutional networks for large-scale image
        recognition. Chao, Wang, Xing, Cheng (2020), Directional pruning of deep neural networks.
    """
    with seeded(seed):
        features = _features(batch_norm)
        classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )
    return _vgg(features, nn.Identity(), classifier).to(dtype)


def vgg16_imagenet(
    *,
    seed: int,
    num_classes: int = 1000,
    batch_norm: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return VGG16 for ImageNet: 138,357,544 weights, with torchvision's names.

    Weights published as ``vgg16``, or as ``vgg16_bn`` with ``batch_norm`` (138,365,992), load
    with ``strict=True``. Any image of 32x32 pixels or more is pooled to the 7x7 map that the
    classifier takes. Convolutions start as in He et al. (2015), linear weights with standard
    deviation 0.01, biases at zero; the global random state is put back. In training mode.

    Args:
        seed: Seed of the initial weights.
        num_classes: Length of the output.
        batch_norm: Whether batch norm follows each convolution.
        dtype: Type of the weights.

    References:
        Simonyan, Zisserman (2015), Very deep convolutional networks for large-scale image
        recognition.
    """
    with seeded(seed):
        features = _features(batch_norm)
        classifier = nn.Sequential(
            _small_linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            _small_linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            _small_linear(4096, num_classes),
        )
    return _vgg(features, nn.AdaptiveAvgPool2d(7), classifier).to(dtype)


def _vgg(features: nn.Module, pool: nn.Module, classifier: nn.Module) -> nn.Module:
    model = nn.Sequential()
    model.add_module("features", features)
    model.add_module("avgpool", pool)
    model.add_module("flatten", nn.Flatten())
    model.add_module("classifier", classifier)
    return model


def _features(batch_norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for widths in STAGES:
        for width in widths:
            layers.append(convolution(inputs, width, 3, bias=True))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _small_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer
