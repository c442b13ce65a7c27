"""Samples held out of the training set, for choices that must not see the test set."""

from dataclasses import replace

import torch
from torch import Tensor

from flatvalley.data.dataset import Dataset


def split_off_validation(dataset: Dataset, size: int | float, *, seed: int) -> Dataset:
    """Return the data set with a part of its training samples as test set.

    Tune on it, then train on all of the training samples and test once. The part has the shares
    of the classes that the training set has, up to one sample a class. What stays keeps its
    order.

    Args:
        dataset: Its own test set is left out of the result.
        size: Number of samples held out, or their share in (0, 1).
        seed: Seed of the choice; the global random state is not used.

    Raises:
        ValueError: If nothing would be held out, or nothing would be left.

    Example:
        >>> from flatvalley.data import load_dataset
        >>> held_out = split_off_validation(load_dataset("digits"), 0.1, seed=0)
        >>> len(held_out.train_labels), len(held_out.test_labels)
        (1293, 144)
    """
    total = len(dataset.train_labels)
    count = size if isinstance(size, int) else round(size * total)
    if not 0 < count < total or (isinstance(size, float) and not size < 1):
        raise ValueError(
            f"`size` must be from 1 to {total - 1} samples, or a share in (0, 1) that comes to as "
            f"many, got {size}."
        )
    held_out = _stratified(dataset.train_labels.cpu(), count, seed)
    train, test = (rows.nonzero().flatten() for rows in (~held_out, held_out))
    train, test = (rows.to(dataset.train_labels.device) for rows in (train, test))
    return replace(
        dataset,
        train_inputs=dataset.train_inputs[train.to(dataset.train_inputs.device)],
        train_labels=dataset.train_labels[train],
        test_inputs=dataset.train_inputs[test.to(dataset.train_inputs.device)],
        test_labels=dataset.train_labels[test],
    )


def _stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Mark ``count`` samples, of each class its share, rounded by the largest remainders."""
    _, classes, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    exact = sizes.double() * count / len(labels)
    quotas = exact.floor().long()
    rest = count - int(quotas.sum())
    quotas[(exact - quotas).argsort(descending=True, stable=True)[:rest]] += 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    marked = torch.zeros(len(labels), dtype=torch.bool)
    for number, quota in enumerate(quotas.tolist()):
        marked[order[classes[order] == number][:quota]] = True
    return marked
