"""Points measured by one process, by several, or by ranks; the same bits each way."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessian.distributed import Ranks
from hessian.worker_processes import UnsendableError, WorkerError, by_workers
from landscape.point_meter import PointMeter, without_infinities
from landscape.shards import CHUNK, Shards

Progress: TypeAlias = Callable[[int, int], object]
"""Called as ``progress(done, total)``."""

Recipe: TypeAlias = Mapping[str, Any]
"""Arguments of a `PointMeter`."""


def measure_all(
    recipe: Recipe,
    points: Tensor,
    shards: Shards,
    *,
    width: tuple[int, ...],
    workers: int,
    ranks: Ranks,
    progress: Progress | None,
) -> Tensor:
    """Return the meter's numbers at every point, shape [m, *width].

    Every point is measured by itself, so it does not matter who does it.

    Args:
        recipe: Of the meter.
        points: One a row.
        shards: Where finished points are kept.
        width: Shape of the numbers of a point: [columns, 3] for sums, one number for each sample
            of each column otherwise.
        workers: Processes; with 1, this one.
        ranks: That share the points; each takes every so manyth chunk.
        progress: Called after every point, with several processes after every chunk.
    """
    sums = torch.zeros(len(points), *width, dtype=torch.float64)
    pieces = list(range(0, len(points), CHUNK))
    own = [k for k in range(len(pieces)) if k % ranks.size == ranks.rank]
    total = sum(len(points[pieces[k] : pieces[k] + CHUNK]) for k in own)
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None and count:
            progress(done, total)

    with ranks.in_step():
        missing = []
        for k in own:
            part = sums[pieces[k] : pieces[k] + CHUNK]
            kept = shards.read(k, tuple(part.shape))
            if kept is None:
                missing.append(k)
            else:
                part.copy_(kept)
                add(len(part))
        todo = {k: points[pieces[k] : pieces[k] + CHUNK] for k in missing}
        found = (
            _here(recipe, todo, add, len(width) == 1)
            if workers == 1 or len(todo) < 2
            else _elsewhere(recipe, todo, min(workers, len(todo)), add, len(width) == 1)
        )
        for k, part in found:
            sums[pieces[k] : pieces[k] + CHUNK] = part
            shards.write(k, part)
    if ranks.size == 1:
        return sums
    return ranks.gather(sums.reshape(-1).tolist()).sum(dim=0).view_as(sums)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run operations inside on this many threads; 0: as torch is set."""
    before = torch.get_num_threads()
    if number in (0, before):
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _here(
    recipe: Recipe, todo: Mapping[int, Tensor], add: Callable[[int], None], samples: bool
) -> Iterator[tuple[int, Tensor]]:
    if not todo:
        return
    meter = PointMeter(**recipe)
    for k, points in todo.items():
        parts = []
        for point in points:
            parts.append(meter.samples(point) if samples else meter.measure(point))
            add(1)
        yield k, _numbers(parts, samples)


def _elsewhere(
    recipe: Recipe,
    todo: Mapping[int, Tensor],
    workers: int,
    add: Callable[[int], None],
    samples: bool,
) -> Iterator[tuple[int, Tensor]]:
    jobs = list(todo.items())
    results = by_workers(
        _served,
        (dict(recipe), samples),
        [points for _, points in jobs],
        workers=workers,
        threads=recipe["plan"].threads or 1,
    )
    try:
        with closing(results):
            for place, numbers in results:
                k, points = jobs[place]
                yield k, numbers
                add(len(points))
    except UnsendableError as error:
        raise ValueError(
            "`workers` above 1 needs a model, criterion and path that can be sent to another "
            f"process, got {error}. Define them at the top of a module, or leave `workers` out."
        ) from error
    except WorkerError as error:
        raise RuntimeError(
            f"{error} What was finished is kept in `folder`; run the same call again to go on."
        ) from error


def _served(sent: tuple[dict[str, Any], bool]) -> Callable[[Tensor], Tensor]:
    """Return what a worker process does with some points."""
    recipe, samples = sent
    meter = PointMeter(**recipe)
    measure = meter.samples if samples else meter.measure
    return lambda points: _numbers([measure(row) for row in points.double()], samples)


def _numbers(parts: list[Tensor], samples: bool) -> Tensor:
    table = torch.stack(parts)
    return table if samples else without_infinities(table)
