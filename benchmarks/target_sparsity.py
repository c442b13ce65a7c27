"""MNIST: the sparsity that ``target_sparsity`` reaches, and the accuracy it costs.

SGD, gRDA with ``target_sparsity`` and gradual magnitude pruning: the same starts, the same batches,
the same number of epochs and learning rate, three seeds. Accuracy is that on the test images after
the last epoch, whatever it was before. What had to be chosen was chosen on 10,000 of the training
images that were held out, with a seed of its own.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timing import report
from training_cells import Cell, Cells

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
    lr: float
    magnitude: str
    """Settings of gradual magnitude pruning."""
    choices: tuple[tuple[str, float, int], ...]
    """Runs, learning rates and epochs that were compared on held-out images."""


MAGNITUDES = (
    "magnitude:target=0.95,end=0.5",
    "magnitude:target=0.95,end=0.75",
    "magnitude:target=0.95,end=0.5,keep=*bias",
    "magnitude:target=0.95,end=0.75,keep=*bias",
)
PLANS = {
    plan.model: plan
    for plan in (
        Plan(
            "lenet-300-100",
            epochs=20,
            lr=0.1,
            magnitude="end=0.75,keep=*bias",
            choices=tuple((run, 0.1, 20) for run in MAGNITUDES),
        ),
        Plan(
            "lenet-5",
            epochs=4,
            lr=0.1,
            magnitude="end=0.75,keep=*bias",
            choices=(),
        ),
    )
}


def settings(plan: Plan, run: str, seed: int) -> TrainConfig:
    """Return the settings of one run on all training images."""
    return TrainConfig(
        model=plan.model,
        runs=(run,),
        epochs=plan.epochs,
        lr=plan.lr,
        seed=seed,
        eval_every=plan.epochs,
        log_every=1_000_000,
        threads=1,
    )


def choice(plan: Plan, run: str, lr: float, epochs: int) -> TrainConfig:
    """Return the settings of one run with held-out images."""
    return TrainConfig(
        model=plan.model,
        runs=(run,),
        epochs=epochs,
        lr=lr,
        seed=CHOOSING_SEED,
        validation=1 / 6,
        eval_every=epochs,
        log_every=1_000_000,
        threads=1,
    )


def runs_of(plan: Plan) -> list[tuple[str, str, float]]:
    """Return title, run and target of every row of the table."""
    rows = [("SGD", "sgd", 0.0)]
    rows += [("gRDA", f"grda:target={target}", target) for target in TARGETS]
    return rows + [
        ("magnitude", f"magnitude:target={target},{plan.magnitude}", target) for target in TARGETS
    ]


def table(plan: Plan, cells: Cells) -> list[str]:
    """Run what is missing and return the lines for one network."""
    ends = {
        (title, target): [cells.get(settings(plan, run, seed)) for seed in SEEDS]
        for title, run, target in runs_of(plan)
    }
    dense = [cell.accuracy for cell in ends["SGD", 0.0]]
    lines = [
        f"{plan.model}: {plan.epochs} epochs, learning rate {plan.lr}, batch 128, mu 0.6; "
        f"magnitude: {plan.magnitude}",
        f"{'':10}{'target':>7}{'sparsity':>10}{'range':>16}{'accuracy':>10}{'range':>15}"
        f"{'below SGD':>11}{'worst':>7}{'c':>10}",
    ]
    for (title, target), found in ends.items():
        sparsities, accuracies = [c.sparsity for c in found], [c.accuracy for c in found]
        below = [d - a for d, a in zip(dense, accuracies, strict=True)]
        lines.append(
            f"{title:10}{target:7.2f}{statistics.mean(sparsities):10.4f}"
            f"{_range(sparsities, 4):>16}{statistics.mean(accuracies):10.2f}"
            f"{_range(accuracies, 2):>15}{statistics.mean(below):11.2f}{max(below):7.2f}"
            + (f"{statistics.mean(c.constant for c in found):10.5f}" if title == "gRDA" else "")
        )
    return [*lines, "", *verdicts(plan, ends), "", *choices(plan, cells), ""]


def verdicts(plan: Plan, ends: dict[tuple[str, float], list[Cell]]) -> list[str]:
    """Return one line for each thing that must hold."""
    off = max(abs(c.sparsity - target) for target in TARGETS for c in ends["gRDA", target])
    lines = [
        f"{_word(off <= 0.01)} {plan.model}: sparsity within .01 of the target in all "
        f"{len(TARGETS) * len(SEEDS)} runs of gRDA (largest distance {off:.4f})"
    ]
    for target, allowed in POINTS_BELOW.items():
        below = statistics.mean(c.accuracy for c in ends["SGD", 0.0]) - statistics.mean(
            c.accuracy for c in ends["gRDA", target]
        )
        lines.append(
            f"{_word(below <= allowed)} {plan.model}: at {target:.2f} gRDA is {below:.2f} points "
            f"below SGD in the mean (allowed: {allowed})"
        )
    return lines


def choices(plan: Plan, cells: Cells) -> list[str]:
    """Return what was compared on held-out images."""
    if not plan.choices:
        return ["Nothing was chosen here: rate and settings are those of LeNet-300-100."]
    lines = ["Compared on 10,000 held-out training images, one seed:"]
    for run, lr, epochs in plan.choices:
        cell = cells.get(choice(plan, run, lr, epochs))
        lines.append(
            f"  {run:44} rate {lr:<5} {epochs:2} epochs {cell.accuracy:7.2f} % at sparsity "
            f"{cell.sparsity:.4f}"
        )
    return lines


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def _word(held: bool) -> str:
    return "PASS" if held else "FAIL"


def main() -> None:
    """Run one network or both; print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(PLANS), help="only this network")
    parser.add_argument("--choose", action="store_true", help="only what is chosen beforehand")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells("target_sparsity", load_dataset("mnist"))
    plans = [PLANS[arguments.model]] if arguments.model else list(PLANS.values())
    if arguments.choose:
        for plan in plans:
            print("\n".join(choices(plan, cells)))
        return
    lines = [line for plan in plans for line in table(plan, cells)]
    name = "target_sparsity" + (f"-{arguments.model}" if arguments.model else "")
    report(name, [*(__doc__ or "").strip().splitlines(), "", *lines])


if __name__ == "__main__":
    main()
