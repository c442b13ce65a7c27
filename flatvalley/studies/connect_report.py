"""The figures, words and tables of one connection's report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as ConsoleTable

from flatvalley.report import Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.connect import CURVE, LINE, LOW, ConnectFindings
from flatvalley.studies.landscape_report import (
    NAMES,
    figure_folder,
    figure_of,
    losses_method,
    origin,
    pictures,
    provenance_rows,
)
from flatvalley.studies.train_report import number, percent
from flatvalley.studies.verify_figures import FigureText
from landscape import Excess, plot_profile, save_figure


def draw_connection(findings: ConnectFindings, run: Run) -> list[FigureText]:
    """Draw every metric along all paths, as PDF and PNG, and return the figures' texts.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = figure_folder(run)
    provenance = origin(run, findings.networks, {})
    texts = []
    for samples in findings.networks.objectives:
        for metric in findings.networks.metrics:
            name, label = f"{samples}_{metric}", f"{samples} {NAMES[metric]}"
            ax = plot_profile(
                {
                    path: findings.barriers[path, samples, metric].evaluation
                    for path in findings.paths
                },
                ends=(findings.names[0], "end"),
                ylabel=label,
            )
            save_figure(figure_of(ax), folder / name, provenance)
            words = (
                f"The line and the curve end at {findings.names[1]}; each control at its own end. "
                "Bands: two standard errors over samples."
            )
            texts.append(FigureText(name, f"{label.capitalize()} along the paths", words))
    return texts


def write_connect_report(
    findings: ConnectFindings, run: Run, figures: Sequence[FigureText]
) -> Path:
    """Write ``report.html`` into the run's folder."""
    about = findings.barriers[LINE, "train", "loss"].evaluation.provenance
    files = ["curve.safetensors: the control points of the curve"] if findings.trained else []
    report = Report(
        title="What lies between two networks",
        byline=(
            f"{' and '.join(source.description for source in findings.networks.sources[:2])} "
            f"({len(findings.networks.weights[0]):,} weights); flatvalley "
            f"{run.record['environment']['flatvalley']}, {run.record['started'][:10]}"
        ),
        verdict=_verdict(findings),
        good=findings.connected is not False,
        conclusion=_notes(findings),
        claims=(),
        tables=[_barriers_table(findings)],
        pictures=pictures(run, figures),
        methods=_methods(findings),
        provenance=provenance_rows(run, about, files),
    )
    return write_report(report, run.path / "report.html")


def console_summary(findings: ConnectFindings) -> ConsoleTable:
    """Return the barriers, for the terminal."""
    table = ConsoleTable(title="Barriers over the chord")
    for i, column in enumerate(("path", "samples", "barrier", "95 % interval", "at", "over mean")):
        table.add_column(column, justify="left" if i < 2 else "right")
    for cells in _rows(findings):
        table.add_row(*cells)
    return table


def summary(findings: ConnectFindings) -> dict[str, Any]:
    """Return what ``run.json`` says of the paths."""
    return {
        "results": {
            path: {
                f"{samples} {metric}": {
                    "over_chord": vars(found.excess_over_chord),
                    "over_mean": vars(found.excess_over_mean),
                }
                for (name, samples, metric), found in findings.barriers.items()
                if name == path
            }
            for path in findings.paths
        },
        "connected": findings.connected,
        "cost": {
            "curve_gradients": findings.trained.num_gradients if findings.trained else 0,
            "points": findings.config.points * len(findings.paths),
        },
        "weights": len(findings.networks.weights[0]),
    }


def _verdict(findings: ConnectFindings) -> str:
    line = findings.barriers[LINE, "train", "loss"].excess_over_chord
    if not math.isfinite(line.value):
        return f"On the straight line the train loss is not finite from t = {line.location:.2f} on."
    if not line.low > 0:
        return (
            "The straight line has no barrier that "
            f"{findings.networks.train.num_samples:,} samples can tell from none: "
            f"{number(line.value)}, interval {_interval(line)}."
        )
    head = f"The straight line has a barrier of {number(line.value)} in train loss"
    if findings.trained is None:
        return f"{head}, at t = {line.location:.2f}."
    curve = findings.barriers[CURVE, "train", "loss"].excess_over_chord
    return f"{head}, the curve {number(curve.value)}, {percent(curve.value / line.value)} of it."


def _notes(findings: ConnectFindings) -> list[str]:
    notes = []
    if findings.connected is False:
        notes.append(
            f"The curve keeps more than {percent(LOW)} of the line's barrier: train it for more "
            "epochs, at another rate, or with more bends."
        )
    if not findings.controls:
        notes.append(
            "There is no control: a flat line means something beside one that is not. Give a "
            "second training from another start with --control."
        )
    return notes


def _interval(found: Excess) -> str:
    return f"{number(found.low)} to {number(found.high)}"


def _rows(findings: ConnectFindings) -> list[list[str]]:
    return [
        [
            path,
            f"{samples} {NAMES[metric]}",
            number(found.excess_over_chord.value),
            _interval(found.excess_over_chord),
            f"{found.excess_over_chord.location:.2f}",
            number(found.excess_over_mean.value),
        ]
        for (path, samples, metric), found in findings.barriers.items()
    ]


def _barriers_table(findings: ConnectFindings) -> Table:
    return Table(
        "Barriers",
        "Largest excess along each path over the chord between its ends, with an interval that "
        "allows for the choice of the largest of all points, and over the mean of the ends. A "
        "barrier is shown where the interval lies above zero.",
        ["path", "samples", "over the chord", "95 % interval", "at t", "over the mean"],
        [
            TableRow(cells, "control" if cells[0] in findings.controls else "")
            for cells in _rows(findings)
        ],
    )


def _methods(findings: ConnectFindings) -> list[str]:
    config = findings.config
    about = findings.barriers[LINE, "train", "loss"].evaluation.provenance
    kinds = {"bezier": "a Bezier curve", "chain": "a polygonal chain"}
    trained = (
        f"The curve is {kinds[config.curve]} with {config.bends} bend(s), trained for "
        f"{config.epochs} epochs at a rate of {config.lr:g} on the training samples that are "
        "looked at, its ends fixed."
        if findings.trained
        else "No curve was trained."
    )
    return [trained, losses_method(findings.networks, about)]
