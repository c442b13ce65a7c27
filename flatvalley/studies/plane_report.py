"""The figures, words and tables of one plane's report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as ConsoleTable

from flatvalley.report import Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.landscape_report import (
    draw_planes,
    losses_method,
    origin,
    pictures,
    provenance_rows,
    write_surfaces,
)
from flatvalley.studies.plane import PlaneFindings
from flatvalley.studies.train_report import number
from flatvalley.studies.verify_figures import FigureText

COLUMNS = ("network", "x", "y", "train loss", "test loss")


def draw_plane(findings: PlaneFindings, run: Run) -> list[FigureText]:
    """Draw every metric of every objective, as PDF and PNG, and return the figures' texts.

    Raises:
        OSError: If a file cannot be written.
    """
    first, second, _ = findings.marks
    return draw_planes(
        run,
        findings.values,
        findings.plane,
        findings.marks,
        curve=findings.curve,
        caption=f"x runs from {first} to {second}; both axes are distances in weight space.",
        provenance=origin(run, findings.networks, {}),
    )


def write_plane_report(findings: PlaneFindings, run: Run, figures: Sequence[FigureText]) -> Path:
    """Write ``report.html`` into the run's folder."""
    title = " and ".join(source.description for source in findings.networks.sources)
    files = write_surfaces(
        run, findings.values, findings.plane, title, origin(run, findings.networks, {})
    )
    about = findings.values.provenance
    report = Report(
        title="The plane through three points",
        byline=(
            f"{title} ({findings.plane.size:,} weights); flatvalley "
            f"{run.record['environment']['flatvalley']}, {run.record['started'][:10]}"
        ),
        verdict=_verdict(findings),
        good=True,
        conclusion=_notes(findings),
        claims=(),
        tables=[_points_table(findings)],
        pictures=pictures(run, figures),
        methods=[
            "w(x, y) = A + x u + y v with u along B − A and v orthogonal to it, towards the third "
            "point.",
            losses_method(findings.networks, about),
        ],
        provenance=provenance_rows(run, about, files),
    )
    return write_report(report, run.path / "report.html")


def console_summary(findings: PlaneFindings) -> ConsoleTable:
    """Return the three points, for the terminal."""
    table = ConsoleTable(title="Points of the plane")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for cells in _rows(findings):
        table.add_row(*cells)
    return table


def summary(findings: PlaneFindings) -> dict[str, Any]:
    """Return what ``run.json`` says of the plane."""
    return {
        "results": {
            "points": {
                name: findings.plane.coordinates(w)[:2] for name, w in findings.marks.items()
            },
            "line": vars(findings.line.excess_over_chord),
            "not_finite": findings.values["train", "loss"].num_nonfinite,
        },
        "evaluation": dict(findings.values.provenance),
        "weights": findings.plane.size,
    }


def _verdict(findings: PlaneFindings) -> str:
    found = findings.line.excess_over_chord
    names = list(findings.marks)
    head = f"On the line from {names[0]} to {names[1]}"
    if not math.isfinite(found.value):
        return f"{head} the train loss is not finite from t = {found.location:.2f} on."
    return (
        f"{head} the train loss rises by at most {number(found.value)} over the chord (interval "
        f"{number(found.low)} to {number(found.high)}), at t = {found.location:.2f}."
    )


def _notes(findings: PlaneFindings) -> list[str]:
    lost = findings.values["train", "loss"].num_nonfinite
    return [f"At {lost} points the train loss is not finite: grey."] if lost else []


def _rows(findings: PlaneFindings) -> list[list[str]]:
    rows = []
    for name, w in findings.marks.items():
        x, y, _ = findings.plane.coordinates(w)
        losses = [number(objective.loss(w)) for objective in findings.networks.objectives.values()]
        rows.append([name, f"{x:.4g}", f"{y:.4g}", *losses])
    return rows


def _points_table(findings: PlaneFindings) -> Table:
    return Table(
        "Points",
        "Losses with the first network's running statistics, where there are such.",
        COLUMNS,
        [TableRow(cells) for cells in _rows(findings)],
    )
