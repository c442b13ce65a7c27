"""A run: a folder that is written atomically, can be resumed, and is readable without us."""

import csv
import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

import flatvalley
from flatvalley.process_group import wait_for_all, world
from hessian import DamagedFileError, tensor_files
from hessian.atomic import write_atomically as write_atomically
from hessian.tensor_files import read_tensors as read_tensors

Row = Mapping[str, Any]
DECISIVE = ("flatvalley", "torch")
_PACKAGES = ("torch", "numpy", "scipy", "matplotlib", "scikit-learn", "PyHessian")


class Run:
    """A folder with ``run.json``, tensors, tables and figures of one study.

    Every file appears whole or not at all. Opening a folder whose ``run.json`` has the same
    study and settings resumes it.

    Args:
        path: The folder; made if it is not there.
        study: Name of the study.
        config: Its settings, of JSON types.

    Raises:
        ValueError: If the folder cannot be written, holds something else, or holds a run with
            other settings.
    """

    def __init__(self, path: Path, study: str, config: Mapping[str, Any]) -> None:
        self.path = path
        # Through JSON and back, so that what is compared is what was written.
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ValueError(
                f"`out` must be a folder that can be written, got {path} "
                f"({error.strerror}). Choose another."
            ) from error
        self.resumed = (path / "run.json").exists()
        """Whether the folder held this run already."""
        self.record = self._open(study)

    def _open(self, study: str) -> dict[str, Any]:
        file = self.path / "run.json"
        if not file.exists():
            if any(entry.name != ".run.json.partial" for entry in self.path.iterdir()):
                raise ValueError(
                    f"`out` must be an empty or new folder, or one with a run to resume, but "
                    f"{self.path} holds other files. Choose another."
                )
            record = {
                "study": study,
                "status": "running",
                "config": self.config,
                "started": _now(),
                "environment": _environment(),
            }
            self.write_text("run.json", _to_json(record))
            return record
        try:
            record = json.loads(file.read_text())
        except ValueError as error:
            raise DamagedFileError(f"{file} is damaged ({error}). Remove its folder.") from error
        made_with = record.get("environment", {})
        now = _environment()
        changed = [name for name in DECISIVE if made_with.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"`out` {self.path} holds a run made with other versions of {', '.join(changed)}, "
                "whose numbers may differ. Choose another folder, or remove that one."
            )
        if record.get("study") != study or record.get("config") != self.config:
            found = record.get("config", {})
            other = [key for key in self.config if found.get(key) != self.config[key]]
            raise ValueError(
                f"`out` {self.path} holds a run with other settings ({', '.join(other) or 'study'}"
                " differ). Choose another folder, or remove that one."
            )
        return dict(record)

    def has(self, name: str) -> bool:
        """Whether a file of this name is in the folder."""
        return (self.path / name).exists()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Add the results to ``run.json`` and mark the run as complete."""
        self.record |= dict(results)
        self.record |= {"status": "complete", "finished": _now()}
        self.write_text("run.json", _to_json(self.record))

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file, whole or not at all."""
        return write_atomically(self.path / name, text.encode())

    def write_table(self, name: str, rows: Sequence[Row]) -> Path:
        """Write rows as CSV, the columns in the order in which they first appear."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return self.write_text(f"tables/{name}.csv", buffer.getvalue())

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> Path:
        """Write tensors as safetensors, with a JSON value for every key of ``metadata``."""
        return write_tensors(self.path / name, tensors, metadata or {})

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read what ``write_tensors`` wrote."""
        return read_tensors(self.path / name)


def open_by_all(path: Path, study: str, config: Mapping[str, Any]) -> Run:
    """Open a run on all processes of ``torchrun``, the first one before the others.

    Only the first one should write. The folder must be one that all can read.

    Raises:
        ValueError: As `Run`.
    """
    run = Run(path, study, config) if world()[0] == 0 else None
    wait_for_all()
    return run or Run(path, study, config)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write tensors and strict JSON metadata to one safetensors file, whole or not at all."""
    return tensor_files.write_tensors(path, tensors, plain(metadata))


def _to_json(value: Any) -> str:
    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Return a value as strict JSON knows it: NaN becomes null, infinity a word."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _environment() -> dict[str, str]:
    packages = {name: version(name) for name in _PACKAGES}
    return {
        "flatvalley": flatvalley.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **packages,
    }
