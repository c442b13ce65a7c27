"""Which network is pruned: the end of a ``flatvalley train`` run, or a model of the user's own."""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flatvalley.models.named import MODELS
from flatvalley.specs import Spec
from flatvalley.train_config import TrainConfig, file_name
from hessian import DamagedFileError


@dataclass(frozen=True)
class Source:
    """A network that was trained: on what, and where its weights are."""

    config: TrainConfig
    weights: Path | None
    """safetensors file; None for weights as the model is made."""
    trained: Spec | None
    """The run of the training that it is the end of, if known."""
    description: str
    """What the reader is told, in a line."""

    @property
    def identity(self) -> dict[str, Any]:
        """What numbers depend on, of JSON types."""
        digest = None if self.weights is None else _digest(self.weights)
        return self.config.identity() | {"weights": digest}


def from_train_run(folder: Path, name: str | None = None, *, device: str = "cpu") -> Source:
    """Return the end of a run of a ``flatvalley train`` folder.

    Args:
        folder: The folder.
        name: Which of its runs, e.g. ``"sgd"``. Default: the first one by SGD.
        device: Where to compute.

    Raises:
        ValueError: If the folder holds no such training, no such run, or one that has not ended.
        DamagedFileError: If its ``run.json`` cannot be read.
    """
    file = folder / "run.json"
    if not file.is_file():
        raise ValueError(
            f"`NETWORK` must be a folder made by `flatvalley train`, but there is no {file}."
        )
    try:
        record = json.loads(file.read_text())
        study = record["study"]
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(f"{file} is damaged ({error!r}).") from error
    if study != "train":
        raise ValueError(
            f"`NETWORK` must be a folder made by `flatvalley train`, but {folder} is one of the "
            f"study {study!r}."
        )
    known = {field.name for field in fields(TrainConfig) if field.init}
    settings = {key: value for key, value in record["config"].items() if key in known}
    config = TrainConfig(**settings | {"runs": tuple(settings["runs"]), "device": device})
    specs = dict(zip(config.runs, config.specs, strict=True))
    if name is None:
        name = next((text for text, spec in specs.items() if spec.name == "sgd"), None)
    if name is None or name not in specs:
        listed = ", ".join(specs)
        raise ValueError(
            f"`run` must be one of {listed}, got {name}."
            if name
            else f"`run` must say which network to prune, as none of {listed} is dense."
        )
    weights = folder / file_name(name) / "weights.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"`NETWORK` {folder} has no {weights.relative_to(folder)} yet. Let `flatvalley train` "
            "finish."
        )
    return Source(
        config,
        weights,
        specs[name],
        f"{config.model} on {config.data}, {name}, {config.epochs} epochs, seed {config.seed}",
    )


def from_model(config: TrainConfig, weights: Path | None) -> Source:
    """Return a model of the user's own, or one by its name, with the weights of a file.

    Raises:
        ValueError: If the model is not known.
    """
    if ":" not in config.model and config.model not in MODELS:
        raise ValueError(
            "`NETWORK` must be a folder made by `flatvalley train`, a model as "
            f"package.module:factory, or one of {', '.join(MODELS)}, got {config.model!r}."
        )
    origin = "as it is made" if weights is None else f"of {weights.name}"
    if weights is not None and not weights.is_file():
        raise ValueError(f"`weights` must be a safetensors file, but there is no file {weights}.")
    return Source(
        replace(config, runs=("sgd",)),
        weights,
        None,
        f"{config.model} on {config.data}, weights {origin}",
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
