"""Refuses losses and derivatives that are not finite, and names where it began."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessian.errors import NonFiniteError

if TYPE_CHECKING:
    from hessian.flat_weights import FlatWeights


def all_finite(vector: Tensor) -> bool:
    """Return whether no entry is NaN or infinite, in one pass over them."""
    # Both are NaN if any entry is; a tenth of the time of asking every entry.
    ends = torch.stack(torch.aminmax(vector)) if vector.numel() else vector
    return bool(torch.isfinite(ends).all())


def finite_loss(
    totals: Tensor, normalizer: float, penalty: float, weights: dict[str, Tensor]
) -> float:
    """Return the sum of the batches' totals over what they count for, plus the regulariser.

    Raises:
        NonFiniteError: Naming the weight, the regulariser or the batch.
    """
    total = float(totals.sum())
    loss = total / normalizer + penalty
    if math.isfinite(loss):
        return loss
    for name, part in weights.items():
        if not all_finite(part):
            raise NonFiniteError(f"The weights hold a NaN or an infinity in `{name}`.")
    if math.isfinite(total):
        raise NonFiniteError(f"`regularizer` is {penalty} at finite weights.")
    bad = next((i for i, t in enumerate(totals.tolist()) if not math.isfinite(t)), None)
    where = "their sum" if bad is None else f"batch {bad}"
    raise NonFiniteError(
        f"The loss is {loss} (first in {where} of {len(totals)}) at finite weights. Look at "
        "that batch for NaN inputs or an overflow in the model."
    )


def finite_vector(vector: Tensor, what: str, flat: "FlatWeights") -> Tensor:
    """Return a vector beside the weights as it is.

    Raises:
        NonFiniteError: Naming the first parameter where it is not finite.
    """
    if not all_finite(vector):
        parts = flat.unflatten(vector)
        bad = next(name for name, part in parts.items() if not all_finite(part))
        raise NonFiniteError(f"The {what} is not finite, first in `{bad}`.")
    return vector
