"""Loss and right answers of a model on samples that it was not trained on."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatvalley.process_group import sum_over_ranks, world
from flatvalley.train_data import Part
from flatvalley.trainees import Criterion


def evaluate(
    model: nn.Module,
    criterion: Criterion,
    part: Part,
    *,
    classifies: bool = True,
    autocast: AbstractContextManager[Any],
) -> tuple[float, float | None]:
    """Return mean loss and accuracy in evaluation mode; several processes share the batches out.

    Args:
        model: Left in training mode.
        criterion: A mean over the batch.
        part: The samples, in batches on the model's device.
        classifies: Whether targets are classes; without, there is no accuracy.
        autocast: The context of the forward passes.
    """
    rank, world_size = world()
    sums: Tensor | None = None
    with evaluating(model), autocast:
        for step in range(rank, len(part.batches), world_size):
            x, y = part.batches.batch(step)
            if sums is None:
                sums = torch.zeros(2, dtype=torch.float64, device=x.device)
            out = model(x)
            sums[0].add_(criterion(out, y), alpha=len(y))
            if classifies:
                sums[1].add_((out.argmax(1) == y).sum())
    if sums is None:  # more processes than batches
        sums = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    loss, right = sum_over_ranks(sums).tolist()
    return loss / part.num_samples, right / part.num_samples if classifies else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training mode afterwards."""
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train()
