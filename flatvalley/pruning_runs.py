"""How every method of pruning runs: from a dense network and sparsities to weights and costs."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flatvalley.pruning_problem import Clock, PrunedAt, PruningProblem
from flatvalley.transport_replay import OTHERS
from hessian import ConvergenceWarning, hessian_operator
from pruning import (
    EigenspaceSolver,
    KrylovSolver,
    Pruned,
    Scores,
    compensate,
    compensated_prune,
    directional_paths,
    directional_prune,
    directional_scores,
    flat_response,
    lambda_for_sparsity,
    magnitude_prune,
    net_trim_to_sparsities,
    random_prune,
)
from pruning.allocation import prunable
from pruning.compensated import DEFAULT_STAGES
from pruning.net_trim_result import NetworkTrim
from pruning.obc import LayerAllocation, obc_traces
from pruning.obd import obd_prune
from pruning.pruned import wanted_zeros
from pruning.wanda import wanda_prune
from pruning.woodfisher import woodfisher_prune

PATH_EVENTS = 1000
"""Times that the directional path renews its direction, unless ``batch`` says otherwise."""
EIGENSPACE: dict[str, Any] = {"k": 100, "tol": 0.01, "max_products": 1000, "seed": 0}
"""How the sharp directions are found, unless settings say otherwise."""

NET_TRIM: dict[str, Any] = {"mode": "cascade", "refit": True, "precision": "mixed", "tol": 1e-3}
"""How Net-Trim prunes, unless settings say otherwise."""

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


@dataclass(frozen=True)
class Scored:
    """Scores, and what they cost beside their products and the time they were waited for."""

    scores: Scores
    seconds: float = 0.0
    """Of what was computed before."""
    gradients: int = 0


def scored(scores: Callable[[PruningProblem, Settings], Scored]) -> Run:
    """Make a run of directional pruning with scores, which are computed once."""

    def run(
        problem: PruningProblem, sparsities: Sequence[float], settings: Settings
    ) -> Iterator[PrunedAt]:
        clock = Clock(problem.w.device)
        with clock.running():
            cost = scores(problem, settings)
            s = cost.scores.values.clone()
            # A weight whose score is 0 stays as it is.
            s[~prunable(problem.w, problem.objective, problem.exclude)] = 0.0
            found = replace(cost.scores, values=s)
        for sparsity in sparsities:
            with clock.running():
                lam = lambda_for_sparsity(problem.w, found, sparsity)
                weights = directional_prune(problem.w, found, lam).weights
            seconds = cost.seconds + clock.seconds
            yield PrunedAt(sparsity, weights, found.num_products, cost.gradients, seconds)

    return run


def projector_scores(problem: PruningProblem, settings: Settings) -> Scored:
    """Return the scores that the sharpest directions give."""
    space, seconds = problem.eigenspace(**(EIGENSPACE | dict(settings)))
    return Scored(directional_scores(problem.w, space), seconds)


def filter_scores(problem: PruningProblem, settings: Settings) -> Scored:
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
    return Scored(directional_scores(problem.w, H, response=response, **budget))


def transport_scores(problem: PruningProblem, settings: Settings) -> Scored:
    """Return the scores that the training gives when it is made once more."""
    require_replay(problem)
    assert problem.replay is not None
    replayed = problem.replay.run(problem.w, mu=settings.get("mu", 0.6), progress=problem.progress)
    return Scored(replayed.scores, gradients=replayed.num_steps)


def require_replay(problem: PruningProblem) -> None:
    """See that there is a training that transport scores can be had of.

    Raises:
        ValueError: If none is known, or it is not by plain SGD.
    """
    if problem.replay is None:
        raise ValueError(
            "`method` dp-transport needs the training of the network, which it makes once more and "
            f"which is not known here. Use {OTHERS}, or prune the folder of a `flatvalley train` "
            "run."
        )
    problem.replay.require()


def even_scores(problem: PruningProblem, settings: Settings) -> Scored:
    """All directions count as flat."""
    return Scored(Scores(torch.ones_like(problem.w), "projector", 0.0, 0, math.nan))


def path(
    problem: PruningProblem, sparsities: Sequence[float], settings: Settings
) -> Iterator[PrunedAt]:
    """Yield one directional path where it passes the sparsities."""
    eigen = {key: settings.get(key, value) for key, value in EIGENSPACE.items()}
    space, before = problem.eigenspace(**eigen)
    batch = settings.get("batch", max(1, len(problem.w) // PATH_EVENTS))
    ridge = settings.get("ridge", 0.0)
    clock = Clock(problem.w.device, before)
    with clock.running():
        stops = directional_paths(problem.w, space, sparsities, batch=batch, ridge=ridge)
    for sparsity in sparsities:
        with clock.running():
            found = next(stops)
        yield PrunedAt(sparsity, found.weights, space.num_products, 0, clock.seconds)


def net_trim(
    problem: PruningProblem, sparsities: Sequence[float], settings: Settings
) -> Iterator[PrunedAt]:
    """Yield Net-Trim's weights; what was tried for one sparsity serves the next."""
    tries: list[int] = []

    def count(trim: NetworkTrim) -> None:
        tries.append(sum(own.iterations for layer in trim.layers for own in layer.trims))

    clock = Clock(problem.w.device)
    with clock.running():
        trims = net_trim_to_sparsities(
            problem.model,
            [(x,) for x, _ in problem.batches],
            sparsities,
            on_try=count,
            exclude=problem.exclude,
            **(NET_TRIM | dict(settings)),
        )
    for sparsity in sparsities:
        with clock.running():
            found = next(trims)
        zeros = int((~found.mask).sum())
        if zeros > wanted_zeros(sparsity, len(problem.w)):
            warnings.warn(
                f"Net-Trim gave a share of {found.sparsity:.4f} zeros where {sparsity:g} was "
                f"wanted, even for the least discrepancy that was tried, {found.epsilon:.3g} of "
                "every layer's outputs. Want more zeros.",
                ConvergenceWarning,
                stacklevel=2,
            )
        yield PrunedAt(
            sparsity, found.weights, 0, 0, clock.seconds, iterations=sum(tries), trim=found
        )


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


def after(
    problem: PruningProblem, sparsities: Sequence[float], settings: Settings
) -> Iterator[PrunedAt]:
    """Yield what another method leaves, moved by conjugate gradients over all layers."""
    solver = KrylovSolver(**known(settings, solver_settings(KrylovSolver)))
    distance = problem.distance(settings.get("temperature", 1.0))
    first, how = SUPPORTS[settings.get("after", "obc")]
    for pruned in first(problem, sparsities, how):
        clock = Clock(problem.w.device, pruned.seconds)
        with clock.running():
            found = compensate(pruned.weights, distance, solver=solver)
        yield PrunedAt(
            pruned.sparsity,
            found.weights,
            pruned.products + found.num_products,
            pruned.gradients,
            clock.seconds,
            found.stages,
            pruned.iterations,  # but not what was measured on weights that have moved since
        )


SUPPORTS: Mapping[str, tuple[Run, Settings]] = {
    "magnitude": (one_shot(magnitude), {}),
    "net-trim": (net_trim, {}),
    "obc": (obc, {"allocation": "relative", "inputs": "pruned"}),
    "wanda": (one_shot(wanda), {}),
    "woodfisher": (staged(woodfisher), {"stages": 4}),
}
"""Methods whose weights can be moved afterwards, with their settings."""


def known(settings: Settings, names: Mapping[str, type]) -> dict[str, Any]:
    """Return the settings that are among some names."""
    return {key: value for key, value in settings.items() if key in names}


def solver_settings(solver: type[KrylovSolver] | type[EigenspaceSolver]) -> dict[str, type]:
    """Return names and types of a solver's settings, as texts can give them."""
    kinds = {f.name: int if f.default is None else type(f.default) for f in fields(solver)}
    return {name: kind for name, kind in kinds.items() if kind in (int, float, str)}
