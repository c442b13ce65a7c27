"""Pruning without retraining: every method on the same dense networks, as ``flatvalley compare``.

One table a plan, in ``results/pruning_<plan>.txt``. All weights count for the sparsity, biases
included, and accuracy is that on all test images. Methods look at calibration images from the
training set; those marked so take their labels. Settings were chosen on training images that were
held out, with networks of another seed: the plans "choose-…", whose tables are kept beside the
others. A staged method makes one run through all sparsities; products, gradients and seconds of the
processor are those of all of it. An interrupted plan goes on where it was stopped.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from timing import report, say

from flatvalley.data import Dataset, load_dataset
from flatvalley.run import Run
from flatvalley.studies.compare import CompareFindings, compare
from flatvalley.studies.compare_config import CompareConfig
from flatvalley.studies.compare_figures import draw_comparison
from flatvalley.studies.compare_report import (
    compare_tables,
    console_summary,
    summary,
    write_compare_report,
)
from flatvalley.train_config import TrainConfig

SPARSITIES = (0.9, 0.95, 0.97, 0.98, 0.99)
SEEDS, CHOOSING_SEEDS = (0, 1, 2), (100,)
HELD_OUT = 1 / 6


@dataclass(frozen=True)
class Plan:
    """What is compared on one kind of network."""

    training: TrainConfig
    methods: tuple[str, ...]
    choices: tuple[str, ...]
    """Rows of the plan that chooses: settings between bars."""
    calibration: int
    calibration_batch: int = 2_000
    """Of them in a forward pass: convolutions are fastest with few."""
    sparsities: tuple[float, ...] = SPARSITIES
    seeds: tuple[int, ...] = SEEDS

    def config(self, *, choosing: bool) -> CompareConfig:
        """Return the settings of the comparison."""
        training = replace(self.training, validation=HELD_OUT) if choosing else self.training
        return CompareConfig(
            training,
            self.choices if choosing else self.methods,
            self.sparsities,
            CHOOSING_SEEDS if choosing else self.seeds,
            self.calibration,
            self.calibration_batch,
        )


MLP = TrainConfig(
    model="lenet-300-100",
    data="mnist",
    runs=("sgd",),
    epochs=10,
    batch_size=128,
    lr=0.1,
    threads=1,
)
BASELINES = (
    "random",
    "magnitude",
    "magnitude:allocation=uniform",
    "obd",
    "wanda",
    "wanda:per=global",
    "obc:allocation=uniform",
    "obc",
    "obc:allocation=relative,inputs=pruned",
    "woodfisher:stages=4",
)
DIRECTIONAL = (
    "soft-threshold",
    "dp-projector:k=100",
    "dp-filter",
    "dp-transport",
    "path:k=100",
)
TRAININGS = ("grda", "gradual-magnitude")
PLANS = {
    # At most 700 products.
    "lenet-300-100": Plan(
        MLP,
        (
            "krylov:temperature=4,preconditioner=rows,stages=24,products=25",
            "krylov:temperature=4,saliency=kronecker",
            "eigenspace:k=100,tol=0.1,max_products=130,stages=8",
            *BASELINES,
            *DIRECTIONAL,
            *TRAININGS,
        ),
        # One thing after the other: temperature, damping, stages, preconditioner, saliency.
        (
            "krylov:temperature=1,saliency=kronecker",
            "krylov:temperature=2,saliency=kronecker",
            "krylov:temperature=4,saliency=kronecker",
            "krylov:temperature=8,saliency=kronecker",
            "krylov:temperature=4,damping=0.03,saliency=kronecker",
            "krylov:temperature=4,damping=0.1,saliency=kronecker",
            "krylov:temperature=4,damping=1.0,saliency=kronecker",
            "krylov:temperature=4,stages=24,products=25,saliency=kronecker",
            "krylov:temperature=4,stages=48,products=13,saliency=kronecker",
            "krylov:temperature=4,preconditioner=rows,saliency=kronecker",
            "krylov:temperature=4,saliency=magnitude",
            "krylov:temperature=4,saliency=diagonal",
            "krylov:temperature=4",
            "krylov:temperature=4,preconditioner=rows",
            "krylov:temperature=4,stages=24,products=25",
            "krylov:temperature=4,preconditioner=rows,stages=24,products=25",
            "krylov:temperature=4,preconditioner=rows,stages=24,products=25,damping=1.0",
        ),
        10_000,
    ),
    # At most 700 products up to 98 %, of which the plan above takes 800.
    "lenet-300-100-eigenspace": Plan(
        MLP,
        ("eigenspace:k=100,tol=0.1,max_products=130,stages=6",),
        (),
        10_000,
        sparsities=(0.95, 0.97, 0.98),
    ),
    # At most 10,000 products.
    "lenet-300-100-push": Plan(
        MLP,
        ("krylov:temperature=4,preconditioner=rows,stages=100,products=90",),
        (),
        10_000,
        sparsities=(0.98, 0.99),
    ),
    # At most 250 products. The settings are those chosen for LeNet-300-100.
    "lenet-5": Plan(
        replace(MLP, model="lenet-5", lr=0.05, epochs=4, schedule="step:at=3", channels_last=True),
        (
            "krylov:temperature=4,preconditioner=rows,products=17",
            *BASELINES,
        ),
        (),
        3_000,
        250,
    ),
    "lenet-300-100-cifar10": Plan(
        replace(MLP, data="pruning_tables:grey_cifar10"),
        (
            "krylov:temperature=4,preconditioner=rows,stages=24,products=25",
            *BASELINES,
        ),
        (),
        10_000,
    ),
    "resnet20": Plan(
        replace(
            MLP,
            model="resnet20",
            data="cifar10",
            train_samples=5_000,
            epochs=8,
            batch_size=32,
            schedule="step:at=7",
            augment="crop-flip",
            channels_last=True,
        ),
        (
            "krylov:temperature=4,preconditioner=rows,products=12,stages=6",
            "compensated:after=obc,temperature=4,damping=3.0,preconditioner=rows,products=24",
            *BASELINES,
        ),
        (),
        500,
        100,
        (0.8, 0.9, 0.95),
        (0,),
    ),
}


def grey_cifar10(seed: int = 0) -> Dataset:
    """Return CIFAR-10 as MNIST's shape: grey images, without the two outermost rows of pixels."""
    data = load_dataset("cifar10")
    shares = torch.tensor([0.299, 0.587, 0.114])[:, None, None]

    def grey(images: torch.Tensor) -> torch.Tensor:
        flat = (images * shares).sum(dim=1, keepdim=True)[:, :, 2:-2, 2:-2]
        return flat.contiguous()

    return replace(
        data,
        name="grey CIFAR-10",
        train_inputs=grey(data.train_inputs),
        test_inputs=grey(data.test_inputs),
    )


def run_plan(name: str, config: CompareConfig, workers: int) -> None:
    """Compute what is missing of a plan, and keep its table."""
    folder = Path("runs") / "pruning_tables" / name
    run = Run(folder, "compare", config.identity())
    findings = compare(run, config, workers=workers, console=Console(stderr=True))
    for table, rows in compare_tables(findings).items():
        run.write_table(table, rows)
    run.finish(summary(findings))
    say(f"report: {write_compare_report(findings, run, draw_comparison(findings, run))}")
    console = Console(width=180, no_color=True)
    with console.capture() as shown:
        chooses = config.training.validation > 0
        console.print(_held_out(findings) if chooses else console_summary(findings))
    training = config.training
    lines = [
        *(__doc__ or "").strip().splitlines(),
        "",
        f"{training.model}, {training.data}: {training.epochs} epochs of SGD at {training.lr} "
        f"({training.schedule}); {findings.num_calibration_samples} calibration images, "
        f"{findings.num_weights:,} weights.",
        "",
        *(line.rstrip() for line in shown.get().splitlines()),
    ]
    lines += [f"{row.row.title}: {remark}" for row in findings.rows for remark in row.remarks]
    report(f"pruning_{name}", lines)


def _held_out(findings: CompareFindings) -> Table:
    """What the samples held out say: accuracy, and beside it the distance to the dense network."""
    seeds = ", ".join(map(str, findings.config.seeds))
    table = Table(title=f"On the images held out, seeds {seeds}: accuracy in %, KL divergence")
    table.add_column("method")
    for share in findings.config.sparsities:
        table.add_column(f"{share:.0%}", justify="right")
    table.add_column("products", justify="right")
    for row in findings.rows:
        cells = [cell for cell in findings.cells if cell["spec"] == row.row.text]
        shown = []
        for share in findings.config.sparsities:
            here = [cell for cell in cells if cell["wanted"] == share]
            right, far = (
                fmean(cell[f"validation_{key}"] for cell in here)
                for key in ("accuracy", "distance")
            )
            shown.append(f"{100 * right:.2f} {far:.4f}")
        most = fmean(cell["products"] for cell in cells if cell["wanted"] == share)
        table.add_row(row.row.title, *shown, f"{most:.0f}")
    return table


def main() -> None:
    """Run the plans that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="*", default="all", choices=[*PLANS, "all"])
    parser.add_argument("--choose", action="store_true", help="compare settings on held-out images")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    for plan in PLANS if "all" in arguments.plans else arguments.plans:
        if arguments.choose and not PLANS[plan].choices:
            continue
        name = f"choose-{plan}" if arguments.choose else plan
        run_plan(name, PLANS[plan].config(choosing=arguments.choose), arguments.workers)


if __name__ == "__main__":
    main()
