"""Networks by their names in configurations."""

from collections.abc import Callable
from functools import partial

from torch import nn

from flatvalley.models.lenet import lenet_5, lenet_300_100
from flatvalley.models.mlp import digits_mlp
from flatvalley.models.resnet import resnet20, resnet50
from flatvalley.models.vgg import vgg16, vgg16_imagenet
from flatvalley.models.wide_resnet import wrn_28_10

MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-mlp": digits_mlp,
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet_5,
    "resnet20": resnet20,
    "vgg16": vgg16,
    "vgg16-bn": partial(vgg16, batch_norm=True),
    "vgg16-imagenet": vgg16_imagenet,
    "vgg16-bn-imagenet": partial(vgg16_imagenet, batch_norm=True),
    "wrn-28-10": wrn_28_10,
    "wrn-28-10-late-stride": partial(wrn_28_10, late_stride=True),
    "resnet50": resnet50,
}
"""Factories by name. Each takes ``seed``, ``num_classes`` and ``dtype`` as keywords."""


def build_named_model(name: str, *, seed: int, num_classes: int | None = None) -> nn.Module:
    """Return a network by its name in ``MODELS``, in training mode.

    Args:
        name: For example ``"lenet-5"`` or ``"resnet20"``.
        seed: Seed of the initial weights; the global random state is put back.
        num_classes: Length of the output. Default: 10, and 1000 for ImageNet's networks.

    Raises:
        ValueError: If the name is not known, or ``num_classes`` is not positive; the message
            lists the known names.

    Example:
        >>> build_named_model("lenet-300-100", seed=0, num_classes=3)[-1]
        Linear(in_features=100, out_features=3, bias=True)
    """
    if name not in MODELS:
        raise ValueError(f'`model` must be one of {", ".join(MODELS)}, got "{name}".')
    if num_classes is None:
        return MODELS[name](seed=seed)
    if num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    return MODELS[name](seed=seed, num_classes=num_classes)
