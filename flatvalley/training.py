"""Training several optimizers side by side, from one start, on the same batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatvalley.checkpoints import Checkpoints, storage_errors
from flatvalley.data import Dataset
from flatvalley.models.named import MODELS, build_named_model
from flatvalley.process_group import own_device, world
from flatvalley.run import Row, Run
from flatvalley.sparse_weights import save_sparse_weights
from flatvalley.train_config import TrainConfig, file_name
from flatvalley.train_data import load_train_data
from flatvalley.training_loop import Progress, Training
from flatvalley.user_code import build_model

TARGET_TOLERANCE = 0.01
"""How far the sparsity of a run may be from the wanted one."""
DENSE_BELOW = 0.5
"""Sparsity from which on the compact form of the weights is the smaller one."""


@dataclass(frozen=True)
class RunResult:
    """How one of the runs ended."""

    name: str
    weights: dict[str, Tensor]
    """The model's state, on the CPU."""
    row: Row
    """Its last row of the table ``epochs``."""
    target: float | None
    """The sparsity that was wanted, if one was."""
    pruned_sparsity: float
    """Share of zeros among the weights that were to be pruned."""

    @property
    def test_accuracy(self) -> float:
        """Share of the test samples classified rightly, after the last epoch."""
        return float(self.row["test_accuracy"])

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights that were trained."""
        return float(self.row["sparsity"])

    @property
    def missed(self) -> bool:
        """Whether the wanted sparsity was not reached."""
        return self.target is not None and not (
            abs(self.pruned_sparsity - self.target) <= TARGET_TOLERANCE
        )

    def vector(self, model: nn.Module) -> Float[Tensor, " d"]:
        """Return the trained weights as one vector, in the order of the model's parameters."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return torch.cat([self.weights[name].flatten() for name in names])


@dataclass(frozen=True)
class TrainResult:
    """The ends of all runs, and the tables that were written on the way."""

    config: TrainConfig
    runs: tuple[RunResult, ...]
    tables: dict[str, list[Row]]
    notes: tuple[str, ...]
    """Warnings of the optimizers, and damaged checkpoints that were passed over."""
    num_weights: int
    num_steps: int
    num_test_samples: int
    run: Run | None
    """The folder; None if there is none, and on other processes than the first."""

    @property
    def reached(self) -> bool:
        """Whether every wanted sparsity was reached."""
        return not any(run.missed for run in self.runs)

    def __getitem__(self, name: str) -> RunResult:
        """Return the run of this name.

        Raises:
            KeyError: If there is none.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise KeyError(f"No run {name}; there are {', '.join(run.name for run in self.runs)}.")


def train(
    config: TrainConfig,
    folder: Path | None = None,
    *,
    make_model: Callable[[], nn.Module] | None = None,
    data: Dataset | None = None,
    recipe: Mapping[str, Any] | None = None,
    checkpoint_seconds: float = 60.0,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train the runs that the settings name, side by side, and return how they ended.

    All start from the same weights and see the same batches, with the same augmentation and the
    same draws of dropout, so that they can be compared weight by weight. Everything random
    depends on the seed and the step alone. So a run gives the same bits whatever stands beside it,
    and a training that was killed goes on from its last checkpoint to the same weights and the
    same tables, bit for bit on a CPU with the same number of threads.

    Under ``torchrun`` every process calls this with the same arguments and takes its part of each
    batch; the folder must be one that all of them can read. Only the first one writes.

    Args:
        config: Settings.
        folder: Where tables, weights and checkpoints go; if it holds this training, it goes on.
            Default: nothing is written.
        make_model: Returns the same freshly started model at every call, in place of the one that
            the settings name.
        data: Samples, in place of those that the settings name.
        recipe: What to note in ``run.json`` of where the settings come from.
        checkpoint_seconds: Time between two checkpoints, which are made when a row of ``steps``
            is written: every ``config.log_every`` steps and after every epoch.
        tensorboard: Whether to write event files, too.
        progress: Called after every step, on the first process.

    Raises:
        ValueError: If a setting does not fit the model, the data or the folder, or the folder's
            checkpoint belongs to another training.
        NonFiniteError: If a loss, a gradient or a weight is not finite. The message names the run,
            the step and the tensor; the last good checkpoint stays.
        DamagedFileError: If a file of the data set, or every checkpoint, is damaged.
        FileNotFoundError: If a file of the data set is not there.
        ImportError: If a package that reads the data is not installed.
        StorageError: If a file cannot be written; the last good checkpoint stays.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 40)[:, None] ** torch.arange(5)
        >>> samples = Dataset("cubic", x, (x[:, 3] > 0).long(), x, (x[:, 3] > 0).long(), 2)
        >>> config = TrainConfig(runs=("sgd", "grda:c=0.2"), epochs=20, batch_size=8, lr=0.5)
        >>> def start():
        ...     torch.manual_seed(0)  # the state outside is put back
        ...     return torch.nn.Linear(5, 2)
        >>> for run in train(config, make_model=start, data=samples).runs:
        ...     print(run.name, run.test_accuracy > 0.9, run.sparsity)
        sgd True 0.0
        grda:c=0.2 True 0.75
    """
    rank, world_size = world()
    local = replace(config, device=own_device(config.device))
    samples = load_train_data(local, data, rank=rank, world_size=world_size)
    try:
        make = make_model or model_factory(local, samples.num_classes)
        training = Training(local, samples, make, rank=rank, world_size=world_size)
        checkpoints, run = None, None
        if folder is not None:
            identity = config.identity()
            marks = {"data digest": samples.digest, "start digest": training.start_digest()}
            checkpoints = Checkpoints(folder / "checkpoints", identity | marks)
            if rank == 0:
                run = Run(folder, "train", identity | ({"recipe": dict(recipe)} if recipe else {}))
        training.keep_in(run, checkpoints, checkpoint_seconds, tensorboard=tensorboard)
        with training.everything_put_back():
            training.go_on(progress)
            result = TrainResult(
                config,
                tuple(
                    RunResult(
                        t.name,
                        t.weights(),
                        training.last_row(t.name),
                        t.spec.settings.get("target"),
                        t.pruned_sparsity(),
                    )
                    for t in training.trainees
                ),
                training.log.tables,
                tuple(training.notes),
                training.trainees[0].num_weights,
                training.num_steps,
                samples.test.num_samples,
                run,
            )
    finally:
        samples.close()
    if run is not None:
        _write_ends(result, run)
    return result


def model_factory(config: TrainConfig, num_classes: int) -> Callable[[], nn.Module]:
    """Return a function that makes the model of the settings, the same at every call.

    Raises:
        ValueError: If the model is not known; a factory of the user's own may raise more.
    """
    if ":" in config.model:
        return lambda: build_model(config.model, seed=config.seed)
    if config.model not in MODELS:
        raise ValueError(
            f"`model` must be one of {', '.join(MODELS)}, or package.module:factory, got "
            f'"{config.model}".'
        )
    return lambda: build_named_model(config.model, seed=config.seed, num_classes=num_classes)


def _write_ends(result: TrainResult, run: Run) -> None:
    """Write every run's weights, plain and compact, and the summary into ``run.json``."""
    for end in result.runs:
        folder = file_name(end.name)
        with storage_errors(run.path / folder, "The last checkpoint holds these weights."):
            run.write_tensors(f"{folder}/weights.safetensors", end.weights)
            if end.sparsity > DENSE_BELOW:
                save_sparse_weights(run.path / folder / "sparse.safetensors", end.weights)
    with storage_errors(run.path / "run.json"):
        run.finish(
            {
                "results": {end.name: dict(end.row) for end in result.runs},
                "notes": list(result.notes),
                "weights": result.num_weights,
                "steps": result.num_steps,
            }
        )
