"""Figure, tables and words of the published accuracies of sparse ResNet-50."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table as ConsoleTable

from flatvalley.report import Picture, Report, Table, TableRow, write_report
from flatvalley.run import Row, Run
from flatvalley.studies.direct_labels import EndLabel, label_ends
from flatvalley.studies.published import DENSE, PROTOCOLS, Point, frontier
from flatvalley.studies.sparsity_axes import percent_zeros, sparsity_axis
from flatvalley.studies.verify_figures import FigureText
from landscape import save_figure

COLORS = {
    "magnitude_pruning": "#000000",
    "random_pruning": "#999999",
    "variational_dropout": "#D55E00",
    "gRDA, official": "#56B4E9",
    "gRDA, 0.1_ep140_0.01": "#0072B2",
}
"""Of Okabe & Ito (2008)."""
_MARKERS = {"gRDA, official": "s", "gRDA, 0.1_ep140_0.01": "o"}
AT = (0.8, 0.9, 0.95, 0.98)
"""Sparsities of the table."""
NEAR = 0.005
"""How far from one of them a network may be to stand for it."""
LEAST_SPARSITY, LEAST_ACCURACY = 0.45, 0.4
"""What the figure shows from; the tables leave nothing out."""


def draw_published(points: Sequence[Point], run: Run) -> list[FigureText]:
    """Draw the figure as PDF and PNG, and return its text.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    figure, text = accuracies(points)
    provenance = {
        "study": "flatvalley published",
        "settings": ", ".join(f"{key}={value}" for key, value in run.config.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in run.record["environment"].items()),
    }
    save_figure(figure, folder / text.name, provenance)
    return [text]


def accuracies(points: Sequence[Point]) -> tuple[Figure, FigureText]:
    """Every network as a point, and a line through those that none beats."""
    figure = Figure(figsize=(8.0, 4.8))
    figure.subplots_adjust(left=0.09, right=0.7, bottom=0.12, top=0.97)
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    shown = [
        p for p in points if LEAST_SPARSITY <= p.sparsity < 1.0 and p.accuracy >= LEAST_ACCURACY
    ]
    labels = []
    for method, mine in by_method(shown).items():
        color = COLORS[method]
        marker = _MARKERS.get(method, "o")
        x = [1.0 - p.sparsity for p in mine]
        ax.plot(x, [p.accuracy for p in mine], marker, color=color, markersize=2.5, alpha=0.35)
        best = frontier(mine)
        ax.plot(
            [1.0 - p.sparsity for p in best],
            [p.accuracy for p in best],
            marker=marker,
            color=color,
            markersize=3.5,
            linewidth=1.4,
        )
        labels.append(
            EndLabel(PROTOCOLS[method].title, 1.0 - best[-1].sparsity, best[-1].accuracy, color)
        )
    if shown:
        sparsity_axis(ax, [p.sparsity for p in shown])
    for name, (accuracy, _) in DENSE.items():
        ax.axhline(accuracy, color="0.45", linewidth=0.9, linestyle=":")
        labels.append(EndLabel(name, ax.get_xlim()[1], accuracy, "0.45"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    ax.set_ylabel("top-1 accuracy")
    label_ends(ax, labels)
    left_out = len(points) - len(shown)
    words = (
        f" {left_out} networks below {percent_zeros(LEAST_SPARSITY)} zeros or "
        f"{percent_zeros(LEAST_ACCURACY)} accuracy are in tables/points.csv only."
        if left_out
        else ""
    )
    return figure, FigureText(
        "resnet50",
        "ResNet-50 on ImageNet, as published",
        "Top-1 accuracy against the share of zeros, each row by its own protocol: see the table. "
        "Pale: every network that was published. Lines: those that no other of the row beats in "
        "both. Of gradual magnitude, random pruning and variational dropout that is the best of a "
        f"grid, chosen by the test images. Dotted: dense networks.{words} The axis of zeros is "
        "logarithmic in the weights that are left.",
    )


def by_method(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points of every method, in the order of the protocols."""
    found: Mapping[str, list[Point]] = {name: [] for name in PROTOCOLS}
    for point in points:
        found[point.method].append(point)
    return {name: mine for name, mine in found.items() if mine}


def best_near(points: Sequence[Point], share: float) -> Point | None:
    """Return the most accurate network within half a percent of a sparsity."""
    near = [p for p in points if abs(p.sparsity - share) <= NEAR]
    return max(near, key=lambda p: p.accuracy, default=None)


def published_tables(points: Sequence[Point]) -> dict[str, list[Row]]:
    """Return tables by name: every network, and every protocol."""
    return {
        "points": [vars(point) for point in points],
        "protocols": [
            {"method": name} | vars(PROTOCOLS[name]) | {"networks": len(mine)}
            for name, mine in by_method(points).items()
        ],
    }


def console_summary(points: Sequence[Point]) -> ConsoleTable:
    """Return the best accuracy by method near some sparsities, for the terminal."""
    table = ConsoleTable(title="Top-1 accuracy, best of what was published", box=SIMPLE_HEAD)
    table.add_column("method")
    for share in AT:
        table.add_column(percent_zeros(share), justify="right")
    for name, mine in by_method(points).items():
        cells = [_cell(best_near(mine, share), share) for share in AT]
        table.add_row(PROTOCOLS[name].title, *cells)
    return table


def write_published_report(
    points: Sequence[Point], run: Run, figures: Sequence[FigureText]
) -> Path:
    """Write ``report.html`` into the run's folder."""
    methods = by_method(points)
    at = Table(
        "Best accuracy near some sparsities",
        "The most accurate network within half a percent of zeros; in brackets its sparsity where "
        "it differs. –: none was published there.",
        ["method", *[percent_zeros(share) for share in AT], "networks"],
        [
            TableRow(
                [
                    PROTOCOLS[name].title,
                    *[_cell(best_near(mine, share), share) for share in AT],
                    str(len(mine)),
                ]
            )
            for name, mine in methods.items()
        ],
    )
    protocols = Table(
        "What each row is",
        "As far as the sources say. Rows with different answers are different experiments.",
        ["row", "counts", "training", "epochs", "accuracy of epoch", "points", "source"],
        [
            TableRow([p.title, p.counts, p.training, p.epochs, p.reported, p.selection, p.source])
            for p in (PROTOCOLS[name] for name in methods)
        ],
        prose=True,
    )
    report = Report(
        title="ResNet-50 on ImageNet, as published",
        byline=(
            f"{len(points)} published networks; flatvalley "
            f"{run.record['environment']['flatvalley']}, {run.record['started'][:10]}"
        ),
        verdict="Rows stand side by side, but were not trained alike.",
        good=True,
        conclusion=[
            "gRDA's rows count zeros among all trainable weights and train without momentum, "
            "weight decay and label smoothing; compare each row with the dense network of its own "
            "recipe first: "
            + "; ".join(f"{n} {100 * a:.2f} %" for n, (a, _) in DENSE.items())
            + "."
        ],
        claims=(),
        tables=[at, protocols],
        pictures=[
            Picture(f.name, f.title, f.caption, run.path / "figures" / f"{f.name}.png")
            for f in figures
        ],
        methods=[
            "Numbers are those of the CSV files, nothing was trained here.",
            *[
                f"{name[0].upper()}{name[1:]}: {100 * accuracy:.2f} %, {what}."
                for name, (accuracy, what) in DENSE.items()
            ],
        ],
        provenance=[
            ("settings", json.dumps(run.record["config"])),
            ("versions", ", ".join(f"{k} {v}" for k, v in run.record["environment"].items())),
            ("tables", "tables/points.csv, tables/protocols.csv"),
        ],
    )
    return write_report(report, run.path / "report.html")


def _cell(point: Point | None, share: float) -> str:
    if point is None:
        return "–"
    text = f"{100 * point.accuracy:.2f}"
    differs = f"{100 * point.sparsity:.1f}" != f"{100 * share:.1f}"
    return f"{text} ({100 * point.sparsity:.1f} %)" if differs else text
