"""The layers of a network, pruned one after another by Net-Trim."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from hessian import ConvergenceWarning, Objective
from hessian.distributed import Ranks
from hessian.finiteness import finite_vector
from pruning.calibration import CalibrationWarning
from pruning.net_trim_bound import chained_bound, output_distance
from pruning.net_trim_kept import KeptLayers
from pruning.net_trim_options import TrimOptions
from pruning.net_trim_problem import GroupProblem
from pruning.net_trim_program import Progress
from pruning.net_trim_result import NetworkTrim, TrimmedLayer
from pruning.net_trim_solved import SolvedLayer, solved_layer
from pruning.net_trim_spread import Recipe, solve_apart
from pruning.net_trim_survey import FoundLayer, survey
from pruning.pruned import as_pruned


def trim_network(
    objective: Objective,
    w: Float[Tensor, " d"],
    options: TrimOptions,
    *,
    known: dict[str, list[GroupProblem]] | None = None,
    checkpoint: Path | None = None,
    workers: int = 1,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
    stacklevel: int = 2,
) -> NetworkTrim:
    """Return the sparse weights of a network, by its model and calibration inputs.

    Args:
        objective: Model and inputs; labels are not looked at.
        w: Weights of the dense network, shape [d].
        options: As for ``net_trim``.
        known: Programs of layers by weight, in parallel: those that are missing are added, and all
            start where they ended before. With one process. Default: none is kept.
        checkpoint: As for ``net_trim``, like all that follow.
        workers: Processes.
        group: Ranks.
        progress: Called with the layers done and all of them.
        stacklevel: Of warnings, as seen by the caller.

    Raises:
        ValueError: As ``net_trim``.
        RuntimeError: As ``net_trim``.
        NonFiniteError: As ``net_trim``.

    Warns:
        ConvergenceWarning: As ``net_trim``.
        CalibrationWarning: As ``net_trim``.
    """
    _require_one_process(objective, options, workers, group)
    ranks = Ranks(group, objective.device)
    with ranks.in_step():
        found = survey(objective, w, options.exclude, options.mode)
        shares = options.shares(found.layers)
        kept = None if checkpoint is None else KeptLayers(checkpoint, objective, w, options)
    _warn_of_few(found.layers, stacklevel + 1)
    weights = w.clone()
    parts = objective.unflatten(weights)
    if options.mode == "parallel":
        solved = solve_apart(
            Recipe(objective, w, shares, options),
            found.layers,
            workers=workers,
            ranks=ranks,
            kept=kept,
            known=known,
            progress=progress,
        )
        for layer in found.layers:
            layer.write_rows_(parts, solved[layer.weight].rows)
    else:
        solved = {}
        for done, layer in enumerate(found.layers, start=1):
            one = None if kept is None else kept.read(layer.weight)
            if one is None:
                share = shares[layer.weight]
                one = solved_layer(objective, layer, w, weights, share, options)
                if kept is not None:
                    kept.write(layer.weight, one)
            solved[layer.weight] = one
            layer.write_rows_(parts, one.rows)
            if progress is not None:
                progress(done, len(found.layers))
    trimmed = {layer.weight: _trimmed(layer, solved[layer.weight]) for layer in found.layers}
    for one in solved.values():
        for text in one.told:
            warnings.warn(text, ConvergenceWarning, stacklevel=stacklevel)
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


def _trimmed(layer: FoundLayer, solved: SolvedLayer) -> TrimmedLayer:
    return TrimmedLayer(
        layer.weight,
        layer.bias,
        layer.kind,
        layer.reason,
        layer.between,
        solved.trims,
        solved.drift,
    )


def _require_one_process(
    objective: Objective, options: TrimOptions, workers: int, group: dist.ProcessGroup | None
) -> None:
    """See that processes are asked for where they can share the work."""
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}.")
    if options.mode == "cascade" and (workers > 1 or group is not None):
        raise ValueError(
            "`workers` must be 1 and `group` None in a cascade, where every layer waits for those "
            f"before it, got {workers} and {group}."
        )
    if workers > 1 and (objective.device.type != "cpu" or group is not None):
        raise ValueError(
            f"`workers` must be 1 for a model on a GPU, or with ranks, got {workers}. Share the "
            "layers over ranks with `group`, one a GPU."
        )


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
