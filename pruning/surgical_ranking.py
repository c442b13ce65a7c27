"""In which order weights go, if each removal of an output's weight is answered by its others."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pruning.dense_distance import DenseDistance
from pruning.row_surgery import removal_order
from pruning.saliency import KroneckerFactors

MOST_FLOPS = 4e12
"""Of the surgery in one layer; beyond, its weights are ranked by their Kronecker saliencies."""


def surgical_ranking(
    w: Float[Tensor, " d"],
    factors: KroneckerFactors,
    distance: DenseDistance,
    *,
    damping: float = 0.01,
) -> Float64[Tensor, " d"]:
    """Return every weight's place in one ranking of removals, the cheapest first.

    Within every output r of a layer, weights go one after the other as in Optimal Brain Surgeon:
    next is the one of least w_ri² B_r / [(A + δ I)⁻¹]_ii, where w and the inverse are those of
    what is left after the ones before it. A ``kronecker_saliency`` is the first step of that, with
    an inverse over all inputs, also over those whose weights are gone and cannot answer. Rows meet
    in one ranking by what the dearest removal so far has cost. Weights without a Kronecker factor
    cost w² diag G.

    Takes 5/3 f³ flops in float64 for an output with f weights that are not zero.

    Args:
        w: Weights, shape [d]; zeros have gone already.
        factors: Their moments.
        distance: Names and shapes of the weights.
        damping: δ as a share of the mean of diag A.

    Raises:
        ValueError: If damping is not positive, or w does not fit.
        torch.linalg.LinAlgError: If a damped factor is singular.

    References:
        Hassibi & Stork (1993), Second order derivatives for network pruning.
        Frantar & Alistarh (2022), Optimal Brain Compression.
    """
    if not 0 < damping < math.inf:
        raise ValueError(f"`damping` must be positive and finite, got {damping}.")
    distance.require_vector(w, "w")
    costs = (factors.diagonal * w.square()).double()
    # Of equal costs in a row, what goes first in the surgery goes first in the ranking.
    turns = torch.zeros_like(costs)
    cost_parts, turn_parts = distance.unflatten(costs), distance.unflatten(turns)
    weights = distance.unflatten(w)
    for layer in factors.layers:
        W = layer.rows(weights).double()
        flops = 5.0 / 3.0 * float((W != 0).sum(dim=1).double().pow(3).sum())
        if flops > MOST_FLOPS:
            stiffness = layer.stiffness(damping)
            if stiffness is not None:
                layer.write_rows_(cost_parts, stiffness * W.square())
            continue
        A = layer.damped(damping)
        if A is None:
            continue
        order, losses = removal_order(A, W, torch.zeros_like(W, dtype=torch.bool))
        so_far = losses.cummax(dim=1).values * layer.slopes.double()[:, None]
        turn = torch.arange(W.shape[1], device=W.device).to(W).expand_as(W)
        layer.write_rows_(cost_parts, torch.empty_like(W).scatter_(1, order, so_far))
        layer.write_rows_(turn_parts, torch.empty_like(W).scatter_(1, order, turn))
    by_turn = turns.argsort(stable=True)
    ranked = by_turn[costs[by_turn].argsort(stable=True)]
    places = torch.empty_like(costs)
    places[ranked] = torch.arange(len(costs), device=costs.device).to(costs)
    return places
