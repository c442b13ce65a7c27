"""Finished points of a sweep in a folder, from which a killed one goes on."""

import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from hessian.atomic import write_atomically
from hessian.batches import fingerprint
from hessian.job_folder import JobFolder, checksum
from hessian.objective import Objective
from landscape.batch_norm import BatchNorm
from landscape.combinations import defining_vectors
from landscape.paths import Path
from landscape.planes import Plane

CHUNK = 8
"""Points in a file: what a kill may cost, at most, for each process."""


class Shards:
    """Numbers of the points, a file for every few of them.

    Args:
        folder: Made if it is not there. None: nothing is kept.
        identity: What the numbers depend on, as JSON values.

    Raises:
        ValueError: If the folder holds points of another sweep; names what differs.
    """

    def __init__(self, folder: FilePath | None, identity: Mapping[str, Any]) -> None:
        self._folder = None
        self._losses: list[float | None] = []
        self._plan: dict[str, Any] = {}
        if folder is not None:
            self._folder = JobFolder(
                folder, "sweep.json", identity, name="folder", holds="points of this sweep"
            )

    @property
    def plan(self) -> dict[str, Any] | None:
        """The plan that the points so far were evaluated by."""
        found = None if self._folder is None else self._folder.notes
        return None if found is None else found["plan"]

    def require_losses(self, losses: Callable[[], list[float | None]]) -> None:
        """See that the points so far are of a model and a criterion with these losses.

        Raises:
            ValueError: If they are not.
        """
        if self._folder is None:
            return
        self._losses = losses()
        kept = self._losses if self._folder.notes is None else self._folder.notes.get("losses", [])
        if len(kept) != len(self._losses) or not all(map(_alike, kept, self._losses)):
            self._folder.refuse("losses: the model or the criterion has changed")

    def begin(self, plan: dict[str, Any]) -> None:
        """Keep the plan with the first points, so that those who go on evaluate in the same way."""
        self._plan = plan

    def read(self, chunk: int, shape: tuple[int, ...]) -> Tensor | None:
        """Return a chunk's numbers, or None if it is not there, whole."""
        if self._folder is None:
            return None
        try:
            found = load_tensors(self._path(chunk).read_bytes())["sums"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return found if found.shape == shape and found.dtype == torch.float64 else None

    def write(self, chunk: int, sums: Tensor) -> None:
        """Keep a chunk's numbers."""
        if self._folder is not None:
            self._folder.begin(plan=self._plan, losses=self._losses)
            write_atomically(self._path(chunk), dump_tensors({"sums": sums.contiguous()}))

    def _path(self, chunk: int) -> FilePath:
        assert self._folder is not None
        return self._folder.path / f"points-{chunk:06d}.safetensors"


def identity(
    objectives: Mapping[str, Objective],
    path: Path | Plane,
    points: Tensor,
    metrics: tuple[str, ...],
    policy: BatchNorm,
    precision: str,
) -> dict[str, Any]:
    """Return what the numbers of a sweep depend on. Costs one pass over the data, no model."""
    first = next(iter(objectives.values()))
    sources = dict(objectives) | ({} if policy.data is None else {"batch norm": policy.data})
    ends = [t for buffers in policy.ends or () for _, t in sorted(buffers.items())]
    return {
        "points": checksum(points),
        "path": [type(path).__name__, checksum(*defining_vectors(path, points))],
        "model": [type(first.model).__name__, checksum(*first.constants().values())],
        "data": {name: checksum(fingerprint(o.batches())) for name, o in sources.items()},
        "criterion": {name: _name(o.criterion) for name, o in objectives.items()},
        "metrics": list(metrics),
        "batch norm": [policy.words, checksum(*ends)],
        "precision": precision,
        "type": str(first.dtype),
        "versions": [version("flatvalley"), str(torch.__version__)],
    }


def probe_losses(
    objectives: Mapping[str, Objective], path: Path | Plane, points: Tensor
) -> list[float | None]:
    """Return losses on the first batch at the first and the last point; None if not finite.

    They show what names do not: the code of a model and a criterion.
    """
    found: list[float | None] = []
    for point in points[[0, -1]]:
        w = path(*point.tolist()) if isinstance(path, Plane) else path(float(point))
        for objective in objectives.values():
            if objective.ranks.size > 1:  # every rank has other batches
                continue
            with torch.no_grad():
                batch = next(iter(objective.batches()))
                losses = objective.sample_losses_from_output(objective.output(w, batch), batch)
            value = float(losses.double().mean())
            found.append(value if math.isfinite(value) else None)
    return found


def _alike(a: float | None, b: float | None) -> bool:
    """Whether losses differ by rounding alone."""
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9)


def _name(criterion: Any) -> str:
    """A name that is the same in another process."""
    if isinstance(criterion, nn.Module):
        return repr(criterion)
    return str(getattr(criterion, "__qualname__", type(criterion).__qualname__))
