"""The methods of pruning: from a dense network and sparsities to weights and what they cost."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flatvalley.pruning_problem import Clock, PruningProblem
from hessian import Objective, hessian_operator
from pruning import (
    EigenspaceSolver,
    KrylovSolver,
    Pruned,
    Scores,
    Stage,
    compensated_prune,
    directional_path,
    directional_prune,
    directional_scores,
    flat_response,
    lambda_for_sparsity,
    magnitude_prune,
    random_prune,
)
from pruning.allocation import prunable
from pruning.compensated import DEFAULT_STAGES
from pruning.pruned import wanted_zeros

PATH_EVENTS = 1000
"""Times that the directional path renews its direction, unless ``batch`` says otherwise."""
EIGENSPACE: dict[str, Any] = {"k": 100, "tol": 0.01, "max_products": 1000, "seed": 0}
"""How the sharp directions are found, unless settings say otherwise."""


@dataclass(frozen=True)
class PrunedAt:
    """The dense network pruned to one sparsity, with what it took to get there."""

    sparsity: float
    """The share of zeros that was wanted."""
    weights: Tensor
    products: int
    """Products with a matrix of second derivatives since the dense network."""
    gradients: int
    """Gradients, of a batch or of a sample, since the dense network."""
    seconds: float
    """Time since the dense network: of the processor, or the wall's on a GPU."""
    stages: tuple[Stage, ...] = ()
    """Evidence of the stages so far, for methods that have any."""


Settings = Mapping[str, Any]
Run = Callable[[PruningProblem, Sequence[float], Settings], Iterator[PrunedAt]]


@dataclass(frozen=True)
class Method:
    """A way to prune a trained network without training it again."""

    title: str
    """What people call it."""
    settings: Mapping[str, type]
    run: Run
    labels: bool = False
    """Whether it takes the labels of the calibration samples."""
    calibrates: bool = True
    """Whether it looks at calibration samples at all."""
    takes: frozenset[str] = frozenset({"exclude", "allocation"})
    """What it can do of ``exclude`` and ``allocation``."""
    check: Callable[[Settings], object] = dict
    """Raises ValueError for settings that are out of range."""


def stages_through(sparsities: Sequence[float], count: int) -> list[float]:
    """Return sparsities on the way, the wanted ones among them.

    No stage removes a larger share of the weights that are left than ``count`` equal ones up to
    the last sparsity would.

    Example:
        >>> [round(share, 3) for share in stages_through([0.5, 0.75], 2)]
        [0.5, 0.75]
    """
    step = -math.log1p(-sparsities[-1]) / count
    found: list[float] = []
    done = 0.0
    for share in sparsities:
        here = -math.log1p(-share)
        parts = math.ceil((here - done) / step - 1e-9)
        found += [-math.expm1(-(done + (here - done) * i / parts)) for i in range(1, parts)]
        found.append(share)
        done = here
    return found


def _one_shot(prune: Callable[[PruningProblem, float, Settings], Pruned]) -> Run:
    """Make a run of a function that prunes the dense network to one sparsity."""

    def run(
        problem: PruningProblem, sparsities: Sequence[float], settings: Settings
    ) -> Iterator[PrunedAt]:
        for sparsity in sparsities:
            clock = Clock(problem.w.device)
            with clock.running():
                found = prune(problem, sparsity, settings)
            yield PrunedAt(
                sparsity,
                found.weights,
                int(getattr(found, "num_products", 0)),
                int(getattr(found, "num_gradients", 0)),
                clock.seconds,
            )

    return run


def _where(problem: PruningProblem, settings: Settings) -> dict[str, Any]:
    """What ``keep_mask`` is told of the problem."""
    given = settings.get("allocation", problem.allocation)
    found: dict[str, Any] = {"objective": problem.objective, "exclude": problem.exclude}
    return found if given is None else found | {"allocation": given}


def _rest(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "allocation"}


def _magnitude(problem: PruningProblem, sparsity: float, settings: Settings) -> Pruned:
    return magnitude_prune(problem.w, sparsity, **_where(problem, settings))


def _random(problem: PruningProblem, sparsity: float, settings: Settings) -> Pruned:
    return random_prune(problem.w, sparsity, **_where(problem, settings), **_rest(settings))


def _scored(scores: Callable[[PruningProblem, Settings], tuple[Scores, float]]) -> Run:
    """Make a run of directional pruning with scores, which are computed once."""

    def run(
        problem: PruningProblem, sparsities: Sequence[float], settings: Settings
    ) -> Iterator[PrunedAt]:
        clock = Clock(problem.w.device)
        with clock.running():
            found, before = scores(problem, settings)
            s = found.values.clone()
            # A weight whose score is 0 stays as it is.
            s[~prunable(problem.w, problem.objective, problem.exclude)] = 0.0
            found = Scores(s, found.form, found.error, found.num_products, found.lowest_eigenvalue)
        for sparsity in sparsities:
            with clock.running():
                lam = lambda_for_sparsity(problem.w, found, sparsity)
                weights = directional_prune(problem.w, found, lam).weights
            yield PrunedAt(sparsity, weights, found.num_products, 0, before + clock.seconds)

    return run


def _projector(problem: PruningProblem, settings: Settings) -> tuple[Scores, float]:
    space, seconds = problem.eigenspace(**(EIGENSPACE | dict(settings)))
    return directional_scores(problem.w, space), seconds


def _filter(problem: PruningProblem, settings: Settings) -> tuple[Scores, float]:
    time = settings.get("time", problem.training_time)
    if time is None:
        raise ValueError(
            "`method` dp-filter needs the training time, steps times learning rate, which is not "
            "known here. Give it: dp-filter:time=…"
        )
    H = hessian_operator(problem.objective, problem.w)
    response = flat_response(mu=settings.get("mu", 0.6), t=time)
    budget = {key: settings[key] for key in ("tol", "max_products") if key in settings}
    return directional_scores(problem.w, H, response=response, **budget), 0.0


def _soft(problem: PruningProblem, settings: Settings) -> tuple[Scores, float]:
    """All directions count as flat."""
    return Scores(torch.ones_like(problem.w), "projector", 0.0, 0, math.nan), 0.0


def _path(
    problem: PruningProblem, sparsities: Sequence[float], settings: Settings
) -> Iterator[PrunedAt]:
    eigen = {key: settings.get(key, value) for key, value in EIGENSPACE.items()}
    space, seconds = problem.eigenspace(**eigen)
    batch = settings.get("batch", max(1, len(problem.w) // PATH_EVENTS))
    for sparsity in sparsities:
        clock = Clock(problem.w.device)
        with clock.running():
            found = directional_path(
                problem.w,
                space,
                sparsity=sparsity,
                batch=batch,
                ridge=settings.get("ridge", 0.0),
            )
        yield PrunedAt(sparsity, found.weights, space.num_products, 0, seconds + clock.seconds)


def _staged(
    solver: type[KrylovSolver] | type[EigenspaceSolver],
    curvature: Callable[[PruningProblem, Settings], Objective],
) -> Run:
    """Make a run of compensated pruning, looked at on its way."""
    known = _of(solver)

    def run(
        problem: PruningProblem, sparsities: Sequence[float], settings: Settings
    ) -> Iterator[PrunedAt]:
        wanted = {wanted_zeros(share, len(problem.w)): share for share in sparsities}
        found: list[PrunedAt] = []
        stages: list[Stage] = []
        clock = Clock(problem.w.device)

        def look(stage: Stage, w: Tensor) -> None:
            stages.append(stage)
            zeros = int((w == 0).sum())
            if zeros in wanted:
                spent = sum(stage.num_products for stage in stages)
                # The clock runs in the block below: read it as it stands.
                found.append(
                    PrunedAt(wanted[zeros], w.clone(), spent, 0, clock.elapsed(), tuple(stages))
                )

        with clock.running():
            compensated_prune(
                problem.w,
                curvature(problem, settings),
                sparsity=sparsities[-1],
                stages=stages_through(sparsities, settings.get("stages", DEFAULT_STAGES)),
                solver=solver(**{key: settings[key] for key in known if key in settings}),
                exclude=problem.exclude,
                on_stage=look,
            )
        yield from found

    return run


def _of(solver: type[KrylovSolver] | type[EigenspaceSolver]) -> dict[str, type]:
    """Names and types of a solver's settings."""
    kinds: dict[Any, type] = {int: int, float: float, str: str}
    return {field.name: kinds[field.type] for field in fields(solver) if field.type in kinds}


def _checked(
    solver: type[KrylovSolver] | type[EigenspaceSolver],
) -> Callable[[Settings], object]:
    def check(settings: Settings) -> None:
        if settings.get("stages", 1) < 1:
            raise ValueError(f"`stages` must be at least 1, got {settings['stages']}.")
        _positive(settings, "temperature")
        solver(**{key: value for key, value in settings.items() if key in _of(solver)})

    return check


def _positive(settings: Settings, *names: str) -> None:
    for name in names:
        if name in settings and not 0 < settings[name] < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {settings[name]}.")


def _allocation(settings: Settings) -> None:
    if settings.get("allocation", "global") not in ("global", "uniform"):
        raise ValueError(f'`allocation` must be global or uniform, got "{settings["allocation"]}".')
    if settings.get("seed", 0) < 0:
        raise ValueError(f"`seed` must be at least 0, got {settings['seed']}.")


def _eigen_settings(settings: Settings) -> None:
    _positive(settings, "k", "tol", "max_products", "batch", "mu", "time")
    if not 0.0 <= settings.get("ridge", 0.0) < math.inf:
        raise ValueError(f"`ridge` must be finite and not negative, got {settings['ridge']}.")


_EXCLUDE = frozenset({"exclude"})
_EIGEN = {"k": int, "tol": float, "max_products": int, "seed": int}

METHODS: Mapping[str, Method] = {
    "random": Method(
        "random",
        {"allocation": str, "seed": int},
        _one_shot(_random),
        calibrates=False,
        check=_allocation,
    ),
    "magnitude": Method(
        "magnitude",
        {"allocation": str},
        _one_shot(_magnitude),
        calibrates=False,
        check=_allocation,
    ),
    "soft-threshold": Method(
        "soft threshold", {}, _scored(_soft), calibrates=False, takes=_EXCLUDE
    ),
    "dp-projector": Method(
        "DP, projector",
        _EIGEN,
        _scored(_projector),
        labels=True,
        takes=_EXCLUDE,
        check=_eigen_settings,
    ),
    "dp-filter": Method(
        "DP, filter",
        {"mu": float, "time": float, "tol": float, "max_products": int},
        _scored(_filter),
        labels=True,
        takes=_EXCLUDE,
        check=_eigen_settings,
    ),
    "path": Method(
        "directional path",
        _EIGEN | {"batch": int, "ridge": float},
        _path,
        labels=True,
        takes=frozenset(),
        check=_eigen_settings,
    ),
    "eigenspace": Method(
        "compensated, eigenspace",
        _of(EigenspaceSolver) | {"stages": int},
        _staged(EigenspaceSolver, lambda problem, settings: problem.objective),
        labels=True,
        takes=_EXCLUDE,
        check=_checked(EigenspaceSolver),
    ),
    "krylov": Method(
        "compensated, Krylov",
        _of(KrylovSolver) | {"stages": int, "temperature": float},
        _staged(
            KrylovSolver,
            lambda problem, settings: problem.distance(settings.get("temperature", 1.0)),
        ),
        takes=_EXCLUDE,
        check=_checked(KrylovSolver),
    ),
}
"""Methods by name, with their settings."""
