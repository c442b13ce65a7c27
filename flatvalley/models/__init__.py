"""Networks, started from a seed."""

from flatvalley.models.lenet import lenet_5, lenet_300_100
from flatvalley.models.mlp import tanh_mlp
from flatvalley.models.named import MODELS, build_named_model
from flatvalley.models.prepare import prepare_model
from flatvalley.models.resnet import resnet20, resnet50
from flatvalley.models.vgg import vgg16, vgg16_imagenet
from flatvalley.models.wide_resnet import wrn_28_10

__all__ = [
    "MODELS",
    "build_named_model",
    "lenet_5",
    "lenet_300_100",
    "prepare_model",
    "resnet20",
    "resnet50",
    "tanh_mlp",
    "vgg16",
    "vgg16_imagenet",
    "wrn_28_10",
]
