"""What the reports of landscapes have in common: where figures come from, planes, methods."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from flatvalley.report import Picture
from flatvalley.run import Run, write_atomically
from flatvalley.studies.landscape_networks import Networks
from flatvalley.studies.verify_figures import FigureText
from landscape import Evaluation, Path, Plane, Sweep, plot_plane, save_figure
from landscape.figures_surfaces import plot_surface
from landscape.interactive import surface_html
from landscape.paraview import write_paraview

NAMES = {"loss": "loss", "error": "error rate"}


def figure_of(ax: Any) -> Figure:
    """Return the figure that axes belong to."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def figure_folder(run: Run) -> FilePath:
    """Return the folder of a run's figures; made if it is not there."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    return folder


def origin(run: Run, networks: Networks, more: Mapping[str, str]) -> dict[str, str]:
    """Return where a figure comes from, for its metadata."""
    return {
        "study": f"flatvalley {run.record['study']}",
        "networks": "; ".join(source.description for source in networks.sources),
        "settings": ", ".join(f"{key}={value}" for key, value in run.config.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in run.record["environment"].items()),
    } | dict(more)


def draw_planes(
    run: Run,
    values: Sweep,
    plane: Plane,
    marks: Mapping[str, Tensor],
    *,
    curve: Path | None = None,
    caption: str,
    provenance: Mapping[str, str],
) -> list[FigureText]:
    """Draw every metric of every objective over a plane, and the train loss in space.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = figure_folder(run)
    texts = []
    for objective, metric in values.columns:
        evaluation = values[objective, metric]
        if not bool((evaluation.mean > 0).any()):
            continue
        name = f"{objective}_{metric}"
        label = f"{objective} {NAMES[metric]}"
        ax = plot_plane(
            evaluation,
            plane,
            marks,
            curve=curve,
            equal_aspect=is_square(values.points, plane),
            label=label,
        )
        save_figure(figure_of(ax), folder / name, provenance)
        samples = f"{float(evaluation.count.flatten()[0]):,.0f} samples a point."
        texts.append(FigureText(name, label.capitalize(), f"{samples} {caption}"))
    space = plot_surface(values["train", "loss"], plane, label="train loss")
    save_figure(figure_of(space), folder / "train_loss_3d", provenance)
    words = "For a first impression; values are read off the contours above."
    return [*texts, FigureText("train_loss_3d", "Train loss in space", words)]


def write_surfaces(
    run: Run, values: Sweep, plane: Plane, title: str, provenance: Mapping[str, str]
) -> list[str]:
    """Write the train loss to turn by hand, and for ParaView; return what to say of the files."""
    train = values["train", "loss"]
    return write_surface_files(run, train, plane, "train loss", title, provenance)


def write_surface_files(
    run: Run,
    evaluation: Evaluation,
    plane: Plane,
    label: str,
    title: str,
    provenance: Mapping[str, str],
) -> list[str]:
    """Write one surface to turn by hand, and for ParaView; return what to say of the files."""
    write_paraview(evaluation, run.path / "surface.vts", provenance=provenance)
    files = [f"surface.vts: the {label} for ParaView"]
    try:
        page = surface_html(evaluation, plane, label=label, title=title, provenance=provenance)
    except ModuleNotFoundError as error:
        return [*files, f"surface.html: not written. {error}"]
    write_atomically(run.path / "surface.html", page.encode())
    return [*files, f"surface.html: the {label} to turn and point at, in any browser"]


def pictures(run: Run, figures: Sequence[FigureText]) -> list[Picture]:
    """Return what the report shows of the figures."""
    folder = run.path / "figures"
    return [Picture(f.name, f.title, f.caption, folder / f"{f.name}.png") for f in figures]


def losses_method(networks: Networks, about: Mapping[str, Any]) -> str:
    """Return what a loss at a point is, in a sentence or two."""
    plan = about.get("plan", {})
    reduced = plan.get("precision", "full")
    bits = ""
    if reduced != "full":
        moved = plan["deviation"]
        share = "an unknown share" if moved is None else f"a share of {moved:.1e}"
        bits = f" Forward passes in {reduced}, which moves the loss by {share} where it was tried."
    return (
        f"Every point has the loss of {networks.train.num_samples:,} training samples without "
        f"augmentation and {networks.test.num_samples:,} test samples, dropout off. Batch norm: "
        f"{about.get('batch norm', 'none in the model')}.{bits}"
    )


def provenance_rows(
    run: Run, about: Mapping[str, Any], files: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the rows of a report's table of where it comes from."""
    return [
        ("settings", json.dumps(run.record["config"])),
        ("evaluation", json.dumps(dict(about))),
        ("versions", ", ".join(f"{k} {v}" for k, v in run.record["environment"].items())),
        ("started", run.record["started"]),
        ("finished", run.record["finished"]),
        *(("file", text) for text in files),
    ]


def is_square(points: Tensor, plane: Plane) -> bool:
    """Return whether both axes of a grid have one unit, and the picture would not be a strip."""
    width = float(points[-1, 0, 0] - points[0, 0, 0]) * plane.lengths[0]
    height = float(points[0, -1, 1] - points[0, 0, 1]) * plane.lengths[1]
    return math.isclose(*plane.lengths, rel_tol=0.05) and 0.4 < height / width < 2.5
