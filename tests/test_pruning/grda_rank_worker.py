"""What one rank does in the tests of gRDA on several ranks; also run without ranks, for the truth.

``python -m tests.test_pruning.grda_rank_worker "SCENARIO|…" RANK RANKS STORE OUT`` writes
``OUT/SCENARIO.RANK.safetensors``.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pruning import GRDA
from pruning.sparsity_target import constant_for

Group = Any
STEPS = 500


def network(dtype: torch.dtype) -> nn.Module:
    """Odd sizes, so that shards are uneven and one rank may hold nothing of a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 61), nn.Tanh(), nn.Linear(61, 3), nn.Tanh())
        model.append(nn.Linear(3, 1))
    return model.to(dtype)


def batch(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(16, 7, generator=generator, dtype=torch.float64).to(dtype)
    return x, x[:, :3].sin().sum(1, keepdim=True)


def part(tensor: Tensor, group: Group) -> Tensor:
    """The rows of a batch that this rank takes."""
    if group is None:
        return tensor
    return tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def run(
    model: nn.Module,
    group: Group,
    dtype: torch.dtype,
    steps: int = STEPS,
    **options: Any,
) -> GRDA:
    optimizer = GRDA(model.parameters(), lr=0.1, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 200, gamma=0.5)
    for n in range(steps):
        x, y = batch(n, dtype)
        optimizer.zero_grad()
        F.mse_loss(model(part(x, group)), part(y, group)).backward()
        optimizer.step()
        scheduler.step()
    return optimizer


def result(model: nn.Module, optimizer: GRDA) -> dict[str, Tensor]:
    """Whole weights and duals, the threshold and the counted sparsity."""
    out = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        for kind, t in (("weight", p.detach()), ("dual", optimizer.state[p]["dual"])):
            whole = t.full_tensor() if hasattr(t, "full_tensor") else t
            out[f"{kind} of {name}"] = whole.contiguous().clone()
    group = optimizer.param_groups[0]
    numbers = group["threshold"], group["c"], optimizer.sparsity()
    out["numbers"] = torch.tensor(numbers, dtype=torch.float64)
    return out


def replicated(group: Group, **options: Any) -> dict[str, Tensor]:
    model = network(torch.float64)
    if group is not None:
        model = DistributedDataParallel(model, process_group=group)
    return result(model, run(model, group, torch.float64, **options))


def sharded(group: Group, **options: Any) -> dict[str, Tensor]:
    """FSDP2: parameters, gradients and duals are DTensors."""
    model = network(torch.float32)
    if group is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (model[0], model):
            fully_shard(module, mesh=mesh)
    optimizer = run(model, group, torch.float32, steps=200, **options)
    if group is not None:
        for p in model.parameters():
            assert optimizer.state[p]["dual"].placements == p.placements
            assert optimizer.state[p]["dual"].to_local().shape == p.to_local().shape
    return result(model, optimizer)


def constants(group: Group) -> dict[str, Tensor]:
    """The c of a measurement counts every weight once, sharded or not."""
    v = torch.randn(101, 3, generator=torch.Generator().manual_seed(0))
    w = torch.randn(50, generator=torch.Generator().manual_seed(1))
    if group is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        v = distribute_tensor(v, mesh, [Shard(0)])
        w = distribute_tensor(w, mesh, [Replicate()])
    return {str(q): constant_for(q, [([v, w], 0.1, 2.0)]) for q in (0.05, 0.5, 0.9, 0.99)}


SCENARIOS: dict[str, Callable[[Group], dict[str, Tensor]]] = {
    "DDP": lambda group: replicated(group, c=0.03),
    "DDP, fused": lambda group: replicated(group, c=0.03, fused=True),
    "DDP, target": lambda group: replicated(group, target_sparsity=0.7, horizon=STEPS),
    "FSDP2": lambda group: sharded(group, c=0.03),
    "FSDP2, fused": lambda group: sharded(group, c=0.03, fused=True),
    "FSDP2, capturable": lambda group: sharded(group, c=0.03, capturable=True),
    "FSDP2, target": lambda group: sharded(group, target_sparsity=0.7, horizon=200),
    "constants": constants,
}


def main(names: str, rank: int, ranks: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(store, ranks))
    for name in names.split("|"):
        save_file(SCENARIOS[name](dist.group.WORLD), Path(out) / f"{name}.{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
