"""What one rank does in the test of ranks over points.

``python -m tests.test_landscape.rank_worker RANK RANKS STORE OUT``
"""

import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn

from hessian import Objective
from landscape import Plane, evaluate, grid, save_sweep
from tests.cases import seeded

POINTS = grid(torch.linspace(0, 1, 4), torch.linspace(-1, 1, 5))


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


def main(rank: int, ranks: int, store: str, out: Path) -> None:
    """Evaluate together, first with points of its own folder left over from another rank count."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    objective, plane = problem()
    group = dist.group.WORLD
    found = evaluate(objective, plane, POINTS, group=group, folder=out / "kept")
    save_sweep(found, out / f"{rank}.safetensors")
    # A point without a loss, and an error of one rank that all are told of.
    points = POINTS.clone()
    points[3, 4] = torch.nan
    nowhere = evaluate(objective, plane, points, group=group)
    save_sweep(nowhere, out / f"{rank}.nan.safetensors")

    def stop(done: int, total: int) -> None:
        if rank == 1:
            raise ZeroDivisionError("planned")

    try:
        evaluate(objective, plane, POINTS, group=group, progress=stop)
    except Exception as error:
        (out / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
