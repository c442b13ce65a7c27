"""What a data set is: tensors for training and for testing."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

Bytes = npt.NDArray[np.uint8]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Dataset:
    """Inputs of shape [n, ...] and class labels of shape [n], for training and for testing."""

    name: str
    train_inputs: Shaped[Tensor, "n *shape"]
    train_labels: Int[Tensor, " n"]
    test_inputs: Shaped[Tensor, "m *shape"]
    test_labels: Int[Tensor, " m"]
    num_classes: int
    normalise: Normalisation | None = None
    """Mean and deviation by channel that inputs kept as bytes still need, after their scaling to
    [0, 1]; None where they are normalised. ``ResidentBatches`` takes it as it is."""


def finish(images: Bytes, normalisation: Normalisation, dtype: torch.dtype) -> Tensor:
    """Bytes [n, c, ...] as they are if bytes are wanted, else with mean 0 and deviation 1."""
    # A copy where the array is read-only, as torch takes none of those.
    found = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    if dtype == torch.uint8:
        return found
    shape = [-1] + [1] * (found.ndim - 2)
    mean, deviation = (torch.tensor(x, dtype=dtype).reshape(shape) for x in normalisation)
    return found.to(dtype).div_(255.0).sub_(mean).div_(deviation)
