"""Mini-batches by their number, from data held in memory or on the device."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

_ORDER, _CHANGES = 0, 1


@runtime_checkable
class Augmentation(Protocol):
    """Random changes of a batch, in two parts: what is drawn, and what is done with it."""

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Return the draws for ``num`` samples, [num, ...], from a generator on the CPU."""
        ...

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the samples [n, ...] changed as the draws [n, ...] say, as a new tensor."""
        ...


class EpochOrder:
    """Which samples each step sees, by the seed and the number of the step alone.

    Steps count on through the epochs: epoch e begins at step ``e * len(self)``. Each epoch has a
    permutation of its own.

    Args:
        num_samples: Samples of an epoch.
        batch_size: Samples of a batch over all ranks.
        seed: Seed of the permutations, and of the generators of the steps.
        shuffle: Whether each epoch has an order of its own; else all have the given one.
        drop_last: Whether to leave out the last batch of an epoch where it is smaller.
        rank: Number of this process.
        world_size: Number of processes.
        device: Where the numbers of the samples are returned.

    Raises:
        ValueError: If there are fewer samples than one, or than a batch where the last one is
            dropped; if a batch cannot be shared evenly by the ranks; if ``rank`` or ``seed``
            cannot be.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        _check(num_samples, batch_size, seed, drop_last, rank, world_size)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._epoch, self._order = -1, torch.arange(num_samples, device=device)

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def samples(self, step: int) -> Tensor:
        """Return the numbers of the samples of a step, those of all ranks.

        A step of another epoch than the call before costs a permutation of all samples.

        Raises:
            ValueError: If ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"`step` must be at least 0, got {step}.")
        epoch, place = divmod(step, len(self))
        if self.shuffle and epoch != self._epoch:
            order = torch.randperm(self.num_samples, generator=self._generator(_ORDER, epoch))
            self._epoch, self._order = epoch, order.to(self._order.device)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def mine(self, batch: Tensor) -> Tensor:
        """Return this rank's part of what belongs to the samples of a batch."""
        return batch[self.rank :: self.world_size]

    def generator(self, step: int) -> torch.Generator:
        """Return the generator, on the CPU, of what is random in a step."""
        return self._generator(_CHANGES, step)

    def _generator(self, stream: int, number: int) -> torch.Generator:
        mixed = np.random.SeedSequence((self.seed, stream, number)).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))


class ResidentBatches:
    """Mini-batches of data held in memory, each known by its step alone.

    ``batch(step)`` depends on the seed and the step and on nothing else, so that training can
    stop and resume at any step. Every epoch has an order of its own, a permutation of the
    samples; the augmentation of a batch is drawn anew for each step. All draws are made on the
    CPU: every device sees the same batches.

    Bytes stay bytes, a quarter of float32's memory, and are normalised batch by batch on the
    device.

    With several ranks every batch is shared: rank r takes samples r, r + world_size, … of it,
    augmented as one process would do, so the ranks together see what one process sees.

    Args:
        inputs: Samples, [n, ...]. Moved to ``device`` once, and not copied where they are there.
        labels: Their labels, [n, ...].
        batch_size: Samples of a batch over all ranks.
        seed: Seed of the order and of the augmentation.
        augment: Changes the inputs of a batch before they are normalised; ``CropAndFlip()``, or
            an ``Augmentation`` of your own.
        normalise: Mean and standard deviation of each channel, for inputs scaled to [0, 1] if
            they are bytes. Default: bytes are only scaled, and other inputs stay as they are.
        dtype: Type of the batches made from bytes, or of normalised ones.
        device: Where the data live. Default: where ``inputs`` are.
        shuffle: Whether each epoch has an order of its own; else all have the given one.
        drop_last: Whether to leave out the last batch of an epoch where it is smaller.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are no samples, not as many labels as inputs, fewer samples than a
            batch where the last one is dropped, or a batch that cannot be shared evenly by the
            ranks; if ``rank``, ``seed`` or ``normalise`` cannot be.

    Example:
        >>> import torch
        >>> batches = ResidentBatches(torch.arange(5.0), torch.arange(5), 2, seed=0)
        >>> len(batches)
        3
        >>> sorted(y for step in range(3) for y in batches.batch(step)[1].tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        augment: Augmentation | None = None,
        normalise: tuple[Sequence[float], Sequence[float]] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(inputs) != len(labels):
            raise ValueError(
                f"`inputs` and `labels` must be as many, got {len(inputs)} and {len(labels)}."
            )
        device = inputs.device if device is None else torch.device(device)
        self.order = EpochOrder(
            len(labels),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            device=device,
        )
        self.inputs, self.labels = inputs.to(device), labels.to(device)
        self.augment = augment
        self._dtype = dtype
        self._affine = affine(self.inputs, normalise, dtype)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of the batch of a step, this rank's part.

        Steps count on through the epochs: epoch e begins at step ``e * len(self)``. Nothing waits
        for the device, but where an epoch begins.

        Raises:
            ValueError: If ``step`` is negative.
        """
        chosen = self.order.samples(step)
        mine = self.order.mine(chosen)
        x = self.inputs.index_select(0, mine)
        if self.augment is not None:
            draws = self.augment.draw(len(chosen), self.order.generator(step))
            x = self.augment.apply(x, self.order.mine(draws))
        if self._affine is not None:
            scale, shift = self._affine
            x = (x.to(self._dtype) * scale).add_(shift)
        return x, self.labels.index_select(0, mine)


def affine(
    inputs: Tensor, normalise: tuple[Sequence[float], Sequence[float]] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift that normalise batches of ``inputs``; None where nothing is to do."""
    unit = 255.0 if inputs.dtype == torch.uint8 else 1.0
    if normalise is None and unit == 1.0:
        return None
    mean, deviation = (torch.tensor(x, dtype=torch.float64) for x in normalise or ([0.0], [1.0]))
    channels = inputs.shape[1] if inputs.ndim > 1 else 1
    if (
        mean.shape != deviation.shape
        or len(mean) not in (1, channels)
        or not bool((deviation > 0).all())
    ):
        raise ValueError(
            "`normalise` must be a mean and a positive deviation for each of "
            f"{channels} channels, got {normalise}."
        )
    shape = [-1] + [1] * (inputs.ndim - 2)
    scale, shift = 1 / (unit * deviation), -mean / deviation
    return (
        scale.reshape(shape).to(inputs.device, dtype),
        shift.reshape(shape).to(inputs.device, dtype),
    )


def _check(
    num_samples: int, batch_size: int, seed: int, drop_last: bool, rank: int, world_size: int
) -> None:
    if num_samples < 1:
        raise ValueError(f"There must be at least one sample, got {num_samples}.")
    if batch_size < 1 or (drop_last and batch_size > num_samples):
        raise ValueError(
            "`batch_size` must be at least 1, and at most the number of samples where the last "
            f"batch is dropped, got {batch_size} for {num_samples} samples."
        )
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be from 0 to {world_size - 1}, got {rank}.")
    last = 0 if drop_last else num_samples % batch_size
    if batch_size % world_size or last % world_size:
        raise ValueError(
            f"`batch_size` must share evenly among {world_size} ranks, in the last batch of "
            f"an epoch too, got {batch_size} and a last one of {last or batch_size}. Choose a "
            "multiple of the ranks, and `drop_last=True` where the last batch is no multiple."
        )
