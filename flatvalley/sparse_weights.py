"""Weights with many zeros in a compact file: the values that are not zero, and where they stand."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flatvalley.run import read_tensors, write_tensors
from hessian import DamagedFileError

FORMAT = "flatvalley sparse weights 1"
_VALUES, _PLACES = ".values", ".places"


def save_sparse_weights(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a model's state so that zeros take no room, and return the path.

    A tensor whose zeros are worth it is stored as its other values and their places in the
    flattened tensor, four bytes each (eight from 2³¹ entries on); any other tensor as it is. Every
    bit comes back, but for the sign of a zero.

    Args:
        path: The safetensors file.
        state: Tensors by name, such as ``model.state_dict()``.

    Raises:
        OSError: If the file cannot be written; what was there before is left as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> _ = save_sparse_weights(path, {"w": torch.tensor([[0.0, 2.0, 0.0, 0.0, 0.0]])})
        >>> load_sparse_weights(path)["w"]
        tensor([[0., 2., 0., 0., 0.]])
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        t = tensor.detach().cpu()
        places = t.flatten().nonzero().flatten()
        wide = t.numel() >= 2**31
        room = len(places) * (t.element_size() + (8 if wide else 4))
        if room >= t.numel() * t.element_size():
            tensors[name] = t.clone()
            continue
        shapes[name] = list(t.shape)
        tensors[name + _VALUES] = t.flatten()[places]
        tensors[name + _PLACES] = places if wide else places.to(torch.int32)
    return write_tensors(path, tensors, {"format": FORMAT, "shapes": shapes})


def load_sparse_weights(path: Path) -> dict[str, Tensor]:
    """Return the state that ``save_sparse_weights`` wrote, dense, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If the file is damaged, or was written by something else.
    """
    tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise DamagedFileError(
            f"{path} must be written by `save_sparse_weights`. Plain safetensors are read with "
            "safetensors.torch.load_file."
        )
    shapes = header["shapes"]
    state = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(_VALUES)
        if name.endswith(_PLACES) and name.removesuffix(_PLACES) in shapes:
            continue
        if name.endswith(_VALUES) and stem in shapes:
            dense = tensor.new_zeros(torch.Size(shapes[stem]).numel())
            dense[tensors[stem + _PLACES].long()] = tensor
            state[stem] = dense.view(shapes[stem])
        else:
            state[name] = tensor
    return state
