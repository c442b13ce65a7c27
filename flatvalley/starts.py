"""The start of a training: the same model for every run, tried out on the data."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatvalley.evaluation import evaluating
from flatvalley.models import prepare_model
from flatvalley.train_config import TrainConfig
from flatvalley.train_data import TrainData
from flatvalley.trainees import Criterion, Trainee
from flatvalley.user_code import build, describe


def start_trainees(
    config: TrainConfig,
    make_model: Callable[[], nn.Module],
    *,
    num_steps: int,
    horizon: int,
    world_size: int = 1,
) -> list[Trainee]:
    """Return a trainee for every run of the settings, all with the same weights.

    Args:
        config: Settings, with the device of this process.
        make_model: Returns the same freshly started model at every call.
        num_steps: Steps of the whole training.
        horizon: gRDA's horizon in steps, where a run does not name one.
        world_size: Number of processes.

    Raises:
        ValueError: If the models differ, or a run does not fit them.
    """
    criterion = make_criterion(config)
    trainees = []
    for text, spec in zip(config.runs, config.specs, strict=True):
        model = make_model().train().to(config.device)
        if config.precision == "float64":
            model = model.double()
        if world_size > 1 and config.device.startswith("cuda"):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        prepare_model(model, channels_last=config.channels_last, compile=config.compile)
        trainees.append(
            Trainee(
                text,
                spec,
                model,
                criterion,
                config,
                num_steps=num_steps,
                horizon=horizon,
                distributed=world_size > 1,
            )
        )
    first = trainees[0].weights()
    for other in trainees[1:]:
        if any(not torch.equal(t, first[name]) for name, t in other.weights().items()):
            raise ValueError(
                "`make_model` must return the same freshly started model at every call, so that "
                "all runs start alike. Set torch's seed in it."
            )
    return trainees


def try_out(trainee: Trainee, config: TrainConfig, data: TrainData) -> bool:
    """See that the model takes the data; return whether its outputs are scores of classes.

    Raises:
        ValueError: If it cannot evaluate two samples; the message has the cause.
    """
    x, y = (t[:2] for t in data.test.batches.batch(0))
    try:
        with evaluating(trainee.model), trainee.autocast():
            out = trainee.model(x)
            trainee.criterion(out, y)
    except Exception as error:
        raise ValueError(
            f"`model` {config.model} must be able to evaluate `data` {data.name}, inputs of shape "
            f"{list(x.shape[1:])}, but that raised {describe(error)}."
        ) from error
    integral = y.ndim == 1 and not y.is_floating_point()
    return integral and isinstance(out, Tensor) and out.ndim == 2


def make_criterion(config: TrainConfig) -> Criterion:
    """Return the loss that the settings name.

    Raises:
        ValueError: If a factory of the user's own cannot be built, or makes no function.
    """
    if config.criterion == "cross-entropy":
        return nn.functional.cross_entropy
    found = build(config.criterion, "criterion", seed=config.seed)
    if not callable(found):
        raise ValueError(
            f"`criterion` {config.criterion} must return a function of outputs and targets, got a "
            f"{type(found).__name__}."
        )
    return found  # type: ignore[no-any-return]
