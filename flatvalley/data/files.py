"""What readers of data files share."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessian import DamagedFileError

ROOT_VARIABLE = "FLATVALLEY_DATA"
"""Environment variable that names the folder of the data sets that are read from files."""


def missing(path: Path) -> FileNotFoundError:
    """Return the error that says where a file is looked for."""
    return FileNotFoundError(
        f"{path} is not there. Put the file there, or name the folder above its own with `root` "
        f"or the environment variable {ROOT_VARIABLE}. Nothing is downloaded."
    )


def class_labels(labels: npt.NDArray[np.integer[Any]], folder: Path) -> Tensor:
    """Return labels of ten classes, checked."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise DamagedFileError(
            f"{folder} must hold one or more labels from 0 to 9, got "
            f"{sorted(set(labels.tolist()))}. Get the files again."
        )
    return torch.from_numpy(labels.astype(np.int64))


def optional(module: str, package: str) -> Any:
    """Return a module of a package that only some data sets need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"These images are read with {package}, which is not installed. Run "
            "`pip install 'flatvalley[data]'`."
        ) from error
