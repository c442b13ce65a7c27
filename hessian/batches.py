"""Batches of data: what may be passed, how it is cut, and whether every pass sees the same."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

from hessian.errors import NonDeterministicError

Batch: TypeAlias = tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""``(*inputs, target)``, or a mapping that is passed to the model by keyword."""

T = TypeVar("T")


class TensorBatches:
    """Tensors cut into batches of ``batch_size`` samples, in order.

    Args:
        whole: One batch of all samples; every tensor has shape [n, ...].
        batch_size: Samples in a batch; the last batch may be smaller. Default: all.
    """

    def __init__(self, whole: Batch, batch_size: int | None) -> None:
        self._whole, self._length = whole, batch_length(whole)
        self._batch_size = batch_size or max(self._length, 1)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._length, self._batch_size):
            yield map_tensors(self._whole, itemgetter(slice(start, start + self._batch_size)))

    def __len__(self) -> int:
        return -(-self._length // self._batch_size)


def as_batches(data: Any, batch_size: int | None) -> Iterable[Batch]:
    """Return ``data`` as something that can be iterated again and again.

    Raises:
        TypeError: If ``data`` cannot be iterated, or only once.
        ValueError: If ``batch_size`` is not positive, or is given with ready-made batches.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(part, Tensor) for part in data)
    ):
        inputs, target = data
        if len(inputs) != len(target):
            raise ValueError(
                f"`data` must hold as many targets as inputs, got {len(inputs)} inputs and "
                f"{len(target)} targets."
            )
        return TensorBatches((inputs, target), batch_size)
    if isinstance(data, Mapping):
        lengths = {key: len(part) for key, part in data.items() if isinstance(part, Tensor)}
        if len(lengths) < len(data) or len(set(lengths.values())) > 1:
            raise ValueError(
                "`data` given as one mapping must hold tensors of one length, got "
                f"{lengths or [type(part).__name__ for part in data.values()]}."
            )
        return TensorBatches(data, batch_size)
    if batch_size is not None:
        raise ValueError(
            "`batch_size` cuts tensors (X, y) or a mapping of them into batches, but `data` is "
            f"{type(data).__name__}, which brings its own batches. Leave `batch_size` out."
        )
    if isinstance(data, Iterator):
        raise TypeError(
            "`data` must be iterable more than once, because every product is one pass over it, "
            f"got the one-pass {type(data).__name__}. Pass `list(data)` or the loader itself."
        )
    if isinstance(data, Dataset):
        raise TypeError(
            "`data` must be a pair of tensors (X, y) or an iterable of batches, got the data set "
            f"{type(data).__name__}. Wrap it: `DataLoader(dataset, batch_size=128)`."
        )
    if isinstance(data, tuple | list) and any(isinstance(part, np.ndarray) for part in data):
        raise TypeError(
            "`data` must hold tensors, got NumPy arrays. Convert them with `torch.from_numpy`."
        )
    if not isinstance(data, Iterable):
        raise TypeError(
            "`data` must be a pair of tensors (X, y) or an iterable of batches, got "
            f"{type(data).__name__}."
        )
    return data


def one_pass(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Begin a pass over the batches; the global random state stays as it was."""
    # A DataLoader draws a seed for its workers when a pass begins, even without workers.
    with torch.random.fork_rng(devices=[]):
        return iter(batches)


def batch_length(batch: Batch) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor."""
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(parts, tuple | list):
        raise TypeError(
            "A batch must be a tuple `(*inputs, target)` or a mapping, got a "
            f"{type(batch).__name__}. Pass one batch as `[(*inputs, target)]`, in a list."
        )
    for part in parts:
        if isinstance(part, Tensor) and part.ndim > 0:
            return len(part)
    raise TypeError(
        "A batch must hold at least one tensor whose first dimension counts the samples, got "
        f"{type(batch).__name__} of {[type(part).__name__ for part in parts]}."
    )


def first_samples(batch: Batch, number: int) -> Batch:
    """Return the first samples of a batch: every tensor as long as the batch is cut."""
    length = batch_length(batch)
    cut: Batch = map_tensors(batch, lambda t: t[:number] if t.ndim and len(t) == length else t)
    return cut


def to_device(value: T, device: torch.device) -> T:
    """Return ``value`` with every tensor in it, however nested, on ``device``."""
    # Only towards the GPU: the CPU would read a copy that has not arrived yet.
    ahead = device.type == "cuda"
    moved: T = map_tensors(value, lambda tensor: tensor.to(device, non_blocking=ahead))
    return moved


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, function) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [map_tensors(part, function) for part in value]
        # A named tuple takes its fields one by one, a plain one takes the list.
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def require_repeatable(batches: Iterable[Batch]) -> None:
    """Refuse data that differ from one pass to the next, and name the cause.

    Batches held in memory are trusted. A loader costs two passes over the data, without the model.
    The global random state is put back.

    Raises:
        NonDeterministicError: If the loader shuffles or augments.
    """
    if isinstance(batches, TensorBatches) or (
        isinstance(batches, Sequence) and not isinstance(batches, DataLoader)
    ):
        return
    refuse_shuffling(batches)
    with torch.random.fork_rng(devices=[]):
        first, second = fingerprint(batches), fingerprint(batches)
    if first.shape == second.shape and _close(first, second):
        return
    if _close(first[:, 0].sum(), second[:, 0].sum()):
        raise NonDeterministicError(
            "`data` must give the same batches in every pass, got the same samples in another "
            "order: the loader shuffles. Turn the shuffling off, or pass `list(loader)`."
        )
    raise NonDeterministicError(
        "`data` must give the same batches in every pass, got other samples in the second pass: "
        "the loader augments, subsamples or draws at random. Turn that off, or pass `list(loader)`."
    )


def refuse_shuffling(batches: Iterable[Batch]) -> None:
    """Refuse a loader that says that it shuffles.

    Raises:
        NonDeterministicError: Naming the sampler.
    """
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, RandomSampler | WeightedRandomSampler):
        raise NonDeterministicError(
            "`data` must give the same batches in every pass, got a DataLoader that shuffles "
            f"({type(sampler).__name__}). Build it with `shuffle=False`."
        )


def fingerprint(batches: Iterable[Batch]) -> Tensor:
    """Return two sums a batch, shape [b, 2]: one blind to the order of its samples, and one not."""
    sums = [torch.zeros(0, 2, dtype=torch.float64, device="cpu")]
    for batch in batches:
        total = torch.zeros(1, 2, dtype=torch.float64, device="cpu")
        for tensor in _tensors(batch):
            total += _marks(tensor)
        sums.append(total)
    return torch.cat(sums)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.numel() > 0:
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _marks(tensor: Tensor) -> Tensor:
    # Entries within a sample weigh unevenly in both sums, so that a mirrored image shows.
    rows = tensor.detach().to("cpu", torch.float64)
    rows = rows.reshape(len(rows) if rows.ndim else 1, -1)
    samples = rows @ _uneven(rows.shape[1])
    return torch.stack([samples.sum(), samples @ _uneven(len(samples))])


def _uneven(length: int) -> Tensor:
    return torch.cos(torch.arange(length, dtype=torch.float64, device="cpu"))


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
