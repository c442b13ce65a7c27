"""Net-Trim to several sparsities in one run: each begins with what those before it have found."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
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
from pruning.net_trim_sparsity import HIGHEST, LOWEST, SparsityTrim, _stays
from pruning.pruned import as_pruned, wanted_zeros

EDGE = 0.1
"""Tries stay off the ends of the interval that is left by this share of it."""


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
        options: All others of ``net_trim``, but for ``epsilon`` and ``progress``.

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
    settings = trim_options(epsilon=HIGHEST, **options)
    objective = DenseDistance(
        model, calibration, kind="squared", parameters=parameters, batch_size=batch_size
    )
    w = objective.weights()
    stays = [_stays(objective, w, settings, sparsity) for sparsity in sparsities]
    search = _Search(objective, w, settings, on_try)
    return (
        search.reach(sparsity, stay, within, max_tries)
        for sparsity, stay in zip(sparsities, stays, strict=True)
    )


class _Search:
    """Tries of a network, by the share that each was made for."""

    def __init__(
        self,
        objective: Objective,
        w: Float[Tensor, " d"],
        settings: TrimOptions,
        on_try: Callable[[NetworkTrim], object] | None,
    ) -> None:
        self._objective, self._w, self._settings = objective, w, settings
        self._on_try = on_try
        # In a cascade, inputs differ from try to try.
        self._known: dict[str, list[GroupProblem]] | None = None
        if settings.mode == "parallel":
            self._known = {}
        self._zeros: dict[float, int] = {}
        self._trims: dict[float, tuple[NetworkTrim, list[warnings.WarningMessage]]] = {}

    def reach(
        self, sparsity: float, stays: Sequence[str], within: float, max_tries: int
    ) -> SparsityTrim:
        """Return weights of a sparsity, that of the tries before or larger."""
        wanted = wanted_zeros(sparsity, len(self._w))
        slack = within * len(self._w)
        num_solved = 0
        while num_solved < max_tries and not any(
            0 <= wanted - zeros <= slack for zeros in self._zeros.values()
        ):
            # Every third halves: where zeros jump, interpolation creeps.
            aim = None if num_solved % 3 == 2 else wanted - slack / 2
            self._try(next_share(self._zeros, wanted, aim))
            num_solved += 1
        share = self._nearest(wanted)
        trim, told = self._trims[share]
        for warning in told:
            warnings.warn(str(warning.message), warning.category, stacklevel=3)
        # What has fewer zeros is nearest to no sparsity that comes.
        for other in [g for g in self._trims if self._zeros[g] < self._zeros[share]]:
            del self._trims[other]
        return self._cut(trim, share, sparsity, stays, num_solved)

    def _nearest(self, wanted: int) -> float:
        """Return the share that came nearest from below, or from above if none is below."""

        def order(share: float) -> tuple[bool, int]:
            zeros = self._zeros[share]
            return zeros > wanted, abs(wanted - zeros)

        return min(self._trims, key=order)

    def _try(self, share: float) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trim = trim_network(
                self._objective,
                self._w,
                replace(self._settings, epsilon=share),
                known=self._known,
            )
        self._zeros[share] = int((~trim.mask).sum())
        self._trims[share] = trim, told
        if self._on_try is not None:
            self._on_try(trim)

    def _cut(
        self,
        trim: NetworkTrim,
        share: float,
        sparsity: float,
        stays: Sequence[str],
        num_solved: int,
    ) -> SparsityTrim:
        """Cut the smallest weights of layers until the number of zeros is exact."""
        objective, weights = self._objective, trim.weights.clone()
        if self._zeros[share] < wanted_zeros(sparsity, len(weights)):
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
            num_cut=int((~pruned.mask).sum()) - self._zeros[share],
            num_solved=num_solved,
            discrepancy=output_distance(objective, weights, self._w)[0],
        )


def next_share(zeros: Mapping[float, int], wanted: int, aim: float | None) -> float:
    """Return the share ε to try next, between those that gave fewer and more zeros than wanted.

    Args:
        zeros: What shares that were tried gave.
        wanted: Zeros of which there may be no more.
        aim: Zeros to interpolate for, in the logarithm of the share, where both ends were tried.
            Default: the middle.

    Example:
        >>> round(next_share({0.01: 100, 0.1: 300}, 250, 200.0), 4)
        0.0316
    """
    high = min((g for g, count in zeros.items() if count > wanted), default=HIGHEST)
    low = max((g for g, count in zeros.items() if count <= wanted and g < high), default=LOWEST)
    part = 0.5
    if aim is not None and low in zeros and high in zeros:
        part = (aim - zeros[low]) / (zeros[high] - zeros[low])
    part = min(max(part, EDGE), 1.0 - EDGE)
    return math.exp((1.0 - part) * math.log(low) + part * math.log(high))
