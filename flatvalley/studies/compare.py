"""Methods of pruning side by side: the same dense networks, made sparse by all of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from flatvalley.dense_network import load_dense
from flatvalley.pruners import pruner
from flatvalley.run import Run
from flatvalley.studies.compare_cell import (
    DENSE,
    cell_file,
    dense_config,
    forget_networks,
    read_cell,
    run_cell,
    train_cell,
    trained_config,
    training_folder,
)
from flatvalley.studies.compare_config import CompareConfig
from flatvalley.studies.compare_rows import Row
from flatvalley.workers import run_jobs

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RowFindings:
    """What one row came to."""

    row: Row
    chosen: Mapping[float, str]
    """Which of its settings stands for it, by sparsity; none where none got there."""
    points: Mapping[tuple[float, int], Record]
    """What that came to, by sparsity and seed."""
    remarks: tuple[str, ...]
    """Warnings, and why a sparsity was not reached."""

    def over_seeds(self, sparsity: float, *keys: str) -> list[float]:
        """Return one number of every seed at a sparsity; empty where there is none."""
        found = []
        for (share, _), point in self.points.items():
            if share == sparsity:
                value: Any = point
                for key in keys:
                    value = value.get(key)
                if value is not None:
                    found.append(float(value))
        return found


@dataclass(frozen=True)
class CompareFindings:
    """All rows of a comparison, and the dense networks they begin with."""

    config: CompareConfig
    dense: Mapping[int, Record]
    """Measured, by seed."""
    rows: tuple[RowFindings, ...]
    cells: Sequence[Record]
    """Every candidate at every sparsity and seed, chosen or not: rows of a table."""

    @property
    def classifies(self) -> bool:
        """Whether there are accuracies."""
        return all(record["test"]["accuracy"] is not None for record in self.dense.values())

    @property
    def complete(self) -> bool:
        """Whether every row reached every sparsity."""
        return all(len(row.chosen) == len(self.config.sparsities) for row in self.rows)

    @property
    def num_weights(self) -> int:
        """Weights of a network."""
        return int(next(iter(self.dense.values()))["weights"])

    @property
    def num_test_samples(self) -> int:
        """Samples that accuracies are shares of."""
        return int(next(iter(self.dense.values()))["test_samples"])

    @property
    def num_calibration_samples(self) -> int:
        """Training samples that methods looked at."""
        return int(next(iter(self.dense.values()))["calibration_samples"])

    def dense_over_seeds(self, key: str) -> list[float]:
        """Return one number of every dense network on the test samples."""
        return [float(record["test"][key]) for record in self.dense.values()]


def compare(run: Run, config: CompareConfig, *, workers: int, console: Console) -> CompareFindings:
    """Train and prune what is not in the run's folder yet, and put everything side by side.

    Args:
        run: The folder.
        config: Settings.
        workers: Processes; trainings are independent, and so are cells.
        console: Where progress is shown.

    Raises:
        ValueError: If model and data do not fit each other, or a training's folder holds another.
        NonFiniteError: If a training does not stay finite.
        DamagedFileError: If a file in the folder is damaged; the message names it.
    """
    trainings: dict[str, tuple[Any, ...]] = {}
    for seed in config.seeds:
        wanted = {f"{DENSE}, seed {seed}": dense_config(config.training, seed)}
        for row in config.rows:
            for text in row.candidates if row.retrains else ():
                for share in config.sparsities:
                    name = f"{text} to {share:g}, seed {seed}"
                    wanted[name] = trained_config(config.training, text, share, seed)
        for name, training in wanted.items():
            folder = training_folder(run.path, training)
            if not _is_complete(folder):
                trainings[name] = (training, folder)
    run_jobs(train_cell, trainings, workers=workers, console=console)
    texts = [DENSE, *(text for row in config.rows for text in row.candidates)]
    jobs = {
        f"{text}, seed {seed}": (config, text, seed, run.path)
        for seed in config.seeds
        for text in texts
        if not cell_file(run.path, text, seed).exists()
    }
    try:
        run_jobs(run_cell, jobs, workers=workers, console=console)
    finally:
        forget_networks()
    return collect(run.path, config)


def collect(folder: Path, config: CompareConfig) -> CompareFindings:
    """Return the findings of a folder whose cells are all there."""
    found = {
        (text, seed): read_cell(cell_file(folder, text, seed))
        for text in (DENSE, *(text for row in config.rows for text in row.candidates))
        for seed in config.seeds
    }
    cells = [
        {"row": row.text, "spec": text, "seed": seed} | _flat(point)
        for row in config.rows
        for text in row.candidates
        for seed in config.seeds
        for point in found[text, seed]["points"]
    ]
    return CompareFindings(
        config,
        {seed: found[DENSE, seed] for seed in config.seeds},
        tuple(_row(row, found, config) for row in config.rows),
        cells,
    )


def _row(row: Row, found: Mapping[tuple[str, int], Record], config: CompareConfig) -> RowFindings:
    """Choose among the candidates at every sparsity, by the validation samples alone."""
    chosen: dict[float, str] = {}
    points: dict[tuple[float, int], Record] = {}
    remarks: list[str] = []
    for text in row.candidates:
        head = f"{text}: " if len(row.candidates) > 1 else ""
        for seed in config.seeds:
            cell = found[text, seed]
            remarks += [head + note for note in cell["notes"] if head + note not in remarks]
            if cell["refused"] and head + cell["refused"] not in remarks:
                remarks.append(head + cell["refused"])
    for share in config.sparsities:
        here: dict[str, dict[int, Record]] = {}
        for text in row.candidates:
            by_seed = {
                seed: point
                for seed in config.seeds
                for point in found[text, seed]["points"]
                if point["wanted"] == share
            }
            if len(by_seed) == len(config.seeds):
                here[text] = by_seed
        if here:
            chosen[share] = max(here, key=lambda text: _merit(here[text].values()))
            points |= {(share, seed): point for seed, point in here[chosen[share]].items()}
    return RowFindings(row, chosen, points, tuple(remarks))


def _merit(points: Any) -> tuple[float, float]:
    """Mean accuracy on the validation samples, and for ties the loss."""
    held_out = [point["validation"] for point in points]
    if any(measured is None for measured in held_out):
        return 0.0, 0.0  # a single candidate: nothing is chosen
    accuracy = fmean(measured["accuracy"] or 0.0 for measured in held_out)
    return accuracy, -fmean(measured["loss"] for measured in held_out)


def _flat(point: Record) -> dict[str, Any]:
    row = {key: value for key, value in point.items() if key not in ("validation", "test")}
    for part in ("validation", "test"):
        if point[part] is not None:
            row |= {f"{part}_{key}": value for key, value in point[part].items()}
    return row


def _is_complete(folder: Path) -> bool:
    file = folder / "run.json"
    try:
        return file.exists() and json.loads(file.read_text())["status"] == "complete"
    except (ValueError, KeyError):
        return False  # the training says what is wrong with it


def look_at_the_door(config: CompareConfig) -> None:
    """See, before anything is trained, that model, data and methods fit each other.

    Raises:
        ValueError: If they do not; the message says which.
        FileNotFoundError: If a file of the data set is not there.
        DamagedFileError: If one is damaged.
        ImportError: If a package that reads the data is not installed.
    """
    first = replace(config.training, seed=config.seeds[0])
    dense = load_dense(
        first,
        None,
        trained=first.specs[0],
        calibration=config.calibration,
        calibration_batch=config.calibration_batch,
    )
    problem = dense.problem(exclude=config.exclude)
    for row in config.rows:
        for text in () if row.retrains else row.candidates:
            pruner(text, "methods").require(problem)
