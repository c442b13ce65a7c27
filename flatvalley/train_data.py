"""The samples of a training: which are trained on, which are held out, and how they are seen."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatvalley.augmentation import CropAndFlip
from flatvalley.batches import ResidentBatches
from flatvalley.checkpoints import content
from flatvalley.data import Dataset, load_dataset
from flatvalley.train_config import TrainConfig
from flatvalley.user_code import build

# The samples that are left out are the same for every seed of the training.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Samples:
    """Inputs and labels of one part of the data."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TrainData:
    """The parts of a data set that a training uses."""

    name: str
    num_classes: int
    train: Samples
    validation: Samples | None
    test: Samples

    def batches(
        self, config: TrainConfig, *, rank: int = 0, world_size: int = 1
    ) -> ResidentBatches:
        """Return the training batches by their step, on the device.

        Raises:
            ValueError: If a batch cannot be shared evenly by the ranks, or augmentation is asked
                for where inputs are no images.
        """
        augment = None
        if config.augment == "crop-flip":
            if self.train.inputs.ndim != 4:
                raise ValueError(
                    "`augment` crop-flip needs images [n, channels, height, width], got inputs of "
                    f"shape {list(self.train.inputs.shape)}. Use none."
                )
            augment = CropAndFlip()
        return ResidentBatches(
            self.train.inputs,
            self.train.labels,
            config.batch_size,
            seed=config.seed,
            augment=augment,
            device=config.device,
            rank=rank,
            world_size=world_size,
        )

    def digest(self) -> str:
        """Return a short digest by which a resumed training knows its data."""
        found = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            if part is not None:
                found.update(str([*part.inputs.shape, part.inputs.dtype]).encode())
                for t in (part.labels, part.inputs[:8], part.inputs[-8:]):
                    found.update(content(t.cpu()))
        return found.hexdigest()[:16]


def load_train_data(config: TrainConfig, given: Dataset | None = None) -> TrainData:
    """Return the data that the settings name, cut and split as they say.

    Args:
        config: Settings; a factory of ``data`` returns a ``Dataset``, or two pairs of inputs and
            class labels, for training and for testing.
        given: Data to use in place of those that the settings name.

    Raises:
        ValueError: If the data are not known, or not of that kind, or nothing would be left.
        FileNotFoundError: If a file is not there.
        DamagedFileError: If a file is not what its name says.
    """
    found = given if given is not None else _named(config)
    inputs, labels = found.train_inputs, found.train_labels
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    wanted = config.train_samples or len(labels)
    if wanted > len(labels):
        raise ValueError(
            f"`train_samples` must be at most {len(labels):,}, those that there are, got "
            f"{wanted:,}."
        )
    held_out = round(config.validation * wanted)
    if config.validation and not 0 < held_out < wanted:
        raise ValueError(
            f"`validation` must leave samples on both sides, got {config.validation} of {wanted}."
        )
    validation = None
    if wanted < len(labels) or held_out:
        order = torch.randperm(len(labels), generator=generator)[:wanted]
        rows = order[held_out:]
        if held_out:
            validation = Samples(inputs[order[:held_out]], labels[order[:held_out]])
        inputs, labels = inputs[rows], labels[rows]
    data = TrainData(
        found.name,
        found.num_classes,
        Samples(inputs, labels),
        validation,
        Samples(found.test_inputs, found.test_labels),
    )
    return _converted(data, config)


def _converted(data: TrainData, config: TrainConfig) -> TrainData:
    """Floating-point inputs in the type of the training, everything on its device."""
    dtype = torch.float64 if config.precision == "float64" else torch.float32

    def convert(part: Samples) -> Samples:
        x = part.inputs
        return Samples(
            x.to(config.device, dtype if x.is_floating_point() else None),
            part.labels.to(config.device),
        )

    validation = None if data.validation is None else convert(data.validation)
    return replace(data, train=convert(data.train), validation=validation, test=convert(data.test))


def _named(config: TrainConfig) -> Dataset:
    if ":" not in config.data:
        return load_dataset(config.data)
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
