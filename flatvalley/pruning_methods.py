"""The methods of pruning by name, with their settings and what they look at."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from flatvalley import pruning_runs as runs
from flatvalley.pruning_runs import Run, Settings, known, solver_settings
from flatvalley.transport_replay import require_mu
from pruning import EigenspaceSolver, KrylovSolver
from pruning.net_trim_options import trim_options
from pruning.net_trim_program import Ball
from pruning.net_trim_result import Mode
from pruning.net_trim_setup import Precision
from pruning.wanda import Per
from pruning.woodfisher import Update


@dataclass(frozen=True)
class Method:
    """A way to prune a trained network without training it again."""

    title: str
    """What people call it."""
    settings: Mapping[str, type]
    run: Run
    labels: Callable[[Settings], bool] = lambda settings: False
    """Whether it takes the labels of the calibration samples."""
    calibrates: bool = True
    """Whether it looks at calibration samples at all."""
    takes: frozenset[str] = frozenset({"exclude", "allocation"})
    """What it can do of ``exclude`` and ``allocation``."""
    check: Callable[[Settings], object] = dict
    """Raises ValueError for settings that are out of range."""
    replays: bool = False
    """Whether it makes the training of the network once more."""


def _checked(
    solver: type[KrylovSolver] | type[EigenspaceSolver],
) -> Callable[[Settings], object]:
    def check(settings: Settings) -> None:
        _positive(settings, "temperature", "stages")
        _one_of(settings, "allocation", ("global", "uniform"))
        solver(**known(settings, solver_settings(solver)))

    return check


def _after_check(settings: Settings) -> None:
    _one_of(settings, "after", tuple(runs.SUPPORTS))
    _checked(KrylovSolver)(settings)


def _positive(settings: Settings, *names: str) -> None:
    for name in names:
        if name in settings and not 0 < settings[name] < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {settings[name]}.")


def _one_of(settings: Settings, name: str, choices: tuple[str, ...]) -> None:
    if name in settings and settings[name] not in choices:
        raise ValueError(f'`{name}` must be one of {", ".join(choices)}, got "{settings[name]}".')


def _eigen_check(settings: Settings) -> None:
    _positive(settings, "k", "tol", "max_products", "batch", "mu", "time")
    if not 0.0 <= settings.get("ridge", 0.0) < math.inf:
        raise ValueError(f"`ridge` must be finite and not negative, got {settings['ridge']}.")


def _transport_check(settings: Settings) -> None:
    require_mu(settings.get("mu", 0.6))


def _baseline_check(settings: Settings) -> None:
    _one_of(settings, "allocation", ("global", "uniform"))
    _one_of(settings, "kind", ("empirical", "monte_carlo"))
    _one_of(settings, "update", get_args(Update))
    _one_of(settings, "per", get_args(Per))
    _positive(settings, "damping", "block_size", "num_samples", "samples_per_row", "stages")
    if settings.get("seed", 0) < 0:
        raise ValueError(f"`seed` must be at least 0, got {settings['seed']}.")


def _layerwise_check(settings: Settings) -> None:
    _one_of(settings, "allocation", ("pooled", "relative", "uniform"))
    _one_of(settings, "inputs", ("dense", "pruned"))
    _positive(settings, "damping")


def _net_trim_check(settings: Settings) -> None:
    for name, kind in (("mode", Mode), ("ball", Ball), ("precision", Precision)):
        _one_of(settings, name, get_args(kind))
    if not 0.0 <= settings.get("within", 0.0) < math.inf:
        raise ValueError(f"`within` must be finite and at least 0, got {settings['within']}.")
    _positive(settings, "max_tries")
    trim_options(epsilon=1.0, **{k: v for k, v in settings.items() if k not in _SEARCH})


def _labels(settings: Settings) -> bool:
    return True


_EXCLUDE = frozenset({"exclude"})
_SEARCH = {"within": float, "max_tries": int}
_EIGEN = {"k": int, "tol": float, "max_products": int, "seed": int}

METHODS: Mapping[str, Method] = {
    "random": Method(
        "random",
        {"allocation": str, "seed": int},
        runs.one_shot(runs.at_random),
        calibrates=False,
        check=_baseline_check,
    ),
    "magnitude": Method(
        "magnitude",
        {"allocation": str},
        runs.one_shot(runs.magnitude),
        calibrates=False,
        check=_baseline_check,
    ),
    "soft-threshold": Method(
        "soft threshold", {}, runs.scored(runs.even_scores), calibrates=False, takes=_EXCLUDE
    ),
    "obd": Method(
        "OBD, diagonal",
        {"allocation": str, "kind": str, "num_samples": int, "seed": int},
        runs.one_shot(runs.obd),
        labels=lambda settings: settings.get("kind") == "empirical",
        check=_baseline_check,
    ),
    "wanda": Method(
        "Wanda",
        {"per": str},
        runs.one_shot(runs.wanda),
        takes=_EXCLUDE,
        check=_baseline_check,
    ),
    "obc": Method(
        "OBC",
        {"allocation": str, "damping": float, "inputs": str},
        runs.obc,
        check=_layerwise_check,
    ),
    "net-trim": Method(
        "Net-Trim",
        {
            "mode": str,
            "refit": bool,
            "gamma": float,
            "ball": str,
            "penalise_bias": bool,
            "precision": str,
            "tol": float,
            "max_iterations": int,
        }
        | _SEARCH,
        runs.net_trim,
        takes=_EXCLUDE,
        check=_net_trim_check,
    ),
    "woodfisher": Method(
        "WoodFisher",
        {
            "allocation": str,
            "block_size": int,
            "damping": float,
            "kind": str,
            "num_samples": int,
            "samples_per_row": int,
            "stages": int,
            "update": str,
            "seed": int,
        },
        runs.staged(runs.woodfisher),
        labels=lambda settings: settings.get("kind") != "monte_carlo",
        check=_baseline_check,
    ),
    "dp-projector": Method(
        "DP, projector",
        _EIGEN,
        runs.scored(runs.projector_scores),
        labels=_labels,
        takes=_EXCLUDE,
        check=_eigen_check,
    ),
    "dp-filter": Method(
        "DP, filter",
        {"mu": float, "time": float, "tol": float, "max_products": int},
        runs.scored(runs.filter_scores),
        labels=_labels,
        takes=_EXCLUDE,
        check=_eigen_check,
    ),
    "dp-transport": Method(
        "DP, transport",
        {"mu": float},
        runs.scored(runs.transport_scores),
        calibrates=False,
        takes=_EXCLUDE,
        check=_transport_check,
        replays=True,
    ),
    "path": Method(
        "directional path",
        _EIGEN | {"batch": int, "ridge": float},
        runs.path,
        labels=_labels,
        takes=frozenset(),
        check=_eigen_check,
    ),
    "eigenspace": Method(
        "compensated, eigenspace",
        solver_settings(EigenspaceSolver) | {"stages": int, "allocation": str},
        runs.staged(runs.eigenspace),
        labels=_labels,
        check=_checked(EigenspaceSolver),
    ),
    "krylov": Method(
        "compensated, Krylov",
        solver_settings(KrylovSolver) | {"stages": int, "temperature": float, "allocation": str},
        runs.staged(runs.krylov),
        check=_checked(KrylovSolver),
    ),
    "compensated": Method(
        "compensated support",
        solver_settings(KrylovSolver) | {"after": str, "temperature": float},
        runs.after,
        labels=lambda settings: settings.get("after") == "woodfisher",
        takes=_EXCLUDE,
        check=_after_check,
    ),
}
"""Methods by name."""
