"""``flatvalley connect``: the loss between two networks."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flatvalley.commands.landscape_options import (
    Criterion,
    Data,
    Device,
    InBits,
    Model,
    Network,
    Norm,
    Samples,
    Workers,
)
from flatvalley.commands.refusals import at_the_door, files_wanted, refusals
from flatvalley.process_group import PATIENCE, own_device, process_group, world
from flatvalley.run import open_by_all
from flatvalley.studies.connect import CURVES, ConnectConfig, connect_tables
from flatvalley.studies.connect import connect as run_connect
from flatvalley.studies.connect_report import (
    console_summary,
    draw_connection,
    summary,
    write_connect_report,
)
from flatvalley.studies.landscape_networks import OwnModel, open_networks
from flatvalley.user_code import importable_from
from flatvalley.workers import bars


def connect(
    a: Network,
    b: Network,
    control: Annotated[
        list[str] | None,
        typer.Option(help="Another network: the line from A to it is drawn as well. Repeatable."),
    ] = None,
    curve: Annotated[str, typer.Option(help=f"One of {', '.join(CURVES)}.")] = "bezier",
    bends: Annotated[int, typer.Option(help="Points of the curve that are trained.")] = 1,
    epochs: Annotated[int, typer.Option(help="Of the curve's training; 0 for no curve.")] = 30,
    lr: Annotated[float, typer.Option(help="Learning rate of that.")] = 0.1,
    points: Annotated[int, typer.Option(help="On each path, both ends among them.")] = 61,
    keep_zeros: Annotated[
        bool, typer.Option(help="Weights that are zero at both ends stay zero on the curve.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the curve's training.")] = 0,
    samples: Samples = None,
    batch_norm: Norm = "recompute",
    precision: InBits = "full",
    workers: Workers = 1,
    model: Model = None,
    data: Data = None,
    criterion: Criterion = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("runs/connect"),
) -> None:
    """Measure the loss on the line and on a trained curve between two networks.

    Where B is sparser than A, the line from A to A pruned by magnitude to the same sparsity is a
    control. Goes on where it was stopped. Processes of `torchrun` share the points. Exit status: 0
    if it is done, 2 for a mistake in the options, the networks or the folder, 3 if the curve's
    training does not stay finite, 130 if interrupted.
    """
    with importable_from(Path.cwd()), refusals(), process_group(device, timeout=PATIENCE):
        first = world()[0] == 0
        console = Console(quiet=not first)
        with at_the_door(), files_wanted():
            config = ConnectConfig(
                curve,
                bends,
                epochs,
                lr,
                points,
                keep_zeros,
                seed,
                samples,
                batch_norm,
                precision,
            )
            networks, names = open_networks(
                [a, b, *(control or [])],
                OwnModel(model, data, criterion),
                device=own_device(device),
                samples=samples,
            )
            run = open_by_all(out, "connect", networks.identity | vars(config))
        with bars(console, "curve", "points") as (trains, measures):
            findings = run_connect(
                run,
                networks,
                names,
                config,
                workers=workers,
                trains=trains,
                measures=measures,
            )
    if not first:
        return
    for name, rows in connect_tables(findings).items():
        run.write_table(name, rows)
    run.finish(summary(findings))
    with console.status("Drawing the figures and writing the report"):
        report = write_connect_report(findings, run, draw_connection(findings, run))
    console.print(console_summary(findings))
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
