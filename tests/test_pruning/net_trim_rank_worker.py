"""What one rank does in the test of Net-Trim's ranks.

``python -m tests.test_pruning.net_trim_rank_worker RANK RANKS STORE OUT``
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from pruning import net_trim
from tests.cases import seeded


def problem() -> tuple[nn.Module, Tensor]:
    """Layers of several sizes, one of them with groups, and inputs for them."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 20),
            nn.ReLU(),
            nn.Linear(20, 20),
            nn.Tanh(),
            nn.Linear(20, 3),
        )
    )
    x = torch.randn(90, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x


def main(rank: int, ranks: int, store: str, out: Path) -> None:
    """Prune together, then let one rank fail, then give each another model and other inputs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    model, x = problem()
    seen: list[Any] = []

    def progress(done: int, total: int) -> None:
        seen.append([done, total])

    trim = net_trim(model, x, epsilon=0.1, group=group, checkpoint=out / "kept", progress=progress)
    numbers = [[layer.discrepancy, layer.violation] for layer in trim.layers]
    found = {"weights": trim.weights, "numbers": torch.tensor(numbers), "seen": torch.tensor(seen)}
    save_file(found, out / f"{rank}.safetensors")

    def stop(done: int, total: int) -> None:
        if rank == 1:
            raise ZeroDivisionError("planned")

    errors = []
    for change in ("none", "inputs", "weights"):
        other, y = problem()
        if rank == 1 and change == "inputs":
            y = y.flip(0)
        if rank == 1 and change == "weights":
            with torch.no_grad():
                other[3].weight[0, 0] += 1.0
        try:
            net_trim(
                other, y, epsilon=0.1, group=group, progress=stop if change == "none" else None
            )
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    (out / f"{rank}.txt").write_text("\n".join(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
