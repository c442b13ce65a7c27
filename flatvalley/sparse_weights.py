"""Weights with many zeros in a compact file: the values that are not zero, and where they stand."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatvalley.run import read_tensors, write_tensors
from hessian import DamagedFileError
from pruning.masks import pack_bits, unpack_bits

FORMAT = "flatvalley sparse weights 2"
_VALUES, _BITS, _GAPS = ".values", ".bits", ".gaps"
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FARTHEST = 255


def save_sparse_weights(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a model's state so that zeros take hardly any room, and return the path.

    A tensor whose zeros are worth it is stored as its other values and their places: one bit an
    entry, or one byte a value with the number of zeros before it, whichever is less (the latter
    from about 88 % zeros on). Any other tensor is stored as it is. Tensors that are the same one,
    as tied weights are, are stored once. Every bit comes back, but for the sign of a zero.

    Args:
        path: The safetensors file.
        state: Tensors by name, such as ``model.state_dict()``.

    Raises:
        ValueError: If a tensor holds NaN. An infinity is kept, as masks of attention have them.
        TypeError: If something in the state is no dense tensor, or is complex128.
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
    same: dict[str, str] = {}
    firsts: dict[Any, str] = {}
    for name, tensor in state.items():
        _require_storable(name, tensor)
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if firsts.setdefault(identity, name) != name:
            same[name] = firsts[identity]
            continue
        t = tensor.detach().cpu()
        parts = {name + end: part for end, part in _compact(t).items()}
        if _size(parts) < _size({name: t}) and not parts.keys() & state.keys():
            shapes[name] = list(t.shape)
            tensors |= parts
        else:
            tensors[name] = t.clone()
    metadata = {"format": FORMAT, "shapes": shapes, "same": same, "checksum": _checksum(tensors)}
    return write_tensors(path, tensors, metadata)


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
    if header.get("checksum") != _checksum(tensors):
        raise DamagedFileError(f"{path} is damaged: its checksum is not that of its tensors.")
    try:
        state = {name: _dense(tensors, name, shape) for name, shape in header["shapes"].items()}
        state |= tensors
        return state | {name: state[first] for name, first in header["same"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}).") from error


def _require_storable(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise TypeError(
            f"`state` must hold dense tensors, got {type(tensor).__name__} for `{name}`. Save what "
            "`to_sparse` made as `to_dense(model).state_dict()`."
        )
    if tensor.element_size() not in _SAME_WIDTH:
        raise TypeError(
            f"`state` must hold types that safetensors knows, got {tensor.dtype} for `{name}`."
        )
    if tensor.isnan().any():
        raise ValueError(
            f"`state` must not hold NaN, but `{name}` does. Go back to weights from before."
        )


def _compact(t: Tensor) -> dict[str, Tensor]:
    """Return values and places of what is not zero, by the ends of their names."""
    raw = _raw(t)
    there = raw != 0 if t.element_size() == 1 else t.reshape(-1) != 0
    gaps = _gaps(there.nonzero().flatten())
    values = raw[there].view(t.dtype)
    if len(gaps) < -(-t.numel() // 8):
        return {_VALUES: values, _GAPS: gaps}
    return {_VALUES: values, _BITS: pack_bits(there)}


def _dense(tensors: dict[str, Tensor], name: str, shape: list[int]) -> Tensor:
    """Take the parts of a tensor out of what was read, and put it together."""
    values, size = tensors.pop(name + _VALUES), torch.Size(shape)
    if name + _BITS in tensors:
        places = unpack_bits(tensors.pop(name + _BITS), shape).flatten().nonzero().flatten()
    else:
        places = _places(tensors.pop(name + _GAPS))
    if len(places) != len(values) or (len(places) and int(places[-1]) >= size.numel()):
        raise ValueError(f"values and places of `{name}` differ")
    raw = torch.zeros(size.numel(), dtype=_raw(values).dtype)
    raw[places] = _raw(values)
    return raw.view(values.dtype).view(size)


def _raw(t: Tensor) -> Tensor:
    """Return a tensor's entries in a row, as integers: not all types can be looked up."""
    return t.reshape(-1).view(_SAME_WIDTH[t.element_size()])


def _gaps(places: Tensor) -> Tensor:
    """Return the number of zeros before each place, a byte each; 255 stands for 255 with none."""
    gaps = places.diff(prepend=places.new_tensor([-1])) - 1
    ends = (gaps // _FARTHEST + 1).cumsum(0) - 1
    written = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), _FARTHEST, dtype=torch.uint8)
    written[ends] = (gaps % _FARTHEST).to(torch.uint8)
    return written


def _places(gaps: Tensor) -> Tensor:
    """Return the places of which ``_gaps`` made bytes."""
    steps = gaps.long() + (gaps != _FARTHEST)
    return (steps.cumsum(0) - 1)[gaps != _FARTHEST]


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of names, types, shapes and bytes."""
    found = 0
    for name in sorted(tensors):
        t = tensors[name]
        found = zlib.crc32(f"{name} {t.dtype} {list(t.shape)}".encode(), found)
        found = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, found)
    return found
