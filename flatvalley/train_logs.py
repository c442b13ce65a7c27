"""What a training writes down while it runs: rows for the tables, and TensorBoard if asked."""

import math
from collections.abc import Mapping
from importlib import import_module
from time import monotonic
from typing import Any

from flatvalley.checkpoints import storage_errors
from flatvalley.run import Row, Run
from flatvalley.train_config import file_name

WRITE_SECONDS = 1.0
TABLES = ("epochs", "steps", "time")
"""``epochs`` and ``steps`` are equal for equal settings, to the last digit; ``time`` is not."""


class TrainLog:
    """The rows of all tables, which belong to the state of the training.

    A checkpoint holds them, and the files are written from them: after a kill no row is lost or
    there twice.

    Args:
        run: The folder; None writes nothing.
        tensorboard: Whether to write event files for TensorBoard into it, too.

    Raises:
        ValueError: If TensorBoard is asked for and not installed.
    """

    def __init__(self, run: Run | None, *, tensorboard: bool = False) -> None:
        self.tables: dict[str, list[Row]] = {name: [] for name in TABLES}
        self._run = run
        self._written = -math.inf
        self._writers: dict[str, Any] = {}
        self._open = _summary_writer() if tensorboard and run is not None else None

    def add(self, table: str, row: Row) -> None:
        """Add a row to a table, and to the event files."""
        self.tables[table].append(row)
        if self._open is not None:
            self._write_events(table, row)

    def write(self, *, at_once: bool = False) -> None:
        """Bring the files up to date, at most once in ``WRITE_SECONDS`` unless told to.

        Raises:
            StorageError: If one cannot be written.
        """
        if self._run is None or (monotonic() - self._written < WRITE_SECONDS and not at_once):
            return
        self._written = monotonic()
        for name, rows in self.tables.items():
            path = self._run.path / "tables" / f"{name}.csv"
            with storage_errors(path, "It is written again from the last checkpoint."):
                self._run.write_table(name, rows)
        for writer in self._writers.values():
            writer.flush()

    def state(self) -> dict[str, list[dict[str, Any]]]:
        """Return all rows."""
        return {name: [dict(row) for row in rows] for name, rows in self.tables.items()}

    def load(self, state: Mapping[str, list[Row]]) -> None:
        """Go on from ``state()``."""
        self.tables = {name: list(state[name]) for name in TABLES}

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()

    def _write_events(self, table: str, row: Row) -> None:
        assert self._run is not None and self._open is not None
        name = file_name(str(row["run"])) if "run" in row else "all"
        step = int(row["step"])
        if name not in self._writers:
            # What an earlier process wrote beyond this step is not shown.
            folder = self._run.path / "tensorboard" / name
            self._writers[name] = self._open(str(folder), purge_step=step)
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step" and math.isfinite(value):
                self._writers[name].add_scalar(f"{table}/{key}", value, step)


def _summary_writer() -> Any:
    try:
        return import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise ValueError(
            "`tensorboard` needs the package tensorboard, which is not installed. Run "
            "`pip install tensorboard`, or leave the option out: tables/*.csv hold the same rows."
        ) from error
