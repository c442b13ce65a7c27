"""How many points a surface takes adaptively, and how far it is from the dense one.

51 x 51 points in the plane of two filter-normalised directions around a trained network. Points are
counted; no time is measured.
"""

import torch
from landscape_peers import SETTINGS, Case
from timing import report, say

from hessian import Objective
from landscape import adaptive_surface, evaluate, grid

SIDE = 51
HEADS = ("images", "points", "fewer", "reported", "95 %", "largest")
IMAGES = {"mlp": 1_000, "cnn": 256}


def main() -> None:
    """Print and keep the table."""
    torch.set_num_threads(1)
    lines = [
        f"{SIDE} x {SIDE} points, tol = 0.01. The error reported is the largest |difference in",
        "log L| at points held out; the others are over all interpolated points.",
        "",
        f"  {'':24}" + "".join(f"{head:>10}" for head in HEADS),
    ]
    axis = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    for name, images in IMAGES.items():
        say(name)
        case = Case(SETTINGS[name])
        data = case.x[:images], case.y[:images]
        objective = Objective(case.model, case.criterion, data, batch_size=128)
        found = adaptive_surface(objective, case.plane, axis, axis)
        dense = evaluate(objective, case.plane, grid(axis, axis))
        off = torch.log(found.evaluation.mean / dense.mean).abs()[~found.measured]
        fewer = SIDE**2 / found.num_evaluations
        lines.append(
            f"  {SETTINGS[name].title:24}{images:10,}{found.num_evaluations:10}{fewer:10.1f}"
            f"{found.error:10.4f}{float(off.quantile(0.95)):10.4f}{float(off.max()):10.4f}"
        )
    report("landscape_adaptive", lines)


if __name__ == "__main__":
    main()
