"""Data sets held in memory, split into training and test samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Inputs of shape [n, ...] and class labels of shape [n], for training and for testing."""

    name: str
    train_inputs: Float[Tensor, "n *shape"]
    train_labels: Int[Tensor, " n"]
    test_inputs: Float[Tensor, "m *shape"]
    test_labels: Int[Tensor, " m"]
    num_classes: int


def load_dataset(name: str, *, dtype: torch.dtype = torch.float32) -> Dataset:
    """Return a data set by its name.

    Args:
        name: ``"digits"``, the 1,797 images of 8x8 grey levels that scikit-learn ships.
        dtype: Type of the inputs.

    Raises:
        ValueError: If the name is not known; the message lists the known ones.
    """
    if name not in _LOADERS:
        raise ValueError(f'`data` must be one of {", ".join(sorted(_LOADERS))}, got "{name}".')
    return _LOADERS[name](dtype)


def _digits(dtype: torch.dtype) -> Dataset:
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


_LOADERS: dict[str, Callable[[torch.dtype], Dataset]] = {"digits": _digits}
