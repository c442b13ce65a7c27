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
from hessian.storage import write_atomically

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
    """Runs of ``train`` by their settings; those that are in the file are not made again."""

    def __init__(self, name: str, data: Dataset) -> None:
        self.path, self.data = RESULTS / f"{name}.json", data

    def get(self, config: TrainConfig) -> Cell:
        """Return the end of the only run of these settings; train it if it is not known."""
        key = json.dumps(config.identity(), sort_keys=True)
        found = self._read().get(key)
        if found is None:
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
    ) -> dict[Row, list[Cell]]:
        """Return the cells of every row of a table, seed by seed."""
        found: dict[Row, list[Cell]] = {row: [] for row in runs}
        for seed in seeds:
            for row, run in runs.items():
                found[row].append(self.get(configs(run, seed)))
        return found

    def _read(self) -> dict[str, Any]:
        path = Path(self.path)
        return dict(json.loads(path.read_text())) if path.exists() else {}


def table(ends: Mapping[Row, Sequence[Cell]]) -> list[str]:
    """Return mean and range over the seeds for every row."""
    dense = [cell.accuracy for cell in ends["SGD", 0.0]]
    lines = [
        f"{'':10}{'target':>7}{'sparsity':>10}{'range':>16}{'accuracy':>10}{'range':>14}"
        f"{'below SGD':>11}{'worst':>7}{'c':>10}"
    ]
    for (method, target), cells in ends.items():
        sparsities, accuracies = [c.sparsity for c in cells], [c.accuracy for c in cells]
        below = [d - a for d, a in zip(dense, accuracies, strict=True)]
        lines.append(
            f"{method:10}{target:7.2f}{statistics.mean(sparsities):10.4f}"
            f"{_range(sparsities, 4):>16}{statistics.mean(accuracies):10.2f}"
            f"{_range(accuracies, 2):>14}{statistics.mean(below):11.2f}{max(below):7.2f}"
            + (f"{statistics.mean(c.constant for c in cells):10.5f}" if method == "gRDA" else "")
        )
    return lines


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"
