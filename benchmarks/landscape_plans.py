"""Time per point by every way of evaluating, one option after the other, and what compiling takes.

One thread, CPU seconds, in turn. Networks are as they are initialised, images are noise: only time
and rounding are asked for. Batch norm uses statistics of the images, the same at every point.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from timing import interleaved, report, say
from torch import nn

from flatvalley.models import build_named_model
from hessian import Objective
from landscape import BatchNorm, Plan, Plane, grid, random_directions
from landscape.plans import relative_deviation
from landscape.point_meter import PointMeter

REPEATS = 5
SIDE = 3
LAST = Plan(channels_last=True)
WAYS = {
    "plain": Plan(),
    "channels last": LAST,
    "first layer reused": Plan(reuse_first_layer=True),
    "both": replace(LAST, reuse_first_layer=True),
    "both, linear layers by oneDNN": replace(LAST, reuse_first_layer=True, onednn_linear=True),
    "compiled": Plan(compiled=True),
    "compiled, channels last": replace(LAST, compiled=True),
}


@dataclass(frozen=True)
class Setting:
    """A network and how many images of which shape it sees."""

    name: str
    shape: tuple[int, int, int]
    images: int


SETTINGS = (
    Setting("lenet-300-100", (1, 28, 28), 4_096),
    Setting("lenet-5", (1, 28, 28), 1_024),
    Setting("resnet20", (3, 32, 32), 512),
)


def compare(setting: Setting) -> list[str]:
    """Time the ways on one network."""
    model = build_named_model(setting.name, seed=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.images, *setting.shape, generator=generator)
    y = torch.randint(10, (setting.images,), generator=generator)
    with torch.no_grad():
        for _ in range(20):
            model(x[:256])
    model.eval()
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y), batch_size=256)
    plane = Plane.along(objective.weights(), random_directions(objective))
    points = grid(*2 * [torch.linspace(-0.2, 0.2, SIDE)]).reshape(-1, 2)

    def measure(meter: PointMeter) -> list[float]:
        return [float(meter.measure(point)[0, 1]) for point in points]

    ready: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    ways: dict[str, Callable[[], object]] = {}
    for title, plan in WAYS.items():
        say(f"{setting.name}: {title}")
        began = time.perf_counter()
        meter = PointMeter({"objective": objective}, plane, ("loss",), BatchNorm("frozen"), plan)
        found[title] = measure(meter)
        ready[title] = time.perf_counter() - began
        ways[title] = partial(measure, meter)
    seconds = {title: value / SIDE**2 for title, value in interleaved(ways, REPEATS).items()}
    off = {title: relative_deviation(losses, found["plain"]) for title, losses in found.items()}
    lines = [
        f"{setting.name}, {setting.images:,} images in batches of 256",
        "",
        f"  {'':32}{'ms a point':>11}{'of plain':>10}{'deviation':>11}",
    ]
    lines += [
        f"  {title:32}{1e3 * value:11.1f}{value / seconds['plain']:10.2f}{off[title]:11.1e}"
        for title, value in seconds.items()
    ]
    compiled = [title for title in WAYS if WAYS[title].compiled]
    listed = " and ".join(f"{ready[title]:.0f}" for title in compiled)
    lines += ["", f"  The first points of the compiled ways took {listed} s, with the compiler."]
    return [*lines, ""]


def main() -> None:
    """Print and keep the tables."""
    torch.set_num_threads(1)
    lines = []
    for setting in SETTINGS:
        lines += compare(setting)
    report("landscape_plans", lines[:-1])


if __name__ == "__main__":
    main()
