"""``flatvalley redraw``: a plane, curve or surface that another tool wrote."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flatvalley.commands.refusals import at_the_door, files_wanted
from flatvalley.run import Run
from flatvalley.studies.redraw import digest, redraw_tables
from flatvalley.studies.redraw import redraw as read_anew
from flatvalley.studies.redraw_report import console_summary, draw_redrawn, write_redraw_report


def redraw(
    file: Annotated[
        Path,
        typer.Argument(
            help="plane.npz or curve.npz of dnn-mode-connectivity, or a .h5 of loss-landscape."
        ),
    ],
    floor: Annotated[
        float | None, typer.Option(help="Lowest loss with a colour of its own.")
    ] = None,
    cap: Annotated[
        float | None, typer.Option(help="Highest loss with a colour of its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("runs/redraw"),
) -> None:
    """Draw a plane, curve or surface of another tool, and print its largest loss between models.

    Nothing is evaluated: numbers are those of the file. Exit status: 0, or 2 for a file that cannot
    be read or a folder that cannot be used.
    """
    console = Console()
    with at_the_door(), files_wanted():
        result = read_anew(file)
        settings = {"file": file.name, "digest": digest(file), "floor": floor, "cap": cap}
        run = Run(out, "redraw", settings)
        figures = draw_redrawn(result, run, floor=floor, cap=cap)
    tables = redraw_tables(result)
    for name, rows in tables.items():
        run.write_table(name, rows)
    run.finish({"results": {"maxima": tables["maxima"], "missing": result.missing}})
    report = write_redraw_report(result, run, figures)
    for line in console_summary(result):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
