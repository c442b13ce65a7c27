"""The data of an objective, kept on its device and cut anew, so that no point waits for it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hessian.batches import Batch, batch_length, map_tensors
from hessian.objective import Objective

RESIDENT_BYTES = 4 << 30
"""Data up to this size are held; larger ones are read again at every point."""


class ResidentData:
    """The batches of an objective, the same ones in every pass.

    Args:
        objective: Whose data.
        batch_size: Samples in a batch. Default: the objective's own batches. Data that cannot be
            cut by rows (batches padded to different lengths) keep their batches.
    """

    def __init__(self, objective: Objective, batch_size: int | None = None) -> None:
        self._objective = objective
        self._held = held_batches(objective)
        if batch_size is not None and self._held is not None:
            whole = concatenated(self._held)
            if whole is not None:
                self._held = cut(whole, batch_size)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._objective.batches() if self._held is None else self._held

    @property
    def held(self) -> list[Batch] | None:
        """The batches, or None if they are too large to be held."""
        return self._held


def held_batches(objective: Objective) -> list[Batch] | None:
    """Return an objective's batches on its device, or None if they are too large to be held."""
    found, size = [], 0
    for batch in objective.batches():
        size += _bytes(batch)
        if size > RESIDENT_BYTES:
            return None
        found.append(batch)
    return found


def concatenated(batches: list[Batch]) -> Batch | None:
    """Return all batches as one, or None where the parts do not fit together."""
    lengths = [batch_length(batch) for batch in batches]
    try:
        return _joined(batches, lengths)  # type: ignore[no-any-return]
    except (_MisfitError, RuntimeError, TypeError):
        return None


def cut(whole: Batch, batch_size: int) -> list[Batch]:
    """Return a batch in pieces of ``batch_size`` samples, in order; the last may be smaller."""
    n = batch_length(whole)
    return [rows(whole, slice(i, i + batch_size)) for i in range(0, n, batch_size)]


def rows(batch: Batch, index: Any) -> Batch:
    """Return some samples of a batch."""
    found: Batch = map_tensors(batch, lambda t: t[index])
    return found


def random_samples(batches: Iterable[Batch], number: int, seed: int) -> list[Batch]:
    """Return a random subset of the samples, in the order of the data, as one batch if they fit.

    The draw is made on the CPU and depends on the seed and the number of samples alone.
    """
    batches = list(batches)
    lengths = [batch_length(batch) for batch in batches]
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed))
    chosen = order[:number].sort().values
    picked, start = [], 0
    for batch, length in zip(batches, lengths, strict=True):
        own = chosen[(chosen >= start) & (chosen < start + length)] - start
        if len(own):
            picked.append(rows(batch, own))
        start += length
    whole = concatenated(picked)
    return picked if whole is None else [whole]


class _MisfitError(Exception):
    """Parts of several batches that cannot be joined."""


def _joined(parts: list[Any], lengths: list[int]) -> Any:
    """Join nested tuples, lists and mappings of tensors, row after row."""
    first = parts[0]
    if isinstance(first, Tensor):
        if any(part.ndim == 0 or len(part) != n for part, n in zip(parts, lengths, strict=True)):
            raise _MisfitError
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts], lengths) for key in first}
    if type(first) in (tuple, list) and all(len(part) == len(first) for part in parts):
        return type(first)(_joined(list(each), lengths) for each in zip(*parts, strict=True))
    raise _MisfitError


def _bytes(batch: Batch) -> int:
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    map_tensors(batch, note)
    return sum(sizes)
