"""``flatvalley surface``: the loss around one network."""

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
from flatvalley.studies.landscape_networks import OwnModel, open_networks
from flatvalley.studies.surface import KINDS, SurfaceConfig, sweep_tables
from flatvalley.studies.surface import surface as run_surface
from flatvalley.studies.surface_report import (
    console_summary,
    draw_surface,
    summary,
    write_surface_report,
)
from flatvalley.user_code import importable_from
from flatvalley.workers import bars


def surface(
    network: Network,
    directions: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "filter",
    points: Annotated[int, typer.Option(help="Grid points along the first axis.")] = 51,
    points_y: Annotated[
        int | None, typer.Option(help="Along the second. Default: the same.")
    ] = None,
    reach: Annotated[
        float | None,
        typer.Option(help="Coordinates go from minus to plus that. Default: by the directions."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random directions.")] = 0,
    adaptive: Annotated[
        bool,
        typer.Option(help="Measure an eighth of the points or fewer; a spline fills in the rest."),
    ] = False,
    samples: Samples = None,
    batch_norm: Norm = "recompute",
    precision: InBits = "full",
    workers: Workers = 1,
    model: Model = None,
    data: Data = None,
    criterion: Criterion = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("runs/surface"),
) -> None:
    """Evaluate the loss on a grid around one network, and write figures and a report.

    Goes on where it was stopped. Processes of `torchrun` share the points. Exit status: 0 if it is
    done, 2 for a mistake in the options, the network or the folder, 3 if a weight is not finite,
    130 if interrupted.
    """
    with importable_from(Path.cwd()), refusals(), process_group(device, timeout=PATIENCE):
        first = world()[0] == 0
        console = Console(quiet=not first)
        with at_the_door(), files_wanted():
            config = SurfaceConfig(
                directions,
                (points, points if points_y is None else points_y),
                reach,
                seed,
                samples,
                batch_norm,
                adaptive,
                precision,
            )
            networks, _ = open_networks(
                [network],
                OwnModel(model, data, criterion),
                device=own_device(device),
                samples=samples,
            )
            run = open_by_all(out, "surface", networks.identity | vars(config))
        with bars(console, "points") as (progress,):
            findings = run_surface(run, networks, config, workers=workers, progress=progress)
    if not first:
        return
    for name, rows in sweep_tables(findings.values).items():
        run.write_table(name, rows)
    run.finish(summary(findings))
    with console.status("Drawing the figures and writing the report"):
        report = write_surface_report(findings, run, draw_surface(findings, run))
    console.print(console_summary(findings))
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
