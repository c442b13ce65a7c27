"""Data sets by their names."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from flatvalley.data.cifar import cifar10
from flatvalley.data.dataset import Dataset
from flatvalley.data.files import ROOT_VARIABLE
from flatvalley.data.idx import mnist


def load_dataset(
    name: str, *, root: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> Dataset:
    """Return a data set by its name; files are read where they are, and never downloaded.

    Args:
        name: ``"digits"``, the 1,797 images of 8x8 grey levels that scikit-learn ships, as vectors
            of 64 scaled to [0, 1]. ``"mnist"``, 70,000 images of shape [1, 28, 28] from the four
            original IDX files in ``root/mnist``, gzipped or not. ``"cifar10"``, 60,000 images of
            shape [3, 32, 32] from the original pickles for Python in
            ``root/cifar10/cifar-10-batches-py`` or ``root/cifar-10-batches-py``, which are read
            without unpickling; where neither folder is there, from Parquet files
            ``train*.parquet`` and ``test*.parquet`` in ``root/cifar10``, in the layout of the
            Hugging Face hub: ``img``, a struct with the ``bytes`` of an image file, and
            ``label``. If those are JPEG files, results are not those of the original images. The
            last two are normalised with the mean and the standard deviation of the training
            images (``MNIST_MEAN``, ``CIFAR10_MEAN``, …).
        root: Folder of the data sets that are read from files. Default: what the environment
            variable ``FLATVALLEY_DATA`` says, else ``../shared/data`` beside the project.
        dtype: Type of the inputs. In float32, CIFAR-10 takes 740 MB. With ``torch.uint8``, 184 MB:
            inputs are the bytes of the files, and ``normalise`` of the result says how to
            normalise them.

    Raises:
        ValueError: If the name is not known; the message lists the known ones.
        FileNotFoundError: If a file of the data set is not there.
        DamagedFileError: If a file is not what its name says.
        ImportError: If ``"cifar10"`` is read from Parquet files without pyarrow and Pillow.

    Example:
        >>> load_dataset("digits").train_inputs.shape
        torch.Size([1437, 64])

    References:
        LeCun, Bottou, Bengio, Haffner (1998), Gradient-based learning applied to document
        recognition. Krizhevsky (2009), Learning multiple layers of features from tiny images.
    """
    if name not in _LOADERS:
        raise ValueError(f'`data` must be one of {", ".join(sorted(_LOADERS))}, got "{name}".')
    folder = default_root() if root is None else Path(root)
    return _LOADERS[name](folder / name, dtype)


def default_root() -> Path:
    """Return the folder in which data sets are looked for unless another is named."""
    beside = Path(__file__).parents[2] / ".." / "shared" / "data"
    return Path(os.environ.get(ROOT_VARIABLE) or beside)


def _digits(folder: Path, dtype: torch.dtype) -> Dataset:
    """Grey levels scaled to [0, 1]; four fifths of every class for training, the same always."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    targets = torch.from_numpy(labels).to(torch.int64)
    if dtype == torch.uint8:
        # Sixteen grey levels: a byte over 255 is 16/255 of what it stands for.
        inputs, normalise = torch.from_numpy(images).to(dtype), ((0.0,), (16 / 255,))
    else:
        inputs, normalise = torch.from_numpy(images / 16.0).to(dtype), None
    return Dataset(
        "digits", inputs[train], targets[train], inputs[test], targets[test], 10, normalise
    )


_LOADERS: dict[str, Callable[[Path, torch.dtype], Dataset]] = {
    "digits": _digits,
    "mnist": mnist,
    "cifar10": cifar10,
}
