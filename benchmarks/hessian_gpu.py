"""The peer benchmark on a CUDA device, and products with the Hessian of a ResNet-50.

One call, in an environment with the peers (see ``hessian_peers.py``; a peer that is not installed
is left out and named):

    python benchmarks/hessian_gpu.py

Everything is really run: all libraries live side by side in one process and take turns, times are
those of CUDA events around synchronised calls, and the solvers run in full on their own products,
at the settings that ``peer_counts.py`` finds first. All in float32: TF32 is off, for its rounding
is of the size of the goal. curvlinops runs as it is and with its batch product in
``torch.compile``, where that works. The trained networks come from ``--trained``, the folder of
``hessian_peers.py``; those that are missing are trained first.
"""

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from hessian_peers import PACKAGES, ROWS, SEEDS
from peer_counts import HINTS, RememberedProducts, loosest_setting, orthonormal, rayleigh
from peer_libraries import GOAL, LIBRARIES, SOLVERS, K, Library, Product, counted, objective
from peer_problems import (
    SETTINGS,
    Problem,
    floors,
    load,
    plain_columns,
    plain_gradient,
    prepare,
)
from timing import RESULTS, report, say

from flatvalley.models import resnet50
from flatvalley.run import write_atomically
from hessian import hessian_operator, leading_eigenspace

Record = dict[str, Any]
BATCHES = {"mlp": (2500, 10_000), "cnn": (256, 1024, 2048), "resnet50": (16, 32, 64)}
RESNET50_IMAGES = 256
TINY_ROWS = ("kept", "eigenthings", "curvlinops")
compiler = "inductor"


def curvlinops_on_device(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build curvlinops without the way through NumPy, which only its solver needs."""
    return _curvlinops(problem, batch_size).__matmul__


def curvlinops_compiled(problem: Problem, batch_size: int, budget: int) -> Product:
    """Build curvlinops with the product of a batch compiled."""
    operator = _curvlinops(problem, batch_size)
    operator.__dict__["_mp"] = torch.compile(operator._mp, backend=compiler)
    return operator.__matmul__


def _curvlinops(problem: Problem, batch_size: int) -> Any:
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        problem.model,
        problem.criterion,
        problem.parameters,
        problem.batches(batch_size),
        check_deterministic=False,
        num_data=len(problem.inputs),
    )


GPU_LIBRARIES = LIBRARIES | {
    "curvlinops": Library("curvlinops", curvlinops_on_device),
    "curvlinops-compiled": Library("curvlinops, compiled", curvlinops_compiled),
}


class Device:
    """A device with a clock that waits for it, and a meter of its memory."""

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, name.startswith("cuda")

    def seconds(self, call: Callable[[], object]) -> float:
        """Time of one call, by events on a GPU."""
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def begin_memory(self) -> int:
        """Forget the highest use so far; return the bytes in use."""
        if not self.cuda:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def peak_memory(self, before: int) -> float:
        """Bytes in use at most since then, beyond those before; NaN on a CPU."""
        return float(torch.cuda.max_memory_allocated() - before) if self.cuda else math.nan


def synthetic(name: str, model: torch.nn.Module, shape: tuple[int, ...], device: str) -> Problem:
    """Random images and labels for a network that is not trained."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(0, 10, shape[:1], generator=generator).to(device)
    return Problem(name, model.to(device).eval(), inputs, labels, math.nan, math.nan, math.nan)


def products(
    problem: Problem,
    sizes: tuple[int, ...],
    device: Device,
    budget: int,
    repeats: int,
    libraries: Iterable[str] = GPU_LIBRARIES,
) -> tuple[Record, dict[str, Product]]:
    """Every library's best batch size, then all in turn: seconds, ratio to the gradient, memory."""
    v = torch.randn(problem.size, generator=torch.Generator().manual_seed(1)).to(device.name)
    samples = len(problem.inputs)
    gradient_batch = min(
        sizes, key=lambda size: _best(plain_gradient(problem, size), device, repeats=3)
    )
    calls: dict[str, Callable[[], object]] = {"gradient": plain_gradient(problem, gradient_batch)}
    built: dict[str, Product] = {}
    record: Record = {"gradient": {"title": "one gradient", "batch": gradient_batch}}
    for key in libraries:
        library = GPU_LIBRARIES[key]
        times: dict[int, float] = {}
        say(f"{problem.name}: {library.title}")
        try:
            for size in (samples,) if library.one_batch else sizes:
                trial = library.build(problem, size, budget)
                call = _bound(trial, v)
                call()
                times[size] = _best(call, device, repeats=2)
                del trial, call
            batch = min(times, key=lambda size: times[size])
            before = device.begin_memory()
            built[key] = library.build(problem, batch, budget)
            built[key](v)
            built[key](v)
        # Out of memory, not installed, not to be compiled: said in the table.
        except Exception as error:
            built.pop(key, None)
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            record[key] = {"title": library.title, "failed": why}
            continue
        calls[key] = _bound(built[key], v)
        peak = device.peak_memory(before)
        record[key] = {"title": library.title, "batch": batch, "peak": peak}
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for number in range(repeats):
        names = list(calls)
        for key in names[number % len(names) :] + names[: number % len(names)]:
            seconds[key].append(device.seconds(calls[key]))
    gradient = statistics.median(seconds["gradient"])
    for key, found in seconds.items():
        record[key] |= {"seconds": statistics.median(found)}
        record[key] |= {"ratio": record[key]["seconds"] / gradient}
    return record, built


def eigenpairs(
    problem: Problem,
    built: dict[str, Product],
    device: Device,
    *,
    tiny: bool,
) -> Record:
    """Ten pairs by every solver on its own products, in full; residuals in plain torch."""
    remembered = RememberedProducts(built["anew"], problem.size, device.name)
    rows: Record = {}
    hints = dict(HINTS)
    settings: dict[tuple[str, int], Record] = {}
    for seed in SEEDS[:1] if tiny else SEEDS:
        for key, row in ROWS.items():
            if tiny and key not in TINY_ROWS:
                continue
            if tiny:  # without the search for the best setting
                settings[row.solver, seed] = SOLVERS[row.solver][1][0]
            # The compiled product is the better one of curvlinops, where there is one.
            compiled = key == "curvlinops" and "curvlinops-compiled" in built
            library = "curvlinops-compiled" if compiled else row.library
            if library not in built:
                continue
            say(f"{problem.name}: pairs, {row.title}, seed {seed}")
            if (row.solver, seed) not in settings:
                found, _ = loosest_setting(remembered, problem, row.solver, seed, hints)
                settings[row.solver, seed] = found["setting"]
            setting = settings[row.solver, seed]
            solve, vectors = SOLVERS[row.solver][0], None
            with counted(built[library]) as (product, spent):

                def run(
                    solve: Any = solve,
                    product: Product = product,
                    seed: int = seed,
                    setting: Record = setting,
                ) -> None:
                    nonlocal vectors
                    vectors = solve(product, problem, seed, **setting)

                seconds = device.seconds(run)
            assert vectors is not None
            V = orthonormal(vectors)
            worst, values = rayleigh(V, plain_columns(problem, V, _smallest(problem)))
            title = f"{row.title}{', compiled' if compiled else ''}"
            rows.setdefault(key, {"title": title, "runs": []})["runs"].append(
                {
                    "seconds": seconds,
                    "products": spent["products"],
                    "residual": worst,
                    "values": values,
                    "setting": setting,
                }
            )
    return rows


def resnet50_run(device: Device, budget: int, tiny: bool) -> tuple[list[str], Record]:
    """Products and leading pairs at the size of a ResNet-50 on synthetic images."""
    shape = (4, 3, 32, 32) if tiny else (RESNET50_IMAGES, 3, 224, 224)
    problem = synthetic("resnet50", resnet50(seed=0), shape, device.name)
    sizes = (2,) if tiny else BATCHES["resnet50"]
    libraries = ("kept", "anew") if tiny else GPU_LIBRARIES
    record, built = products(problem, sizes, device, budget, 1 if tiny else 7, libraries)
    batch = record["anew"]["batch"]
    built.clear()
    H = hessian_operator(objective(problem, batch), memory_budget=budget)
    space = None

    def run() -> None:
        nonlocal space
        space = leading_eigenspace(H, k=2 if tiny else K, tol=1e-2, max_products=8 if tiny else 200)

    seconds = device.seconds(run)
    assert space is not None
    worst = float(space.residuals.max() / space.values.abs().max())
    lines = [
        f"ResNet-50, not trained, {shape[0]} synthetic images of {shape[2]}x{shape[3]}: "
        f"d = {problem.size:,}",
        *product_lines(record, floors(problem)),
        f"{len(space.values)} pairs: {seconds:.1f} s, {space.num_products} products, largest "
        f"residual {worst:.1e} of the largest eigenvalue",
        "",
    ]
    found = {"seconds": seconds, "products": space.num_products, "residual": worst}
    return lines, {"products": record, "pairs": found}


def product_lines(record: Record, lowest: dict[str, float]) -> list[str]:
    """The table of products."""
    gradient = record["gradient"]
    lines = [
        f"one gradient, plain torch: {1000 * gradient['seconds']:.2f} ms, batch "
        f"{gradient['batch']:,}",
        f"{'a product, in gradients':32}{'':>7}{'ms':>10}{'batch':>8}{'MiB':>9}",
    ]
    for key, row in record.items():
        if "failed" in row:
            lines.append(f"{row['title']:32}  {row['failed']}")
        elif key != "gradient":
            lines.append(
                f"{row['title']:32}{row['ratio']:7.2f}{1000 * row['seconds']:10.2f}"
                f"{row['batch']:8,}{row['peak'] / 2**20:9,.0f}"
            )
    kept, anew = lowest["graph kept"], lowest["computed anew"]
    lines.append(f"floors in flops of the layers: graph kept {kept:.2f}, computed anew {anew:.2f}")
    return lines


def pair_lines(rows: Record) -> list[str]:
    """The table of eigenpairs."""
    mean = statistics.mean
    lines = [
        f"{f'{K} pairs to {GOAL:g}':32}{'s':>9}{'x ours':>9}{'products':>10}{'residual':>11}",
    ]
    ours = mean(run["seconds"] for run in rows["kept" if "kept" in rows else "anew"]["runs"])
    for row in rows.values():
        seconds = mean(run["seconds"] for run in row["runs"])
        worst = max(run["residual"] for run in row["runs"])
        count = mean(run["products"] for run in row["runs"])
        lines.append(
            f"{row['title']:32}{seconds:9.2f}{seconds / ours:9.2f}{count:10.0f}{worst:11.1e}"
            f"{'' if worst <= GOAL else '  goal not met'}"
        )
    return lines


def _best(call: Callable[[], object], device: Device, repeats: int) -> float:
    return min(device.seconds(call) for _ in range(repeats))


def _bound(product: Product, v: torch.Tensor) -> Callable[[], object]:
    return lambda: product(v)


def _smallest(problem: Problem) -> int:
    return min(len(problem.inputs), BATCHES[problem.name][0])


def main() -> None:
    """Run everything, print the tables and keep them."""
    global compiler
    parser = argparse.ArgumentParser(description="The peer benchmark on a CUDA device.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trained", type=Path, default=Path("runs/hessian_peers"))
    parser.add_argument("--memory-gib", type=float, default=40.0, help="budget of kept graphs")
    # A trial of the script itself: a few random images, nothing kept.
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = Device(arguments.device)
    if device.cuda and not torch.cuda.is_available():
        sys.exit(
            "hessian_gpu: no CUDA device is available to torch "
            f"{torch.__version__}. On a CPU run benchmarks/hessian_peers.py."
        )
    if arguments.tiny:
        torch.set_num_threads(1)
        compiler = "eager"  # the compiler proper takes minutes for a network on a CPU
    tiny, budget = arguments.tiny, int(arguments.memory_gib * 2**30)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    lines = [
        "float32 without TF32; medians of CUDA events for products, whole runs for eigenpairs,",
        f"means over {len(SEEDS)} seeds; residuals measured in plain torch; memory beyond the",
        "model and the data.",
        "",
    ]
    record: Record = {}
    for name, setting in SETTINGS.items():
        if tiny:
            shape = (8, 1, 28, 28) if name == "mlp" else (8, 3, 32, 32)
            problem = synthetic(name, setting.make_model(seed=0), shape, device.name)
        else:
            problem = load(prepare(name, arguments.trained), device=device.name)
        sizes = (4, 8) if tiny else BATCHES[name]
        timed, built = products(problem, sizes, device, budget, repeats=2 if tiny else 15)
        rows = eigenpairs(problem, built, device, tiny=tiny)
        built.clear()
        lines += [
            f"{setting.title}: d = {problem.size:,}, N = {len(problem.inputs):,}",
            *product_lines(timed, floors(problem)),
            *pair_lines(rows),
            "",
        ]
        record[name] = {"products": timed, "pairs": rows}
    more, record["resnet50"] = resnet50_run(device, budget, tiny)
    lines += more
    if tiny:
        print("\n".join(lines))
        return
    device_name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    report(f"hessian_gpu_{device_name}", lines, PACKAGES)
    path = RESULTS / f"hessian_gpu_{device_name}.json"
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
