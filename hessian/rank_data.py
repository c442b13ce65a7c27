"""Which batches of the data a rank works on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from hessian.batches import Batch, fingerprint, one_pass, refuse_shuffling
from hessian.distributed import Ranks
from hessian.errors import NonDeterministicError

Split = Literal["batches", "given"]
"""``"batches"``: every rank is given all data; ``"given"``: every rank is given its own."""


def rank_share(batches: Iterable[Batch], ranks: Ranks, split: Split) -> Iterable[Batch]:
    """Return the batches that this rank works on.

    Raises:
        ValueError: If ``split`` is unknown; if the ranks were given different data to share; if
            they were given the same data as their own, or data padded with duplicates.
    """
    if split not in ("batches", "given"):
        raise ValueError(f'`split` must be "batches" or "given", got "{split}".')
    if ranks.size == 1:
        return batches
    sampler = getattr(batches, "sampler", None)
    with ranks.in_step():
        refuse_shuffling(batches)
        if isinstance(sampler, DistributedSampler):
            _refuse_sampler(sampler, split)
        marks = _first_marks(batches)
    table = ranks.gather(marks)
    same = torch.allclose(table, table[:1].expand_as(table), rtol=1e-9, equal_nan=True)
    if split == "given":
        if same and not table[:, 0].isnan().all():
            raise ValueError(
                '`split="given"` needs data that differ from rank to rank, got the same first '
                "batch on every rank. Leave `split` out: every rank then takes its share."
            )
        return batches
    if not same:
        raise ValueError(
            "`data` must be the same on every rank, which takes its share of the batches, got "
            'different data. Pass all of it on every rank, or `split="given"` if it is split '
            "already."
        )
    if type(batches) is DataLoader and batches.batch_sampler is not None:
        return _loader_of(batches, ranks)
    return EveryNth(batches, ranks.rank, ranks.size)


@dataclass(frozen=True)
class Places:
    """Where this rank's batches stand among those of all ranks."""

    own: list[int]
    lengths: list[int]
    """Samples in every batch of all ranks."""

    @classmethod
    def among(cls, ranks: Ranks, lengths: list[int], split: Split) -> "Places":
        """Arrange batches of these lengths; the ranks call it together."""
        counts = [int(row) for row in ranks.gather([float(len(lengths))])[:, 0]]
        start, step = ranks.rank, ranks.size
        if split == "given":
            start, step = sum(counts[: ranks.rank]), 1
        own = [start + step * i for i in range(len(lengths))]
        everywhere = torch.zeros(sum(counts), dtype=torch.float64, device="cpu")
        everywhere[own] = torch.tensor(lengths, dtype=torch.float64, device="cpu")
        total = ranks.gather(everywhere.tolist()).sum(dim=0)
        return cls(own, [int(length) for length in total])

    def put(self, totals: list[Tensor], device: torch.device) -> Tensor:
        """Return this rank's sums in float64 in their places; zero in those of the others.

        Raises:
            NonDeterministicError: If there are more or fewer sums than batches.
        """
        if len(totals) != len(self.own):
            raise NonDeterministicError(
                f"`data` must give the same batches in every pass, got {len(totals)} of them and "
                f"{len(self.own)} before."
            )
        out = torch.zeros(len(self.lengths), dtype=torch.float64, device=device)
        for place, total in zip(self.own, totals, strict=True):
            out[place] = total.to(torch.float64)
        return out


class EveryNth:
    """Every ``step``-th batch from ``start`` on; a sequence is not asked for the others."""

    def __init__(self, batches: Iterable[Any], start: int, step: int) -> None:
        self._batches, self._start, self._step = batches, start, step

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._batches, Sequence):
            return (self._batches[i] for i in range(self._start, len(self._batches), self._step))
        return islice(one_pass(self._batches), self._start, None, self._step)


def _loader_of(loader: DataLoader[Any], ranks: Ranks) -> DataLoader[Any]:
    """The same loader without the other ranks' batches, so that they are not read."""
    return DataLoader(
        loader.dataset,
        batch_sampler=EveryNth(loader.batch_sampler, ranks.rank, ranks.size),  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _first_marks(batches: Iterable[Batch]) -> list[float]:
    """Checksums of the first batch, NaN without one, and the number of batches where known."""
    first = fingerprint(islice(one_pass(batches), 1))
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        count = -1  # known only to those who read it all
    return [*(first[0].tolist() if len(first) else (torch.nan, torch.nan)), float(count)]


def _refuse_sampler(sampler: DistributedSampler[Any], split: Split) -> None:
    if split == "batches":
        raise ValueError(
            "`data` must be the same on every rank, got a DataLoader with a DistributedSampler, "
            "which splits it already. Leave the sampler out: every rank then takes its share of "
            "the batches, and every sample counts once."
        )
    length = len(sampler.dataset)  # type: ignore[arg-type]
    surplus = sampler.total_size - length
    if surplus > 0:
        raise ValueError(
            f"`data` must hold every sample once, but its DistributedSampler pads {length} "
            f"samples to {sampler.total_size}, so that {surplus} would count twice. Leave the "
            'sampler and `split="given"` out: every rank then takes its share of the batches.'
        )
