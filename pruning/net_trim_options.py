"""How Net-Trim prunes a network: settings, and what is refused of them at the door."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, get_args

from pruning.net_trim_checks import require_goal, require_options
from pruning.net_trim_program import MAX_ITERATIONS, RELAXATION, RHO, TOL, Ball
from pruning.net_trim_result import Mode
from pruning.net_trim_setup import Precision
from pruning.net_trim_survey import FoundLayer

Shares: TypeAlias = float | Mapping[str, float]
"""A share for all layers, or shares by glob pattern."""


@dataclass(frozen=True)
class TrimOptions:
    """How a network is pruned: the arguments of ``net_trim``, which says what they mean."""

    epsilon: Shares | None = None
    layer_sparsity: Shares | None = None
    mode: Mode = "parallel"
    gamma: float = 1.1
    refit: bool = False
    ball: Ball = "split"
    penalise_bias: bool = True
    exclude: tuple[str, ...] = ()
    tol: float = TOL
    max_iterations: int = MAX_ITERATIONS
    program: Mapping[str, Any] = field(default_factory=dict)
    """Others of ``LayerProgram``."""

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.layer_sparsity is None):
            raise ValueError(
                "One of `epsilon` and `layer_sparsity` must be given, got "
                f"{self.epsilon} and {self.layer_sparsity}."
            )
        given = self._given[1]
        for share in given.values() if isinstance(given, Mapping) else [given]:
            if self.epsilon is not None and not 0.0 <= share < math.inf:
                raise ValueError(
                    "`epsilon` must be a finite share of the norm of a layer's outputs, at least "
                    f"0, got {share}."
                )
            if self.epsilon is None and not 0.0 <= share <= 1.0:
                raise ValueError(
                    f"`layer_sparsity` must be a share of zeros from 0 to 1, got {share}."
                )
        if self.mode not in get_args(Mode):
            raise ValueError(f"`mode` must be one of {get_args(Mode)}, got {self.mode!r}.")
        if not 1.0 <= self.gamma < math.inf:
            raise ValueError(
                "`gamma` must be finite and at least 1, so that the dense weights are feasible on "
                f"pruned inputs, got {self.gamma}."
            )
        defaults = {"rho": RHO, "relaxation": RELAXATION, "precision": "full"}
        require_options(ball=self.ball, **{**defaults, **self.program})
        require_goal(0.0, self.tol, self.max_iterations)

    @property
    def goal(self) -> dict[str, Any]:
        """When a program is solved, as options of ``LayerProgram.sparse``."""
        return {"tol": self.tol, "max_iterations": self.max_iterations}

    @property
    def _given(self) -> tuple[str, Shares]:
        """The parameter that says how sparse layers become, and its value."""
        if self.layer_sparsity is not None:
            return "layer_sparsity", self.layer_sparsity
        assert self.epsilon is not None
        return "epsilon", self.epsilon

    def shares(self, layers: Sequence[FoundLayer]) -> dict[str, float]:
        """Return the share of every layer: ε over the norm of its outputs, or of zeros.

        Raises:
            ValueError: If a pattern fits no layer, or a layer has no share.
        """
        names = [layer.weight for layer in layers]
        parameter, given = self._given
        if not isinstance(given, Mapping):
            return dict.fromkeys(names, given)
        found: dict[str, float] = {}
        for pattern, share in given.items():
            hits = [name for name in names if fnmatchcase(name, pattern)]
            if not hits:
                raise ValueError(
                    f'`{parameter}` pattern "{pattern}" matches none of {", ".join(names)}.'
                )
            found = dict.fromkeys(hits, share) | found
        for name in names:
            if name not in found:
                raise ValueError(
                    f"`{parameter}` must have a pattern for every layer, got none for `{name}`. "
                    'Add "*" as the last one, or put the layer into `exclude`.'
                )
        return found


def trim_options(
    *,
    exclude: str | Sequence[str] = (),
    tol: float = TOL,
    max_iterations: int = MAX_ITERATIONS,
    rho: float = RHO,
    relaxation: float = RELAXATION,
    chunk: int | None = None,
    precision: Precision = "full",
    **options: Any,
) -> TrimOptions:
    """Return the settings that arguments of ``net_trim`` say.

    Raises:
        ValueError: If one is out of range or not known.
        TypeError: If there is no such argument.
    """
    known = {field.name for field in fields(TrimOptions)}
    for name in options:
        if name not in known:
            raise TypeError(f"`{name}` is no option here. Choose from {', '.join(sorted(known))}.")
    return TrimOptions(
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
        tol=tol,
        max_iterations=max_iterations,
        program={"rho": rho, "relaxation": relaxation, "chunk": chunk, "precision": precision},
        **options,
    )
