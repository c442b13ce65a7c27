"""The samples of a training: which are trained on, which are held out, and how they are seen."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flatvalley.augmentation import CropAndFlip
from flatvalley.batches import ResidentBatches
from flatvalley.checkpoints import content
from flatvalley.data import (
    Dataset,
    ImageBatches,
    ImageFolder,
    default_root,
    load_dataset,
    split_off_validation,
)
from flatvalley.train_config import TrainConfig
from flatvalley.user_code import build
from hessian import DamagedFileError

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

    def close(self) -> None:
        """End the threads that decode images ahead, if there are any."""
        for part in (self.train, self.validation, self.test):
            if part is not None and isinstance(part.batches, ImageBatches):
                part.batches.close()


def load_train_data(
    config: TrainConfig, given: Dataset | None = None, *, rank: int = 0, world_size: int = 1
) -> TrainData:
    """Return the data that the settings name, cut and split as they say, on their device.

    Args:
        config: Settings; a factory of ``data`` returns a ``Dataset``, or two pairs of inputs and
            class labels, for training and for testing. Of a folder of images the files are
            decoded batch by batch.
        given: Data to use in place of those that the settings name.
        rank: Number of this process, which takes its part of every training batch.
        world_size: Number of processes.

    Raises:
        ValueError: If the data are not known, not of that kind, or do not fit the settings.
        FileNotFoundError: If a file is not there.
        DamagedFileError: If a file is not what its name says.
        ImportError: If a package that reads the files is not installed.
    """
    folders: _Folders | None = None
    if given is None and (root := _folder(config.data)) is not None:
        folders = _Folders.scan(root)
        # The numbers of the files stand for the images until they are decoded.
        given = folders.numbers()
    found = given if given is not None else _named(config)
    if config.augment != "none" and folders is None and found.train_inputs.ndim != 4:
        raise ValueError(
            f"`augment` {config.augment} needs images [n, channels, height, width], got inputs of "
            f"shape {list(found.train_inputs.shape)}. Use none."
        )
    digest = _digest(found, folders)
    found, held_out = _split(found, config)
    training: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "drop_last": config.drop_last,
        "rank": rank,
        "world_size": world_size,
    }
    fixed: dict[str, Any] = {"batch_size": EVALUATION_BATCH, "seed": 0, "shuffle": False}
    options: dict[str, Any] = {
        "dtype": torch.float64 if config.precision == "float64" else torch.float32,
        "device": config.device,
    }

    def part(inputs: Tensor, labels: Tensor, settings: dict[str, Any], *, changed: bool) -> Part:
        changed = changed and config.augment == "crop-flip"
        if folders is not None:
            files = folders.files(inputs, labels)
            size: dict[str, Any] = {"size": config.image_size, "augment": changed}
            return Part(ImageBatches(files, **settings, **options, **size), len(files))
        x = inputs.to(options["dtype"]) if inputs.is_floating_point() else inputs
        change: dict[str, Any] = {
            "augment": CropAndFlip() if changed else None,
            "normalise": found.normalise,
        }
        return Part(ResidentBatches(x, labels, **settings, **options, **change), len(labels))

    validation = None
    if held_out is not None:
        validation = part(held_out.test_inputs, held_out.test_labels, fixed, changed=False)
    return TrainData(
        found.name,
        found.num_classes,
        part(found.train_inputs, found.train_labels, training, changed=True),
        validation,
        part(found.test_inputs, found.test_labels, fixed, changed=False),
        digest,
    )


def _split(found: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """Cut the training samples to those wanted; return also the split that holds some out."""
    total = len(found.train_labels)
    if config.train_samples > total:
        raise ValueError(
            f"`train_samples` must be at most {total:,}, those that there are, got "
            f"{config.train_samples:,}."
        )
    if 0 < config.train_samples < total:
        drawn = split_off_validation(found, config.train_samples, seed=SPLIT_SEED)
        found = replace(found, train_inputs=drawn.test_inputs, train_labels=drawn.test_labels)
    if not config.validation:
        return found, None
    held_out = split_off_validation(found, config.validation, seed=SPLIT_SEED)
    rest = replace(found, train_inputs=held_out.train_inputs, train_labels=held_out.train_labels)
    return rest, held_out


@dataclass(frozen=True)
class _Folders:
    """Image files for training and for testing."""

    train: ImageFolder
    test: ImageFolder

    @classmethod
    def scan(cls, root: Path) -> "_Folders":
        test = "test" if not (root / "val").is_dir() and (root / "test").is_dir() else "val"
        found = cls(ImageFolder.scan(root / "train"), ImageFolder.scan(root / test))
        if found.train.classes != found.test.classes:
            (name, *_) = sorted(set(found.train.classes) ^ set(found.test.classes))
            raise ValueError(
                f"`data` {root} must have the same classes in train and {test}, but has {name} in "
                "only one of them."
            )
        return found

    def numbers(self) -> Dataset:
        """The files by their numbers, those of the test after those of the training."""
        first, last = len(self.train), len(self.train) + len(self.test)
        return Dataset(
            self.train.root.parent.name,
            torch.arange(first),
            self.train.labels,
            torch.arange(first, last),
            self.test.labels,
            len(self.train.classes),
        )

    def files(self, numbers: Tensor, labels: Tensor) -> ImageFolder:
        """The files of these numbers."""
        paths = self.train.paths + self.test.paths
        chosen = tuple(paths[number] for number in numbers.tolist())
        return ImageFolder(self.train.root, self.train.classes, chosen, labels)


def _folder(data: str) -> Path | None:
    """The folder of images that the setting names, if it does."""
    if data == "imagenet":
        return default_root() / data
    return Path(data) if Path(data).is_dir() else None


def _digest(data: Dataset, folders: _Folders | None) -> str:
    found = hashlib.sha256()
    for x, y in (
        (data.train_inputs, data.train_labels),
        (data.test_inputs, data.test_labels),
    ):
        found.update(str([*x.shape, x.dtype]).encode())
        for t in (y, x[:8], x[-8:]):
            found.update(content(t.cpu()))
    if folders is not None:
        paths = (*folders.train.paths, *folders.test.paths)
        found.update("\n".join(f"{path.parent.name}/{path.name}" for path in paths).encode())
    return found.hexdigest()[:16]


def _named(config: TrainConfig) -> Dataset:
    if ":" not in config.data:
        # Bytes where images are changed, so that what is shifted in is black; a float otherwise,
        # which need not be normalised again in every step.
        dtype = torch.float32 if config.augment == "none" else torch.uint8
        try:
            return load_dataset(config.data, dtype=dtype)
        except ValueError as error:
            if isinstance(error, DamagedFileError):
                raise
            raise ValueError(
                f"{error} Or name a folder of images with train and val, or a factory: "
                "package.module:factory."
            ) from error
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
