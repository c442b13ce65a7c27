"""``flatvalley published``: the published figure of sparse ResNet-50, redrawn with protocols."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flatvalley.commands.refusals import at_the_door
from flatvalley.run import Run
from flatvalley.studies.published import read_published
from flatvalley.studies.published_report import (
    console_summary,
    draw_published,
    published_tables,
    write_published_report,
)


def published(
    folder: Annotated[Path, typer.Argument(help="Folder of the CSV files.")],
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("runs/published"),
) -> None:
    """Redraw the published accuracies of sparse ResNet-50 on ImageNet, each with its protocol.

    FOLDER holds rn50_magnitude_pruning.csv, rn50_random_pruning.csv, rn50_variational_dropout.csv
    and rn50_gRDA.csv, or some of them. Exit status: 0, or 2 if a file cannot be read.
    """
    console = Console()
    with at_the_door():
        points = read_published(folder)
        digest = hashlib.sha256(repr(points).encode()).hexdigest()[:16]
        run = Run(out, "published", {"points": len(points), "digest": digest})
    for name, rows in published_tables(points).items():
        run.write_table(name, rows)
    run.finish({})
    report = write_published_report(points, run, draw_published(points, run))
    console.print(console_summary(points))
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
