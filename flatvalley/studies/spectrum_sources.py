"""Where the points come from whose spectrum is measured: a run, the user's code, built in."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

from flatvalley.data import load_dataset
from flatvalley.models import tanh_mlp
from flatvalley.process_group import require_device
from flatvalley.studies.verify import VerifyConfig
from flatvalley.studies.verify_cell import network, read_cell
from flatvalley.user_code import build, build_model, describe, is_refusal, load_weights_
from hessian import DamagedFileError, NonFiniteError, Objective
from hessian.batches import Batch, map_tensors, one_pass

DTYPES = {"float32": torch.float32, "float64": torch.float64}
HIDDEN, LEARNING_RATE, BATCH_SIZE, EPOCHS = 20, 0.1, 64, 100
"""Of the built-in network: the defaults of the verify study, and how it is trained."""


@dataclass(frozen=True)
class Subject:
    """A point in weight space whose curvature is measured."""

    name: str
    objective: Objective
    weights: Tensor


@dataclass(frozen=True)
class Source:
    """The points of one study, with what identifies them."""

    subjects: Sequence[Subject]
    identity: Mapping[str, Any]
    """What the numbers depend on, of JSON types."""
    description: str
    """What the reader is told of model and data, in a line."""


@dataclass(frozen=True)
class Options:
    """What applies to every source."""

    dtype: str | None = None
    """``"float32"`` or ``"float64"``; None leaves models as they are made."""
    device: str = "cpu"
    parameters: tuple[str, ...] = ()
    """Glob patterns of parameter names; none for all that require a gradient."""
    batch_size: int | None = None
    """Cuts a pair of tensors into batches."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f'`dtype` must be float32 or float64, got "{self.dtype}".')
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        require_device(self.device)


@dataclass(frozen=True)
class UserCode:
    """What the user's own model is made of: factories as ``package.module:factory``."""

    model: str
    data: str
    """What ``Objective`` takes as data, or the name of a built-in data set."""
    criterion: str | None = None
    """Default: cross-entropy; for mapping batches the output's own ``loss``."""
    count: str | None = None
    """Gives ``Objective``'s ``count``: what a batch counts for in the mean over the data."""
    weights: Path | None = None
    """safetensors file. Default: what the factory made."""


def built_in(options: Options) -> Source:
    """Return a small network on the digits, before and after training by SGD (two seconds)."""
    data = load_dataset("digits", dtype=torch.float64)
    sizes = [data.train_inputs[0].numel(), HIDDEN, data.num_classes]
    model = tanh_mlp(sizes, seed=options.seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(options.seed)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        order = torch.randperm(len(data.train_inputs), generator=generator)
        for rows in torch.split(order, BATCH_SIZE):
            optimizer.zero_grad()
            output = model(data.train_inputs[rows])
            loss = nn.functional.cross_entropy(output, data.train_labels[rows])
            torch.autograd.backward(loss)
            optimizer.step()
    trained = [p.detach().clone() for p in model.parameters()]
    points = {"before training": start, "after training": trained}
    train = data.train_inputs, data.train_labels

    def subject(name: str) -> Subject:
        copy = tanh_mlp(sizes, seed=options.seed, dtype=torch.float64)
        with torch.no_grad():
            for p, value in zip(copy.parameters(), points[name], strict=True):
                p.copy_(value)
        return _subject(name, copy, nn.CrossEntropyLoss(), train, options)

    return Source(
        [subject(name) for name in points],
        {"source": "built in", **vars(options)},
        f"digits, tanh network {'-'.join(map(str, sizes))}, SGD at learning rate "
        f"{LEARNING_RATE:g} for {EPOCHS} epochs, seed {options.seed}",
    )


def from_run(folder: Path, cell: str | None, options: Options) -> Source:
    """Return the end points of SGD and gRDA of one cell of a ``flatvalley verify`` run.

    Args:
        folder: The run's folder.
        cell: Which cell, e.g. ``"gamma0.1_seed0"``. Default: the smallest learning rate's first.
        options: What applies to every source.

    Raises:
        ValueError: If the folder holds no such run, or no such cell.
        DamagedFileError: If its files cannot be read.
    """
    config = _verify_config(folder)
    names = {
        f"gamma{gamma:g}_seed{seed}": (gamma, seed)
        for gamma in reversed(config.gammas)
        for seed in range(config.seeds)
    }
    there = [name for name in names if _cell_file(folder, name).exists()]
    if not there:
        raise ValueError(
            f"`RUN_FOLDER` {folder} has no finished cell yet. Let `flatvalley verify` finish."
        )
    cell = cell or there[0]
    if cell not in there:
        raise ValueError(f'`cell` must be one of {", ".join(there)}, got "{cell}".')
    gamma, seed = names[cell]
    data = load_dataset(config.data, dtype=torch.float64)
    tensors, _ = read_cell(_cell_file(folder, cell))

    def subject(name: str, key: str) -> Subject:
        model = network(config.cell(gamma, seed), data)
        nn.utils.vector_to_parameters(tensors[key], model.parameters())
        train = data.train_inputs, data.train_labels
        return _subject(name, model, nn.CrossEntropyLoss(), train, options)

    return Source(
        [subject("SGD", "sgd"), subject("gRDA", "grda")],
        {"source": "run", "cell": cell, "weights": _digest(_cell_file(folder, cell))}
        | vars(options),
        f"{config.data}, tanh network with {config.hidden} hidden units, end points of SGD and "
        f"gRDA at learning rate {gamma:g}, seed {seed}, of the run {folder.name}",
    )


def from_user_code(code: UserCode, options: Options) -> Source:
    """Return the one point that factories of the user's describe; the model in evaluation mode.

    Raises:
        ValueError: If anything cannot be built or loaded, or the model cannot be evaluated on the
            data; the message says which and why.
        NonFiniteError: If the loss is not finite.
    """
    model = build_model(code.model, seed=options.seed)
    if code.weights is not None:
        load_weights_(model, code.weights)
    model.eval()
    data = _data(code.data, options)
    count = _function(code.count, "count", "of a batch")
    criterion = _function(code.criterion, "criterion", "of output and target")
    if criterion is None:
        criterion = _default_criterion(data, counted=count is not None)
    subject = _subject("model", model, criterion, data, options, count)
    identity = {"source": "user's code"} | vars(code)
    identity["weights"] = None if code.weights is None else _digest(code.weights)
    origin = "as the factory makes them" if code.weights is None else f"of {code.weights}"
    return Source(
        [subject],
        identity | vars(options),
        f"{code.model} on {code.data}, weights {origin}",
    )


def _function(spec: str | None, option: str, arguments: str) -> Callable[..., Any] | None:
    if spec is None:
        return None
    found = build(spec, option)
    if not callable(found):
        raise ValueError(
            f"`{option}` {spec} must return a function {arguments}, got a {type(found).__name__}."
        )
    return found  # type: ignore[no-any-return]


def _subject(
    name: str,
    model: nn.Module,
    criterion: Callable[..., Tensor],
    data: Any,
    options: Options,
    count: Callable[..., Any] | None = None,
) -> Subject:
    dtype = DTYPES.get(options.dtype or "")
    model.to(device=options.device, dtype=dtype)
    try:
        objective = Objective(
            model,
            criterion,
            data if dtype is None else _converted(data, dtype),
            parameters=list(options.parameters) or None,
            batch_size=options.batch_size,
            count=count,
        )
    except NonFiniteError:
        raise
    except Exception as error:
        if is_refusal(error):
            raise ValueError(str(error)) from error
        # Whatever a model or a criterion raises on data that do not fit it.
        raise ValueError(
            f"`model` must be able to evaluate the first batch of `data`, but that raised "
            f"{describe(error)}."
        ) from error
    return Subject(name, objective, objective.weights())


def _data(spec: str, options: Options) -> Any:
    if ":" in spec:
        return build(spec, "data", seed=options.seed)
    try:
        found = load_dataset(spec)
    except FileNotFoundError as error:
        raise ValueError(f"`data` {spec}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{error} Or name a factory: package.module:factory.") from error
    return found.train_inputs, found.train_labels


def _default_criterion(data: Any, *, counted: bool) -> Callable[..., Tensor]:
    first = data
    if not isinstance(data, tuple | Mapping | Iterator | TorchDataset):
        first = next(iter(one_pass(data)), None) if isinstance(data, Iterable) else None
    if not isinstance(first, Mapping):
        return nn.CrossEntropyLoss()
    labels = first.get("labels")
    if isinstance(labels, Tensor) and labels.ndim > 1 and not counted:
        raise ValueError(
            "`count` must say how many tokens a batch counts for, because there is a label for "
            "each token. Name a factory, for a causal language model "
            '`def tokens(): return lambda batch: (batch["labels"][:, 1:] != -100).sum()`.'
        )
    return _loss_of_output


def _loss_of_output(output: Any, batch: Batch) -> Tensor:
    """The loss that a Hugging Face model computes from the labels in its batch."""
    loss: Any = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "`criterion` must be given, because the model's output has no `loss`. Name a factory "
            "of a function of (output, batch), or put the labels into the batch."
        )
    return loss


class _Converted:
    """Batches whose floating-point tensors are converted, pass by pass."""

    def __init__(self, batches: Iterable[Batch], dtype: torch.dtype) -> None:
        self.batches, self.dtype = batches, dtype
        self.sampler = getattr(batches, "sampler", None)  # a shuffling one is named to the user

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield map_tensors(batch, lambda t: t.to(self.dtype) if t.is_floating_point() else t)


def _converted(data: Any, dtype: torch.dtype) -> Any:
    if isinstance(data, tuple | list | Mapping):
        return map_tensors(data, lambda t: t.to(dtype) if t.is_floating_point() else t)
    if isinstance(data, Iterable) and not isinstance(data, Iterator | TorchDataset):
        return _Converted(data, dtype)
    return data  # refused by Objective, which says why


def _verify_config(folder: Path) -> VerifyConfig:
    file = folder / "run.json"
    if not file.is_file():
        raise ValueError(
            f"`RUN_FOLDER` must be a folder made by `flatvalley verify`, but there is no {file}."
        )
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise DamagedFileError(f"{file} is damaged ({error}).") from error
    if record.get("study") != "verify":
        raise ValueError(
            f"`RUN_FOLDER` must be a folder made by `flatvalley verify`, but {folder} is one of "
            f"the study {record.get('study')!r}."
        )
    settings = record["config"]
    return VerifyConfig(
        **settings | {"gammas": tuple(settings["gammas"]), "ks": tuple(settings["ks"])}
    )


def _cell_file(folder: Path, cell: str) -> Path:
    return folder / "cells" / f"{cell}.safetensors"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
