"""What ``flatvalley redraw`` does: a plane, curve or surface of another tool, read anew."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatvalley.run import plain
from landscape import (
    Evaluation,
    LineMaximum,
    PublishedLine,
    PublishedPlane,
    read_published_landscape,
)

ACCURACIES = (" accuracy (%)", " acc")
"""How names of accuracies end; errors are drawn in their place."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Redrawn:
    """What a file holds, and the largest values on the ways between its models."""

    path: Path
    found: PublishedPlane | PublishedLine
    measures: Mapping[str, Evaluation]
    """Losses and errors: what is better the lower it is."""
    maxima: tuple[LineMaximum, ...]
    """Of every measure, on the straight line and on the curve; none where no models are known."""

    @property
    def suspicious(self) -> dict[str, int]:
        """How often an accuracy is exactly zero, which files not filled to the end have."""
        counts = {
            name: int((values == 0).sum())
            for name, values in self.found.values.items()
            if name.endswith(ACCURACIES)
        }
        return {name: count for name, count in counts.items() if count}

    @property
    def missing(self) -> int:
        """Number of points without a value, of the measure that has most of them."""
        return max(each.num_nonfinite for each in self.measures.values())


def redraw(path: Path) -> Redrawn:
    """Read a file of dnn-mode-connectivity or loss-landscape.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is none of these, or cut short.
        ValueError: If it holds nothing that is better the lower it is.
    """
    found = read_published_landscape(path)
    measures = _measures(found)
    if not measures:
        raise ValueError(f"`FILE` must hold a loss or an error, got {', '.join(found.values)}.")
    maxima: list[LineMaximum] = []
    for name in found.values:
        if name not in measures:
            continue
        if isinstance(found, PublishedLine):
            if found.between_models:
                maxima.append(found.maximum(name))
        elif len(found.points) == 3:
            maxima.append(found.line_maximum(name))
            if found.curve is not None:
                maxima.append(found.curve_maximum(name))
    return Redrawn(path, found, measures, tuple(maxima))


def digest(path: Path) -> str:
    """Return what tells a file from others: the beginning of its SHA-256.

    Raises:
        OSError: If it cannot be read.
    """
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            seen.update(part)
    return seen.hexdigest()[:16]


def redraw_tables(result: Redrawn) -> dict[str, list[dict[str, Any]]]:
    """Return tables by name: every value of the file, and the largest on each way."""
    found = result.found
    if isinstance(found, PublishedPlane):
        places = {"x": found.grid[..., 0], "y": found.grid[..., 1]}
    else:
        places = {"t": found.ts}
    columns: dict[str, Tensor] = places | dict(found.values)
    numbers = [plain(column.reshape(-1).tolist()) for column in columns.values()]
    return {
        "points": [dict(zip(columns, row, strict=True)) for row in zip(*numbers, strict=True)],
        "maxima": [
            {
                "measure": each.name,
                "along": each.along,
                "largest": each.value,
                "t": each.t,
                "start": each.ends[0],
                "end": each.ends[1],
                "over_mean": each.barrier,
            }
            for each in result.maxima
        ],
    }


def _measures(found: PublishedPlane | PublishedLine) -> dict[str, Evaluation]:
    """What is better the lower it is; an accuracy as an error, where the file has no error."""
    measures = {}
    for name, values in found.values.items():
        ending = next((end for end in ACCURACIES if name.endswith(end)), None)
        if ending is None:
            measures[name] = found.evaluation(name)
            continue
        error = f"{name.removesuffix(ending)} error (%)"
        if error not in found.values:
            of = found.evaluation(name)
            one = torch.ones_like(values)
            measures[error] = Evaluation(of.points, one, 100 - values, (100 - values).square())
    return measures
