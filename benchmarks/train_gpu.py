"""The paper's networks on all of CIFAR-10 with gRDA, and the price of a step, on a CUDA device.

One call, which goes on where it was stopped:

    python benchmarks/train_gpu.py --vgg16-epochs 60 --wrn-epochs 20

Trains SGD and gRDA side by side (``flatvalley train``'s own training, into ``runs/train_gpu``) with
the paper's recipes, shortened to the epochs given, and sets accuracy and sparsity beside what was
published. In fewer epochs the same c ends at a smaller threshold; so each exponent mu runs twice:
with the paper's c, and with the c that reaches the paper's final threshold. The weights of all
minima are kept, compact. Then the time and the memory of a training step of ResNet-50 with SGD and
with gRDA, and of the optimizer's step alone, all in turn.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, report, say
from torch import nn

from flatvalley.data import Dataset
from flatvalley.models.resnet import resnet50
from flatvalley.recipes import RECIPES, Recipe
from flatvalley.run import plain, write_atomically
from flatvalley.studies.train_figures import draw_training
from flatvalley.studies.train_report import write_train_report
from flatvalley.train_config import TrainConfig
from flatvalley.training import train
from pruning import GRDA

Record = dict[str, Any]
STEP_BATCH, STEP_REPEATS = 64, 20
ROUNDS = 10
"""Optimizer steps in one measurement: one alone is shorter than the clock's own cost."""


def shortened(
    recipe: Recipe, epochs: int, mus: list[float] | None
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the recipe with fewer epochs, and every run's counterpart in the paper.

    The threshold at the end is proportional to c · E^μ at E epochs of the same schedule, so c is
    multiplied by (E₀ / E)^μ to end where the paper's ended.
    """
    runs: list[str] = []
    counterpart: dict[str, str] = {}
    for text, spec in zip(recipe.config.runs, recipe.config.specs, strict=True):
        if spec.name == "grda" and mus and spec.settings["mu"] not in mus:
            continue
        versions = [text]
        if spec.name == "grda" and epochs < recipe.config.epochs:
            c, mu = spec.settings["c"], spec.settings["mu"]
            scaled = c * (recipe.config.epochs / epochs) ** mu
            versions.append(f"grda:c={scaled:.4g},mu={mu:g}")
        runs += versions
        counterpart |= dict.fromkeys(versions, text)
    return replace(recipe.config, epochs=epochs, runs=tuple(runs)), counterpart


def trained(
    name: str, config: TrainConfig, counterpart: dict[str, str], folder: Path, data: Dataset | None
) -> tuple[list[str], Record]:
    """Train a recipe; return its table and its record."""
    recipe = RECIPES[name]
    began = time.perf_counter()
    shown = -1

    def progress(step: int, steps: int, losses: Any) -> None:
        nonlocal shown
        if step * 20 // steps > shown:
            shown = step * 20 // steps
            say(f"{name}: step {step:,} of {steps:,}")

    changed = {
        key: value
        for key, value in config.identity().items()
        if value != recipe.config.identity()[key]
    }
    origin = {"name": name, "overrides": changed}
    result = train(config, folder, data=data, recipe=origin, progress=progress)
    assert result.run is not None
    write_train_report(result, result.run, draw_training(result, result.run))
    seconds = sum(row["training_seconds"] for row in result.tables["time"])
    lines = [
        f"{name}: {config.epochs} of {recipe.config.epochs} epochs, {result.num_weights:,} "
        f"weights, {config.precision}, {seconds:,.0f} s of training for {len(result.runs)} runs "
        f"({seconds / result.num_steps / len(result.runs) * 1000:.1f} ms a step)",
        f"{'':28}{'accuracy':>10}{'zeros':>9}{'threshold':>11}{'published':>12}{'zeros':>9}",
    ]
    for run in result.runs:
        accuracy, zeros = recipe.published[counterpart[run.name]]
        lines.append(
            f"{run.name:28}{100 * run.test_accuracy:9.2f}%{100 * run.sparsity:8.2f}%"
            f"{run.row['threshold']:11.4f}{100 * accuracy:11.2f}%{100 * zeros:8.2f}%"
        )
    ends = [path.parent for path in folder.glob("*/weights.safetensors")]
    compact = sum(min(p.stat().st_size for p in end.glob("*.safetensors")) for end in ends)
    lines += [f"weights kept in {folder}, {compact / 2**20:.0f} MiB in the compact form", ""]
    record = {
        "epochs": config.epochs,
        "seconds": seconds,
        "wall": time.perf_counter() - began,
        "runs": {run.name: dict(run.row) for run in result.runs},
    }
    return lines, record


class Clock:
    """Seconds of a call, by CUDA events on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def seconds(self, call: Callable[[], object]) -> float:
        """Run the call and return how long it took."""
        if not self.cuda:
            began = time.process_time()
            call()
            return time.process_time() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000


def steps_of_resnet50(device: str, tiny: bool) -> tuple[list[str], Record]:
    """Time and memory of whole steps and of the optimizer's alone, SGD and gRDA in turn."""
    clock = Clock(device)
    shape = (2, 3, 32, 32) if tiny else (STEP_BATCH, 3, 224, 224)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, shape[:1], generator=generator).to(device)
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD, foreach": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
        "GRDA": lambda p: GRDA(p, 1e-3, c=1e-3, mu=0.55),
    }
    record: Record = {}
    for name, make in makers.items():
        # One at a time, so that the peak is its own.
        if clock.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step, _ = _whole_and_alone(make, x, y)
        for _ in range(3):
            step()
        record[name] = {"peak": torch.cuda.max_memory_allocated() if clock.cuda else 0}
        del step
    built = {name: _whole_and_alone(make, x, y) for name, make in makers.items()}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in built}
    for _ in range(2 if tiny else STEP_REPEATS):
        for name, (whole, alone) in built.items():
            times[name][0].append(clock.seconds(whole))
            times[name][1].append(clock.seconds(alone) / ROUNDS)
    for name, (whole_times, alone_times) in times.items():
        record[name] |= {
            "step": statistics.median(whole_times),
            "optimizer": statistics.median(alone_times),
        }
    base = record["SGD, foreach"]
    lines = [
        f"ResNet-50, batch {shape[0]} of {shape[2]}x{shape[3]}, channels last; medians, in turn",
        f"{'':16}{'step ms':>10}{'x SGD':>8}{'optimizer ms':>14}{'x SGD':>8}{'peak MiB':>10}",
    ]
    for name, row in record.items():
        lines.append(
            f"{name:16}{1000 * row['step']:10.2f}{row['step'] / base['step']:8.3f}"
            f"{1000 * row['optimizer']:14.3f}{row['optimizer'] / base['optimizer']:8.2f}"
            f"{row['peak'] / 2**20:10,.0f}"
        )
    size = sum(p.numel() for p in resnet50(seed=0).parameters()) * 4 / 2**20
    lines += [f"one copy of the parameters: {size:.0f} MiB", ""]
    return lines, record


def _whole_and_alone(
    make: Callable[[Any], torch.optim.Optimizer], x: torch.Tensor, y: torch.Tensor
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A whole training step of a fresh ResNet-50, and some steps of its optimizer alone."""
    model = resnet50(seed=0).to(x.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make(model.parameters())

    def whole() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def alone() -> None:
        for _ in range(ROUNDS):
            optimizer.step()

    return whole, alone


def synthetic() -> Dataset:
    """A few random images, for a trial of the script."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, 3, 32, 32), generator=generator)
    y = torch.randint(0, 10, (4,), generator=generator)
    return Dataset("synthetic", x, y, x[:2], y[:2], 10)


def main() -> None:
    """Run everything, print the tables and keep them."""
    parser = argparse.ArgumentParser(description="gRDA on the paper's networks, on a CUDA device.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="tf32", choices=["float32", "tf32", "bf16"])
    parser.add_argument("--vgg16-epochs", type=int, default=60, help="0 leaves VGG16 out")
    parser.add_argument("--wrn-epochs", type=int, default=20, help="0 leaves WRN-28-10 out")
    parser.add_argument("--mus", type=float, nargs="*", help="only these of the paper's exponents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train_gpu"))
    # A trial of the script itself on a CPU: a few random images, small epochs, nothing kept.
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tiny = arguments.tiny
    device = "cpu" if tiny else arguments.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(
            f"train_gpu: no CUDA device is available to torch {torch.__version__}. On a CPU train "
            "a smaller network: flatvalley train resnet20-cifar10 --epochs 10."
        )
    lines: list[str] = []
    record: Record = {}
    wanted = {"vgg16-cifar10": arguments.vgg16_epochs, "wrn28x10-cifar10": arguments.wrn_epochs}
    for name, epochs in wanted.items():
        if not epochs:
            continue
        config, counterpart = shortened(RECIPES[name], 1 if tiny else epochs, arguments.mus)
        config = replace(
            config,
            device=device,
            precision="float32" if tiny else arguments.precision,
            channels_last=True,
            seed=arguments.seed,
        )
        if tiny:
            runs = (config.runs[0], config.runs[-1])
            config = replace(config, runs=runs, batch_size=2)
        folder = arguments.out / f"{name}-{config.epochs}-{config.precision}-{config.seed}"
        more, record[name] = trained(
            name, config, counterpart, folder, synthetic() if tiny else None
        )
        lines += more
    more, record["resnet50"] = steps_of_resnet50(device, tiny)
    lines += more
    if tiny:
        print("\n".join(lines))
        return
    device_name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    report(f"train_gpu_{device_name}", lines)
    path = RESULTS / f"train_gpu_{device_name}.json"
    write_atomically(path, (json.dumps(plain(record), indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
