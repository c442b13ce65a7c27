"""Keeps the points of a training run, whole or as coordinates in a few directions."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hessian.flat_weights import FlatWeights
from hessian.tensor_files import read_tensors, write_tensors
from landscape.curve_checkpoint import digest
from landscape.directions import Directions
from landscape.trajectory import Projector, Trajectory

COORDINATES = "coordinates.safetensors"


@dataclass(frozen=True)
class RecordedPoints:
    """Checkpoints of one run, in the order of time."""

    times: Int64[Tensor, " t"]
    """Steps or epochs, whatever the recorder counted."""
    points: Float[Tensor, "t d"]
    """Flat weights, one checkpoint a row."""


@dataclass(frozen=True)
class RecordedTrajectory:
    """Coordinates of one run, in the order of time."""

    times: Int64[Tensor, " t"]
    """Steps or epochs, whatever the recorder counted."""
    trajectory: Trajectory
    """Coordinates in the directions that were recorded, with the distance outside them."""


class Recorder:
    """Keeps the weights of a model every so often while any loop trains it.

    Call it once a step or epoch, or let an optimizer do so by `attach`. Each checkpoint is one
    safetensors file of flat weights, in the layout of an objective of the model, that appears whole
    or not at all. With ``directions``, only the coordinates are kept, with the distance outside
    the directions, so that nothing grows with the number of weights.

    Weights are read where the model is; a checkpoint waits for the device, the calls between do
    not.

    Args:
        model: The model that trains, or an objective of it, whose selection of weights counts.
        folder: Where files go; made if it is not there. A folder with checkpoints of the same
            model goes on: see `resume`.
        every: Calls between two checkpoints.
        directions: What to project on, on the fly; None keeps the weights.
        center: The point with coordinates 0, shape [d]. Default: the weights now.

    Raises:
        ValueError: If ``every`` is not positive, the directions do not fit the model, ``center``
            comes without directions, or the folder holds checkpoints of another model or other
            directions.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     handle = Recorder(model, folder, every=2).attach(optimizer)
        ...     for _ in range(4):
        ...         model(torch.ones(3, 2)).square().sum().backward()
        ...         optimizer.step()
        ...     handle.remove()
        ...     read_points(folder).times
        tensor([0, 2, 4])
    """

    def __init__(
        self,
        model: nn.Module | FlatWeights,
        folder: str | os.PathLike[str],
        *,
        every: int = 1,
        directions: Directions | None = None,
        center: Float[Tensor, " d"] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        if center is not None and directions is None:
            raise ValueError("`center` must come with `directions`, got it alone.")
        self.weights = model if isinstance(model, FlatWeights) else FlatWeights(model)
        self.folder, self.every = Path(folder), every
        self.count = 0
        """Calls so far."""
        self._about: dict[str, Any] = {"layout": _layout(self.weights)}
        self._project: Projector | None = None
        self._rows: dict[int, list[float]] = {}
        if directions is not None:
            at = self.weights.weights() if center is None else center
            self.weights.require_vector(at, "center")
            self.weights.require_vector(directions.vectors[0], "directions")
            self._project = Projector(directions.basis, at)
            self._about |= {
                "directions": digest(directions.vectors),
                "center": digest(at),
                "names": list(directions.names),
            }
        self._open()

    def __call__(self) -> None:
        """Count one step or epoch, and keep the weights if it is time."""
        self.count += 1
        if self.count % self.every == 0:
            self.record(self.count)

    def record(self, time: int) -> None:
        """Keep the weights now, as those at a time; a checkpoint of that time is replaced.

        Raises:
            OSError: If it cannot be written; earlier checkpoints are as they were.
        """
        w = self.weights.weights()
        if self._project is None:
            about = self._about | {"time": time}
            write_tensors(self.folder / _name(time), {"weights": w}, about)
            return
        seen = self._project(w[None])
        self._rows[time] = [
            *seen.coordinates[0].tolist(),
            float(seen.residuals[0]),
            float(seen.distances[0]),
        ]
        times = sorted(self._rows)
        rows = torch.tensor([self._rows[t] for t in times], dtype=torch.float64)
        tensors = {"times": torch.tensor(times), "rows": rows}
        write_tensors(self.folder / COORDINATES, tensors, self._about)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Call the recorder after every step of an optimizer, and keep the start at once.

        Returns:
            The handle; its ``remove()`` ends the recording.
        """
        if self.count % self.every == 0:
            self.record(self.count)
        return optimizer.register_step_post_hook(lambda *_: self())

    def resume(self, count: int) -> None:
        """Go on after a number of calls, as the training does that was resumed from there.

        Checkpoints of later times, which the killed run made and the resumed one makes anew, are
        removed.

        Raises:
            ValueError: If the count is negative.
        """
        if count < 0:
            raise ValueError(f"`count` must be at least 0, got {count}.")
        self.count = count
        self._rows = {time: row for time, row in self._rows.items() if time <= count}
        for path in _files(self.folder):
            if _time(path) > count:
                path.unlink()

    def _open(self) -> None:
        """Read what the folder holds already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / COORDINATES
        if self._project is None:
            found = _files(self.folder)
            about = read_tensors(found[0])[1] if found else self._about
        elif file.exists():
            tensors, about = read_tensors(file)
            times = tensors["times"].tolist()
            self._rows = dict(zip(times, tensors["rows"].tolist(), strict=True))
        else:
            about = self._about
        other = [key for key, value in self._about.items() if about.get(key) != value]
        if other:
            raise ValueError(
                f"`folder` {self.folder} holds a recording of another run ({', '.join(other)} "
                "differ). Choose another folder."
            )


def read_points(folder: str | os.PathLike[str]) -> RecordedPoints:
    """Return the checkpoints that a `Recorder` kept.

    Args:
        folder: The folder of the recorder.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If checkpoints have different lengths.
        DamagedFileError: If a file cannot be read.
    """
    files = _files(Path(folder))
    if not files:
        raise FileNotFoundError(f"`folder` must hold checkpoints of a `Recorder`, got {folder}.")
    rows = [read_tensors(path)[0]["weights"] for path in files]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"`folder` {folder} holds checkpoints of different models.")
    return RecordedPoints(torch.tensor([_time(path) for path in files]), torch.stack(rows))


def read_trajectory(folder: str | os.PathLike[str]) -> RecordedTrajectory:
    """Return the coordinates that a `Recorder` with directions kept.

    Args:
        folder: The folder of the recorder.

    Raises:
        FileNotFoundError: If there are none.
        DamagedFileError: If the file cannot be read.
    """
    tensors, _ = read_tensors(Path(folder) / COORDINATES)
    rows = tensors["rows"]
    found = Trajectory(rows[:, :-2].clone(), rows[:, -2].clone(), rows[:, -1].clone())
    return RecordedTrajectory(tensors["times"], found)


def _layout(weights: FlatWeights) -> str:
    """Digest of names and shapes, in their order."""
    shapes = [[name, list(shape)] for name, shape in weights.shapes.items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _name(time: int) -> str:
    return f"point-{time:012}.safetensors"


def _time(path: Path) -> int:
    return int(path.stem.removeprefix("point-"))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("point-*.safetensors"))
