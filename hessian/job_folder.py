"""A folder of results that belong to one job, known by what they depend on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from hessian.atomic import write_atomically


class JobFolder:
    """A folder that says in one file what all others in it depend on.

    Args:
        path: Made once something is written.
        head: Name of that file.
        identity: What the results depend on, as JSON values.
        name: The argument that the folder was given as.
        holds: What the folder is to hold, "points of this sweep", say.

    Raises:
        ValueError: If the folder holds results of another job; names what differs.
    """

    def __init__(
        self, path: Path, head: str, identity: Mapping[str, Any], *, name: str, holds: str
    ) -> None:
        self.path = path
        self.notes: dict[str, Any] | None = None
        """What was noted by ``begin``; None in a new folder."""
        self._head = path / head
        self._identity = json.loads(json.dumps(identity))
        self._must = must = f"`{name}` must be new or hold {holds}, but"
        if path.exists() and not path.is_dir():
            raise ValueError(f"{must} {path} is a file. Choose another folder.")
        if not self._head.exists():
            return
        try:
            notes = dict(json.loads(self._head.read_text()))
            found = dict(notes.pop("identity"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{must} {self._head} is damaged ({error}). Remove the folder."
            ) from error
        keys = [*self._identity, *(key for key in found if key not in self._identity)]
        other = [key for key in keys if found.get(key) != self._identity.get(key)]
        if other:
            self.refuse(", ".join(other))
        self.notes = notes

    def refuse(self, other: str) -> NoReturn:
        """Say what in the folder is of another job.

        Raises:
            ValueError: In any case.
        """
        raise ValueError(
            f"{self._must} those in {self.path} have other {other}. Choose another folder, or "
            "remove that one."
        )

    def begin(self, **notes: Any) -> None:
        """Write the head of a new folder, with notes for those who go on."""
        if self.notes is None:
            text = json.dumps({"identity": self._identity, **notes}, indent=2)
            write_atomically(self._head, text.encode())
            self.notes = notes


def checksum(*tensors: Tensor) -> str:
    """Return a hash of types, shapes and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
