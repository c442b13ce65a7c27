"""Data sets, held in memory or read from files batch by batch."""

from flatvalley.data.cifar import CIFAR10_DEVIATION, CIFAR10_MEAN
from flatvalley.data.dataset import Dataset
from flatvalley.data.datasets import default_root, load_dataset
from flatvalley.data.files import ROOT_VARIABLE
from flatvalley.data.idx import MNIST_DEVIATION, MNIST_MEAN
from flatvalley.data.image_folder import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    ImageBatches,
    ImageFolder,
    load_image_folder,
)
from flatvalley.data.validation import split_off_validation

__all__ = [
    "CIFAR10_DEVIATION",
    "CIFAR10_MEAN",
    "IMAGENET_DEVIATION",
    "IMAGENET_MEAN",
    "MNIST_DEVIATION",
    "MNIST_MEAN",
    "ROOT_VARIABLE",
    "Dataset",
    "ImageBatches",
    "ImageFolder",
    "default_root",
    "load_dataset",
    "load_image_folder",
    "split_off_validation",
]
