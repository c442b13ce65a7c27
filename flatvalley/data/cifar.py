"""CIFAR-10, from the original pickles for Python or from the Parquet files of the hub."""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatvalley.data.dataset import Bytes, Dataset, finish
from flatvalley.data.files import class_labels, missing, optional
from flatvalley.data.pickles import read_plain_pickle
from hessian import DamagedFileError

CIFAR10_MEAN, CIFAR10_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Mean and standard deviation of CIFAR-10's training images by colour channel, scaled to [0, 1]."""

PICKLES = "cifar-10-batches-py"
"""Name of the folder that the original archive for Python unpacks to."""

_PARTS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def cifar10(folder: Path, dtype: torch.dtype) -> Dataset:
    """Return CIFAR-10 from a folder in either layout; the original pickles come first."""
    places = (folder / PICKLES, folder.parent / PICKLES)
    pickles = next((place for place in places if place.is_dir()), None)

    def read(part: str) -> tuple[Tensor, Tensor]:
        if pickles is not None:
            found = [_read_pickle(pickles / name) for name in _PARTS[part]]
        else:
            files = sorted(folder.glob(f"{part}*.parquet"))
            if not files:
                raise missing(folder / f"{part}.parquet")
            found = [_read_parquet(file) for file in files]
        images = np.concatenate([images for images, _ in found])
        labels = np.concatenate([labels for _, labels in found])
        where = folder if pickles is None else pickles
        return finish(images, (CIFAR10_MEAN, CIFAR10_DEVIATION), dtype), class_labels(labels, where)

    normalise = (CIFAR10_MEAN, CIFAR10_DEVIATION) if dtype == torch.uint8 else None
    return Dataset("cifar10", *read("train"), *read("test"), 10, normalise)


def _read_pickle(path: Path) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Read images [n, 3, 32, 32] and labels from one file of the original archive."""
    try:
        found = read_plain_pickle(path)
    except FileNotFoundError as error:
        raise missing(path) from error
    table = {_text(key): value for key, value in found.items()} if isinstance(found, dict) else {}
    data, labels = table.get("data"), table.get("labels")
    if (
        not isinstance(data, np.ndarray)
        or not isinstance(labels, list)
        or not all(type(label) is int for label in labels)
        or data.shape != (len(labels), 3 * 32 * 32)
    ):
        raise DamagedFileError(
            f"{path} must hold `data`, bytes of shape [n, 3072], and `labels`, n whole numbers, "
            f"but holds {', '.join(map(str, table)) or 'no dictionary'}"
            f"{f' with data of shape {list(data.shape)}' if isinstance(data, np.ndarray) else ''}"
            ". Get the file again."
        )
    return data.reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64)


def _text(key: Any) -> Any:
    return key.decode("latin-1") if isinstance(key, bytes) else key


def _read_parquet(path: Path) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Read images [n, 3, 32, 32] and labels from the layout of the Hugging Face hub."""
    found = path.stat()
    return _decoded(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _decoded(path: Path, changed: int, size: int) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Decode a file once in a process, which may train many networks on it.

    All of CIFAR-10 keeps 184 MB. Nobody sees the arrays themselves: they are put together anew.
    """
    parquet = optional("pyarrow.parquet", "pyarrow")
    decode = optional("PIL.Image", "Pillow").open
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
    return images.transpose(0, 3, 1, 2), labels
