"""Net-Trim to a sparsity: the share of ε that gives it, found by bisection."""

import math
from dataclasses import dataclass, replace
from glob import escape
from typing import Any

from torch import Tensor, nn

from hessian import Objective
from hessian.parameters import Selection
from pruning.allocation import keep_mask
from pruning.dense_distance import DenseDistance
from pruning.net_trim_bound import output_distance
from pruning.net_trim_layers import trim_network
from pruning.net_trim_options import TrimOptions, trim_options
from pruning.net_trim_problem import GroupProblem
from pruning.net_trim_result import NetworkTrim
from pruning.net_trim_survey import survey
from pruning.pruned import Pruned, as_pruned, wanted_zeros

LOWEST, HIGHEST = 1e-3, 1.0
"""Shares between which one is looked for; at 1, nothing is left of a layer in parallel."""


@dataclass(frozen=True)
class SparsityTrim(Pruned):
    """Weights of a wanted sparsity by Net-Trim, and by a cut of the smallest that were left."""

    trim: NetworkTrim
    """What Net-Trim gave, with its evidence, before the cut."""
    epsilon: float
    """The share of every layer's ‖Y‖_F."""
    num_cut: int
    """Weights that were cut by their size."""
    num_solved: int
    """Shares that the network was pruned for."""
    discrepancy: float
    """‖f̂(x) − f(x)‖_F of the network's outputs over all calibration inputs, with the cut."""


def net_trim_to_sparsity(
    model: nn.Module,
    calibration: Any,
    sparsity: float,
    *,
    within: float = 0.005,
    max_tries: int = 12,
    parameters: Selection = None,
    batch_size: int | None = None,
    **options: Any,
) -> SparsityTrim:
    """Return weights of a sparsity: those of ``net_trim`` for one share ε of all layers.

    The share is found by bisection of its logarithm. In parallel, all tries share the layers'
    programs, which start where they ended before, and the inputs of all layers are held. Of the
    tries with no more zeros than wanted, that with most of them is taken, and the smallest weights
    of its layers that are left are cut, until the number is exact.

    Args:
        model: As for ``net_trim``.
        calibration: As for ``net_trim``.
        sparsity: Share of zeros wanted among all d weights, in [0, 1], biases and the rest
            included: ⌈sparsity · d⌉ zeros result, or more where the model has them already, or
            where even the smallest share, 0.001, gives more.
        within: Share of all d weights that may be left to the cut; tries end there.
        max_tries: Budget of tries; each costs what ``net_trim`` does.
        parameters: As for ``net_trim``.
        batch_size: As for ``net_trim``.
        options: All others of ``net_trim``, but for ``epsilon`` and ``progress``.

    Raises:
        ValueError: If the sparsity is outside [0, 1] or above what the weights of layers can reach,
            ``within`` is negative, ``max_tries`` is not positive, or as ``net_trim``.
        TypeError: If an option is not known, or as ``net_trim``.
        NonDeterministicError: As ``net_trim``.
        NonFiniteError: As ``net_trim``.

    Warns:
        ConvergenceWarning: As ``net_trim``, for every try.
        CalibrationWarning: As ``net_trim``, for every try.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.1]]))
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9]])  # almost the same input twice
        >>> found = net_trim_to_sparsity(model, X, 0.5)
        >>> found.sparsity, found.num_cut
        (0.5, 0)
    """
    if within < 0:
        raise ValueError(f"`within` must be at least 0, got {within}.")
    if max_tries < 1:
        raise ValueError(f"`max_tries` must be at least 1, got {max_tries}.")
    settings = trim_options(epsilon=HIGHEST, **options)
    objective = DenseDistance(
        model, calibration, kind="squared", parameters=parameters, batch_size=batch_size
    )
    w = objective.weights()
    wanted = wanted_zeros(sparsity, len(w))
    stays = _stays(objective, w, settings, sparsity)
    low, high = math.log(LOWEST), math.log(HIGHEST)
    tried: dict[float, NetworkTrim] = {}
    # In a cascade, inputs differ from try to try.
    known: dict[str, list[GroupProblem]] | None = {} if settings.mode == "parallel" else None
    for _ in range(max_tries):
        share = math.exp((low + high) / 2)
        last = trim_network(
            objective, w, replace(settings, epsilon=share), known=known, stacklevel=3
        )
        tried[share] = last
        left = wanted - _zeros(last)
        if 0 <= left <= within * len(w):
            break
        low, high = (math.log(share), high) if left > 0 else (low, math.log(share))
    # The nearest from below; if even small shares give more zeros than wanted, the nearest.
    share = min(tried, key=lambda g: (_zeros(tried[g]) > wanted, abs(wanted - _zeros(tried[g]))))
    trim = tried[share]
    weights = trim.weights.clone()
    if _zeros(trim) < wanted:
        keep = keep_mask(
            weights.abs(), weights, sparsity=sparsity, objective=objective, exclude=stays
        )
        weights[~keep] = 0.0
    pruned = as_pruned(weights)
    return SparsityTrim(
        pruned.weights,
        pruned.mask,
        pruned.sparsity,
        pruned.lam,
        trim=trim,
        epsilon=share,
        num_cut=int((weights == 0).sum()) - _zeros(trim),
        num_solved=len(tried),
        discrepancy=output_distance(objective, weights, w)[0],
    )


def _zeros(trim: NetworkTrim) -> int:
    return int((~trim.mask).sum())


def _stays(objective: Objective, w: Tensor, settings: TrimOptions, sparsity: float) -> list[str]:
    """Return patterns of all parameters but the layers' weights, which must be enough."""
    layers = {layer.weight for layer in survey(objective, w, settings.exclude).layers}
    parts = objective.unflatten(w)
    most = sum(p.numel() if name in layers else int((p == 0).sum()) for name, p in parts.items())
    if wanted_zeros(sparsity, len(w)) > most:
        raise ValueError(
            f"`sparsity` must be at most {most / len(w):.10g}, the share of all parameters that "
            f"are weights of layers to be pruned, got {sparsity}."
        )
    return [escape(name) for name in parts if name not in layers]
