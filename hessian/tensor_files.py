"""Tensors with text or JSON beside them, in safetensors files that appear whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from hessian.atomic import write_atomically


class DamagedFileError(ValueError):
    """A file cannot be read as what it should hold; the message says why."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write tensors, and a JSON value for every key of the metadata; every bit is kept."""
    return write_atomically(path, tensor_bytes(tensors, metadata))


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Return what `write_tensors` writes, and `tensors_of` reads."""
    return save(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        {key: json.dumps(value) for key, value in metadata.items()},
    )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; tensors are on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is no safetensors file, or cut short.
    """
    return tensors_of(path.read_bytes(), path)


def tensors_of(data: bytes, source: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors, on the CPU, and metadata of the bytes of a file; errors name the source.

    Raises:
        DamagedFileError: If they are not those of a safetensors file, or cut short.
    """
    tensors, header = _with_header(data, source)
    try:
        return tensors, {key: json.loads(value) for key, value in header.items()}
    except ValueError as error:
        raise DamagedFileError(f"{source} is damaged ({error}). Remove it.") from error


def read_with_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file's tensors, on the CPU, and its metadata as they stand.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is no safetensors file, or cut short.
    """
    return _with_header(path.read_bytes(), path)


def _with_header(data: bytes, source: object) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        return tensors, dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))
    except Exception as error:  # safetensors and json each have their own
        raise DamagedFileError(
            f"{source} is damaged ({error}): it must be a whole safetensors file. Remove it."
        ) from error
