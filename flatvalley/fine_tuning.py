"""Training a sparse network on, with its zeros kept."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from flatvalley.specs import Spec
from flatvalley.starts import make_criterion
from flatvalley.surroundings import everything_put_back, seed_noise
from flatvalley.train_config import TrainConfig
from flatvalley.train_data import load_train_data
from hessian import NonFiniteError
from hessian.finiteness import all_finite
from pruning import keep_zeros

RATE_SHARE = 0.1
"""Of the training's learning rate, unless another rate is given."""


def fine_tune_(
    model: nn.Module,
    config: TrainConfig,
    trained: Spec | None,
    *,
    epochs: int,
    lr: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train a sparse network on by SGD at a constant rate; what is zero stays zero.

    On the training's data, batches, augmentation, momentum and weight decay. The result depends on
    the settings alone; torch's random state and threads are as before afterwards.

    Args:
        model: Changed in place, in evaluation mode afterwards.
        config: Settings of the training.
        trained: Its run, for momentum and weight decay; None for neither.
        epochs: Passes over the training data.
        lr: Learning rate. Default: a tenth of the training's.
        progress: Called after every epoch with those done and in all.

    Raises:
        ValueError: If ``epochs`` or the rate is out of range.
        NonFiniteError: If a weight does not stay finite.
    """
    settings = {} if trained is None else trained.settings
    rate = RATE_SHARE * settings.get("lr", config.lr) if lr is None else lr
    # Checks both.
    config = replace(config, epochs=epochs, lr=rate, schedule="constant", warmup=0.0)
    given = {name: settings[name] for name in ("momentum", "weight_decay") if name in settings}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, **given)
    data, criterion = load_train_data(config), make_criterion(config)
    count = len(data.train.batches)
    try:
        with everything_put_back(config, config.threads or torch.get_num_threads()):
            model.train()
            with keep_zeros(model, optimizer):
                for step in range(epochs * count):
                    x, y = data.train.batches.batch(step)
                    seed_noise(config, step, 0)
                    optimizer.zero_grad()
                    criterion(model(x), y).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    if (step + 1) % count == 0:
                        _require_finite(model)
                        if progress is not None:
                            progress((step + 1) // count, epochs)
    finally:
        model.eval().zero_grad()
        data.close()


def _require_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if not all_finite(p.detach()):
            raise NonFiniteError(
                f"`{name}` did not stay finite in fine-tuning. Give a smaller `fine_tune_lr`."
            )
