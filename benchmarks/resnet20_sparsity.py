"""CIFAR-10 with ResNet-20: gRDA at two sparsities beside SGD and gradual magnitude pruning.

A part of the data and few epochs, so that it fits two CPU cores: a comparison at equal budget, not
the accuracy that ResNet-20 can have. The images are JPEG files, so that even a full training would
not give the published numbers. Same starts, same batches, crops and flips, same learning rate, two
seeds; accuracy on all 10,000 test images after the last epoch. Kernels and the last matrix are
pruned; batch normalisation and the bias, 0.5 % of the weights, stay dense and count in the
sparsity.
"""

import argparse

import torch
from timing import report
from training_cells import Cells, Row, table

from flatvalley.data import load_dataset
from flatvalley.train_config import TrainConfig

TARGETS = (0.8, 0.9)
SEEDS = (0, 1)
KEEP = "keep=*bias+*.bn?.weight+1.weight"
"""The bias, and scales and shifts of the normalisation."""


def settings(run: str, seed: int) -> TrainConfig:
    """Return the settings of one run."""
    return TrainConfig(
        model="resnet20",
        data="cifar10",
        runs=(run,),
        train_samples=5_000,
        epochs=8,
        batch_size=32,
        lr=0.1,
        schedule="step:at=7",
        augment="crop-flip",
        channels_last=True,
        seed=seed,
        eval_every=8,
        log_every=1_000_000,
        threads=1,
    )


def main() -> None:
    """Run what is missing; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--known", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[Row, str] = {("SGD", 0.0): "sgd"}
    runs |= {("gRDA", target): f"grda:target={target},{KEEP}" for target in TARGETS}
    runs |= {("magnitude", target): f"magnitude:target={target},{KEEP}" for target in TARGETS}
    data = None if arguments.known else load_dataset("cifar10")
    cells = Cells("resnet20_sparsity", data)
    ends = cells.ends(runs, settings, SEEDS)
    config = settings("sgd", 0)
    lines = [
        *(__doc__ or "").strip().splitlines(),
        "",
        f"{config.train_samples:,} images, {config.epochs} epochs, batch {config.batch_size}, "
        f"learning rate {config.lr} ({config.schedule}), mu 0.6",
        *table(ends),
    ]
    report("resnet20_sparsity", lines)


if __name__ == "__main__":
    main()
