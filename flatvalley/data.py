"""Data sets held in memory, split into training and test samples."""

import gzip
import importlib
import io
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hessian import DamagedFileError

ROOT_VARIABLE = "FLATVALLEY_DATA"
"""Environment variable that names the folder of the data sets that are read from files."""

MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081
"""Mean and standard deviation of all pixels of MNIST's training images, scaled to [0, 1]."""

CIFAR10_MEAN, CIFAR10_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""The same for every colour channel of CIFAR-10, of the original images."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Dataset:
    """Inputs of shape [n, ...] and class labels of shape [n], for training and for testing."""

    name: str
    train_inputs: Float[Tensor, "n *shape"]
    train_labels: Int[Tensor, " n"]
    test_inputs: Float[Tensor, "m *shape"]
    test_labels: Int[Tensor, " m"]
    num_classes: int


def load_dataset(
    name: str, *, root: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> Dataset:
    """Return a data set by its name.

    Args:
        name: ``"digits"``, the 1,797 images of 8x8 grey levels that scikit-learn ships, as vectors
            of 64 scaled to [0, 1]. ``"mnist"``, 70,000 images of shape [1, 28, 28] from the four
            original gzipped IDX files in ``root/mnist``. ``"cifar10"``, 60,000 images of shape
            [3, 32, 32] from Parquet files ``train*.parquet`` and ``test*.parquet`` in
            ``root/cifar10``, in the layout of the Hugging Face hub: ``img``, a struct with the
            ``bytes`` of an image file, and ``label``. If those are JPEG files, results are not
            those of the original images. The last two are normalised with the mean and the
            standard deviation of the training images (``MNIST_MEAN``, ``CIFAR10_MEAN``, …).
        root: Folder of the data sets that are read from files. Default: what the environment
            variable ``FLATVALLEY_DATA`` says, else ``../shared/data`` beside the project.
        dtype: Type of the inputs. In float32, CIFAR-10 takes 740 MB.

    Raises:
        ValueError: If the name is not known; the message lists the known ones.
        FileNotFoundError: If a file of the data set is not there.
        DamagedFileError: If a file is not what its name says.
        ImportError: If ``"cifar10"`` is asked for without pyarrow and Pillow.

    Example:
        >>> load_dataset("digits").train_inputs.shape
        torch.Size([1437, 64])

    References:
        LeCun, Bottou, Bengio, Haffner (1998), Gradient-based learning applied to document
        recognition. Krizhevsky (2009), Learning multiple layers of features from tiny images.
    """
    if name not in _LOADERS:
        raise ValueError(f'`data` must be one of {", ".join(sorted(_LOADERS))}, got "{name}".')
    return _LOADERS[name](_root(root) / name, dtype)


def _root(root: str | Path | None) -> Path:
    beside = Path(__file__).parents[1] / ".." / "shared" / "data"
    return Path(root or os.environ.get(ROOT_VARIABLE) or beside)


def _digits(folder: Path, dtype: torch.dtype) -> Dataset:
    """Grey levels scaled to [0, 1]; four fifths of every class for training, the same always."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    inputs = torch.from_numpy(images / 16.0).to(dtype)
    targets = torch.from_numpy(labels).to(torch.int64)
    return Dataset("digits", inputs[train], targets[train], inputs[test], targets[test], 10)


def _mnist(folder: Path, dtype: torch.dtype) -> Dataset:
    def read(part: str) -> tuple[Tensor, Tensor]:
        images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", (None, 28, 28))
        labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", (None,))
        if len(images) != len(labels):
            raise DamagedFileError(
                f"{folder} holds {len(images)} {part} images and {len(labels)} labels. Get the "
                "files again."
            )
        inputs = _normalised(images[:, None], (MNIST_MEAN,), (MNIST_DEVIATION,), dtype)
        return inputs, _class_labels(labels, folder)

    return Dataset("mnist", *read("train"), *read("t10k"), 10)


def _read_idx(path: Path, shape: tuple[int | None, ...]) -> Bytes:
    """Read a gzipped IDX file of bytes; None in the shape stands for any length."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFileError(f"{path} is no gzip file, or cut short ({error}).") from error
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions, and each as 32 bits.
    start = 4 + 4 * len(shape)
    found = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    fits = all(wanted in (None, size) for wanted, size in zip(shape, found, strict=True))
    if content[:4] != bytes([0, 0, 8, len(shape)]) or not fits:
        raise DamagedFileError(
            f"{path} must be an IDX file of unsigned bytes in {len(shape)} dimensions "
            f"({', '.join('any' if size is None else str(size) for size in shape)}), but its "
            f"header is {content[:start].hex(' ', 4)}. Get the file again."
        )
    if len(content) - start != math.prod(found):
        raise DamagedFileError(
            f"{path} must hold {math.prod(found):,} bytes after its header, as that says, got "
            f"{len(content) - start:,}. Get the file again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(found)


def _cifar10(folder: Path, dtype: torch.dtype) -> Dataset:
    def read(part: str) -> tuple[Tensor, Tensor]:
        files = sorted(folder.glob(f"{part}*.parquet"))
        if not files:
            raise _missing(folder / f"{part}.parquet")
        found = [_read_parquet(file) for file in files]
        images = np.concatenate([images for images, _ in found]).transpose(0, 3, 1, 2)
        labels = np.concatenate([labels for _, labels in found])
        inputs = _normalised(images, CIFAR10_MEAN, CIFAR10_DEVIATION, dtype)
        return inputs, _class_labels(labels, folder)

    return Dataset("cifar10", *read("train"), *read("test"), 10)


def _read_parquet(path: Path) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Read images [n, 32, 32, 3] and labels from the layout of the Hugging Face hub."""
    parquet = _optional("pyarrow.parquet", "pyarrow")
    decode = _optional("PIL.Image", "Pillow").open
    try:
        table = parquet.read_table(path, columns=["img", "label"])
        labels = np.asarray(table["label"].to_numpy(), dtype=np.int64)
        images = np.empty((len(labels), 32, 32, 3), dtype=np.uint8)
        for image, row in zip(images, table["img"], strict=True):
            image[:] = np.asarray(decode(io.BytesIO(row["bytes"].as_py())).convert("RGB"))
    # What the two libraries raise on a damaged file is many things.
    except Exception as error:
        raise DamagedFileError(
            f"{path} must be a Parquet file with `label` and `img.bytes`, image files of 32x32 "
            f"pixels ({type(error).__name__}: {error}). Get the file again."
        ) from error
    return images, labels


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"CIFAR-10 is read with {package}, which is not installed. Run "
            "`pip install 'flatvalley[data]'`."
        ) from error


def _normalised(
    images: Bytes, means: tuple[float, ...], deviations: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """Bytes [n, c, h, w] scaled to [0, 1], then to mean 0 and deviation 1 by channel."""
    mean, deviation = (torch.tensor(x, dtype=dtype)[:, None, None] for x in (means, deviations))
    # A copy, because torch takes no read-only arrays.
    scaled = torch.from_numpy(np.array(images)).to(dtype).contiguous().div_(255.0)
    return scaled.sub_(mean).div_(deviation)


def _class_labels(labels: npt.NDArray[np.integer[Any]], folder: Path) -> Tensor:
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise DamagedFileError(
            f"{folder} must hold one or more labels from 0 to 9, got "
            f"{sorted(set(labels.tolist()))}. Get the files again."
        )
    return torch.from_numpy(labels.astype(np.int64))


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} is not there. Put the file there, or name the folder above its own with `root` "
        f"or the environment variable {ROOT_VARIABLE}."
    )


_LOADERS: dict[str, Callable[[Path, torch.dtype], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
}
