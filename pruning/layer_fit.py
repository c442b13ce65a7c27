"""The rows of one layer that fit its dense outputs best with the weights that are kept."""

import torch
from torch import Tensor

from pruning.layer_inputs import LayerInputs
from pruning.row_surgery import best_fit


def fitted_rows(
    inputs: LayerInputs,
    W: Tensor,
    keep: Tensor,
    damping: float,
    moments: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, float]:
    """Return the rows that fit a layer's dense output best with what is kept, and their error.

    With moments of changed inputs a = a_dense + s: least E (uᵀ a − wᵀ a_dense)² + δ |u − w|².
    """
    if inputs.moments.ndim == 1:
        fitted = W.masked_fill(~keep, 0.0)
        return fitted, mean_square(inputs, fitted - W)
    own, cross, change = moments or (inputs.moments, None, None)
    groups = len(own)
    found, error = [], 0.0
    for i, (w, kept) in enumerate(zip(W.chunk(groups), keep.chunk(groups), strict=True)):
        A = own[i].double()
        N = torch.zeros_like(A) if cross is None else cross[i].double()
        Q = torch.zeros_like(A) if change is None else change[i].double()
        u = best_fit(damped(A, damping, inputs.weight), w, kept, w @ N.T)
        move = u - w
        error += float((move @ A * move + 2.0 * (move @ N) * w + w @ Q * w).sum())
        found.append(u)
    return torch.cat(found), error


def by_group(inputs: LayerInputs, W: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the moments of every group in float64, with its outputs' rows."""
    moments = inputs.moments.double()
    return list(zip(moments, W.chunk(len(moments)), strict=True))


def damped(A: Tensor, damping: float, name: str) -> Tensor:
    """Return A + δ I for a share δ of the mean of diag A; ones where an input is never active.

    Raises:
        ValueError: If that is singular in float64.
    """
    active = A.diagonal() > 0
    H = A.clone()
    H.diagonal().add_(damping * A.diagonal().sum() / active.sum().clamp(min=1))
    H.diagonal().masked_fill_(~active, 1.0)
    if int(torch.linalg.cholesky_ex(H).info) != 0:
        raise ValueError(
            f"`damping` must be larger, got {damping}: the damped moments of what goes into "
            f"`{name}` are singular in float64."
        )
    return H


def mean_square(inputs: LayerInputs, rows: Tensor) -> float:
    """Return the mean over samples of the squared output of rows of weights."""
    if inputs.moments.ndim == 1:
        return float((rows.square() * inputs.moments).sum())
    return sum(float((some @ A * some).sum()) for A, some in by_group(inputs, rows))
