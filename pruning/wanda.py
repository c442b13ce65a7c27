"""Wanda: weights go by their size times the norm of their input; none moves."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from pruning.layer_allocation import keep_in_layers
from pruning.layer_inputs import input_moments
from pruning.pruned import Pruned, as_pruned, wanted_zeros

Per = Literal["output", "layer", "global"]


def wanda_prune(
    w: Float[Tensor, " d"],
    objective: Objective,
    sparsity: float,
    *,
    per: Per = "output",
    exclude: Sequence[str] = (),
) -> Pruned:
    """Set the weights to zero that are smallest, times the norm of what they are multiplied by.

    Score ``|W_ij| ‖x_j‖₂`` for input j of output i, with the norm over all calibration samples and
    positions. Costs one forward pass without gradients. All layers that ``input_moments`` sees
    take part; biases, normalisation and all else stay as they are, but count for the sparsity.

    ============ ===========================================================================
    per          who competes with whom
    ============ ===========================================================================
    ``"output"`` the weights of one output; all outputs of all layers give the same share
    ``"layer"``  the weights of one layer; all layers give the same share
    ``"global"`` all weights
    ============ ===========================================================================

    Args:
        w: Weights, shape [d]. Zeros stay zero.
        objective: Model and calibration inputs, e.g. a ``DenseDistance``; labels are not used.
        sparsity: Share of zeros wanted among all d, in [0, 1]: exactly ⌈sparsity · d⌉ zeros
            result, or more where w has them already.
        per: See the table.
        exclude: Glob patterns of parameters that stay as they are.

    Raises:
        ValueError: If the sparsity is outside [0, 1] or above what the layers' weights can reach,
            ``per`` is not known, a pattern matches nothing, w does not fit or is not finite, or
            anything that ``input_moments`` refuses.
        NonDeterministicError: If dropout is on, or batch norm in training mode.
        NonFiniteError: If what goes into a layer is not finite.

    Example:
        >>> import torch
        >>> from pruning import DenseDistance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.5, 1.0]]))
        >>> X = torch.tensor([[3.0, 1.0], [3.0, -1.0]])
        >>> distance = DenseDistance(model, X, kind="squared")
        >>> wanda_prune(distance.weights(), distance, 0.5).weights
        tensor([0.5000, 0.0000])

    References:
        Sun, Liu, Bair & Kolter (2023), A simple and effective pruning approach for large language
        models.
    """
    if per not in get_args(Per):
        raise ValueError(f"`per` must be one of {get_args(Per)}, got {per!r}.")
    wanted_zeros(sparsity, objective.size)
    layers = input_moments(objective, w)
    weights = w.detach().clone()
    parts = objective.unflatten(weights)
    scores = torch.full_like(weights, torch.inf, dtype=torch.float64)
    score_parts = objective.unflatten(scores)
    for layer in layers:
        norms = layer.diagonals.double().sqrt()
        rows = layer.rows(parts).double().abs()
        scored = rows * norms.repeat_interleave(len(rows) // len(norms), dim=0)
        if per == "output":
            scored = _quantiles(scored, has_bias=layer.bias is not None)
        layer.write_rows_(score_parts, scored)
    allocation: Literal["uniform", "global"] = "uniform" if per == "layer" else "global"
    keep = keep_in_layers(
        scores,
        weights,
        objective,
        layers,
        sparsity=sparsity,
        allocation=allocation,
        exclude=exclude,
    )
    weights[~keep] = 0.0
    return as_pruned(weights)


def _quantiles(scores: Tensor, *, has_bias: bool) -> Tensor:
    """Return the share of weights of the same output that go before each; the bias goes last."""
    size = scores.shape[1] - has_bias
    shares = torch.full_like(scores, torch.inf)
    order = scores[:, :size].argsort(dim=1, stable=True)
    steps = (torch.arange(size, device=scores.device).to(scores) + 0.5) / size
    shares[:, :size] = torch.empty_like(scores[:, :size]).scatter_(1, order, steps.expand_as(order))
    return shares
