"""Files that appear whole or not at all, whatever is killed in between."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, data: bytes) -> Path:
    """Write to a temporary file beside the target and rename it.

    The temporary file has one name for each target, so that what a killed writer leaves behind
    is taken over by the next one. Writers of the same target take turns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with _open_alone(partial) as file:
        try:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return path


def _open_alone(partial: Path) -> BinaryIO:
    while True:
        file = partial.open("ab")
        with suppress(OSError):  # a file system without locks: one writer at a time is up to you
            fcntl.flock(file, fcntl.LOCK_EX)
        # While we waited, another writer may have renamed the file that we opened.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                return file
        file.close()
