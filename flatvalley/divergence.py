"""Where a training first met a number that is not finite."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flatvalley.process_group import sum_over_ranks, world
from flatvalley.schedules import Factor
from flatvalley.surroundings import seed_noise
from flatvalley.train_config import TrainConfig
from flatvalley.trainees import Trainee


def locate(
    trainees: Sequence[Trainee],
    batch: Callable[[int], tuple[Tensor, Tensor]],
    factor: Factor,
    config: TrainConfig,
    steps: range,
) -> str | None:
    """Repeat some steps, looking at every tensor; return what was not finite first, and where.

    All processes of a group call this together.

    Args:
        trainees: The runs, as they were before the first of the steps; they are changed.
        batch: The batches by their step.
        factor: The schedule.
        config: Settings, with the device of this process.
        steps: The steps to repeat.

    Returns:
        A sentence without its full stop, or None if everything was finite.
    """
    for step in steps:
        x, y = batch(step)
        for trainee in trainees:
            trainee.set_rate(factor(step))
            seed_noise(config, step, world()[0])
            found = _careful_step(trainee, x, y)
            flag = torch.tensor([float(found is not None)], device=config.device)
            if float(sum_over_ranks(flag)) > 0:
                return (
                    f"{found or 'A number of another process'} is not finite in step {step + 1} "
                    f"of {trainee.name}, at learning rate {trainee.base_lr * factor(step):g}"
                )
    return None


def all_finite(trainee: Trainee) -> bool:
    """Whether all weights are finite; waits for the device once."""
    found = [torch.isfinite(p.detach()).all() for p in trainee.params.values()]
    return bool(torch.stack(found).all())


def _careful_step(trainee: Trainee, x: Tensor, y: Tensor) -> str | None:
    """Make a step; name the first tensor that is not finite."""
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        return "An input of the batch"
    loss, _ = trainee.backward(x, y)
    if not bool(torch.isfinite(loss)):
        return "The loss"
    bad = _first_bad({name: p.grad for name, p in trainee.params.items()})
    if bad is not None:
        return f"The gradient of {bad}"
    trainee.optimizer.step()
    bad = _first_bad({name: p.detach() for name, p in trainee.params.items()})
    if bad is not None:
        return f"The weight {bad}"
    trainee.prune()
    return None


def _first_bad(tensors: Mapping[str, Tensor | None]) -> str | None:
    for name, t in tensors.items():
        if t is not None and not bool(torch.isfinite(t).all()):
            return name
    return None
