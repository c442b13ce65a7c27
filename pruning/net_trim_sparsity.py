"""Net-Trim to a sparsity, or to several in one run: the share of ε that gives it, and a cut."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any

from torch import Tensor, nn

from hessian import Objective
from hessian.parameters import Selection
from pruning.allocation import keep_mask
from pruning.dense_distance import DenseDistance
from pruning.net_trim_bound import output_distance
from pruning.net_trim_options import TrimOptions, trim_options
from pruning.net_trim_result import NetworkTrim
from pruning.net_trim_search import ShareSearch
from pruning.net_trim_shares import HIGHEST
from pruning.net_trim_survey import survey
from pruning.pruned import Pruned, as_pruned, wanted_zeros


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

    The share is found by interpolation in its logarithm. In parallel, all tries share the layers'
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
        options: Others of ``net_trim``, but for ``epsilon``, ``layer_sparsity``, ``checkpoint``,
            ``workers``, ``group`` and ``progress``.

    Raises:
        ValueError: If the sparsity is outside [0, 1] or above what the weights of layers can reach,
            ``within`` is negative, ``max_tries`` is not positive, or as ``net_trim``.
        TypeError: If an option is not known, or as ``net_trim``.
        NonDeterministicError: As ``net_trim``.
        NonFiniteError: As ``net_trim``.

    Warns:
        ConvergenceWarning: As ``net_trim``, for the try that is taken.
        CalibrationWarning: The same.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.1]]))
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9]])  # almost the same input twice
        >>> found = net_trim_to_sparsity(model, X, 0.5)
        >>> found.sparsity, found.num_cut
        (0.5, 0)
    """
    (found,) = net_trim_to_sparsities(
        model,
        calibration,
        [sparsity],
        within=within,
        max_tries=max_tries,
        parameters=parameters,
        batch_size=batch_size,
        **options,
    )
    return found


def net_trim_to_sparsities(
    model: nn.Module,
    calibration: Any,
    sparsities: Sequence[float],
    *,
    within: float = 0.005,
    max_tries: int = 12,
    on_try: Callable[[NetworkTrim], object] | None = None,
    parameters: Selection = None,
    batch_size: int | None = None,
    **options: Any,
) -> Iterator[SparsityTrim]:
    """Yield weights of several sparsities, one after the other, as ``net_trim_to_sparsity`` does.

    All tries tell how many zeros a share ε gives, so that the next one is interpolated, and the
    later sparsities take two or three. In parallel they share the layers' programs as well.

    Args:
        model: As for ``net_trim``.
        calibration: As for ``net_trim``.
        sparsities: Shares of zeros, as for ``net_trim_to_sparsity``, increasing.
        within: Share of all d weights that may be left to the cut.
        max_tries: Budget of tries for each sparsity.
        on_try: Called with what each try gave.
        parameters: As for ``net_trim``.
        batch_size: As for ``net_trim``.
        options: Others of ``net_trim``, but for ``epsilon``, ``layer_sparsity``, ``checkpoint``,
            ``workers``, ``group`` and ``progress``.

    Raises:
        ValueError: As ``net_trim_to_sparsity``, or if sparsities do not increase; at the call, but
            for what a program refuses.
        TypeError: As ``net_trim_to_sparsity``.
        NonDeterministicError: As ``net_trim``.
        NonFiniteError: As ``net_trim``.

    Warns:
        ConvergenceWarning: As ``net_trim``, for the tries that are taken.
        CalibrationWarning: The same.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.3, 0.1]]))
        >>> found = net_trim_to_sparsities(model, torch.eye(3), [0.3, 0.6])
        >>> [round(trim.sparsity, 2) for trim in found]
        [0.33, 0.67]
    """
    if within < 0:
        raise ValueError(f"`within` must be at least 0, got {within}.")
    if max_tries < 1:
        raise ValueError(f"`max_tries` must be at least 1, got {max_tries}.")
    if any(b <= a for a, b in itertools.pairwise(sparsities)):
        raise ValueError(f"`sparsities` must increase, got {list(sparsities)}.")
    if "layer_sparsity" in options or "epsilon" in options:
        raise TypeError(
            "`epsilon` and `layer_sparsity` are no options here, where one ε is looked for. Use "
            "`net_trim` for zeros by layer."
        )
    settings = trim_options(epsilon=HIGHEST, **options)
    objective = DenseDistance(
        model, calibration, kind="squared", parameters=parameters, batch_size=batch_size
    )
    w = objective.weights()
    stays = [_stays(objective, w, settings, sparsity) for sparsity in sparsities]
    search = ShareSearch(objective, w, settings, on_try)
    return (
        _to_one(search, objective, w, sparsity, stay, within, max_tries)
        for sparsity, stay in zip(sparsities, stays, strict=True)
    )


def _to_one(
    search: ShareSearch,
    objective: Objective,
    w: Tensor,
    sparsity: float,
    stays: Sequence[str],
    within: float,
    max_tries: int,
) -> SparsityTrim:
    """Search, and cut the smallest weights of layers until the number of zeros is exact."""
    wanted = wanted_zeros(sparsity, len(w))
    found = search.reach(wanted, within * len(w), max_tries)
    weights = found.trim.weights.clone()
    zeros = int((~found.trim.mask).sum())
    if zeros < wanted:
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
        trim=found.trim,
        epsilon=found.share,
        num_cut=int((~pruned.mask).sum()) - zeros,
        num_solved=found.num_solved,
        discrepancy=output_distance(objective, weights, w)[0],
    )


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
