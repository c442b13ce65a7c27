"""What a method of pruning returns, and how many zeros a share of them is."""

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """Sparse weights and how they came about."""

    weights: Float[Tensor, " d"]
    mask: Bool[Tensor, " d"]
    """True where the weight is not zero."""
    sparsity: float
    """Share of zeros among all d weights."""
    lam: float
    """λ of the method; NaN where the method has none."""


def as_pruned(weights: Float[Tensor, " d"], lam: float = math.nan) -> Pruned:
    """Return sparse weights with what they say about themselves."""
    mask = weights != 0
    return Pruned(weights, mask, 1.0 - int(mask.sum()) / len(weights), lam)


def wanted_zeros(sparsity: float, size: int) -> int:
    """Return how many zeros among ``size`` weights make up a share, after a look at it."""
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"`sparsity` must be in [0, 1], the share of zeros, got {sparsity}.")
    # A share that was computed as zeros / size must give the zeros back.
    return math.ceil(sparsity * size - 1e-9 * size)
