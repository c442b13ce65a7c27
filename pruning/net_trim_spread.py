"""Layers that do not depend on each other, solved by one process, by several, or by ranks."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from hessian.batches import fingerprint
from hessian.distributed import Ranks
from hessian.tensor_files import tensor_bytes, tensors_of
from hessian.worker_processes import UnsendableError, WorkerError, by_workers
from pruning.net_trim_kept import KeptLayers
from pruning.net_trim_options import TrimOptions
from pruning.net_trim_problem import GroupProblem
from pruning.net_trim_program import Progress
from pruning.net_trim_solved import SolvedLayer, packed, solved_layer, unpacked
from pruning.net_trim_survey import FoundLayer


@dataclass(frozen=True)
class Recipe:
    """What all layers are solved with."""

    objective: Objective
    dense: Float[Tensor, " d"]
    shares: dict[str, float]
    options: TrimOptions

    def solve(
        self, layer: FoundLayer, known: dict[str, list[GroupProblem]] | None = None
    ) -> SolvedLayer:
        """Return a layer, solved on dense inputs."""
        share = self.shares[layer.weight]
        return solved_layer(self.objective, layer, self.dense, None, share, self.options, known)


def solve_apart(
    recipe: Recipe,
    layers: Sequence[FoundLayer],
    *,
    workers: int,
    ranks: Ranks,
    kept: KeptLayers | None,
    known: dict[str, list[GroupProblem]] | None,
    progress: Progress | None,
) -> dict[str, SolvedLayer]:
    """Return all layers, solved on dense inputs, by weight; the same bits whoever solves them.

    A layer is a unit: its outputs share the ball, and so their iteration.

    Args:
        recipe: What they are solved with.
        layers: In the order of their first calls.
        workers: Processes; with 1, this one.
        ranks: That share the layers, the largest ones first.
        kept: Where finished layers are kept. Default: nowhere.
        known: Programs by weight, as for ``trim_network``, for one process.
        progress: Called with the layers done and all of them, of this rank.
    """
    solved: dict[str, SolvedLayer] = {}
    marks = [] if ranks.size == 1 else [fingerprint(recipe.objective.batches())]
    with ranks.in_step(recipe.dense, *marks):
        own = _own(recipe.objective, layers, ranks)
        for layer in own:
            found = None if kept is None else kept.read(layer.weight)
            if found is not None:
                solved[layer.weight] = found
        missing = [layer for layer in own if layer.weight not in solved]
        if progress is not None and solved:
            progress(len(solved), len(own))
        here = workers == 1 or len(missing) < 2
        with closing(
            _here(recipe, missing, known) if here else _by_workers(recipe, missing, workers)
        ) as results:
            for layer, found in results:
                solved[layer.weight] = found
                if kept is not None:
                    kept.write(layer.weight, found)
                if progress is not None:
                    progress(len(solved), len(own))
    return solved if ranks.size == 1 else _exchanged(solved, ranks, recipe.dense.device)


def _exchanged(
    solved: dict[str, SolvedLayer], ranks: Ranks, device: torch.device
) -> dict[str, SolvedLayer]:
    whole: dict[str, SolvedLayer] = {}
    for rank, data in enumerate(ranks.exchange(tensor_bytes(*packed(solved)))):
        whole |= unpacked(*tensors_of(data, f"What rank {rank} sent"), device)
    return whole


def _own(objective: Objective, layers: Sequence[FoundLayer], ranks: Ranks) -> list[FoundLayer]:
    """Return this rank's layers: the largest one left goes to the rank that has least to do."""
    work = [0.0] * ranks.size
    own = []
    for layer in _longest_first(objective, layers):
        rank = work.index(min(work))
        work[rank] += _cost(objective, layer)
        if rank == ranks.rank:
            own.append(layer)
    return [layer for layer in layers if layer in own]


def _longest_first(objective: Objective, layers: Sequence[FoundLayer]) -> list[FoundLayer]:
    """Return layers by what an iteration costs.

    Of those that cost the same the later come first: what goes into them is more correlated, and
    they take more iterations.
    """
    return sorted(layers, key=lambda layer: _cost(objective, layer))[::-1]


def _cost(objective: Objective, layer: FoundLayer) -> float:
    """Return the flops of an iteration."""
    n, p = layer.num_inputs, layer.num_rows
    p = min(p, n) if layer.kind == "linear" else p
    return float(n * objective.shapes[layer.weight][0] * (4 * p + 2 * n))


def _here(
    recipe: Recipe, layers: Sequence[FoundLayer], known: dict[str, list[GroupProblem]] | None
) -> Generator[tuple[FoundLayer, SolvedLayer], None, None]:
    for layer in layers:
        yield layer, recipe.solve(layer, known)


def _by_workers(
    recipe: Recipe, layers: Sequence[FoundLayer], workers: int
) -> Generator[tuple[FoundLayer, SolvedLayer], None, None]:
    """Yield layers as they are solved; the largest ones are begun first."""
    jobs = _longest_first(recipe.objective, layers)
    results = by_workers(_served, recipe, jobs, workers=workers, threads=torch.get_num_threads())
    try:
        with closing(results):
            for place, (tensors, about) in results:
                layer = jobs[place]
                yield layer, unpacked(tensors, about, recipe.dense.device)[layer.weight]
    except UnsendableError as error:
        raise ValueError(
            "`workers` above 1 needs a model and calibration inputs that can be sent to another "
            f"process, got {error}. Define them at the top of a module, or leave `workers` out."
        ) from error
    except WorkerError as error:
        raise RuntimeError(
            f"{error} It had the layer of `{jobs[error.place].weight}`. With a `checkpoint`, the "
            "same call goes on with what was finished."
        ) from error


def _served(recipe: Recipe) -> Any:
    """Return what a worker process does with a layer."""
    return lambda layer: packed({layer.weight: recipe.solve(layer)})
