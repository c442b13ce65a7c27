"""Which networks a landscape is drawn around: ends of trainings, pruned ones, files of weights."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatvalley.dense_network import DenseNetwork, load_dense
from flatvalley.run import read_tensors
from flatvalley.studies.prune_sources import Source, from_model, from_train_run
from flatvalley.studies.train_figures import title
from flatvalley.train_config import TrainConfig, file_name
from flatvalley.train_data import Part
from flatvalley.trainees import model_state
from flatvalley.user_code import load_weights_
from hessian import DamagedFileError, NonFiniteError, Objective
from hessian.finiteness import all_finite
from landscape import BatchNorm
from landscape.batch_norm import BatchNormKind

POLICIES = get_args(BatchNormKind)
Precision = Literal["full", "bfloat16"]
PRECISIONS = get_args(Precision)
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class OwnModel:
    """What a file of weights does not say: model, samples and loss."""

    model: str | None = None
    data: str | None = None
    criterion: str | None = None

    @property
    def given(self) -> list[str]:
        """Names of what is known."""
        return [f"`{name}`" for name, value in vars(self).items() if value is not None]


def find_network(place: str, own: OwnModel, *, device: str = "cpu") -> Source:
    """Return the network that a place names.

    Args:
        place: The folder of a `flatvalley train` run (its first run by SGD), the folder in it of
            another of its runs, the folder of a `flatvalley prune` run, or a safetensors file.
        own: Model, data and loss; for a file only.
        device: Where to compute.

    Raises:
        ValueError: If there is no network, or model and data are missing or not wanted.
        DamagedFileError: If a ``run.json`` cannot be read.
    """
    path = Path(place)
    if path.is_file():
        if own.model is None or own.data is None:
            raise ValueError(
                f"`model` and `data` must be given with a file of weights, got {path.name} and "
                f"{', '.join(own.given) or 'neither'}."
            )
        criterion = own.criterion or "cross-entropy"
        config = TrainConfig(model=own.model, data=own.data, criterion=criterion, device=device)
        return from_model(config, path)
    if not path.is_dir():
        raise ValueError(
            "`NETWORK` must be a folder made by `flatvalley train` or `flatvalley prune`, or a "
            f"safetensors file, but there is no {path}."
        )
    if own.given:
        raise ValueError(
            f"{', '.join(own.given)} cannot go with the folder of a run, which says what they "
            "are. Leave them out."
        )
    if not (path / "run.json").is_file() and (path.parent / "run.json").is_file():
        runs = _record(path.parent)["config"].get("runs", [])
        name = next((text for text in runs if file_name(text) == path.name), None)
        if name is not None:
            return from_train_run(path.parent, name, device=device)
    if (path / "run.json").is_file() and _record(path)["study"] == "prune":
        return _pruned(path, device)
    return from_train_run(path, device=device)


def _pruned(folder: Path, device: str) -> Source:
    settings = _record(folder)["config"]
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"`NETWORK` {folder} has no {WEIGHTS} yet. Let `flatvalley prune` finish.")
    known = {field.name for field in fields(TrainConfig) if field.init}
    rest = {key: value for key, value in settings.items() if key in known}
    config = TrainConfig(**rest | {"runs": tuple(rest["runs"]), "device": device})
    return Source(
        config,
        folder / WEIGHTS,
        None,
        f"{config.model} on {config.data}, pruned by {settings['method']} to "
        f"{settings['sparsity']:g}",
    )


def _record(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    try:
        record = json.loads(file.read_text())
        return {"study": record["study"], "config": dict(record["config"])}
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(f"{file} is damaged ({error!r}).") from error


@dataclass(frozen=True)
class Networks:
    """Networks of one architecture, and the losses that they are looked at by."""

    dense: DenseNetwork
    """The first of them, in evaluation mode; its model is what losses are evaluated with."""
    sources: tuple[Source, ...]
    weights: tuple[Float[Tensor, " d"], ...]
    states: tuple[dict[str, Tensor], ...]
    """Of each the parameters and buffers by name."""
    train: Objective
    """Over samples drawn from those trained on, without augmentation."""
    test: Objective

    @property
    def identity(self) -> dict[str, Any]:
        """What numbers depend on, of JSON types."""
        return {"networks": [source.identity for source in self.sources]}

    @property
    def objectives(self) -> dict[str, Objective]:
        """The losses by name."""
        return {"train": self.train, "test": self.test}

    @property
    def metrics(self) -> tuple[Literal["loss", "error"], ...]:
        """What there is to see of a loss: also the error, where classes are told apart."""
        return ("loss", "error") if self.dense.classifies else ("loss",)

    def batch_norm(self, kind: str) -> BatchNorm:
        """Return what batch norm normalises by, between the first two networks if mixed."""
        known = cast(BatchNormKind, kind)
        if kind == "interpolated":
            return BatchNorm(known, ends=(self.states[0], self.states[1]))
        return BatchNorm(known, data=self.train if kind == "recompute" else None)


def open_networks(
    places: Sequence[str], own: OwnModel, *, device: str = "cpu", samples: int | None = None
) -> tuple[Networks, tuple[str, ...]]:
    """Return the networks that places name, and what to call them in a figure.

    Args:
        places: As in `find_network`.
        own: Model, data and loss; for files only.
        device: Where to compute.
        samples: Training samples to look at. Default: 10,000, or all there are.

    Raises:
        ValueError: As `find_network` and `load_networks`.
        NonFiniteError: If a weight is not finite.
        DamagedFileError: If a file cannot be read.
    """
    sources = [find_network(place, own, device=device) for place in places]
    return load_networks(sources, samples=samples), short_names(sources, places)


def load_networks(sources: Sequence[Source], *, samples: int | None = None) -> Networks:
    """Return networks that were trained on the same samples.

    Args:
        sources: Where they are.
        samples: Training samples to look at. Default: 10,000, or all there are.

    Raises:
        ValueError: If they differ in model, data or loss, their weights do not fit the model, or
            there are not so many samples.
        NonFiniteError: If a weight is not finite.
    """
    first = sources[0].config
    for source in sources[1:]:
        for name in ("model", "data", "criterion", "image_size", "precision"):
            here, there = getattr(first, name), getattr(source.config, name)
            if here != there:
                raise ValueError(
                    f"`NETWORK`s must be of one architecture and see the same samples, but "
                    f"`{name}` is {here} for the first and {there} for {source.description}."
                )
    dense = load_dense(first, sources[0].weights, trained=sources[0].trained, calibration=samples)
    models = [dense.model, *(_with_weights(dense.model, source) for source in sources[1:])]
    model = copy.deepcopy(dense.model)
    return Networks(
        dense,
        tuple(sources),
        tuple(
            torch.cat([p.detach().flatten() for p in m.parameters() if p.requires_grad])
            for m in models
        ),
        tuple(model_state(m) for m in models),
        Objective(model, dense.criterion, dense.batches),
        Objective(model, dense.criterion, _batches(dense.data.test)),
    )


def _with_weights(model: nn.Module, source: Source) -> nn.Module:
    found = copy.deepcopy(model)
    if source.weights is not None:
        load_weights_(found, source.weights)
    for name, t in found.state_dict().items():
        if t.is_floating_point() and not all_finite(t):
            raise NonFiniteError(
                f"`NETWORK` must have finite weights, but {name} of {source.description} holds a "
                "NaN or an infinity."
            )
    return found


def read_path(source: Source) -> Float[Tensor, "t d"]:
    """Return the weights that a training kept on its way, one snapshot a row.

    Raises:
        ValueError: If it kept none.
        DamagedFileError: If a snapshot cannot be read.
    """
    place = Path() if source.weights is None else source.weights.parent
    files = sorted((place.parent / "trajectory").glob("step-*.safetensors"))
    runs = [text for text in source.config.runs if file_name(text) == place.name]
    if source.trained is None or not files or not runs:
        raise ValueError(
            "`directions` pca needs the way that a training took, but there is none for "
            f"{source.description}. Train with `flatvalley train --snapshots 50`."
        )
    return torch.stack([read_tensors(file)[0][runs[0]] for file in files])


def _batches(part: Part) -> list[tuple[Tensor, Tensor]]:
    return [part.batches.batch(step) for step in range(len(part.batches))]


def short_names(sources: Sequence[Source], places: Sequence[str]) -> tuple[str, ...]:
    """Return what to call networks in a figure, all different."""
    found: list[str] = []
    for source, place in zip(sources, places, strict=True):
        path = Path(place)
        if source.trained is not None and source.weights is not None:
            name = title(source.trained)
        else:
            name = path.stem if path.is_file() else path.name
        again = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({again + 1})" if again else name)
    return tuple(found)
