"""The layers of a network, pruned one after another by Net-Trim."""

import math
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from hessian.errors import NonFiniteError
from hessian.finiteness import finite_vector
from pruning.calibration import CalibrationWarning
from pruning.layer_trim import LayerTrim
from pruning.net_trim_bound import chained_bound, output_distance
from pruning.net_trim_options import TrimOptions
from pruning.net_trim_problem import GroupProblem, group_problems
from pruning.net_trim_program import Progress
from pruning.net_trim_result import NetworkTrim, TrimmedLayer
from pruning.net_trim_survey import FoundLayer, survey
from pruning.pruned import as_pruned


def trim_network(
    objective: Objective,
    w: Float[Tensor, " d"],
    options: TrimOptions,
    *,
    known: dict[str, list[GroupProblem]] | None = None,
    progress: Progress | None = None,
    stacklevel: int = 2,
) -> NetworkTrim:
    """Return the sparse weights of a network, by its model and calibration inputs.

    Args:
        objective: Model and inputs; labels are not looked at.
        w: Weights of the dense network, shape [d].
        options: As for ``net_trim``.
        known: Programs of layers by weight, in parallel: those that are missing are added, and all
            start where they ended before. Default: none is kept.
        progress: Called with the layers done and all of them.
        stacklevel: Of warnings, as seen by the caller.

    Raises:
        ValueError: As ``net_trim``.
        NonFiniteError: As ``net_trim``.

    Warns:
        ConvergenceWarning: As ``net_trim``.
        CalibrationWarning: As ``net_trim``.
    """
    found = survey(objective, w, options.exclude)
    shares = options.shares(found.layers)
    _warn_of_few(found.layers, stacklevel + 1)
    weights = w.clone()
    parts = objective.unflatten(weights)
    trimmed: dict[str, TrimmedLayer] = {}
    for done, layer in enumerate(found.layers, start=1):
        now = weights if options.mode == "cascade" else None
        try:
            problems = None if known is None or now is not None else known.get(layer.weight)
            problems = problems or group_problems(
                objective,
                layer,
                w,
                now,
                ball=options.own_ball,
                penalise_bias=options.penalise_bias,
                options=options.program,
            )
            if known is not None:
                known[layer.weight] = problems
            trims = []
            for problem in problems:
                epsilon = problem.epsilon(shares[layer.weight], options.gamma)
                trims.append(_solved(problem, layer, epsilon, options, stacklevel + 1))
        except NonFiniteError as error:
            raise NonFiniteError(f"Layer of `{layer.weight}`: {error}") from error
        layer.write_rows_(parts, torch.cat([trim.weights for trim in trims]))
        drift = math.hypot(*(problem.drift or 0.0 for problem in problems))
        trimmed[layer.weight] = TrimmedLayer(
            layer.weight, layer.bias, layer.kind, layer.reason, tuple(trims), drift
        )
        if progress is not None:
            progress(done, len(found.layers))
    pruned = as_pruned(finite_vector(weights, "weight vector after Net-Trim", objective))
    distance, size = output_distance(objective, weights, w)
    return NetworkTrim(
        pruned.weights,
        pruned.mask,
        pruned.sparsity,
        pruned.lam,
        mode=options.mode,
        layers=tuple(trimmed.values()),
        skipped=found.skipped,
        discrepancy=distance,
        output_norm=size,
        bound=chained_bound(found.chain, trimmed, {**objective.constants(), **parts}, options.mode),
        shapes=objective.shapes,
    )


def _solved(
    problem: GroupProblem,
    layer: FoundLayer,
    epsilon: float,
    options: TrimOptions,
    stacklevel: int,
) -> LayerTrim:
    """Return the solution of one program; warnings of it name the layer."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trim = problem.program.solve(
            epsilon,
            refit=options.refit,
            tol=options.tol,
            max_iterations=options.max_iterations,
        )
    for warning in told:
        text = f"Layer of `{layer.weight}`: {warning.message}"
        warnings.warn(text, warning.category, stacklevel=stacklevel)
    return trim


def _warn_of_few(layers: Sequence[FoundLayer], stacklevel: int) -> None:
    few = [layer for layer in layers if layer.num_rows < layer.num_inputs]
    if few:
        worst = min(few, key=lambda layer: layer.num_rows / layer.num_inputs)
        warnings.warn(
            f"{len(few)} of {len(layers)} layers have fewer calibration rows (samples times "
            f"positions) than inputs, the worst `{worst.weight}` with {worst.num_rows} for "
            f"{worst.num_inputs}, so weights that are sparse may fit these rows alone. Pass more "
            "calibration inputs.",
            CalibrationWarning,
            stacklevel=stacklevel,
        )
