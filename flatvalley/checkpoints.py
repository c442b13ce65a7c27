"""Checkpoints of a training: whole states as safetensors, checked when they are read."""

import errno
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatvalley.run import read_tensors, write_tensors
from hessian import DamagedFileError

FORMAT = "flatvalley training 1"
KEPT = 2
"""Checkpoints in the folder: should the newest be damaged, the one before it serves."""


class StorageError(OSError):
    """A file could not be written; the message says which, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A state that was read, and what had to be passed over to find it."""

    step: int
    state: Any
    damaged: tuple[str, ...]
    """Why newer files could not be used."""


class Checkpoints:
    """A folder of checkpoints, each one file of everything that training needs to go on.

    A file appears whole or not at all, carries a checksum of its content, and is named for its
    step. Nothing in it is a pickle.

    Args:
        folder: Where; made when the first one is written.
        identity: What must be equal for a state to be of use, of JSON types.

    Example:
        >>> import tempfile
        >>> import torch
        >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), {"seed": 0})
        >>> _ = checkpoints.save(3, {"weights": torch.ones(2), "losses": [0.5]})
        >>> checkpoints.latest().state
        {'weights': tensor([1., 1.]), 'losses': [0.5]}
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(dict(identity)))

    def save(self, step: int, state: Any) -> Path:
        """Write a state of nested dictionaries, lists, tensors and plain values; prune old files.

        Raises:
            StorageError: If it cannot be written; the checkpoints that were there still are.
        """
        tensors, skeleton = pack(state)
        header = {"format": FORMAT, "step": step, "identity": self.identity, "state": skeleton}
        path = self.folder / f"step-{step:09}.safetensors"
        with storage_errors(path, f"The last checkpoint is {self._newest()}."):
            write_tensors(path, tensors, header | {"sha256": _digest(tensors, header)})
            for old in self._files()[KEPT:]:
                old.unlink(missing_ok=True)
        return path

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None if the folder has none.

        Raises:
            DamagedFileError: If there are files, but none is whole.
            ValueError: If a whole one belongs to another training.
        """
        damaged: list[str] = []
        for path in self._files():
            try:
                tensors, header = read_tensors(path)
                found = header.pop("sha256", None)
                if header.get("format") != FORMAT or found != _digest(tensors, header):
                    raise DamagedFileError(f"{path} is not as a training wrote it")
            except (OSError, DamagedFileError) as error:
                damaged.append(str(error).split(". ")[0])
                continue
            if header["identity"] != self.identity:
                theirs = header["identity"]
                other = [
                    f"{key} {theirs.get(key)!r} there, {value!r} here"
                    for key, value in self.identity.items()
                    if theirs.get(key) != value
                ]
                raise ValueError(
                    f"{path} must be a checkpoint of this training, but differs in "
                    f"{'; '.join(other) or 'its settings'}. Remove the file, or use another folder."
                )
            return Checkpoint(int(header["step"]), unpack(tensors, header["state"]), tuple(damaged))
        if damaged:
            raise DamagedFileError(
                f"No checkpoint in {self.folder} is whole: {'; '.join(damaged)}. Remove that "
                "folder to train from the start."
            )
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def _newest(self) -> str:
        files = self._files()
        return str(files[0]) if files else "none"


@contextmanager
def storage_errors(path: Path, kept: str = "") -> Iterator[None]:
    """Say what to do where a file cannot be written."""
    try:
        yield
    except OSError as error:
        cure = (
            "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Mend it"
        )
        raise StorageError(
            error.errno,
            f"{path} could not be written ({error.strerror}). {cure} and run the same command "
            f"again: nothing else is lost. {kept}".strip(),
        ) from error


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a nested state by running names, and the rest as JSON types.

    ``unpack`` gives the same state back: types of keys, tuples, NaN and infinities included.
    Tensors that are one and the same are stored once.

    Raises:
        TypeError: If the state holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    memory: set[int] = set()

    def store(t: Tensor) -> str:
        key = (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype)
        if t.numel() == 0 or key not in names:
            names[key] = f"{len(tensors):06}"
            # Memory that two tensors share in part is stored twice; the format wants copies.
            start = t.untyped_storage().data_ptr()
            tensors[names[key]] = t.cpu().clone() if start in memory else t.cpu()
            memory.add(start)
        return names[key]

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": store(value.detach())}
        if isinstance(value, Mapping):
            return {"map": [[walk(k), walk(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [walk(v) for v in value]}
        if isinstance(value, list):
            return [walk(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(
            f"A state must hold tensors and plain values, got a {type(value).__name__}."
        )

    return tensors, walk(state)


def unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Return the state that ``pack`` took apart; every tensor is a copy of its own."""
    if isinstance(skeleton, list):
        return [unpack(tensors, value) for value in skeleton]
    if not isinstance(skeleton, Mapping):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value].clone()  # out of the file's bytes, where it lies at any address
    if kind == "map":
        return {unpack(tensors, k): unpack(tensors, v) for k, v in value}
    if kind == "tuple":
        return tuple(unpack(tensors, v) for v in value)
    return float(value)


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(content(tensor))
    return found.hexdigest()


def content(t: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, of any type; NumPy knows no bfloat16."""
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy().data
