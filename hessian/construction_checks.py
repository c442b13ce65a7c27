"""What is tried on the data before an objective is used: every way in which it could not hold."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from hessian.batches import Batch, batch_length, first_samples, map_tensors
from hessian.criteria import BatchCriterion, stand_in_output
from hessian.determinism import require_pure_forward

if TYPE_CHECKING:
    from hessian.objective import Objective, Regularizer

_RECOMPUTES = (
    "The model must not use activation checkpointing (or other hooks on saved tensors): backward "
    "passes would recompute activations with the model's own weights instead of w. Switch it off, "
    "for instance with `model.gradient_checkpointing_disable()`, and use smaller batches."
)


def survey(objective: "Objective", criterion: BatchCriterion) -> tuple[list[int], float]:
    """Return the lengths and the total count of this rank's batches, checked in one pass.

    The model runs on the first batch that holds samples; every batch's targets are shown to the
    criterion.

    Raises:
        ValueError: If the criterion does not weight samples alike, the data have another type than
            the weights, or the model checkpoints activations.
        NonDeterministicError: If the forward pass draws random numbers or writes buffers.
    """
    lengths, weight = [], 0.0
    w = objective.weights()
    first: tuple[Any, Batch] | None = None
    for batch in objective.batches():
        lengths.append(batch_length(batch))
        weight += objective.batch_weight(batch)
        with torch.no_grad():
            if first is not None:
                stand_in = stand_in_output(*first, batch)
                if stand_in is not None:
                    criterion.require_additive(stand_in, batch)
            elif lengths[-1] > 0:
                first = _checked_output(objective, criterion, w, batch), batch
    return lengths, weight


def require_scalar(regularizer: "Regularizer", weights: dict[str, Tensor]) -> None:
    """Refuse a regulariser that returns anything but a scalar.

    Raises:
        TypeError: Saying what it returned.
    """
    with torch.no_grad():
        found: Any = regularizer(weights)
    if isinstance(found, Tensor) and found.ndim == 0:
        return
    shape = f" of shape {list(found.shape)}" if isinstance(found, Tensor) else ""
    raise TypeError(
        "`regularizer` must return a scalar tensor from the weights by name, got a "
        f"{type(found).__name__}{shape}."
    )


def _checked_output(
    objective: "Objective", criterion: BatchCriterion, w: Tensor, batch: Batch
) -> Any:
    """Output on a batch, if the forward pass is pure and the criterion a mean."""
    try:
        with require_pure_forward(objective.model):
            output = objective.output(w, batch)
            objective.total_from_output(output, batch)
    except RuntimeError as error:
        foreign = _floating_types(batch) - {objective.dtype}
        if not foreign:
            raise
        raise ValueError(
            f"`data` holds {', '.join(map(str, foreign))}, the model's weights are "
            f"{objective.dtype}, and the forward pass failed ({error}). Convert the data, or the "
            f"model with `model.to({next(iter(foreign))})`."
        ) from error
    criterion.require_additive(output, batch, lambda part: objective.output(w, part))
    _require_no_recomputation(objective, w, batch)
    return output


def _require_no_recomputation(objective: "Objective", w: Tensor, batch: Batch) -> None:
    """Refuse activation checkpoints, which are recomputed with the model's own weights."""
    for part in (first_samples(batch, 2), batch):  # the whole, if it cannot be cut
        try:
            with torch.enable_grad(), disable_saved_tensors_hooks(_RECOMPUTES):
                objective.output(w.detach().requires_grad_(), part)
            return
        except Exception as error:
            if _RECOMPUTES in str(error):
                raise ValueError(_RECOMPUTES) from error


def _floating_types(batch: Batch) -> set[torch.dtype]:
    found: set[torch.dtype] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.add(tensor.dtype)
        return tensor

    map_tensors(batch, note)
    return found
