"""Points of the trajectories of a training, kept as flat vectors."""

from collections.abc import Sequence

import numpy as np
import torch

from flatvalley.checkpoints import storage_errors
from flatvalley.run import Run
from flatvalley.train_config import TrainConfig
from flatvalley.trainees import Trainee


def snapshot_steps(config: TrainConfig, num_steps: int) -> frozenset[int]:
    """Return the steps after which a snapshot is due; the start is kept beside them.

    Example:
        >>> sorted(snapshot_steps(TrainConfig(snapshots=4, snapshot_spacing="log"), 1000))
        [1, 10, 100, 1000]
    """
    if not config.snapshots:
        return frozenset()
    if config.snapshot_spacing == "log":
        found = np.geomspace(1, num_steps, config.snapshots)
    else:
        found = np.linspace(num_steps / config.snapshots, num_steps, config.snapshots)
    return frozenset(int(step) for step in np.rint(found) if step >= 1)


def write_snapshot(run: Run, step: int, trainees: Sequence[Trainee]) -> None:
    """Write the weights of every run as one vector, and its buffers, under the run's name.

    Raises:
        StorageError: If the file cannot be written.
    """
    tensors = {}
    for trainee in trainees:
        weights = [p.detach().flatten() for p in trainee.params.values()]
        tensors[trainee.name] = torch.cat(weights)
        for name, buffer in trainee.model.named_buffers():
            tensors[f"{trainee.name}/{name}"] = buffer
    name = f"trajectory/step-{step:09}.safetensors"
    with storage_errors(run.path / name, "It is written again after a restart."):
        run.write_tensors(name, tensors, {"step": step})
