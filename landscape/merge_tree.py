"""Basins of a loss on a grid: where they begin, where they meet, and what is mere noise."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from landscape.plane_figure import grid_axes
from landscape.records import Evaluation


@dataclass(frozen=True)
class MergeTree:
    """What happens to the set of points below a level while the level rises.

    A branch begins at a local minimum, and ends where the lowest pass lets it into a branch whose
    minimum is lower; the lowest of all never ends. Branches are in order of persistence.

    Args:
        minima: Where branches begin: indices into the flattened grid, shape [b].
        births: The losses there.
        passes: Where they end, in the same indices; -1 where they do not.
        deaths: The losses there; infinite where they do not end.
        parents: Into which branch they end; -1 where they do not.
        errors: Standard errors of ``persistence``, the two losses taken as independent, which is
            too much for losses on the same samples; NaN where unknown or no pass.
        basins: The branch from which the level reaches each point, shape of the grid; -1 where the
            loss is not finite.
        losses: The losses, shape of the grid.
    """

    minima: Int64[Tensor, " b"]
    births: Float64[Tensor, " b"]
    passes: Int64[Tensor, " b"]
    deaths: Float64[Tensor, " b"]
    parents: Int64[Tensor, " b"]
    errors: Float64[Tensor, " b"]
    basins: Int64[Tensor, "*grid"]
    losses: Float64[Tensor, "*grid"]

    @property
    def persistence(self) -> Float64[Tensor, " b"]:
        """How far the level rises from the begin of a branch to its end."""
        return self.deaths - self.births

    @property
    def is_certain(self) -> Bool[Tensor, " b"]:
        """Whether a branch lasts longer than two standard errors, or its error is not known."""
        return ~(self.persistence <= 2 * self.errors)


def merge_tree(evaluation: Evaluation, *, min_persistence: float = 0.0) -> MergeTree:
    """Return the merge tree of the sublevel sets of a loss on a line or a grid.

    Neighbours are next to each other along the line, or along a row, a column or a diagonal of the
    grid. Minima of a slice need not be minima of the loss: a slice shows at most what its plane
    contains. Costs a sort and a pass over the points. (Method: Carr, Snoeyink and Axen 2003; in
    loss landscapes Geniesse et al. 2024.)

    Args:
        evaluation: On a line, points of shape [m], or on a `grid`, points of shape [nx, ny, 2].
        min_persistence: Branches that last no longer than this are not branches, their points those
            of the branch that they meet. Those that do not last at all never are.

    Raises:
        ValueError: If the points are neither rising nor a rectangular grid, no loss is finite, or
            the persistence is negative.

    Example:
        >>> t, n = torch.arange(5.0).double(), torch.ones(5).double()
        >>> tree = merge_tree(Evaluation(t, n, torch.tensor([1.0, 0, 3, 2, 4]).double(), n))
        >>> tree.minima.tolist(), tree.persistence.tolist()
        ([1, 3], [inf, 1.0])
    """
    losses = evaluation.mean.detach().to("cpu", torch.float64)
    if evaluation.points.ndim > 1:
        grid_axes(evaluation)
    elif not bool((evaluation.points.diff() > 0).all()):
        raise ValueError("`evaluation` on a line must have rising values of t. Sort them.")
    if not torch.isfinite(losses).any():
        raise ValueError("`evaluation` must hold a finite loss, got none.")
    if not min_persistence >= 0:
        raise ValueError(f"`min_persistence` must be at least 0, got {min_persistence}.")
    values = losses.flatten().numpy()
    births, ends, basins = _sweep(values, _neighbours(losses.shape), min_persistence)
    branches = [b for b in range(len(births)) if not (b in ends and ends[b].absorbed)]
    branches.sort(key=lambda b: _persistence(values, births[b], ends.get(b)), reverse=True)
    number = {b: i for i, b in enumerate(branches)}

    def kept(b: int) -> int:
        while b not in number:
            b = ends[b].into
        return number[b]

    minima = torch.tensor([births[b] for b in branches])
    passes = torch.tensor([ends[b].at if b in ends else -1 for b in branches])
    parents = torch.tensor([kept(ends[b].into) if b in ends else -1 for b in branches])
    lasting = passes >= 0
    flat = losses.flatten()
    errors = evaluation.standard_error.detach().to("cpu", torch.float64).flatten()
    both = torch.hypot(errors[minima], errors[passes])
    return MergeTree(
        minima,
        flat[minima],
        passes,
        torch.where(lasting, flat[passes], torch.inf),
        parents,
        torch.where(lasting, both, torch.nan),
        torch.tensor([kept(b) if b >= 0 else -1 for b in basins]).reshape(losses.shape),
        losses,
    )


@dataclass(frozen=True)
class _End:
    """Of a branch: the point, the branch it meets, and whether it lasted too short to count."""

    at: int
    into: int
    absorbed: bool


def _sweep(
    values: Any, neighbours: list[list[int]], min_persistence: float
) -> tuple[list[int], dict[int, _End], list[int]]:
    """Add points from the lowest upward; return where branches begin and end, and the basins."""
    births: list[int] = []
    ends: dict[int, _End] = {}
    basins = [-1] * len(values)
    above: list[int] = []  # a branch whose component this one's is in, itself at first

    def component(b: int) -> int:
        while above[b] != b:
            above[b] = b = above[above[b]]
        return b

    finite = np.flatnonzero(np.isfinite(values))
    for point in finite[np.argsort(values[finite], kind="stable")].tolist():
        lower = [q for q in neighbours[point] if basins[q] >= 0]
        if not lower:
            basins[point] = len(births)
            above.append(len(births))
            births.append(point)
            continue
        basins[point] = basins[min(lower, key=lambda q: values[q])]
        # Branches are numbered from the lowest minimum upward.
        first, *others = sorted({component(basins[q]) for q in lower})
        for b in others:
            lasted = values[point] - values[births[b]]
            ends[b] = _End(point, first, bool(lasted <= min_persistence))
            above[b] = first
    return births, ends, basins


def _persistence(values: Any, birth: int, end: _End | None) -> float:
    return np.inf if end is None else float(values[end.at] - values[birth])


def _neighbours(shape: torch.Size) -> list[list[int]]:
    """Of every point: those next to it, also over corners."""
    index = np.arange(np.prod(shape)).reshape(shape)
    padded = np.pad(index, 1, constant_values=-1)
    steps = [s for s in np.ndindex(*(3,) * len(shape)) if s != (1,) * len(shape)]
    windows = [padded[tuple(slice(i, i + n) for i, n in zip(s, shape, strict=True))] for s in steps]
    rows = np.stack([w.ravel() for w in windows], axis=1).tolist()
    return [[q for q in row if q >= 0] for row in rows]
