"""The samples of a training: which are trained on, which are held out, and how they are seen."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flatvalley.augmentation import CropAndFlip
from flatvalley.batches import ResidentBatches
from flatvalley.checkpoints import content
from flatvalley.data import Dataset, load_dataset, split_off_validation
from flatvalley.train_config import TrainConfig
from flatvalley.user_code import build

SPLIT_SEED = 0
"""The samples that are left out are the same for every seed of the training."""
EVALUATION_BATCH = 1000
"""Samples in a forward pass of an evaluation."""


@runtime_checkable
class Batches(Protocol):
    """Batches known by their step alone, as ``ResidentBatches`` and ``ImageBatches`` are."""

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the batch of a step."""
        ...


@dataclass(frozen=True)
class Part:
    """Batches of one part of the data, and how many samples they hold in all."""

    batches: Batches
    num_samples: int


@dataclass(frozen=True)
class TrainData:
    """The parts of a data set as a training sees them."""

    name: str
    num_classes: int
    train: Part
    validation: Part | None
    test: Part
    digest: str
    """A short digest by which a resumed training knows its data."""


def load_train_data(
    config: TrainConfig, given: Dataset | None = None, *, rank: int = 0, world_size: int = 1
) -> TrainData:
    """Return the data that the settings name, cut and split as they say, on their device.

    Args:
        config: Settings; a factory of ``data`` returns a ``Dataset``, or two pairs of inputs and
            targets, for training and for testing.
        given: Data to use in place of those that the settings name.
        rank: Number of this process, which takes its part of every training batch.
        world_size: Number of processes.

    Raises:
        ValueError: If the data are not known, not of that kind, or do not fit the settings.
        FileNotFoundError: If a file is not there.
        DamagedFileError: If a file is not what its name says.
    """
    found = given if given is not None else _named(config)
    if config.augment != "none" and found.train_inputs.ndim != 4:
        raise ValueError(
            f"`augment` {config.augment} needs images [n, channels, height, width], got inputs of "
            f"shape {list(found.train_inputs.shape)}. Use none."
        )
    if config.train_samples > len(found.train_labels):
        raise ValueError(
            f"`train_samples` must be at most {len(found.train_labels):,}, those that there are, "
            f"got {config.train_samples:,}."
        )
    if 0 < config.train_samples < len(found.train_labels):
        drawn = split_off_validation(found, config.train_samples, seed=SPLIT_SEED)
        found = replace(found, train_inputs=drawn.test_inputs, train_labels=drawn.test_labels)
    held_out = None
    if config.validation:
        held_out = split_off_validation(found, config.validation, seed=SPLIT_SEED)
        found = replace(
            found, train_inputs=held_out.train_inputs, train_labels=held_out.train_labels
        )
    options: dict[str, Any] = {
        "normalise": found.normalise,
        "dtype": torch.float64 if config.precision == "float64" else torch.float32,
        "device": config.device,
    }

    def part(inputs: Tensor, labels: Tensor, size: int, **more: Any) -> Part:
        x = inputs.to(options["dtype"]) if inputs.is_floating_point() else inputs
        batches = ResidentBatches(x, labels, size, **options, **more)
        return Part(batches, len(labels))

    train = part(
        found.train_inputs,
        found.train_labels,
        config.batch_size,
        seed=config.seed,
        augment=CropAndFlip() if config.augment == "crop-flip" else None,
        rank=rank,
        world_size=world_size,
    )
    fixed = {"size": EVALUATION_BATCH, "seed": 0, "shuffle": False}
    validation = None
    if held_out is not None:
        validation = part(held_out.test_inputs, held_out.test_labels, **fixed)
    test = part(found.test_inputs, found.test_labels, **fixed)
    return TrainData(found.name, found.num_classes, train, validation, test, _digest(found))


def _digest(data: Dataset) -> str:
    found = hashlib.sha256()
    for x, y in (
        (data.train_inputs, data.train_labels),
        (data.test_inputs, data.test_labels),
    ):
        found.update(str([*x.shape, x.dtype]).encode())
        for t in (y, x[:8], x[-8:]):
            found.update(content(t.cpu()))
    return found.hexdigest()[:16]


def _named(config: TrainConfig) -> Dataset:
    if ":" not in config.data:
        # Bytes where images are changed, so that what is shifted in is black; a float otherwise,
        # which need not be normalised again in every step.
        dtype = torch.float32 if config.augment == "none" else torch.uint8
        return load_dataset(config.data, dtype=dtype)
    found = build(config.data, "data", seed=config.seed)
    if isinstance(found, Dataset):
        return found
    pairs = isinstance(found, tuple | list) and len(found) == 2
    if not pairs or not all(
        isinstance(part, tuple | list)
        and len(part) == 2
        and all(isinstance(t, Tensor) for t in part)
        and len(part[0]) == len(part[1]) > 0
        for part in found
    ):
        raise ValueError(
            f"`data` {config.data} must return a flatvalley.data.Dataset, or two pairs of tensors "
            "((inputs, labels), (test_inputs, test_labels)), each of equal length."
        )
    (inputs, labels), (test_inputs, test_labels) = found
    integral = not labels.is_floating_point() and labels.ndim == 1
    num_classes = int(max(labels.max(), test_labels.max())) + 1 if integral else 0
    return Dataset(config.data, inputs, labels, test_inputs, test_labels, num_classes)
