"""Trainings kept one by one in a JSON file, so that an interrupted benchmark goes on."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timing import RESULTS, say

from flatvalley.data import Dataset
from flatvalley.train_config import TrainConfig
from flatvalley.training import train
from hessian.atomic import write_atomically

NAMES = (
    "model",
    "data",
    "train_samples",
    "validation",
    "runs",
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "augment",
    "seed",
)
"""The settings by which a run is known in the file."""

Row = tuple[str, float]
"""Method and wanted sparsity; ``("SGD", 0.0)`` is the one that the others are compared with."""


@dataclass(frozen=True)
class Cell:
    """How one run ended."""

    accuracy: float
    """On the validation samples where there are some, else on the test samples, in percent."""
    sparsity: float
    """Share of zeros among all weights, biases included."""
    threshold: float
    constant: float
    """gRDA: the constant c with which a constant learning rate leads to that threshold."""
    cpu_seconds: float


class Cells:
    """Runs of ``train`` by their settings; those that are in the file are not made again.

    Without data none is made, and only what is in the file is found.
    """

    def __init__(self, name: str, data: Dataset | None) -> None:
        self.path, self.data = RESULTS / f"{name}.json", data

    def get(self, config: TrainConfig) -> Cell | None:
        """Return the end of the only run of these settings; train it if it is not known."""
        key = " ".join(f"{name}={getattr(config, name)}" for name in NAMES)
        found = self._read().get(key)
        if found is None:
            if self.data is None:
                return None
            say(f"{config.model} {config.runs[0]} seed {config.seed}, {config.epochs} epochs")
            cell = self._train(config)
            say(f"  {cell.accuracy:.2f} % at sparsity {cell.sparsity:.4f}")
            # Read again: another process may work on other cells of the same file.
            found = asdict(cell)
            text = json.dumps(self._read() | {key: found}, indent=1)
            write_atomically(self.path, (text + "\n").encode())
        return Cell(**found)

    def _train(self, config: TrainConfig) -> Cell:
        began = time.process_time()
        result = train(config, data=self.data)
        end = result.runs[0]
        held_out = "validation" if config.validation else "test"
        threshold = float(end.row["threshold"])
        mu, lr = config.specs[0].settings.get("mu", 0.6), config.lr
        return Cell(
            100.0 * float(end.row[f"{held_out}_accuracy"]),
            end.sparsity,
            threshold if threshold > 0 else 0.0,
            threshold / (lr**0.5 * (result.num_steps * lr) ** mu) if threshold > 0 else 0.0,
            time.process_time() - began,
        )

    def ends(
        self,
        runs: Mapping[Row, str],
        configs: Callable[[str, int], TrainConfig],
        seeds: Sequence[int],
    ) -> dict[Row, dict[int, Cell]]:
        """Return the cells of every row of a table by seed, as far as they are known."""
        found: dict[Row, dict[int, Cell]] = {row: {} for row in runs}
        for seed in seeds:
            for row, run in runs.items():
                cell = self.get(configs(run, seed))
                if cell is not None:
                    found[row][seed] = cell
        return found

    def _read(self) -> dict[str, Any]:
        path = Path(self.path)
        return dict(json.loads(path.read_text())) if path.exists() else {}


def table(ends: Mapping[Row, Mapping[int, Cell]]) -> list[str]:
    """Return mean and range over the seeds for every row."""
    lines = [
        f"{'':10}{'target':>7}{'seeds':>6}{'sparsity':>10}{'range':>16}{'accuracy':>10}{'range':>14}"
        f"{'below SGD':>11}{'worst':>7}{'c':>10}"
    ]
    for (method, target), cells in ends.items():
        start = f"{method:10}{target:7.2f}{len(cells):6}"
        if not cells:
            lines.append(start)
            continue
        sparsities, accuracies = (
            [getattr(cell, name) for cell in cells.values()] for name in ("sparsity", "accuracy")
        )
        below = points_below(ends, (method, target))
        lines.append(
            f"{start}{statistics.mean(sparsities):10.4f}{_range(sparsities, 4):>16}"
            f"{statistics.mean(accuracies):10.2f}{_range(accuracies, 2):>14}"
            f"{statistics.mean(below):11.2f}{max(below):7.2f}"
            + (f"{statistics.mean(c.constant for c in cells.values()):10.5f}" * (method == "gRDA"))
        )
    return lines


def points_below(ends: Mapping[Row, Mapping[int, Cell]], row: Row) -> list[float]:
    """Return by how much SGD of the same seed is better, for every seed of a row."""
    dense = ends["SGD", 0.0]
    return [dense[seed].accuracy - cell.accuracy for seed, cell in ends[row].items()]


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"
