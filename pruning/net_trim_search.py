"""The share ε that gives a network a number of zeros by Net-Trim, by all that was tried before."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from pruning.net_trim_layers import trim_network
from pruning.net_trim_options import TrimOptions
from pruning.net_trim_problem import GroupProblem
from pruning.net_trim_result import NetworkTrim
from pruning.net_trim_shares import aim_of, is_reached, nearest_share, next_share


class Found(NamedTuple):
    """The try that came nearest."""

    trim: NetworkTrim
    share: float
    num_solved: int
    """Tries that were made for it."""


class ShareSearch:
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

    def reach(self, wanted: int, slack: float, max_tries: int) -> Found:
        """Return what comes nearest to a number of zeros, that of the tries before or larger.

        Args:
            wanted: Zeros.
            slack: How many fewer will do.
            max_tries: Budget.

        Warns:
            ConvergenceWarning: As ``net_trim``, for the try that is taken.
            CalibrationWarning: The same.
        """
        num_solved = 0
        while num_solved < max_tries and not is_reached(self._zeros, wanted, slack):
            self._try(next_share(self._zeros, wanted, aim_of(num_solved, wanted, slack)))
            num_solved += 1
        share = nearest_share({g: self._zeros[g] for g in self._trims}, wanted)
        trim, told = self._trims[share]
        for warning in told:
            warnings.warn(str(warning.message), warning.category, stacklevel=4)
        # What has fewer zeros is nearest to no number that comes.
        for other in [g for g in self._trims if self._zeros[g] < self._zeros[share]]:
            del self._trims[other]
        return Found(trim, share, num_solved)

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
