"""Where the training of a curve stands, in one file, from which it goes on bit for bit."""

import hashlib
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hessian.tensor_files import read_tensors, write_tensors

FORMAT = "flatvalley curve training"
OPTIMIZER = "optimizer."


class CurveCheckpoint:
    """The file that keeps the state of one training.

    Args:
        path: The file.
        problem: What is trained and how, of JSON types; a file with another problem is refused.
        points: All control points; those between the ends train.
        optimizer: Trains one tensor, the interior control points.
        generator: Draws t and the order of batches.
        losses: Mean loss of each epoch.
    """

    def __init__(
        self,
        path: Path,
        problem: Mapping[str, Any],
        points: Tensor,
        optimizer: Optimizer,
        generator: torch.Generator,
        losses: Tensor,
    ) -> None:
        self._path, self._problem = path, dict(problem)
        self._points, self._optimizer = points, optimizer
        self._generator, self._losses = generator, losses

    def save(self, epochs: int) -> None:
        """Write the state after a number of epochs.

        Raises:
            TypeError: If the optimizer's state is no plain tensors and numbers.
        """
        numbers: dict[str, Any] = {}
        tensors = {
            "interior": self._points[1:-1],
            "generator": self._generator.get_state(),
            "losses": self._losses,
        }
        on_cpu = []
        for name, value in self._state().items():
            if isinstance(value, Tensor):
                tensors[OPTIMIZER + name] = value
                on_cpu += [name] if value.device.type == "cpu" else []
            elif value is None or isinstance(value, Real):
                numbers[name] = value
            else:
                raise TypeError(
                    "`checkpoint` needs an optimizer whose state is tensors and numbers, but "
                    f"{type(self._optimizer).__name__} keeps a {type(value).__name__} as "
                    f'"{name}". Train without a checkpoint.'
                )
        metadata = {
            "format": FORMAT,
            "problem": self._problem,
            "epochs": epochs,
            "numbers": numbers,
            "on_cpu": on_cpu,
            "groups": [_numbers(group) for group in self._optimizer.param_groups],
        }
        write_tensors(self._path, tensors, metadata)

    def resume(self) -> int:
        """Bring everything to where the file stands, and return the epochs done; 0 without a file.

        Raises:
            DamagedFileError: If the file is damaged.
            ValueError: If it holds something else, or another training.
        """
        if not self._path.exists():
            return 0
        tensors, metadata = read_tensors(self._path)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"`checkpoint` must be a file of its own, but {self._path} holds something else. "
                "Choose another name."
            )
        found = metadata["problem"]
        other = [key for key, value in self._problem.items() if found.get(key) != value]
        if other:
            raise ValueError(
                f"`checkpoint` {self._path} is of a training with other settings "
                f"({', '.join(other)} differ). Choose another file, or remove that one."
            )
        with torch.no_grad():
            self._points[1:-1].copy_(tensors["interior"])
        self._generator.set_state(tensors["generator"])
        self._losses.copy_(tensors["losses"])
        state = self._state()
        state.update(metadata["numbers"])
        for name, value in tensors.items():
            if name.startswith(OPTIMIZER):
                key = name.removeprefix(OPTIMIZER)
                state[key] = value if key in metadata["on_cpu"] else value.to(self._points.device)
        for group, numbers in zip(self._optimizer.param_groups, metadata["groups"], strict=True):
            group.update(numbers)
        return int(metadata["epochs"])

    def _state(self) -> dict[str, Any]:
        """The optimizer's state of its one tensor."""
        (interior,) = self._optimizer.param_groups[0]["params"]
        found: dict[str, Any] = self._optimizer.state[interior]
        return found


def describe_optimizer(optimizer: Optimizer) -> str:
    """Class and settings, as far as they are numbers and words."""
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {groups}"


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, Real)}
