"""Figures, tables and words of a redrawn plane, curve or surface."""

import json
from collections.abc import Sequence
from pathlib import Path

from flatvalley.report import Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.landscape_report import (
    figure_folder,
    figure_of,
    is_square,
    pictures,
    write_surface_files,
)
from flatvalley.studies.redraw import Redrawn
from flatvalley.studies.train_report import number
from flatvalley.studies.verify_figures import FigureText
from landscape import (
    LineMaximum,
    PublishedLine,
    PublishedPlane,
    plot_contours,
    plot_plane,
    plot_profile,
    plot_random_lines,
    plot_surface,
    save_figure,
)

COLUMNS = ("measure", "along", "largest", "at t", "start", "end", "over the mean of both")


def draw_redrawn(
    result: Redrawn, run: Run, *, floor: float | None = None, cap: float | None = None
) -> list[FigureText]:
    """Draw every loss and error of the file, as PDF and PNG, and return the figures' texts.

    Args:
        result: What the file holds.
        run: The folder.
        floor: Lowest loss with a colour of its own; errors have theirs.
        cap: Highest loss with a colour of its own.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If the floor is not positive and below the cap.
    """
    folder, provenance = figure_folder(run), _provenance(result, run)
    found, texts = result.found, []
    for name, evaluation in result.measures.items():
        if isinstance(found, PublishedPlane) and not bool((evaluation.mean > 0).any()):
            continue  # colours are logarithmic
        file = "".join(c if c.isalnum() else "_" for c in name).strip("_")
        of_loss = "error" not in name
        low, high = (floor, cap) if of_loss else (None, None)
        if isinstance(found, PublishedLine) and found.between_models:
            ax = plot_profile({"curve": evaluation}, ylabel=name)
            caption = " ".join(f"{each}." for each in result.maxima if each.name == name)
        elif isinstance(found, PublishedLine):
            ax = plot_random_lines(
                {result.path.stem: [evaluation]}, xlabel="multiples of the direction", ylabel=name
            )
            caption = "The model is at 0; how long the direction is, the file does not say."
        elif found.points:
            ax = plot_plane(
                evaluation,
                found.plane,
                found.points,
                curve=found.curve,
                equal_aspect=is_square(found.grid, found.plane),
                floor=low,
                cap=high,
                label=name,
            )
            caption = " ".join(f"{each}." for each in result.maxima if each.name == name)
        else:
            ax = plot_contours(evaluation, found.plane, floor=low, cap=high, label=name)
            caption = "Axes count multiples of the file's directions."
        save_figure(figure_of(ax), folder / file, provenance)
        texts.append(FigureText(file, name.capitalize(), caption))
    if isinstance(found, PublishedPlane):
        name = next(iter(result.measures))
        ax = plot_surface(result.measures[name], found.plane, floor=floor, cap=cap, label=name)
        save_figure(figure_of(ax), folder / "in_space", provenance)
        words = "For a first impression; values are read off the contours above."
        texts.append(FigureText("in_space", f"{name.capitalize()} in space", words))
    return texts


def write_redraw_report(result: Redrawn, run: Run, figures: Sequence[FigureText]) -> Path:
    """Write ``report.html`` into the run's folder."""
    found, files = result.found, []
    if isinstance(found, PublishedPlane):
        name = next(iter(result.measures))
        files = write_surface_files(
            run,
            result.measures[name],
            found.plane,
            name,
            result.path.name,
            _provenance(result, run),
        )
    tables = []
    if result.maxima:
        tables.append(
            Table(
                "Largest values",
                "Read off the grid by linear interpolation, of logarithms where all values are "
                "positive: a peak between grid points is missed."
                if isinstance(found, PublishedPlane)
                else "Over the points in the file.",
                COLUMNS,
                [TableRow(_cells(each)) for each in result.maxima],
            )
        )
    report = Report(
        title=f"{result.path.name}, drawn anew",
        byline=(
            f"{_size(result)}; flatvalley {run.record['environment']['flatvalley']}, "
            f"{run.record['started'][:10]}"
        ),
        verdict=f"{result.maxima[0]}." if result.maxima else "The ground around one model.",
        good=True,
        conclusion=notes(result),
        claims=(),
        tables=tables,
        pictures=pictures(run, figures),
        methods=["Numbers are those of the file; nothing was trained or evaluated here."],
        provenance=[
            ("settings", json.dumps(run.record["config"])),
            ("versions", ", ".join(f"{k} {v}" for k, v in run.record["environment"].items())),
            ("tables", "tables/points.csv, tables/maxima.csv"),
            *(("file", text) for text in files),
        ],
    )
    return write_report(report, run.path / "report.html")


def console_summary(result: Redrawn) -> list[str]:
    """Return what the file says, line by line, for the terminal."""
    return [f"{result.path.name}: {_size(result)}", *map(str, result.maxima), *notes(result)]


def notes(result: Redrawn) -> list[str]:
    """Return what a reader of the figures should know of gaps in the file."""
    found = [
        f"{name}: exactly 0 at {count} points, as where nothing was evaluated."
        for name, count in result.suspicious.items()
    ]
    if result.missing:
        found.append(f"At {result.missing} points there is no value, or none that is finite.")
    return found


def _provenance(result: Redrawn, run: Run) -> dict[str, str]:
    return {
        "study": "flatvalley redraw",
        "file": f"{result.path.name}, SHA-256 {run.config['digest']}…",
        "versions": ", ".join(f"{k} {v}" for k, v in run.record["environment"].items()),
    }


def _size(result: Redrawn) -> str:
    found = result.found
    if isinstance(found, PublishedLine):
        length = f", length {found.length:.4g}" if found.length == found.length else ""
        return f"{len(found.ts)} points on a path{length}"
    return f"{found.grid.shape[0]} x {found.grid.shape[1]} points of a plane"


def _cells(each: LineMaximum) -> list[str]:
    values = (each.value, each.t, *each.ends, each.barrier)
    return [each.name, each.along, *(number(v) if v == v else "–" for v in values)]
