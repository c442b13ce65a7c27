"""What one rank does in the tests of several ranks; also run without ranks, for the truth.

``python -m tests.test_hessian.rank_worker "SCENARIO|…" RANK RANKS STORE OUT BACKEND`` writes
``OUT/SCENARIO.RANK.safetensors``.
"""

import copy
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hessian import (
    Objective,
    Operator,
    RankError,
    RowShards,
    eigensolvers,
    gauss_newton_operator,
    hessian_operator,
    leading_eigenspace,
    trace,
    unsharded,
)
from hessian.checkpoint import Checkpoint
from hessian.lanczos import KrylovBasis
from tests.cases import Tagger, cases, digits_network, seeded

Group = Any
MASKED = -100


def ridge(parameters: dict[str, Tensor]) -> Tensor:
    """A regulariser whose Hessian is neither constant nor a multiple of the identity."""
    parts = [i * (p**4).sum() for i, p in enumerate(parameters.values(), 1)]
    return 1e-3 * torch.stack(parts).sum()


def masked_tokens() -> tuple[nn.Module, Tensor, Tensor]:
    """A tagger with sentences of different lengths, one batch's worth without any target."""
    tokens = seeded(lambda: torch.randint(0, 5, (12, 6)), 3)
    targets = (tokens + 1) % 4
    for row, kept in enumerate([6, 1, 2, 6, 0, 0, 3, 5, 1, 1, 4, 2]):
        targets[row, kept:] = MASKED
    return seeded(Tagger), tokens, targets


def cut(tensors: tuple[Tensor, ...], lengths: list[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(lengths) for t in tensors), strict=True))


class Counting(TensorDataset):
    """A data set that notes which samples were read."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.read: set[int] = set()

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.read.add(index)
        return super().__getitem__(index)


def measured(objective: Objective, *, shards: RowShards | None = None) -> dict[str, Tensor]:
    """Everything that must not depend on the number of ranks."""
    w = objective.weights()
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(1), dtype=w.dtype)
    v = v.to(w.device)
    H = hessian_operator(objective)
    pairs = leading_eigenspace(
        H, k=3, tol=1e-6 if w.dtype == torch.float64 else 1e-3, shards=shards
    )
    both = torch.stack([v, v.flip(0)], dim=1)
    out = {
        "loss": torch.tensor(objective.loss(w), dtype=torch.float64),
        "gradient": objective.gradient(w),
        "product": objective.hessian_product(w, v),
        "operator": H @ v,
        "Gauss-Newton": gauss_newton_operator(objective) @ v,
        "columns": hessian_operator(objective, memory_budget=0) @ both,
        "eigenvalues": torch.as_tensor(pairs.values).clone(),
        "trace": torch.tensor(trace(H, num_probes=2).value, dtype=torch.float64),
        "counts": torch.tensor([objective.num_samples, objective.normalizer]),
    }
    return {name: tensor.cpu().contiguous() for name, tensor in out.items()}


def with_samples(objective: Objective) -> dict[str, Tensor]:
    return measured(objective) | {"samples": objective.sample_losses(objective.weights()).cpu()}


def ragged(group: Group, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    case = cases()["CNN with frozen batch norm"]
    model = copy.deepcopy(case.model).to(device, dtype)
    data = [(x.to(dtype), y) for x, y in case.batches([5, 4, 1, 2])]
    return with_samples(Objective(model, case.criterion, data, group=group))


def loader(group: Group) -> dict[str, Tensor]:
    """Every rank reads its own batches only, besides the first one of all."""
    case = cases()["tanh MLP"]
    data = Counting(*case.data)
    objective = Objective(
        case.model, case.criterion, DataLoader(data, batch_size=2, shuffle=False), group=group
    )
    out = with_samples(objective)
    if group is not None:
        own = {i for i in range(12) if i // 2 % dist.get_world_size() == dist.get_rank()}
        assert data.read == own | {0, 1}, data.read
    return out


def tokens(group: Group) -> dict[str, Tensor]:
    model, x, y = masked_tokens()
    data = cut((x, y), [3, 1, 2, 6])
    return with_samples(Objective(model, nn.CrossEntropyLoss(), data, group=group))


def counted_and_regularized(group: Group) -> dict[str, Tensor]:
    model, x, y = masked_tokens()
    objective = Objective(
        model,
        lambda output, target: F.cross_entropy(output, target),
        cut((x, y), [3, 1, 2, 6]),
        count=lambda batch: (batch[1] != MASKED).sum(),
        regularizer=ridge,
        group=group,
    )
    return with_samples(objective)


def wrapped(group: Group) -> dict[str, Tensor]:
    case = cases()["tanh MLP"]
    model = copy.deepcopy(case.model)
    if group is not None:
        model = DistributedDataParallel(model, process_group=group)
    objective = Objective(model, case.criterion, case.batches([5, 4, 3]), group=group)
    assert list(objective.shapes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    return with_samples(objective)


class TwoUses(nn.Module):
    """A layer used twice, odd sizes, a frozen parameter, a buffer, and a hook of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, twice = nn.Linear(4, 5), nn.Linear(5, 5)
        self.head = nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), nn.Linear(5, 3))
        self.head[4].bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((5,), 1.5))
        twice.register_forward_hook(lambda module, args, output: 0.5 * output)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).tanh() * self.scale)


def fully_sharded(group: Group) -> dict[str, Tensor]:
    """A model under FSDP2: refused as it is, taken as a whole copy, and left as it was."""
    model, (X, y) = seeded(TwoUses), cases()["tanh MLP"].data
    data = cut((X, y), [5, 4, 3])
    if group is None:
        return with_samples(Objective(model, nn.CrossEntropyLoss(), data))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.encoder, model.head, model):
        fully_shard(module, mesh=mesh)
    before = F.cross_entropy(model(X), y)
    before.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    try:
        Objective(model, nn.CrossEntropyLoss(), data, group=group)
    except ValueError as error:
        assert "is sharded over ranks" in str(error)
        assert "`unsharded(model)`" in str(error)
    else:
        raise AssertionError("a sharded model was taken")
    plain = unsharded(model)
    assert type(plain) is TwoUses
    assert plain.head[0] is plain.head[2]
    out = with_samples(Objective(plain, nn.CrossEntropyLoss(), data, group=group))
    assert torch.equal(F.cross_entropy(model(X), y).detach(), before.detach())
    for name, p in model.named_parameters():
        assert hasattr(p, "full_tensor")
        assert p.grad is gradients[name]
    return out


def given(group: Group) -> dict[str, Tensor]:
    """Rank 0 holds the first seven samples in two batches, the others share the rest."""
    case = cases()["tanh MLP"]
    batches = case.batches([4, 3, 5])
    if group is not None:
        batches = batches[:2] if dist.get_rank() == 0 else batches[2:]
    return with_samples(Objective(case.model, case.criterion, batches, group=group, split="given"))


def sharded(group: Group, device: str = "cpu") -> dict[str, Tensor]:
    """d = 1510, so that the vectors outweigh what else a basis holds."""
    case = digits_network(num_samples=40)
    data = [(x, y) for x, y in zip(*(t.split([25, 15]) for t in case.data), strict=True)]
    model = copy.deepcopy(case.model).to(device)
    objective = Objective(model, case.criterion, data, group=group)
    shards = group and RowShards(objective.size, group)
    out = measured(objective, shards=shards)
    basis = KrylovBasis(hessian_operator(objective), objective.weights(), shards=shards)
    for _ in range(8):
        basis.extend()
    coefficients = basis.ritz()[1][:, -2:]
    vectors = basis.combine(coefficients)
    out["Ritz projectors"] = (vectors @ vectors.T).cpu()
    held = [basis.rows[i] for i in range(len(basis))] + [basis.current.vector]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    out["bytes"] = torch.tensor(sum(storages.values()))
    return out


def short_of_memory(group: Group) -> dict[str, Tensor]:
    """One rank has room for sixteen vectors, the other for all: both restart a basis of sixteen."""
    n, sixteen = 20_000, 16
    d = torch.cat([torch.tensor([5.0, -4.0, 3.0]), torch.linspace(0, 1, n - 3)]).double()
    operator = Operator(lambda v: d * v, n, d.dtype, d.device)
    shards = group and RowShards(n, group)
    scarce = group is not None and dist.get_rank() == 1
    sizes, choose = [], eigensolvers.basis_size

    def noting(asked: int | None, **facts: Any) -> int:
        sizes.append(choose(asked, **facts))
        return sizes[-1]

    with (
        mock.patch.object(eigensolvers, "free_memory", lambda _: 4 << 20 if scarce else 1 << 40),
        mock.patch.object(eigensolvers, "basis_size", noting),
    ):
        pairs = leading_eigenspace(
            operator, k=3, tol=1e-9, shards=shards, max_basis=None if group else sixteen
        )
    counts = torch.tensor([*sizes, pairs.num_products])
    return {"counts": counts, "values": pairs.values, "vectors": pairs.vectors.T.contiguous()}


def rows(group: Group) -> dict[str, Tensor]:
    """Tensors taken apart and put together; fewer rows than ranks among them."""
    tensors = {str(shape): seeded(lambda s=shape: torch.randn(s)) for shape in [(1,), (7, 2), (8,)]}
    if group is None:
        return tensors
    shards = {name: RowShards(len(t), group) for name, t in tensors.items()}
    parts = {name: shards[name].local(t) for name, t in tensors.items()}
    for part in parts.values():  # a view would keep all rows alive
        assert part.untyped_storage().nbytes() == part.nbytes
    return {name: shards[name].full(part) for name, part in parts.items()}


class PlannedError(Exception):
    """Ends a run in the middle."""


def spread(n: int = 60) -> Tensor:
    """A matrix that takes a basis of fourteen vectors through several restarts."""
    Q = seeded(lambda: torch.linalg.qr(torch.randn(n, n)).Q)
    # No two of one magnitude, whose order would be a matter of rounding.
    return (Q * torch.linspace(-1.03, 1, n, dtype=torch.float64) ** 3) @ Q.T


def mortal(A: Tensor, fatal: int) -> tuple[Operator, list[int]]:
    """The operator of A, whose product number ``fatal`` is the end; and the products so far."""
    made: list[int] = []

    def product(v: Tensor) -> Tensor:
        made.append(1)
        if len(made) == fatal:
            raise PlannedError
        return A @ v

    return Operator(product, len(A), A.dtype, A.device), made


def resumed(group: Group) -> dict[str, Tensor]:
    """Runs that end at any product, or in any write of any rank, go on to the same bits."""
    A, options = spread(), {"k": 4, "tol": 1e-8, "max_basis": 14, "checkpoint_every": 3}
    shards = group and RowShards(len(A), group)
    whole = leading_eigenspace(mortal(A, -1)[0], shards=shards, **options)
    out = {"values": whole.values, "vectors": whole.vectors.T.contiguous()}
    if group is None:
        return out
    folders: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    base, rank = Path(folders[0]), dist.get_rank()

    def run(name: str, fatal: int = -1) -> tuple[Any, int]:
        operator, made = mortal(A, fatal)
        try:
            space = leading_eigenspace(operator, shards=shards, checkpoint=base / name, **options)
        except (PlannedError, RankError):
            return None, len(made)
        return space, len(made)

    def require_same(space: Any) -> None:
        assert torch.equal(space.vectors, whole.vectors)
        assert torch.equal(space.residuals, whole.residuals)
        assert space.num_products == whole.num_products

    for fatal in range(2, whole.num_products, 7):
        space, _ = run(f"product {fatal}", fatal)
        assert space is None
        space, made = run(f"product {fatal}")
        require_same(space)
        # Again: what came after the last write, the measuring, and the product that compares.
        assert made <= whole.num_products - fatal + 1 + (3 + 4) + 1
    write = Checkpoint._write
    for dying, fatal, again in [(0, 1, 2), (0, 2, 3), (1, 3, 1), (0, 6, 4), (1, 9, 4), (1, 17, 3)]:
        for end in (fatal, again):  # killed once more soon after it went on
            left = [end]

            def dies(
                self: Checkpoint,
                name: str,
                data: bytes,
                left: list[int] = left,
                here: bool = rank == dying,
            ) -> str:
                left[0] -= 1
                if here and left[0] == 0:
                    raise PlannedError
                return write(self, name, data)

            with mock.patch.object(Checkpoint, "_write", dies):
                space, _ = run(f"write {dying} {fatal}")
            assert space is None
        require_same(run(f"write {dying} {fatal}")[0])
        assert not list((base / f"write {dying} {fatal}").rglob("previous.json"))
    operator = mortal(A, -1)[0]
    texts = []
    for name, call in {
        "without ranks": lambda: leading_eigenspace(
            operator, checkpoint=base / "product 2", **options
        ),
        "lost": lambda: run("product 2"),
        "of one": lambda: run("alone"),
    }.items():
        dist.barrier()  # the other rank may be in the call before still, and read its folder
        if name == "lost" and rank == 1:
            shutil.rmtree(base / "product 2" / "rank-1")
        if name == "of one" and rank == 0:
            leading_eigenspace(operator, checkpoint=base / "alone", **options)
        dist.barrier()
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    assert len(texts) == 3, texts
    assert "of as many ranks as there are now, 1, but" in texts[0]
    assert "was written by 2 ranks. Use another folder" in texts[0]
    assert "must hold the states of all 2 ranks" in texts[1]
    assert "was written by one process" in texts[2]
    dist.barrier()
    if rank == 0:
        shutil.rmtree(base)
    return out


def certified(group: Group) -> dict[str, Tensor]:
    """Pairs of a nearby matrix, made exact with vectors that are spread over the ranks."""
    A = spread()
    E = seeded(lambda: torch.randn(A.shape), 5)
    shards = group and RowShards(len(A), group)
    fast, exact = mortal(A + 1e-4 * (E + E.T), -1)[0], mortal(A, -1)[0]
    space = leading_eigenspace(fast, k=4, tol=1e-9, exact=exact, shards=shards)
    assert space.converged
    counts = torch.tensor([space.num_products, space.num_exact])
    return {"values": space.values, "projector": space.vectors @ space.vectors.T, "counts": counts}


def few_batches(group: Group) -> dict[str, Tensor]:
    """Two batches: a third rank has nothing to do but to add zeros."""
    case = cases()["tanh MLP"]
    objective = Objective(case.model, case.criterion, case.batches([7, 5]), group=group)
    shards = group and RowShards(objective.size, group)
    return with_samples(objective) | measured(objective, shards=shards)


@dataclass
class FailsOn:
    """Cross-entropy that fails for batches of a given length."""

    length: int = -1

    def __call__(self, output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        if len(target) == self.length:
            raise ZeroDivisionError(f"planned for {self.length}")
        return F.cross_entropy(output, target, reduction=reduction)


def refusals(group: Group) -> dict[str, Tensor]:
    """What is raised on this rank, as text, when ranks disagree or one of them fails."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    case = cases()["tanh MLP"]
    X, y = case.data
    batches, cross_entropy = case.batches([5, 4, 3]), FailsOn()
    model = copy.deepcopy(case.model)
    objective = Objective(model, cross_entropy, batches, group=group)
    w = objective.weights()
    other = w + 1e-3 * rank
    tilted = torch.zeros_like(w)
    tilted[:2] = torch.tensor([3.0 - rank, 1.0 + rank])  # of the same sum
    texts = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            texts[name] = f"{type(error).__name__}: {error}"

    def build(data: Any = batches, *, net: nn.Module = model, **options: Any) -> Objective:
        return Objective(net, cross_entropy, data, group=group, **options)

    def loader_of(length: int, **options: Any) -> DataLoader[Any]:
        data = TensorDataset(X[:length], y[:length])
        sampler = DistributedSampler(data, ranks, rank, shuffle=False, **options)
        return DataLoader(data, batch_size=3, sampler=sampler)

    note("weights of a call", lambda: objective.loss(other))
    note("weights of a call, same sum", lambda: objective.gradient(tilted))
    note("vector of a product", lambda: objective.hessian_product(w, other))
    note("length of a vector", lambda: objective.loss(w if rank else w[1:]))
    cross_entropy.length = 4  # the second batch, rank 1's
    for method in ("loss", "gradient", "sample_losses"):
        note(method, lambda method=method: getattr(objective, method)(w))
    note("hessian_product", lambda: objective.hessian_product(w, w))
    note("construction", build)
    cross_entropy.length = -1
    note(
        "criterion without reduction",
        lambda: Objective(model, lambda o, t: weighted(o, t), batches, group=group),
    )
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].weight += rank
    note("weights of the model", lambda: build(net=moved))
    note("buffers", lambda: build(net=with_buffer(float(rank))))
    note("data", lambda: build([(X + rank, y)]))
    note("number of batches", lambda: build(batches[: 3 - rank]))
    note("sampler", lambda: build(loader_of(12)))
    note("padding sampler", lambda: build(loader_of(11), split="given"))
    note("even sampler", lambda: build(loader_of(12), split="given"))
    note("same data", lambda: build(split="given"))
    note("unknown split", lambda: build(split="rows"))
    note("shuffling", lambda: build(DataLoader(TensorDataset(X, y), shuffle=True)))
    note("no rows", lambda: RowShards(0, group))
    note("full rows", lambda: RowShards(5, group).local(w[:4]))
    note("rows of a part", lambda: RowShards(5, group).full(w[:5]))
    note("no data", lambda: build([]))
    spoilt = [(x.clone(), t) for x, t in batches]
    spoilt[1][0][0, 0] = torch.nan
    note("NaN", lambda: build(spoilt).loss(w))
    model.append(nn.Dropout(0.5)).train(rank == 1)
    note("training mode", lambda: objective.loss(w))
    model.eval()
    note("afterwards", lambda: objective.loss(w))
    return {
        name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()
    }


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, torch.tensor([0.5, 1.0, 3.0]).double())


def with_buffer(value: float) -> nn.Module:
    model = seeded(lambda: nn.Linear(4, 3))
    model.register_buffer("shift", torch.tensor(value))
    return model


SCENARIOS: dict[str, Callable[[Group], dict[str, Tensor]]] = {
    "ragged, float64": lambda group: ragged(group, torch.float64),
    "ragged, float32": lambda group: ragged(group, torch.float32),
    "loader": loader,
    "tokens": tokens,
    "counted and regularised": counted_and_regularized,
    "wrapped": wrapped,
    "given": given,
    "fully sharded": fully_sharded,
    "sharded": sharded,
    "short of memory": short_of_memory,
    "rows": rows,
    "resumed": resumed,
    "certified": certified,
    "few batches": few_batches,
    "refusals": refusals,
    "ragged on cuda": lambda group: ragged(group, torch.float64, "cuda"),
    "sharded on cuda": lambda group: sharded(group, "cuda"),
}


def main(names: str, rank: int, ranks: int, store: str, out: str, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, rank=rank, world_size=ranks, store=dist.FileStore(store, ranks)
    )
    for name in names.split("|"):
        save_file(SCENARIOS[name](dist.group.WORLD), Path(out) / f"{name}.{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
