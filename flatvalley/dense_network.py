"""A trained network with its samples: what is pruned, and what it is measured on."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatvalley.process_group import require_device
from flatvalley.pruning_problem import Batch, Kind, PruningProblem
from flatvalley.schedules import schedule
from flatvalley.specs import Spec
from flatvalley.starts import make_criterion
from flatvalley.train_config import TrainConfig
from flatvalley.train_data import Part, TrainData, load_train_data
from flatvalley.trainees import Criterion
from flatvalley.training import model_factory
from flatvalley.transport_replay import TransportReplay
from flatvalley.user_code import describe, load_weights_
from hessian import NonFiniteError
from hessian.finiteness import all_finite
from pruning import recalibrate_batch_norm_
from pruning.allocation import Allocation
from pruning.dense_distance import kl_divergence, squared_difference

MOST_CALIBRATION = 10_000
"""Calibration samples where no number is given."""
CALIBRATION_BATCH = 2_000
"""Of them in a forward pass, unless told otherwise."""


@dataclass(frozen=True)
class Measured:
    """How good a network is on some samples."""

    loss: float
    accuracy: float | None
    """Share of the samples classified rightly; None where targets are not classes."""
    distance: float
    """Mean KL divergence of its outputs from the dense network's, or mean squared difference."""


@dataclass(frozen=True)
class DenseNetwork:
    """A trained network in evaluation mode, with calibration samples and samples held out."""

    model: nn.Module
    criterion: Criterion
    classifies: bool
    data: TrainData
    batches: tuple[Batch, ...]
    """Calibration samples: drawn from those trained on, as they are without augmentation."""
    training_time: float | None
    """Steps times learning rate, where the training is known."""
    replay: TransportReplay | None
    """The training itself, where it is known."""

    @property
    def kind(self) -> Kind:
        """How outputs are compared with the dense network's."""
        return "kl" if self.classifies else "squared"

    @property
    def has_batch_norm(self) -> bool:
        """Whether there are running statistics that could be recalibrated."""
        return any(
            isinstance(m, _BatchNorm) and m.track_running_stats for m in self.model.modules()
        )

    def problem(
        self, *, exclude: tuple[str, ...] = (), allocation: Allocation | None = None
    ) -> PruningProblem:
        """Return what methods of pruning are given."""
        return PruningProblem(
            self.model,
            self.criterion,
            self.batches,
            self.kind,
            exclude,
            allocation,
            self.training_time,
            self.replay,
        )

    def with_weights(self, w: Float[Tensor, " d"], *, recalibrate: bool) -> nn.Module:
        """Return a copy of the model with other weights, of those that are trained."""
        model = copy.deepcopy(self.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        parts = torch.split(w.to(parameters[0]), [p.numel() for p in parameters])
        with torch.no_grad():
            for p, values in zip(parameters, parts, strict=True):
                p.copy_(values.view_as(p))
        if recalibrate:
            recalibrate_batch_norm_(model, [x for x, _ in self.batches])
        return model

    def measure(self, model: nn.Module, part: Part) -> Measured:
        """Return loss, accuracy and distance to the dense network on some samples.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
        with torch.inference_mode():
            for step in range(len(part.batches)):
                x, y = part.batches.batch(step)
                z, dense = model(x), self.model(x)
                sums[0].add_(self.criterion(z, y), alpha=len(y))
                if self.classifies:
                    sums[1].add_((z.argmax(1) == y).sum())
                    sums[2].add_(kl_divergence(z, dense, 1.0).sum())
                else:
                    sums[2].add_(squared_difference(z, dense).sum())
        loss, right, distance = (sums / part.num_samples).tolist()
        if not math.isfinite(loss):
            raise NonFiniteError("The loss of the network is not finite on the samples held out.")
        return Measured(loss, right if self.classifies else None, distance)


def load_dense(
    config: TrainConfig,
    weights: Path | None,
    *,
    trained: Spec | None = None,
    calibration: int | None = None,
    calibration_batch: int = CALIBRATION_BATCH,
) -> DenseNetwork:
    """Return the network of a training with the weights it ended with, and its samples.

    Args:
        config: Settings of the training.
        weights: safetensors file. Default: as the model is made.
        trained: Which of the training's runs they are from, if that is known.
        calibration: Number of calibration samples, drawn by ``config.seed`` from those trained
            on. Default: 10,000, or all there are.
        calibration_batch: Of them in a batch.

    Raises:
        ValueError: If the weights do not fit the model, the model does not take the data, there
            are not so many samples, or no such device.
        NonFiniteError: If a weight is not finite.
        FileNotFoundError: If a file of the data set is not there.
        DamagedFileError: If one is damaged.
        ImportError: If a package that reads the data is not installed.
    """
    for name, value in (("calibration", calibration), ("calibration_batch", calibration_batch)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    require_device(config.device)
    plain = replace(config, augment="none", drop_last=False, batch_size=calibration_batch)
    data = load_train_data(plain)
    found = data.train.num_samples
    if calibration is not None and calibration > found:
        raise ValueError(
            f"`calibration` must be at most {found:,}, the number of training samples, got "
            f"{calibration:,}."
        )
    model = model_factory(config, data.num_classes)().to(config.device)
    if config.precision == "float64":
        model = model.double()
    if weights is not None:
        load_weights_(model, weights)
    model.eval()
    for name, t in model.state_dict().items():
        if t.is_floating_point() and not all_finite(t):
            raise NonFiniteError(
                f"`weights` must be finite, but {name} holds a NaN or an infinity. Train again, "
                "with a smaller learning rate."
            )
    batches = _first(data.train, min(calibration or MOST_CALIBRATION, found))
    criterion = make_criterion(config)
    return DenseNetwork(
        model,
        criterion,
        _try_out(model, criterion, batches[0], config),
        data,
        batches,
        None if trained is None else _training_time(config, trained, found),
        None if trained is None else TransportReplay(_alone(config, trained)),
    )


def _first(part: Part, count: int) -> tuple[Batch, ...]:
    """The first samples of a part, in batches."""
    batches: list[Batch] = []
    left = count
    while left:
        x, y = part.batches.batch(len(batches))
        batches.append((x[:left], y[:left]))
        left -= len(batches[-1][1])
    return tuple(batches)


def _try_out(model: nn.Module, criterion: Criterion, batch: Batch, config: TrainConfig) -> bool:
    """See that the model takes the data; return whether its outputs are scores of classes."""
    x, y = (t[:2] for t in batch)
    try:
        with torch.inference_mode():
            out = model(x)
            criterion(out, y)
    except Exception as error:
        raise ValueError(
            f"`model` {config.model} must be able to evaluate `data` {config.data}, inputs of "
            f"shape {list(x.shape[1:])}, but that raised {describe(error)}."
        ) from error
    return y.ndim == 1 and not y.is_floating_point() and isinstance(out, Tensor) and out.ndim == 2


def _alone(config: TrainConfig, run: Spec) -> TrainConfig:
    """The training without the runs beside this one, which change nothing in it."""
    texts = zip(config.runs, config.specs, strict=True)
    return replace(config, runs=tuple(text for text, spec in texts if spec == run)[:1])


def _training_time(config: TrainConfig, run: Spec, num_samples: int) -> float:
    """Sum of the learning rates of all steps."""
    whole, rest = divmod(num_samples, config.batch_size)
    steps = whole + (rest > 0 and not config.drop_last)
    factor = schedule(
        config.schedule, epochs=config.epochs, steps_per_epoch=steps, warmup=config.warmup
    )
    rate = float(run.settings.get("lr", config.lr))
    return rate * sum(factor(step) for step in range(config.epochs * steps))
