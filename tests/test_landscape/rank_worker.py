"""What one rank does in the test of ranks over points.

``python -m tests.test_landscape.rank_worker RANK RANKS STORE OUT``
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hessian import Objective
from landscape import (
    AdaptiveSurface,
    BarrierTable,
    Line,
    Plane,
    adaptive_surface,
    barrier_table,
    evaluate,
    grid,
    save_sweep,
)
from tests.cases import seeded

POINTS = grid(torch.linspace(0, 1, 4), torch.linspace(-1, 1, 5))
AXIS = torch.linspace(-0.5, 0.5, 33, dtype=torch.float64)


def problem() -> tuple[Objective, Plane]:
    """A small network with batch norm, and a plane."""
    x = torch.linspace(-2, 2, 36, dtype=torch.float64).sin().reshape(12, 3)
    y = torch.arange(12) % 2
    model = seeded(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    ).eval()
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y), batch_size=5)
    w = objective.weights()
    u, v = torch.randn(2, len(w), generator=torch.Generator().manual_seed(3), dtype=w.dtype)
    return objective, Plane(w, u, v)


def barriers(**options: object) -> BarrierTable:
    """Barriers of a path and a control, of losses and errors."""
    objective, plane = problem()
    return barrier_table(
        {"train": objective, "test": objective},
        Line(plane.origin, plane.u),
        controls={"other": plane.v},
        metrics=("loss", "error"),
        num_points=11,
        **options,  # type: ignore[arg-type]
    )


def surface(**options: object) -> AdaptiveSurface:
    """A surface from some of its points."""
    return adaptive_surface(*problem(), AXIS, AXIS, tol=0.5, **options)  # type: ignore[arg-type]


def numbers(table: BarrierTable) -> str:
    """All that a table says, to the last bit."""
    profiles = [found.evaluation.total.tolist() for found in table.barriers.values()]
    return json.dumps([table.rows(), profiles])


def message(work: Callable[[], object]) -> str:
    """How some work fails."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(rank: int, ranks: int, store: str, out: Path) -> None:
    """Evaluate together, and fail together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    objective, plane = problem()
    group = dist.group.WORLD
    steps: list[tuple[int, int]] = []
    found = evaluate(
        objective,
        plane,
        POINTS,
        group=group,
        folder=out / "kept",
        progress=lambda *step: steps.append(step),
    )
    save_sweep(found, out / f"{rank}.safetensors")
    # A point without a loss.
    points = POINTS.clone()
    points[3, 4] = torch.nan
    nowhere = evaluate(objective, plane, points, group=group)
    save_sweep(nowhere, out / f"{rank}.nan.safetensors")
    (out / f"{rank}.barriers.json").write_text(numbers(barriers(group=group, folder=out / "lines")))
    filled = surface(group=group)
    save_sweep(filled.evaluation, out / f"{rank}.surface.safetensors")

    def stop(done: int, total: int) -> None:
        if rank == 1:
            raise ZeroDivisionError("planned")

    def other(t: Tensor) -> Tensor:
        return t + rank

    x, y = (torch.cat(parts) for parts in zip(*objective.batches(), strict=True))
    own = Objective(objective.model, nn.CrossEntropyLoss(), (other(x), y), batch_size=5)
    said = {
        "steps": steps,
        "failure": message(lambda: evaluate(objective, plane, POINTS, group=group, progress=stop)),
        "points": message(lambda: evaluate(objective, plane, other(POINTS), group=group)),
        "path": message(
            lambda: evaluate(objective, Line(plane.u, other(plane.v)), [0.0], group=group)
        ),
        "function": message(
            lambda: evaluate(objective, lambda t: other(t * plane.u), [0.0], group=group)
        ),
        "data": message(lambda: evaluate(own, plane, POINTS, group=group)),
    }
    (out / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
