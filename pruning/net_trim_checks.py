"""What Net-Trim refuses at the door."""

import math

import torch
from torch import Tensor

from hessian.errors import NonFiniteError
from hessian.finiteness import all_finite


def require_layer(
    W: Tensor, X: Tensor, Y: Tensor | None, kind: str, bound: Tensor | None, offset: Tensor | None
) -> None:
    """See that the matrices of a layer fit each other and are finite."""
    require_matrix(W, "W", "[outputs, inputs]")
    require_matrix(X, "X", "[samples, inputs]")
    if W.shape[1] != X.shape[1]:
        raise ValueError(
            f"`X` must have a column for each of the {W.shape[1]} inputs of `W`, got "
            f"{X.shape[1]}. A bias is the last column of `W`, with a column of ones in `X`."
        )
    if kind not in ("relu", "linear"):
        raise ValueError(f'`kind` must be "relu" or "linear", got {kind!r}.')
    shape = (len(X), len(W))
    if Y is not None:
        _require_outputs(Y, "Y", shape)
        if kind == "relu" and bool((Y < 0).any()):
            raise ValueError(
                '`Y` must not be negative with kind="relu": it is what comes out of the ReLU, got '
                f'{float(Y.min()):.4g}. Pass kind="linear" for a layer without one.'
            )
    if bound is not None:
        if kind == "linear":
            raise ValueError('`bound` must be None with kind="linear": all outputs are active.')
        _require_outputs(bound, "bound", shape)
    if offset is not None:
        if offset.ndim == 1 and len(offset) == len(W):
            _require_finite(offset, "offset")
        else:
            _require_outputs(offset, "offset", shape)


def require_matrix(A: Tensor, name: str, shape: str) -> None:
    """See that a matrix is one of real, finite numbers with entries."""
    if A.ndim != 2 or not A.numel():
        raise ValueError(
            f"`{name}` must be a matrix {shape} with entries, got shape {list(A.shape)}."
        )
    _require_finite(A, name)


def require_moments(W: Tensor, gram: Tensor, cross: Tensor | None, square: float | None) -> None:
    """See that the moments of a linear layer fit its weights and are finite."""
    require_matrix(W, "W", "[outputs, inputs]")
    require_matrix(gram, "gram", "[inputs, inputs]")
    n = W.shape[1]
    if gram.shape != (n, n):
        raise ValueError(
            f"`gram` must have a row and a column for each of the {n} inputs of `W`, got shape "
            f"{list(gram.shape)}."
        )
    size = float(gram.abs().max())
    if float((gram - gram.T).abs().max()) > 1e-4 * size:
        raise ValueError("`gram` must be symmetric, got a matrix that is not. Pass Xᵀ X.")
    if (cross is None) != (square is None):
        raise ValueError("`cross` and `square` must be given together, or neither.")
    if cross is not None:
        require_matrix(cross, "cross", "[outputs, inputs]")
        if cross.shape != W.shape:
            raise ValueError(
                f"`cross` must be Yᵀ X, shaped as `W`: {list(W.shape)}, got {list(cross.shape)}."
            )


def require_start(start: Tensor, W: Tensor) -> None:
    """See that weights to start from fit."""
    require_matrix(start, "start", "[outputs, inputs]")
    if start.shape != W.shape:
        raise ValueError(
            f"`start` must be shaped as `W`, {list(W.shape)}, got {list(start.shape)}."
        )


def require_options(
    *,
    ball: str,
    precision: str,
    rho: float,
    relaxation: float,
    chunk: int | None = None,
) -> None:
    """See that the options of the iteration are known and in range."""
    if ball not in ("split", "joint"):
        raise ValueError(f'`ball` must be "split" or "joint", got {ball!r}.')
    if precision not in ("full", "mixed"):
        raise ValueError(f'`precision` must be "full" or "mixed", got {precision!r}.')
    if not 0.0 < rho < math.inf:
        raise ValueError(f"`rho` must be positive and finite, got {rho}.")
    if not 0.0 < relaxation < 2.0:
        raise ValueError(f"`relaxation` must be in (0, 2), got {relaxation}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}.")


def require_goal(epsilon: float, tol: float, max_iterations: int) -> None:
    """See that a discrepancy, a tolerance and a budget are in range."""
    if not 0.0 <= epsilon < math.inf:
        raise ValueError(
            f"`epsilon` must be a finite discrepancy of at least 0, got {epsilon}. It counts in "
            "units of the outputs: a share of ‖Y‖_F, say."
        )
    if not 0.0 < tol < math.inf:
        raise ValueError(f"`tol` must be positive and finite, got {tol}.")
    if max_iterations < 1:
        raise ValueError(f"`max_iterations` must be at least 1, got {max_iterations}.")


def penalties(W: Tensor, penalty: Tensor | float | None, penalise_bias: bool) -> Tensor:
    """Return λ of every weight, float64, after a look at it."""
    if penalty is None:
        weights = torch.ones(W.shape, dtype=torch.float64, device=W.device)
    else:
        given = torch.as_tensor(penalty, dtype=torch.float64, device=W.device)
        if given.ndim > 2 or (given.ndim and given.shape != W.shape[2 - given.ndim :]):
            raise ValueError(
                "`penalty` must be a number, one for every input or one for every weight, shape "
                f"{list(W.shape)}, got shape {list(given.shape)}."
            )
        weights = given.expand(W.shape).clone()
    if not penalise_bias:
        weights[:, -1] = 0.0
    if not (all_finite(weights) and bool((weights >= 0).all()) and bool(weights.any())):
        raise ValueError(
            "`penalty` must be finite, at least 0 and not 0 for all weights, got values from "
            f"{float(weights.min()):.4g} to {float(weights.max()):.4g}."
        )
    return weights


def require_ones(X: Tensor) -> None:
    """See that the last input is that of a bias."""
    if not bool((X[:, -1] == 1).all()):
        raise ValueError(
            "`penalise_bias` must be True unless the last column of `X` is one of ones, for the "
            "bias in the last column of `W`."
        )


def _require_outputs(A: Tensor, name: str, shape: tuple[int, int]) -> None:
    if tuple(A.shape) != shape:
        raise ValueError(
            f"`{name}` must have a row for every sample and a column for every output, shape "
            f"{list(shape)}, got {list(A.shape)}."
        )
    _require_finite(A, name)


def _require_finite(A: Tensor, name: str) -> None:
    if not A.is_floating_point():
        raise TypeError(f"`{name}` must be a floating point tensor, got {A.dtype}.")
    if not all_finite(A):
        raise NonFiniteError(
            f"`{name}` holds a NaN or an infinity. Look at the calibration inputs and the weights."
        )
