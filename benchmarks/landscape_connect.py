"""What lies between SGD and gRDA: the line, a trained curve, and lines of control.

Three networks: an MLP on digits, LeNet-5 on MNIST, and a CNN with batch norm on CIFAR-10. SGD and
gRDA are trained side by side from one start on the same batches, and SGD a second time from another
start. Two connections are measured, as ``flatvalley connect`` does:

  SGD to gRDA         beside the controls: the line to the second SGD, and the line to SGD pruned by
                      magnitude to gRDA's sparsity
  SGD to second SGD   the pair that has a barrier; its curve shows whether barriers can be avoided

A barrier is the largest excess over the chord between the ends, with a 95 % interval over samples
that allows for the choice of the largest point; statistics of batch norm are gathered anew on 512
training images at every point. "share" is the curve's barrier in train loss over the line's, where
the line has one: at most a fifth is wanted. A run that was stopped goes on.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from landscape_batch_norm import network
from timing import report, say
from torch import nn

from flatvalley.run import Run
from flatvalley.studies.connect import (
    CURVE,
    LINE,
    ConnectConfig,
    ConnectFindings,
    connect,
    connect_tables,
)
from flatvalley.studies.connect_report import draw_connection, summary, write_connect_report
from flatvalley.studies.landscape_networks import OwnModel, find_network, load_networks
from flatvalley.train_config import TrainConfig, file_name
from flatvalley.training import train

FOLDER = Path("runs") / "landscape_connect"
OTHER = 1
"""Added to the seed of the second SGD: of its start, too."""
SECOND, SPARSE = "second SGD", "gRDA"


@dataclass(frozen=True)
class Subject:
    """A network, its training, and how its curve is trained."""

    title: str
    training: TrainConfig
    connection: ConnectConfig


def batch_norm_cnn() -> nn.Module:
    """Return the CNN of ``landscape_batch_norm.py``."""
    return network(int(torch.initial_seed()))


SUBJECTS = {
    "digits": Subject(
        "digits-mlp, digits",
        TrainConfig(
            model="digits-mlp",
            data="digits",
            runs=("sgd", "grda:target=0.8"),
            epochs=60,
            batch_size=32,
            lr=0.1,
            threads=1,
        ),
        ConnectConfig(epochs=60, lr=0.1, points=41),
    ),
    "lenet-5": Subject(
        "LeNet-5, MNIST",
        TrainConfig(
            model="lenet-5",
            data="mnist",
            runs=("sgd", "grda:target=0.9"),
            epochs=6,
            batch_size=128,
            lr=0.05,
            train_samples=10_000,
            threads=1,
        ),
        ConnectConfig(epochs=20, lr=0.05, points=21, samples=2_000),
    ),
    "batch-norm-cnn": Subject(
        "CNN with batch norm, CIFAR-10",
        TrainConfig(
            model="landscape_connect:batch_norm_cnn",
            data="cifar10",
            runs=("sgd:momentum=0.9", "grda:target=0.5"),
            epochs=10,
            batch_size=100,
            lr=0.05,
            train_samples=5_000,
            channels_last=True,
            threads=1,
        ),
        ConnectConfig(epochs=40, lr=0.05, points=21, samples=2_000),
    ),
}


def connections(subject: Subject, folder: Path) -> Mapping[str, ConnectFindings]:
    """Train what is missing, and measure both connections."""
    both, second = folder / "trained", folder / "second"
    config = subject.training
    train(config, both)
    train(replace(config, runs=config.runs[:1], seed=config.seed + OTHER), second)
    places = {
        "SGD": str(both),
        SPARSE: str(both / file_name(config.runs[1])),
        SECOND: str(second),
    }
    found = {}
    for end, names in ((SPARSE, ("SGD", SPARSE, SECOND)), (SECOND, ("SGD", SECOND))):
        say(f"SGD to {end}")
        networks = load_networks(
            [find_network(places[name], OwnModel()) for name in names],
            samples=subject.connection.samples,
        )
        run = Run(
            folder / f"to-{end.replace(' ', '-')}",
            "connect",
            {"training": repr(config), "connection": repr(subject.connection)},
        )
        found[end] = connect(run, networks, names, subject.connection)
        for name, rows in connect_tables(found[end]).items():
            run.write_table(name, rows)
        run.finish(summary(found[end]))
        write_connect_report(found[end], run, draw_connection(found[end], run))
    return found


def lines_of(subject: Subject, found: Mapping[str, ConnectFindings]) -> list[str]:
    """Return a subject's part of the table."""
    networks = found[SPARSE].networks
    start, end = networks.weights[:2]
    lines = [
        f"{subject.title}: {len(start):,} weights, gRDA with "
        f"{100 * float((end == 0).double().mean()):.1f} % zeros",
        f"  {'':18}{'path':30}{'train loss':>11}{'95 % interval':>18}{'share':>8}"
        f"{'test loss':>11}{'95 % interval':>18}{'test error':>12}",
    ]
    for name, findings in found.items():
        whole = findings.barriers[LINE, "train", "loss"].excess_over_chord
        for path in findings.paths:
            of = {
                column: findings.barriers[path, *column].excess_over_chord
                for column in (("train", "loss"), ("test", "loss"), ("test", "error"))
            }
            train_loss, test_loss = of["train", "loss"], of["test", "loss"]
            share = f"{train_loss.value / whole.value:.3f}" if whole.low > 0 else "none"
            lines.append(
                f"  {f'SGD to {name}' if path == LINE else '':18}{path:30}"
                f"{train_loss.value:11.4f}{f'{train_loss.low:.4f} to {train_loss.high:.4f}':>18}"
                f"{share if path == CURVE else '':>8}"
                f"{test_loss.value:11.4f}{f'{test_loss.low:.4f} to {test_loss.high:.4f}':>18}"
                f"{100 * of['test', 'error'].value:10.2f} %"
            )
    return [*lines, ""]


def main() -> None:
    """Measure the subjects that are asked for, and keep the table of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", nargs="*", default="all", choices=[*SUBJECTS, "all"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in SUBJECTS if "all" in arguments.subjects else arguments.subjects:
        say(name)
        subject = SUBJECTS[name]
        found = connections(subject, FOLDER / name)
        lines = [*(__doc__ or "").strip().splitlines(), "", *lines_of(subject, found)]
        report(f"landscape_connect-{name}", lines)


if __name__ == "__main__":
    main()
