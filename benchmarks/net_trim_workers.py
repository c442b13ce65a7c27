"""Net-Trim by one process and by two: wall time, and whether the weights are the same bits.

    OMP_NUM_THREADS=1 python benchmarks/net_trim_workers.py

Four hidden layers of equal size, in turn by one process and by two of one thread each, with what it
takes to start them. Wall time means something only while nothing else is running on two cores.
"""

import statistics
import sys
import time

import torch
from timing import report, say
from torch import nn

from pruning import NetworkTrim, net_trim

WIDTH, HIDDEN, SAMPLES = 256, 4, 8000

TINY_WIDTH, TINY_SAMPLES = 24, 100
"""With the argument ``tiny``: to see that it runs. Nothing is written then."""

SHARE = 0.1
"""ε over ‖Y‖_F."""

REPEATS = 3

GOAL = 0.65
"""Wall time of two processes over that of one."""


def network(width: int) -> nn.Sequential:
    """Return hidden layers of equal size with ReLUs, and a small last one."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(HIDDEN):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10)).double()


def main() -> None:
    """Time both and write the table."""
    torch.set_num_threads(1)
    tiny = sys.argv[1:] == ["tiny"]
    width, samples = (TINY_WIDTH, TINY_SAMPLES) if tiny else (WIDTH, SAMPLES)
    model = network(width)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    trims: dict[int, NetworkTrim] = {}
    for repeat in range(1 if tiny else REPEATS):
        for workers in seconds:
            say(f"{workers} process(es), {repeat + 1}")
            began = time.perf_counter()
            trims[workers] = net_trim(model, x, epsilon=SHARE, workers=workers)
            seconds[workers].append(time.perf_counter() - began)
    one, two = (statistics.median(values) for values in seconds.values())
    same = torch.equal(trims[1].weights, trims[2].weights)
    lines = [
        f"{HIDDEN} layers {width} x {width} with ReLUs and one {width} x 10, {samples} samples, "
        f"float64, ε = {SHARE:g} |Y|, median of {len(seconds[1])}",
        "",
        f"  {'processes':>9}{'seconds':>10}",
        *(f"  {n:9}{statistics.median(values):10.1f}" for n, values in seconds.items()),
        "",
        f"  Two over one: {two / one:.2f} (goal {GOAL:g}). The same weights bit for bit: "
        f"{'yes' if same else 'no'}.",
        f"  Iterations: {', '.join(str(e.trims[0].iterations) for e in trims[1].layers)}.",
    ]
    if tiny:
        sys.stdout.write("\n".join([*lines, ""]))
    else:
        report("net_trim_workers", lines)


if __name__ == "__main__":
    main()
