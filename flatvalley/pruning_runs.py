"""How every method of pruning runs: from a dense network and sparsities to weights and costs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flatvalley.pruning_problem import Clock, PrunedAt, PruningProblem
from hessian import hessian_operator
from pruning import (
    EigenspaceSolver,
    KrylovSolver,
    Pruned,
    Scores,
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
from pruning.obc import LayerAllocation, obc_traces
from pruning.obd import obd_prune
from pruning.pruned import wanted_zeros
from pruning.wanda import wanda_prune
from pruning.woodfisher import woodfisher_prune

PATH_EVENTS = 1000
"""Times that the directional path renews its direction, unless ``batch`` says otherwise."""
EIGENSPACE: dict[str, Any] = {"k": 100, "tol": 0.01, "max_products": 1000, "seed": 0}
"""How the sharp directions are found, unless settings say otherwise."""

Settings = Mapping[str, Any]
Run = Callable[[PruningProblem, Sequence[float], Settings], Iterator[PrunedAt]]


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


def one_shot(prune: Callable[[PruningProblem, float, Settings], Pruned]) -> Run:
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


def magnitude(problem: PruningProblem, sparsity: float, settings: Settings) -> Pruned:
    """Return the network without its smallest weights."""
    return magnitude_prune(problem.w, sparsity, **_where(problem, settings))


def at_random(problem: PruningProblem, sparsity: float, settings: Settings) -> Pruned:
    """Return the network without weights that were drawn."""
    return random_prune(
        problem.w, sparsity, seed=settings.get("seed", 0), **_where(problem, settings)
    )


def obd(problem: PruningProblem, sparsity: float, settings: Settings) -> Pruned:
    """Return the network without the weights that a diagonal Hessian finds cheapest."""
    rest = {key: value for key, value in settings.items() if key != "allocation"}
    return obd_prune(problem.w, sparsity=sparsity, **_where(problem, settings), **rest)


def wanda(problem: PruningProblem, sparsity: float, settings: Settings) -> Pruned:
    """Return the network without its smallest weights times inputs."""
    return wanda_prune(problem.w, problem.objective, sparsity, exclude=problem.exclude, **settings)


def obc(
    problem: PruningProblem, sparsities: Sequence[float], settings: Settings
) -> Iterator[PrunedAt]:
    """Yield exact layer-wise surgery; one run of removals serves all sparsities."""
    given = settings.get("allocation", problem.allocation)
    allocation: LayerAllocation = "pooled" if given in (None, "global") else given
    damping, inputs = (known(settings, {name: str}) for name in ("damping", "inputs"))
    clock = Clock(problem.w.device)
    with clock.running():
        traces = obc_traces(problem.objective, problem.w, **damping)
    before = clock.seconds
    for sparsity in sparsities:
        clock = Clock(problem.w.device, before)
        with clock.running():
            found = traces.prune(sparsity, allocation, exclude=problem.exclude, **inputs)
        yield PrunedAt(sparsity, found.weights, 0, 0, clock.seconds)


def scored(scores: Callable[[PruningProblem, Settings], tuple[Scores, float]]) -> Run:
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


def projector_scores(problem: PruningProblem, settings: Settings) -> tuple[Scores, float]:
    """Return the scores that the sharpest directions give, and their seconds."""
    space, seconds = problem.eigenspace(**(EIGENSPACE | dict(settings)))
    return directional_scores(problem.w, space), seconds


def filter_scores(problem: PruningProblem, settings: Settings) -> tuple[Scores, float]:
    """Return the scores of a soft projector, for the time that the training had."""
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


def even_scores(problem: PruningProblem, settings: Settings) -> tuple[Scores, float]:
    """All directions count as flat."""
    return Scores(torch.ones_like(problem.w), "projector", 0.0, 0, math.nan), 0.0


def path(
    problem: PruningProblem, sparsities: Sequence[float], settings: Settings
) -> Iterator[PrunedAt]:
    """Yield the ends of directional paths."""
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


def staged(prune: Callable[..., object]) -> Run:
    """Make a run of a method in stages, looked at on its way.

    Args:
        prune: Called with the problem, the settings and, by keyword, ``sparsity``, ``stages`` and
            ``on_stage`` as ``compensated_prune`` takes them.
    """

    def run(
        problem: PruningProblem, sparsities: Sequence[float], settings: Settings
    ) -> Iterator[PrunedAt]:
        wanted = {wanted_zeros(share, len(problem.w)): share for share in sparsities}
        found: list[PrunedAt] = []
        stages: list[Any] = []
        clock = Clock(problem.w.device)

        def look(stage: Any, w: Tensor) -> None:
            stages.append(stage)
            zeros = int((w == 0).sum())
            if zeros in wanted:
                products, gradients = (
                    sum(int(getattr(stage, name, 0)) for stage in stages)
                    for name in ("num_products", "num_gradients")
                )
                # The clock runs in the block below: read it as it stands.
                seconds = clock.elapsed()
                found.append(
                    PrunedAt(wanted[zeros], w.clone(), products, gradients, seconds, tuple(stages))
                )

        with clock.running():
            prune(
                problem,
                settings,
                sparsity=sparsities[-1],
                stages=stages_through(sparsities, settings.get("stages", DEFAULT_STAGES)),
                on_stage=look,
            )
        yield from found

    return run


def krylov(problem: PruningProblem, settings: Settings, **options: Any) -> None:
    """Compensate by conjugate gradients, without labels."""
    solver = KrylovSolver(**known(settings, solver_settings(KrylovSolver)))
    distance = problem.distance(settings.get("temperature", 1.0))
    where = _where(problem, settings) | {"objective": distance}
    _compensate(problem, solver, where, **options)


def eigenspace(problem: PruningProblem, settings: Settings, **options: Any) -> None:
    """Compensate on the sharpest directions of the training loss."""
    solver = EigenspaceSolver(**known(settings, solver_settings(EigenspaceSolver)))
    _compensate(problem, solver, _where(problem, settings), **options)


def _compensate(
    problem: PruningProblem,
    solver: KrylovSolver | EigenspaceSolver,
    where: dict[str, Any],
    **options: Any,
) -> None:
    curvature = where.pop("objective")
    compensated_prune(problem.w, curvature, solver=solver, **where, **options)


def woodfisher(problem: PruningProblem, settings: Settings, **options: Any) -> None:
    """Remove and move by blocks of the Fisher matrix."""
    where = _where(problem, settings)
    rest = {k: v for k, v in settings.items() if k not in ("allocation", "stages")}
    woodfisher_prune(problem.w, **where, **rest, **options)


def known(settings: Settings, names: Mapping[str, type]) -> dict[str, Any]:
    """Return the settings that are among some names."""
    return {key: value for key, value in settings.items() if key in names}


def solver_settings(solver: type[KrylovSolver] | type[EigenspaceSolver]) -> dict[str, type]:
    """Return names and types of a solver's settings, as texts can give them."""
    kinds = {f.name: int if f.default is None else type(f.default) for f in fields(solver)}
    return {name: kind for name, kind in kinds.items() if kind in (int, float, str)}
