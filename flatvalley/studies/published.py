"""Published accuracies of sparse ResNet-50 on ImageNet, each with the protocol behind it."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hessian import DamagedFileError

SPARSITY, ACCURACY = "global sparsity", "Accuracy"
"""Columns that every file has."""


@dataclass(frozen=True)
class Protocol:
    """How one set of published figures came about, as far as it is known."""

    title: str
    source: str
    counts: str
    """Which weights its sparsity counts."""
    training: str
    epochs: str
    reported: str
    """Which epoch's accuracy it is."""
    selection: str
    """What its points are among all that were tried."""


GALE = "Gale, Elsen & Hooker (2019), The state of sparsity in deep neural networks"
CHAO = "Chao, Wang, Xing & Cheng (2020), Directional pruning of deep neural networks"
_GALE_COUNTS = (
    "the files' global sparsity; the same share in every layer, first convolution dense; whether "
    "biases and batch norm count is not said"
)
_GALE_TRAINING = "SGD with momentum and weight decay; label smoothing 0 or 0.1, as each row says"
_GALE_EPOCHS = "about 100"
_GALE_EPOCH = "not said in the files"
_GALE_POINTS = "every setting of a grid; the best is known by its test accuracy only"
_GRDA_COUNTS = "all trainable weights, biases and batch norm included"

PROTOCOLS: Mapping[str, Protocol] = {
    "magnitude_pruning": Protocol(
        "gradual magnitude",
        GALE,
        _GALE_COUNTS,
        _GALE_TRAINING,
        _GALE_EPOCHS,
        _GALE_EPOCH,
        _GALE_POINTS,
    ),
    "random_pruning": Protocol(
        "gradual, random",
        GALE,
        _GALE_COUNTS,
        _GALE_TRAINING,
        _GALE_EPOCHS,
        _GALE_EPOCH,
        _GALE_POINTS,
    ),
    "variational_dropout": Protocol(
        "variational dropout",
        GALE,
        "the files' global sparsity; shares of layers as they come out",
        _GALE_TRAINING,
        _GALE_EPOCHS,
        _GALE_EPOCH,
        _GALE_POINTS,
    ),
    "gRDA, official": Protocol(
        "gRDA, rate in steps",
        CHAO,
        _GRDA_COUNTS,
        "gRDA without momentum, weight decay or label smoothing; a tenth of the rate every 30 "
        "epochs",
        "85 to 121, as each row says",
        "of the row's epoch; that they differ suggests the best one",
        "one setting of c and μ each",
    ),
    "gRDA, 0.1_ep140_0.01": Protocol(
        "gRDA, rate 0.1 to epoch 140",
        CHAO,
        _GRDA_COUNTS,
        "gRDA without momentum, weight decay or label smoothing; rate 0.1, from epoch 140 on 0.01",
        "144 to 153, as each row says",
        "of the row's epoch; that they differ suggests the best one",
        "one setting of c and μ each",
    ),
}
"""What is known of every set, by its name in the files."""

DENSE: Mapping[str, tuple[float, str]] = {
    "dense, Gale et al.": (0.7669, "the dense network of the same recipe as Gale's rows"),
    "dense, gRDA's recipe": (0.6871, "SGD at rate 0.1, without momentum and weight decay"),
}
"""Accuracies of dense networks by the recipes above."""
_FILES = {
    "rn50_magnitude_pruning.csv": ("begin", "end", "freq", "label smoothing", "method"),
    "rn50_random_pruning.csv": ("begin", "end", "freq", "label smoothing", "method"),
    "rn50_variational_dropout.csv": ("DKL loss coeff", "label_smoothing", "method"),
    "rn50_gRDA.csv": ("lr_schedule", "c", "mu", "epoch"),
}


@dataclass(frozen=True)
class Point:
    """One published network."""

    method: str
    """A key of ``PROTOCOLS``."""
    sparsity: float
    accuracy: float
    setting: str
    """What was set, in a line."""


def read_published(folder: Path) -> list[Point]:
    """Return every published network in the CSV files of a folder.

    Args:
        folder: Holds ``rn50_magnitude_pruning.csv``, ``rn50_random_pruning.csv``,
            ``rn50_variational_dropout.csv`` and ``rn50_gRDA.csv``, or some of them.

    Raises:
        ValueError: If the folder is not there, or has none of the files.
        DamagedFileError: If a file lacks a column, or holds a number that cannot be; the message
            names file and line.
    """
    if not folder.is_dir():
        raise ValueError(f"`FOLDER` must be a folder with CSV files, but there is no {folder}.")
    there = [name for name in _FILES if (folder / name).is_file()]
    if not there:
        raise ValueError(
            f"`FOLDER` must have one or more of {', '.join(_FILES)}, but {folder} has none."
        )
    return [point for name in there for point in _read(folder / name)]


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both sparsity and accuracy, by sparsity."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.sparsity, -p.accuracy)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return found[::-1]


def _read(path: Path) -> list[Point]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} must be a CSV file in UTF-8 ({error}).") from error
    reader = csv.DictReader(lines)
    wanted = (SPARSITY, ACCURACY, *_FILES[path.name])
    missing = [column for column in wanted if column not in (reader.fieldnames or ())]
    if missing:
        raise DamagedFileError(
            f"{path} must have the columns {', '.join(wanted)}, but lacks {', '.join(missing)}."
        )
    points = []
    for row in reader:
        if None in row or None in row.values():
            raise DamagedFileError(
                f"{path}, line {reader.line_num}, must have {len(reader.fieldnames or ())} values."
            )
        sparsity, accuracy = (
            _share(row[column], column, path, reader.line_num) for column in (SPARSITY, ACCURACY)
        )
        method = row.get("method") or f"gRDA, {row.get('lr_schedule')}"
        if method not in PROTOCOLS:
            raise DamagedFileError(
                f"{path}, line {reader.line_num}, must be of one of {', '.join(PROTOCOLS)}, got "
                f"{method!r}."
            )
        setting = ", ".join(
            f"{column} {row[column]}"
            for column in _FILES[path.name]
            if column not in ("method", "lr_schedule")
        )
        points.append(Point(method, sparsity, accuracy, setting))
    if not points:
        raise DamagedFileError(f"{path} must have one row or more beside its head.")
    return points


def _share(text: str, column: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise DamagedFileError(
            f"{path}, line {line}, must have a share from 0 to 1 as {column}, got {text!r}."
        )
    return value
