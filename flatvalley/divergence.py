"""Where a training first met a number that is not finite."""

import torch
from torch import Tensor

from flatvalley.trainees import Trainee


def careful_step(trainee: Trainee, x: Tensor, y: Tensor) -> str | None:
    """Make a step, looking at every tensor; name the first that is not finite, or return None."""
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


def all_finite(trainee: Trainee) -> bool:
    """Whether all weights are finite; waits for the device once."""
    found = [torch.isfinite(p.detach()).all() for p in trainee.params.values()]
    return bool(torch.stack(found).all())


def _first_bad(tensors: dict[str, Tensor | None]) -> str | None:
    for name, t in tensors.items():
        if t is not None and not bool(torch.isfinite(t).all()):
            return name
    return None
