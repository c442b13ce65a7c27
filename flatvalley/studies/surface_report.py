"""The figures, words and tables of one surface's report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.table import Table as ConsoleTable

from flatvalley.report import Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.landscape_report import (
    draw_planes,
    figure_folder,
    figure_of,
    losses_method,
    origin,
    pictures,
    provenance_rows,
    write_surfaces,
)
from flatvalley.studies.surface import Scaled, SurfaceFindings, center_of
from flatvalley.studies.train_report import number, percent
from flatvalley.studies.verify_figures import FigureText
from landscape import Evaluation, save_figure
from landscape.figures_surfaces import plot_run_on_plane


def draw_surface(findings: SurfaceFindings, run: Run) -> list[FigureText]:
    """Draw every metric of every objective, as PDF and PNG, and return the figures' texts.

    Raises:
        OSError: If a file cannot be written.
    """
    provenance = _provenance(findings, run)
    texts = draw_planes(
        run,
        findings.values,
        findings.plane,
        {"network": findings.networks.weights[0]},
        caption=_plane_words(findings),
        provenance=provenance,
    )
    if findings.path is not None:
        ax = plot_run_on_plane(
            findings.path,
            findings.plane,
            evaluation=findings.values["train", "loss"],
            equal_aspect=False,
            label="train loss",
        )
        save_figure(figure_of(ax), figure_folder(run) / "way", provenance)
        words = "Lines of the train loss; the run's points lie off the plane."
        texts.insert(0, FigureText("way", "The way of the training", words))
    return texts


def write_surface_report(
    findings: SurfaceFindings, run: Run, figures: Sequence[FigureText]
) -> Path:
    """Write ``report.html`` into the run's folder."""
    files = write_surfaces(
        run, findings.values, findings.plane, findings.description, _provenance(findings, run)
    )
    report = Report(
        title="The loss around a network",
        byline=(
            f"{findings.description} ({findings.plane.size:,} weights); flatvalley "
            f"{run.record['environment']['flatvalley']}, {run.record['started'][:10]}"
        ),
        verdict=_verdict(findings),
        good=True,
        conclusion=_notes(findings),
        claims=(),
        tables=[_losses_table(findings), _directions_table(findings)],
        pictures=pictures(run, figures),
        methods=_methods(findings),
        provenance=provenance_rows(run, findings.values.provenance, files),
    )
    return write_report(report, run.path / "report.html")


def console_summary(findings: SurfaceFindings) -> ConsoleTable:
    """Return the losses at the center and at the lowest point, for the terminal."""
    table = ConsoleTable(title=findings.description)
    table.add_column("samples")
    for column in ("center", "lowest", "at", "not finite"):
        table.add_column(column, justify="right")
    for cells in _loss_rows(findings):
        table.add_row(*cells)
    return table


def summary(findings: SurfaceFindings) -> dict[str, Any]:
    """Return what ``run.json`` says of the surface."""
    found = {}
    for objective in findings.objectives:
        loss = findings.values[objective, "loss"]
        value, at = findings.lowest(objective)
        found[objective] = {
            "center": center_of(loss),
            "lowest": value,
            "lowest_at": at,
            "not_finite": loss.num_nonfinite,
        }
    return {
        "results": found,
        "directions": dict(findings.directions.provenance),
        "evaluation": dict(findings.values.provenance),
        "weights": findings.plane.size,
    }


def _plane_words(findings: SurfaceFindings) -> str:
    kind = findings.config.directions
    words = {
        "eigen": "Axes: the two sharpest eigenvectors of the Hessian of the train loss.",
        "saddle": "Axes: the eigenvectors of most positive and most negative curvature.",
        "pca": "Axes: principal components of the way of the training, from its end.",
    }
    return words.get(kind, f"Axes: random directions, each {kind} as long as the network's.")


def _verdict(findings: SurfaceFindings) -> str:
    value, (x, y) = findings.lowest("train")
    center = center_of(findings.values["train", "loss"])
    head = f"The lowest train loss on the grid is {number(value)}, at ({x:.3g}, {y:.3g})"
    return f"{head}." if center is None else f"{head}; the network has {number(center)}."


def _notes(findings: SurfaceFindings) -> list[str]:
    notes = []
    lost = findings.values["train", "loss"].num_nonfinite
    if lost:
        notes.append(f"At {lost} points the train loss is not finite; they are left out, in grey.")
    filled = findings.adaptive
    if filled is not None:
        kept = "" if filled.converged else ", more than the 1 % that was the goal"
        notes.append(
            f"{filled.num_evaluations:,} of {filled.measured.numel():,} points were measured, a "
            f"spline gives the others: 95 % of {filled.num_held_out} points held out are predicted "
            f"to {percent(filled.error)} of the loss{kept}."
        )
    space = findings.space
    if space is not None and not space.converged:
        worst = float(space.residuals.max())
        notes.append(f"The eigenvectors did not converge (largest residual {worst:.3g}).")
    if findings.config.directions in get_args(Scaled):
        notes.append(
            "Two random directions see the mean curvature of a very high-dimensional space: sharp "
            "and negative directions are rare among them. Look at eigenvectors as well."
        )
    return notes


def _loss_rows(findings: SurfaceFindings) -> list[list[str]]:
    rows = []
    for objective in findings.objectives:
        loss: Evaluation = findings.values[objective, "loss"]
        value, (x, y) = findings.lowest(objective)
        center = center_of(loss)
        rows.append(
            [
                objective,
                "–" if center is None else number(center),
                number(value),
                f"({x:.3g}, {y:.3g})",
                str(loss.num_nonfinite),
            ]
        )
    return rows


def _losses_table(findings: SurfaceFindings) -> Table:
    nx, ny = findings.values.points.shape[:2]
    return Table(
        "Losses",
        f"On a grid of {nx} x {ny} points. Lowest: of the points, not between them.",
        ["samples", "at the network", "lowest", "where", "not finite"],
        [TableRow(cells) for cells in _loss_rows(findings)],
    )


def _directions_table(findings: SurfaceFindings) -> Table:
    directions = findings.directions
    eigenvalues = None if findings.space is None else findings.space.values.tolist()
    residuals = None if findings.space is None else findings.space.residuals.tolist()
    rows = [
        TableRow(
            [
                name,
                f"{length:.4g}",
                "–" if eigenvalues is None else f"{eigenvalues[i]:.4g}",
                "–" if residuals is None else f"{residuals[i]:.2g}",
            ]
        )
        for i, (name, length) in enumerate(
            zip(directions.names, directions.norms.tolist(), strict=True)
        )
    ]
    before = directions.cosines_before
    turned = "" if before is None else f" Before they were made orthogonal: {before[0, 1]:.3g}."
    return Table(
        "Directions",
        f"Length: what a coordinate of 1 is in weight space. Cosine between them: "
        f"{directions.cosines[0, 1]:.3g}.{turned}",
        ["direction", "length", "eigenvalue", "residual"],
        rows,
    )


def _methods(findings: SurfaceFindings) -> list[str]:
    shares = ""
    if findings.config.directions == "pca" and findings.path is not None:
        inside = findings.path.explained_fraction[1:-1]
        shares = (
            " Of a snapshot's squared distance from the end, "
            f"{percent(float(inside.min()))} or more lies in the plane."
            if len(inside)
            else ""
        )
    return [
        f"w(x, y) = w + x u + y v. {_plane_words(findings)}{shares}",
        losses_method(findings.networks, findings.values.provenance),
    ]


def _provenance(findings: SurfaceFindings, run: Run) -> dict[str, str]:
    return origin(run, findings.networks, findings.directions.provenance)
