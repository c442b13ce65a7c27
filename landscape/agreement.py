"""Ranks that share points must have been given the same work, and do it in the same way."""

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hessian.batches import fingerprint
from hessian.distributed import Ranks
from hessian.objective import Objective
from landscape.combinations import defining_vectors
from landscape.paths import Path
from landscape.planes import Plane
from landscape.plans import Plan

MESSAGE = 1024
"""Bytes in which a plan is told to other ranks."""


def require_same_work(
    ranks: Ranks, objectives: Mapping[str, Objective], path: Path | Plane, points: Tensor
) -> None:
    """See that all ranks measure the same points with the same data. Costs a pass over the data.

    Otherwise a surface would be a patchwork that looks like one.

    Raises:
        ValueError: If points, path or data differ between ranks.
        RankError: If one of these cannot be read on another rank.
    """
    if ranks.size == 1:
        return
    with ranks.in_step():
        vectors = defining_vectors(path, points)
    with ranks.in_step(points, *vectors):
        # Of fixed length, whatever the ranks were given.
        marks = torch.zeros(3, dtype=torch.float64)
        for place, objective in enumerate(objectives.values(), start=1):
            sums = fingerprint(objective.batches()).sum(dim=0)
            marks += place * torch.tensor([objective.num_samples, *sums.tolist()])
    table = ranks.gather(marks.tolist())
    if not torch.allclose(table, table[:1].expand_as(table), rtol=1e-9, atol=1e-9, equal_nan=True):
        raise ValueError(
            "`objectives` must hold the same samples in the same order on every rank, because "
            "`group` shares the points and not the data, got data of checksums "
            f"{table[:, 1].tolist()}. Build them from all the data, without a distributed sampler."
        )


def agreed_plan(ranks: Ranks, choose: Callable[[], Plan]) -> Plan:
    """Return the plan that rank 0 chose.

    Raises:
        RankError: If rank 0 failed to choose, on the others.
    """
    if ranks.size == 1:
        return choose()
    sent = b""
    with ranks.in_step():
        if ranks.rank == 0:
            sent = json.dumps(choose().as_json()).encode()
    table = ranks.gather(list(sent.ljust(MESSAGE)))
    return Plan.from_json(json.loads(bytes(int(x) for x in table[0])))
