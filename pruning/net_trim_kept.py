"""Layers that Net-Trim has finished in a folder, from which a killed pruning goes on."""

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import DamagedFileError, Objective
from hessian.batches import fingerprint
from hessian.job_folder import JobFolder, checksum
from hessian.tensor_files import read_tensors, write_tensors
from pruning.net_trim_options import TrimOptions
from pruning.net_trim_solved import SolvedLayer, packed, unpacked


class KeptLayers:
    """A folder with a file for every layer that is finished.

    Args:
        folder: Made if it is not there.
        objective: Model and calibration inputs.
        w: Weights of the dense network.
        options: As for ``net_trim``.

    Raises:
        ValueError: If the folder holds layers of another pruning; names what differs.
    """

    def __init__(
        self, folder: Path, objective: Objective, w: Float[Tensor, " d"], options: TrimOptions
    ) -> None:
        self._folder = JobFolder(
            folder,
            "net_trim.json",
            _identity(objective, w, options),
            name="checkpoint",
            holds="layers of this pruning",
        )
        self._device = objective.device
        self._folder.begin()

    def read(self, weight: str) -> SolvedLayer | None:
        """Return a layer, or None if it is not there, whole."""
        try:
            found = unpacked(*read_tensors(self._path(weight)), self._device)
        except (FileNotFoundError, DamagedFileError):
            return None
        return found.get(weight)

    def write(self, weight: str, layer: SolvedLayer) -> None:
        """Keep a layer."""
        write_tensors(self._path(weight), *packed({weight: layer}))

    def _path(self, weight: str) -> Path:
        return self._folder.path / f"{quote(weight, safe='')}.safetensors"


def _identity(objective: Objective, w: Tensor, options: TrimOptions) -> dict[str, Any]:
    """Return what the weights depend on. Costs one pass over the data, no model."""
    settings = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name != "program"
    }
    return {
        "model": [type(objective.model).__name__, checksum(*objective.constants().values())],
        "weights": [list(objective.shapes), checksum(w)],
        "calibration": checksum(fingerprint(objective.batches())),
        **settings,
        **options.program,
        "versions": [version("flatvalley"), str(torch.__version__)],
    }
