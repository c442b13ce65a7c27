"""``flatvalley plane``: the loss in the plane through three networks."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flatvalley.commands.landscape_options import (
    PLACE,
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
from flatvalley.studies.landscape_networks import OwnModel, open_networks
from flatvalley.studies.plane import PlaneConfig
from flatvalley.studies.plane import plane as run_plane
from flatvalley.studies.plane_report import (
    console_summary,
    draw_plane,
    summary,
    write_plane_report,
)
from flatvalley.studies.surface import sweep_tables
from flatvalley.user_code import importable_from
from flatvalley.workers import bars


def plane(
    a: Network,
    b: Network,
    c: Annotated[
        str | None,
        typer.Argument(help=f"{PLACE} Default: the bend of a curve that is trained from A to B."),
    ] = None,
    points: Annotated[int, typer.Option(help="Grid points along the first axis.")] = 41,
    points_y: Annotated[
        int | None, typer.Option(help="Along the second. Default: the same.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of the curve's training, without C.")] = 30,
    lr: Annotated[float, typer.Option(help="Learning rate of that.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the curve's training.")] = 0,
    samples: Samples = None,
    batch_norm: Norm = "recompute",
    precision: InBits = "full",
    workers: Workers = 1,
    model: Model = None,
    data: Data = None,
    criterion: Criterion = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("runs/plane"),
) -> None:
    """Evaluate the loss in the plane of three networks, and write figures and a report.

    Goes on where it was stopped. Processes of `torchrun` share the points. Exit status: 0 if it is
    done, 2 for a mistake in the options, the networks or the folder, 3 if the curve's training does
    not stay finite, 130 if interrupted.
    """
    with importable_from(Path.cwd()), refusals(), process_group(device, timeout=PATIENCE):
        first = world()[0] == 0
        console = Console(quiet=not first)
        with at_the_door(), files_wanted():
            size = points, points if points_y is None else points_y
            config = PlaneConfig(size, epochs, lr, seed, samples, batch_norm, precision)
            networks, names = open_networks(
                [a, b, *([] if c is None else [c])],
                OwnModel(model, data, criterion),
                device=own_device(device),
                samples=samples,
            )
            run = open_by_all(out, "plane", networks.identity | vars(config))
        with bars(console, "curve", "points") as (trains, measures):
            findings = run_plane(
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
    for name, rows in sweep_tables(findings.values).items():
        run.write_table(name, rows)
    run.finish(summary(findings))
    with console.status("Drawing the figures and writing the report"):
        report = write_plane_report(findings, run, draw_plane(findings, run))
    console.print(console_summary(findings))
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
