"""One cell of a comparison: one dense network, pruned by one method to all sparsities."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatvalley.dense_network import DenseNetwork, load_dense
from flatvalley.pruners import pruner
from flatvalley.pruning_problem import PruningProblem
from flatvalley.run import plain, write_atomically
from flatvalley.studies.compare_config import CompareConfig
from flatvalley.studies.compare_rows import TRAININGS, training_run
from flatvalley.studies.prune import noted
from flatvalley.train_config import TrainConfig, file_name
from flatvalley.training import train
from flatvalley.user_code import is_refusal, load_weights_
from hessian import DamagedFileError, NonFiniteError

DENSE = "dense"
"""The cell of a network before anything is pruned."""
Progress = Callable[[int, int], None]


def dense_config(training: TrainConfig, seed: int) -> TrainConfig:
    """Return the settings of a seed's dense network."""
    return replace(training, seed=seed)


def trained_config(training: TrainConfig, text: str, sparsity: float, seed: int) -> TrainConfig:
    """Return the settings of a training that ends sparse, from the dense network's start."""
    return replace(training, runs=(training_run(text, sparsity),), seed=seed)


def training_folder(folder: Path, training: TrainConfig) -> Path:
    """Return where a training of one run is kept."""
    return folder / "trainings" / f"{file_name(training.runs[0])}_seed{training.seed}"


def cell_file(folder: Path, text: str, seed: int) -> Path:
    """Return where a cell is kept."""
    return folder / "cells" / f"{file_name(text)}_seed{seed}.json"


def train_cell(training: TrainConfig, folder: Path, progress: Progress) -> None:
    """Train one run in a folder of its own, or go on with it."""
    train(training, folder, progress=lambda step, steps, losses: progress(step, steps))


def run_cell(config: CompareConfig, text: str, seed: int, folder: Path, progress: Progress) -> None:
    """Prune a dense network by one method, measure it, and leave a JSON file.

    Args:
        config: Settings.
        text: The method with its settings, or ``DENSE``.
        seed: Of the dense network.
        folder: Of the comparison.
        progress: Called with sparsities done and in all.
    """
    with _threads(config.training.threads):
        dense, problem = _network(config, seed, folder)
        record: dict[str, Any] = {"spec": text, "seed": seed}
        if text == DENSE:
            record |= _measured(dense, None, recalibrate=False)
            place = training_folder(folder, dense_config(config.training, seed))
            record |= _training_cost(place)[0]
            record |= {
                "weights": len(problem.w),
                "test_samples": dense.data.test.num_samples,
                "calibration_samples": problem.num_samples,
                "batch_norm": dense.has_batch_norm,
            }
        elif text.partition(":")[0] in TRAININGS:
            record |= _trained(config, dense, problem, text, seed, folder)
        else:
            record |= _pruned(config, dense, problem, text, progress)
    progress(len(config.sparsities), len(config.sparsities))
    write_atomically(
        cell_file(folder, text, seed), (json.dumps(plain(record), indent=1) + "\n").encode()
    )


def read_cell(path: Path) -> dict[str, Any]:
    """Return a cell's record.

    Raises:
        DamagedFileError: If it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
        found["spec"]  # a file of something else has none
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(
            f"{path} is damaged ({error!r}). Remove it; what it held is computed again."
        ) from error
    return dict(found)


def forget_networks() -> None:
    """Let go of the network that this process holds."""
    _network.cache_clear()


@lru_cache(maxsize=1)
def _network(config: CompareConfig, seed: int, folder: Path) -> tuple[DenseNetwork, PruningProblem]:
    """The dense network of a seed; kept, since the next cell is mostly of the same."""
    training = dense_config(config.training, seed)
    name = file_name(training.runs[0])
    dense = load_dense(
        training,
        training_folder(folder, training) / name / "weights.safetensors",
        trained=training.specs[0],
        calibration=config.calibration,
        calibration_batch=config.calibration_batch,
    )
    return dense, dense.problem(exclude=config.exclude)


def _pruned(
    config: CompareConfig,
    dense: DenseNetwork,
    problem: PruningProblem,
    text: str,
    progress: Progress,
) -> dict[str, Any]:
    """Every sparsity up to the first one that the method refuses."""
    points: list[dict[str, Any]] = []
    refused = None
    chosen = pruner(text, "methods")
    if chosen.method.replays:  # minutes before the first sparsity
        problem = replace(problem, progress=progress)
    with noted() as notes:
        try:
            for result in chosen.prune(problem, config.sparsities):
                measured = _measured(dense, result.weights, recalibrate=config.recalibrate)
                points.append(
                    {
                        "wanted": result.sparsity,
                        "sparsity": 1.0 - int(result.weights.count_nonzero()) / len(problem.w),
                        "products": result.products,
                        "gradients": result.gradients,
                        "iterations": result.iterations,
                        "seconds": result.seconds,
                    }
                    | measured
                )
                progress(len(points), len(config.sparsities))
        except (ValueError, NonFiniteError) as error:
            if isinstance(error, ValueError) and not is_refusal(error):
                raise
            refused = str(error)
    return {"points": points, "refused": refused, "notes": notes}


def _trained(
    config: CompareConfig,
    dense: DenseNetwork,
    problem: PruningProblem,
    text: str,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """The ends of trainings, read from their folders."""
    points, notes = [], []
    for share in config.sparsities:
        training = trained_config(config.training, text, share, seed)
        place = training_folder(folder, training)
        model = dense.with_weights(problem.w, recalibrate=False)
        load_weights_(model, place / file_name(training.runs[0]) / "weights.safetensors")
        weights = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        cost, remarks = _training_cost(place)
        notes += [note for note in remarks if note not in notes]
        points.append(
            {
                "wanted": share,
                "sparsity": 1.0 - int(torch.cat(weights).count_nonzero()) / len(problem.w),
                "validation": _on(dense, model, "validation"),
                "test": _on(dense, model, "test"),
            }
            | cost
        )
    return {"points": points, "refused": None, "notes": notes}


def _training_cost(place: Path) -> tuple[dict[str, Any], list[str]]:
    """What a training in a folder took, and its notes."""
    with (place / "tables" / "time.csv").open() as file:
        seconds = sum(float(row["training_seconds"]) for row in csv.DictReader(file))
    record = json.loads((place / "run.json").read_text())
    return {"products": 0, "gradients": record["steps"], "seconds": seconds}, record["notes"]


def _measured(dense: DenseNetwork, w: Tensor | None, *, recalibrate: bool) -> dict[str, Any]:
    """What samples held out say of the network with weights w, or as it is."""
    model = dense.model if w is None else dense.with_weights(w, recalibrate=recalibrate)
    return {part: _on(dense, model, part) for part in ("validation", "test")}


def _on(dense: DenseNetwork, model: torch.nn.Module, name: str) -> dict[str, Any] | None:
    part = dense.data.validation if name == "validation" else dense.data.test
    return None if part is None else asdict(dense.measure(model, part))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads; 0 for what it takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
