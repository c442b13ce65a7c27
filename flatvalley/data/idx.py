"""MNIST, read from the original IDX files."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatvalley.data.dataset import Bytes, Dataset, finish
from flatvalley.data.files import class_labels, missing
from hessian import DamagedFileError

MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081
"""Mean and standard deviation of all pixels of MNIST's training images, scaled to [0, 1]."""
_NORMALISATION = ((MNIST_MEAN,), (MNIST_DEVIATION,))


def mnist(folder: Path, dtype: torch.dtype) -> Dataset:
    """Return MNIST from a folder with its four files, gzipped or not."""

    def read(part: str) -> tuple[Tensor, Tensor]:
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", (None, 28, 28))
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", (None,))
        if len(images) != len(labels):
            raise DamagedFileError(
                f"{folder} holds {len(images)} {part} images and {len(labels)} labels. Get the "
                "files again."
            )
        return finish(images[:, None], _NORMALISATION, dtype), class_labels(labels, folder)

    normalise = _NORMALISATION if dtype == torch.uint8 else None
    return Dataset("mnist", *read("train"), *read("t10k"), 10, normalise)


def read_idx(path: Path, shape: tuple[int | None, ...]) -> Bytes:
    """Return the bytes of an IDX file; None in the shape stands for any length.

    Where ``path``, which ends in ``.gz``, is not there, the unpacked file beside it is read.

    Raises:
        FileNotFoundError: If neither is there.
        DamagedFileError: If the file is cut short, or of another format or shape.
    """
    unpacked = path.with_suffix("")
    try:
        if unpacked.is_file() and not path.exists():
            path, content = unpacked, unpacked.read_bytes()
        else:
            with gzip.open(path) as file:
                content = file.read()
    except FileNotFoundError as error:
        raise missing(path) from error
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
