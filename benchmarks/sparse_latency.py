"""What zeros save: bytes on disk, bytes in memory and CPU time, against the dense model.

All times are CPU time of one thread, dense and sparse in turn in one run; only their ratios mean
anything. Zeros are spread at random, as unstructured pruning leaves them, or in random blocks for
BSR, whose sparsity is then a share of blocks. LeNet-300-100 is timed whole, with its activations.
"""

import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save as dump_tensors
from timing import interleaved, report, say
from torch import Tensor, nn

from flatvalley.models import lenet_300_100
from flatvalley.sparse_weights import save_sparse_weights
from pruning import to_sparse

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
BATCHES = (1, 32, 256)
BLOCKSIZE = 16
REPEATS = 9
# CPU seconds that one measurement of the dense model should take, so that clocks can tell.
WORK = 0.008


def lenet() -> nn.Module:
    """Return LeNet-300-100 as three linear layers."""
    return lenet_300_100(seed=0)


def one_layer(inputs: int, outputs: int) -> nn.Module:
    """Return a single linear layer."""
    return nn.Linear(inputs, outputs)


def prune_at_random_(model: nn.Module, sparsity: float, *, block: int = 1) -> nn.Module:
    """Set an exact share of every matrix to zero, single weights or whole blocks."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim == 2:
            rows, columns = p.shape[0] // block, p.shape[1] // block
            order = torch.randperm(rows * columns, generator=generator)
            stays = (order >= round(sparsity * rows * columns)).view(rows, columns)
            p.data *= stays.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return model


def ratios(
    build: Callable[[], nn.Module], inputs: int, batch: int, *, blocks: bool
) -> dict[str, list[float]]:
    """CPU time as a multiple of the dense model's, by layout and in the order of SPARSITIES."""
    x = torch.randn(batch, inputs, generator=torch.Generator().manual_seed(1))
    models: dict[str, nn.Module] = {"dense": build().eval()}
    for sparsity in SPARSITIES:
        single = prune_at_random_(build(), sparsity)
        models[f"CSR {sparsity}"] = to_sparse(single, min_sparsity=0.0)
        if blocks:
            blocked = prune_at_random_(build(), sparsity, block=BLOCKSIZE)
            models[f"BSR {sparsity}"] = to_sparse(
                blocked, "bsr", blocksize=BLOCKSIZE, min_sparsity=0.0
            )
    with torch.inference_mode():
        once = interleaved({"dense": lambda: models["dense"](x)}, 5)["dense"]
        inner = max(1, round(WORK / once))
        found = interleaved(
            {name: lambda m=m: [m(x) for _ in range(inner)] for name, m in models.items()}, REPEATS
        )
    layouts = ("CSR", "BSR") if blocks else ("CSR",)
    return {
        layout: [found[f"{layout} {s}"] / found["dense"] for s in SPARSITIES] for layout in layouts
    }


def on_disk(build: Callable[[], nn.Module]) -> dict[str, list[float]]:
    """Bytes as a multiple of the dense safetensors file's, in the order of SPARSITIES."""
    rows: dict[str, list[float]] = {
        "compact": [],
        "compact, then zlib": [],
        "dense, then zlib": [],
        "CSR in memory": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in SPARSITIES:
            model = prune_at_random_(build(), sparsity)
            dense = dump_tensors(model.state_dict())
            path = save_sparse_weights(Path(folder) / "w.safetensors", model.state_dict())
            compact = path.read_bytes()
            buffers = to_sparse(model, min_sparsity=0.0).buffers()
            sizes = {
                "compact": len(compact),
                "compact, then zlib": len(zlib.compress(compact)),
                "dense, then zlib": len(zlib.compress(dense)),
                "CSR in memory": sum(b.numel() * b.element_size() for b in buffers),
            }
            for name, size in sizes.items():
                rows[name].append(size / len(dense))
    return rows


def table(rows: dict[str, list[float]]) -> list[str]:
    """Return rows of ratios under a line of sparsities."""
    head = f"  {'sparsity':28}" + "".join(f"{s:8.2f}" for s in SPARSITIES)
    return [
        head,
        *(f"  {name:28}" + "".join(f"{v:8.3f}" for v in row) for name, row in rows.items()),
    ]


def pays_from(row: list[float]) -> str:
    """Return the first sparsity from which on a layout is faster than dense."""
    first = len(row)
    while first and row[first - 1] < 1.0:
        first -= 1
    return f"from {SPARSITIES[first]:.2f}" if first < len(row) else "nowhere"


def largest_difference() -> Tensor:
    """Return how far the outputs of a converted model are from the dense ones, relatively."""
    model = prune_at_random_(lenet(), 0.9).eval()
    x = torch.randn(64, 784, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        y = model(x)
        return (to_sparse(model)(x) - y).abs().max() / y.abs().max()


def main() -> None:
    """Print and keep the tables."""
    torch.set_num_threads(1)
    lines = ["Bytes as a multiple of the dense safetensors file.", ""]
    say("sizes")
    for title, build in (("LeNet-300-100", lenet), ("1024 x 1024", lambda: one_layer(1024, 1024))):
        lines += [title, *table(on_disk(build)), ""]
    lines += [
        "CPU time as a multiple of the dense model's, which is 1. Below 1 sparsity pays.",
        f"BSR: blocks of {BLOCKSIZE} x {BLOCKSIZE}, a share of blocks zero.",
        "",
    ]
    settings: list[tuple[str, Callable[[], nn.Module], int, bool]] = [
        ("LeNet-300-100", lenet, 784, False),
        ("1024 x 1024", lambda: one_layer(1024, 1024), 1024, True),
        ("4096 x 1024", lambda: one_layer(1024, 4096), 1024, True),
    ]
    verdicts: list[str] = []
    for title, build, inputs, blocks in settings:
        found: dict[str, list[float]] = {}
        for batch in BATCHES:
            say(f"{title}, batch {batch}")
            for layout, row in ratios(build, inputs, batch, blocks=blocks).items():
                found[f"{layout}, batch {batch}"] = row
                verdicts.append(f"  {title}, {layout}, batch {batch}: {pays_from(row)}")
        by_layout = sorted(found.items(), key=lambda row: not row[0].startswith("CSR"))
        lines += [title, *table(dict(by_layout)), ""]
    lines += ["Sparsity, of those above, from which on the layout is faster than dense:", *verdicts]
    lines += ["", f"Outputs differ by at most {float(largest_difference()):.0e} of the largest."]
    report("sparse_latency", lines)


if __name__ == "__main__":
    main()
