"""MNIST: the sparsity that ``target_sparsity`` reaches, and the accuracy it costs.

SGD, gRDA with ``target_sparsity`` and gradual magnitude pruning: the same starts, the same batches,
the same number of epochs and learning rate, three seeds. Accuracy is that on the test images after
the last epoch, whatever it was before; all weights count in the sparsity. What had to be chosen was
chosen on 10,000 of the training images that were held out, with a seed of its own. A constant rate
ends wherever its noise leaves it: SGD and gRDA with one, and then all three with a tenth of it at
the end, which was brought in after the table of the constant rate had been seen. The target is
there after three quarters of the training time, the sum of the rates, unless ``horizon`` says
otherwise.
"""

import argparse
import statistics
from dataclasses import dataclass, replace

import torch
from timing import report
from training_cells import Cell, Cells, Row, points_below, table

from flatvalley.data import load_dataset
from flatvalley.train_config import TrainConfig

TARGETS = (0.90, 0.95, 0.98)
SEEDS = (0, 1, 2)
CHOOSING_SEED = 100
POINTS_BELOW = {0.90: 0.3, 0.95: 0.5}
"""By how much gRDA's accuracy may be below SGD's, in points."""


@dataclass(frozen=True)
class Plan:
    """What is compared on one network."""

    model: str
    epochs: int
    schedule: str
    lr: float = 0.1
    magnitude: str = ""
    """Settings of gradual magnitude pruning; without it if empty."""
    choices: tuple[tuple[str, float, str], ...] = ()
    """Runs, rates and schedules that were compared on held-out images."""


PLANS = {
    # A constant rate ends wherever its noise leaves it, so the main tables end with a tenth of it.
    "lenet-300-100-constant": Plan("lenet-300-100", 20, "constant"),
    "lenet-300-100": Plan(
        "lenet-300-100",
        20,
        "step:at=18",
        magnitude="end=0.5,keep=*bias",
        choices=tuple(
            (f"magnitude:target=0.95,end={end},keep=*bias", 0.1, "step:at=18")
            for end in (0.5, 0.75)
        ),
    ),
    "lenet-5": Plan(
        "lenet-5",
        8,
        "step:at=6",
        lr=0.2,
        magnitude="end=0.5,keep=*bias",
        choices=(
            ("sgd", 0.05, "step:at=6"),
            ("sgd", 0.1, "step:at=6"),
            ("grda:target=0.95,horizon=1.0", 0.05, "step:at=6"),
            ("grda:target=0.95,horizon=1.0", 0.1, "step:at=6"),
            ("grda:target=0.95,horizon=0.775", 0.1, "step:at=6"),
            ("grda:target=0.95,horizon=0.55", 0.1, "step:at=6"),
            ("grda:target=0.95,horizon=0.775", 0.2, "step:at=6"),
            ("grda:target=0.95,horizon=1.0", 0.1, "cosine"),
            ("grda:target=0.95,horizon=0.587", 0.1, "cosine"),
        ),
    ),
}


def settings(plan: Plan, run: str, seed: int) -> TrainConfig:
    """Return the settings of one run on all training images."""
    return TrainConfig(
        model=plan.model,
        runs=(run,),
        epochs=plan.epochs,
        lr=plan.lr,
        schedule=plan.schedule,
        channels_last=plan.model == "lenet-5",
        seed=seed,
        eval_every=plan.epochs,
        log_every=1_000_000,
        threads=1,
    )


def runs_of(plan: Plan) -> dict[Row, str]:
    """Return the run of every row of the table."""
    rows: dict[Row, str] = {("SGD", 0.0): "sgd"}
    rows |= {("gRDA", target): f"grda:target={target}" for target in TARGETS}
    if not plan.magnitude:
        return rows
    return rows | {
        ("magnitude", target): f"magnitude:target={target},{plan.magnitude}" for target in TARGETS
    }


def lines_for(plan: Plan, cells: Cells) -> list[str]:
    """Run what is missing and return the lines for one network."""
    ends = cells.ends(runs_of(plan), lambda run, seed: settings(plan, run, seed), SEEDS)
    return [
        f"{plan.model}: {plan.epochs} epochs, learning rate {plan.lr} ({plan.schedule}), "
        "batch 128, mu 0.6" + (f"; magnitude: {plan.magnitude}" if plan.magnitude else ""),
        *table(ends),
        "",
        *verdicts(plan, ends),
        "",
        *choices(plan, cells),
        "",
    ]


def verdicts(plan: Plan, ends: dict[Row, dict[int, Cell]]) -> list[str]:
    """Return one line for each thing that must hold."""
    title = f"{plan.model}, {plan.schedule} rate"
    off = [abs(c.sparsity - t) for t in TARGETS for c in ends["gRDA", t].values()]
    lines = []
    if off:
        word = _word(max(off) <= 0.01, len(off) == len(TARGETS) * len(SEEDS))
        lines.append(
            f"{word} {title}: sparsity within .01 of the target in all {len(off)} runs "
            f"of gRDA (largest distance {max(off):.4f})"
        )
    for target, allowed in POINTS_BELOW.items():
        found = points_below(ends, ("gRDA", target))
        if found:
            below = statistics.mean(found)
            word = _word(below <= allowed, len(found) == len(SEEDS))
            lines.append(
                f"{word} {title}: at {target:.2f} gRDA is {below:.2f} points below SGD "
                f"in the mean of {len(found)} seeds (allowed: {allowed})"
            )
    return lines


def choices(plan: Plan, cells: Cells) -> list[str]:
    """Return what was compared on held-out images."""
    if not plan.choices:
        return ["Nothing was chosen here."]
    lines = ["Compared on 10,000 held-out training images, one seed:"]
    for run, lr, schedule in plan.choices:
        config = replace(
            settings(plan, run, CHOOSING_SEED), validation=1 / 6, lr=lr, schedule=schedule
        )
        cell = cells.get(config)
        if cell is not None:
            lines.append(
                f"  {run:44} rate {lr:<5} {schedule:11}{cell.accuracy:7.2f} % "
                f"at sparsity {cell.sparsity:.4f}"
            )
    return lines


def _word(held: bool, complete: bool) -> str:
    """Return the verdict; nothing has held before all seeds are there."""
    return ("PASS" if complete else "OPEN") if held else "FAIL"


def main() -> None:
    """Run one network or both; print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", choices=list(PLANS), help="train for this table only")
    parser.add_argument("--known", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = Cells("target_sparsity", None)
    cells = known if arguments.known else Cells("target_sparsity", load_dataset("mnist"))
    lines = []
    for name, plan in PLANS.items():
        lines += lines_for(plan, cells if arguments.plan in (None, name) else known)
    report("target_sparsity", [*(__doc__ or "").strip().splitlines(), "", *lines])


if __name__ == "__main__":
    main()
