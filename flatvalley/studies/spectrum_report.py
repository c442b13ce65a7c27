"""The words and tables of the spectrum study."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as ConsoleTable

from flatvalley.report import Picture, Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.spectrum import Measured, SpectrumFindings
from flatvalley.studies.verify_figures import FigureText

Row = dict[str, Any]
WORDS = {
    "magnitude": "of largest magnitude",
    "largest": "largest",
    "smallest": "smallest",
    "both": "at both ends",
}


def spectrum_tables(findings: SpectrumFindings) -> dict[str, list[Row]]:
    """Return the study's tables by name: rows of plain numbers."""
    tables: dict[str, list[Row]] = {"points": [], "eigenpairs": [], "cost": []}
    for point in findings.points:
        key = {"point": point.name}
        tables["points"].append(key | _point_row(point))
        tables["eigenpairs"] += [key | row for row in _pair_rows(point)]
        tables["cost"] += [
            key | {"part": part} | {c: cost[c] for c in ("products", "seconds", "method")}
            for part, cost in point.costs.items()
        ]
        if point.density is not None:
            columns = ("grid", "density", "standard_error")
            values = [point.density[column].tolist() for column in columns]
            tables.setdefault("density", [])
            tables["density"] += [
                key | {"eigenvalue": x, "density": y, "standard_error": e}
                for x, y, e in zip(*values, strict=True)
            ]
        if point.layers is not None:
            tables.setdefault("layers", [])
            tables["layers"] += [key | dict(row) for row in point.layers]
    return tables


def summary(findings: SpectrumFindings) -> Row:
    """Return what ``run.json`` says of every point."""
    return {
        "points": {point.name: _point_row(point) for point in findings.points},
        "converged": findings.converged,
        "cost": {
            "products": sum(c["products"] for p in findings.points for c in p.costs.values()),
            "seconds": round(
                sum(c["seconds"] for p in findings.points for c in p.costs.values()), 1
            ),
        },
    }


def write_spectrum_report(
    findings: SpectrumFindings, run: Run, figures: Sequence[FigureText]
) -> Path:
    """Write ``report.html`` into the run's folder."""
    report = Report(
        title="The spectrum of the Hessian",
        byline=(
            f"{findings.description}; flatvalley {run.record['environment']['flatvalley']}, "
            f"{run.record['started'][:10]}"
        ),
        verdict=_verdict(findings),
        good=findings.converged,
        conclusion=_conclusion(findings),
        claims=(),
        tables=_report_tables(findings),
        pictures=[
            Picture(f.name, f.title, f.caption, run.path / "figures" / f"{f.name}.png")
            for f in figures
        ],
        methods=_methods_text(findings),
        provenance=_provenance(run),
    )
    return write_report(report, run.path / "report.html")


def console_summary(findings: SpectrumFindings) -> ConsoleTable:
    """Return the leading pairs of every point for the terminal."""
    table = ConsoleTable(title=f"Eigenvalues {WORDS[findings.config.which]}")
    table.add_column("rank", justify="right")
    for point in findings.points:
        several = len(findings.points) > 1
        table.add_column(point.name if several else "eigenvalue", justify="right")
        table.add_column("residual", justify="right")
    for rank in range(len(findings.points[0].space.values)):
        cells = [str(rank + 1)]
        for point in findings.points:
            cells += [
                significant(float(point.space.values[rank])),
                f"{float(point.space.residuals[rank]):.1e}",
            ]
        table.add_row(*cells)
    if any(point.trace for point in findings.points):
        table.add_section()
        cells = ["trace"]
        for point in findings.points:
            assert point.trace is not None
            cells += [
                significant(point.trace["value"]),
                f"± {point.trace['standard_error']:.1e}",
            ]
        table.add_row(*cells)
    return table


def _point_row(point: Measured) -> Row:
    trace = point.trace or {}
    low, residual = point.lowest
    return {
        "weights": point.size,
        "samples": point.samples,
        "batches": point.batches,
        "loss": point.loss,
        "loss_standard_error": point.loss_error,
        "gradient_norm": point.gradient_norm,
        "gradient_share_in_eigenspace": point.gradient_share,
        "predicted_fall": point.predicted_fall,
        "largest_residual": float(point.space.residuals.max()),
        "lowest_eigenvalue": low,
        "lowest_eigenvalue_residual": residual,
        "gap": point.space.gap,
        "projector_error_bound": point.space.projector_error_bound,
        "trace": trace.get("value", math.nan),
        "trace_standard_error": trace.get("standard_error", math.nan),
        "converged": point.space.converged,
    }


def _pair_rows(point: Measured) -> list[Row]:
    rows = []
    for i in range(len(point.space.values)):
        first = point.space.first(i + 1)
        rows.append(
            {
                "rank": i + 1,
                "eigenvalue": float(point.space.values[i]),
                "residual": float(point.space.residuals[i]),
                "gap_of_first": first.gap,
                "projector_error_bound_of_first": first.projector_error_bound,
            }
        )
    return rows


def _verdict(findings: SpectrumFindings) -> str:
    tops = ", ".join(
        f"{significant(float(point.space.values[0]))}"
        + (f" {_at(point)}" if len(findings.points) > 1 else "")
        for point in findings.points
    )
    k = len(findings.points[0].space.values)
    word = "eigenpairs" if k > 1 else "eigenpair"
    worst = max(float(p.space.residuals.max()) for p in findings.points)
    each = " each" if len(findings.points) > 1 else ""
    head = f"Leading eigenvalue {tops}; {k} {word}{each}, with residuals up to {worst:.1e}."
    if findings.converged:
        return head
    return f"{head} Not every tolerance was met: a budget ran out."


def _is_time(name: str) -> bool:
    return name.startswith(("before", "after"))


def _at(point: Measured) -> str:
    return point.name if _is_time(point.name) else f"at {point.name}"


def _headed(name: str) -> str:
    """A name at the head of a sentence; gRDA keeps its small letter."""
    return name.capitalize() if _is_time(name) else name


def _conclusion(findings: SpectrumFindings) -> list[str]:
    paragraphs = []
    for point in findings.points:
        prefix = f"{_headed(point.name)}: the" if len(findings.points) > 1 else "The"
        text = (
            f"{prefix} loss over {point.samples:,} samples in {_count(point.batches, 'batch')} is "
            f"{with_error(point.loss, point.loss_error)}, the norm of its gradient "
            f"{significant(point.gradient_norm)}. {_minimum_sentence(point, findings.config.which)}"
        )
        if point.trace is not None:
            share = float(point.space.values.sum()) / point.trace["value"]
            text += (
                f" The trace is {with_error(point.trace['value'], point.trace['standard_error'])}; "
                f"the {len(point.space.values)} pairs make up {100 * share:.0f} % of it."
            )
        paragraphs.append(text)
    warnings_ = [
        f"{part.capitalize()}: {text}"
        for point in findings.points
        for part, cost in point.costs.items()
        for text in cost["warnings"]
    ]
    return paragraphs + warnings_


def _minimum_sentence(point: Measured, which: str) -> str:
    """Say how far the point is from a minimum, as far as the pairs can tell."""
    low, residual = point.lowest
    fall = point.predicted_fall
    share = f" ({100 * fall / abs(point.loss):.2g} % of it)" if point.loss else ""
    text = (
        f"Of the gradient {100 * point.gradient_share:.0f} % (in norm) lies in the eigenspace; "
        f"along its positive directions the quadratic model lets the loss fall by {fall:.2g}"
        f"{share}."
        if point.gradient_norm > 0
        else "The gradient is zero."
    )
    if low < -residual:
        return f"{text} This is no minimum: {with_error(low, residual)} is an eigenvalue."
    if which in ("smallest", "both"):
        return f"{text} The smallest eigenvalue is {with_error(low, residual)}: not negative."
    return f"{text} None of the pairs is negative; smaller eigenvalues were not looked for."


def _report_tables(findings: SpectrumFindings) -> list[Table]:
    tables = [_pairs_table(findings)]
    if any(point.layers for point in findings.points):
        tables.append(_layers_table(findings))
    return [*tables, _cost_table(findings)]


def _pairs_table(findings: SpectrumFindings) -> Table:
    rows = []
    for point in findings.points:
        for i, pair in enumerate(_pair_rows(point)):
            rows.append(
                TableRow(
                    [
                        point.name if i == 0 else "",
                        str(pair["rank"]),
                        significant(pair["eigenvalue"], digits=6),
                        f"{pair['residual']:.1e}",
                        significant(pair["gap_of_first"], digits=2),
                        significant(pair["projector_error_bound_of_first"], digits=2),
                    ],
                    "group" if i == 0 else "",
                )
            )
    return Table(
        "Eigenpairs and their certificates",
        f"The pairs {WORDS[findings.config.which]}. An eigenvalue of the Hessian lies within one "
        "residual ‖H v − λ v‖ of every value. The gap is the distance from the first i pairs to "
        "all others: exact to the pairs in the table, estimated to the rest. The bound is "
        "Davis and Kahan's on the error of the projector on the first i eigenvectors, 1 where "
        "nothing is known of them one by one.",
        ["point", "i", "eigenvalue", "residual", "gap of the first i", "projector bound"],
        rows,
    )


def _layers_table(findings: SpectrumFindings) -> Table:
    rows = []
    for point in findings.points:
        for i, row in enumerate(point.layers or ()):
            rows.append(
                TableRow(
                    [
                        point.name if i == 0 else "",
                        row["name"],
                        f"{row['size']:,}",
                        with_error(row["trace"], row["standard_error"]),
                        f"{100 * row['share']:.1f} %",
                        significant(row["trace"] / row["size"], digits=2),
                        with_error(row["top_eigenvalue"], row["residual"]),
                    ],
                    "group" if i == 0 else "",
                )
            )
    return Table(
        "Layer by layer",
        "The diagonal block of the Hessian that belongs to each layer, as if all others were "
        "frozen. Trace with its standard error over probes, its share of the whole, and per "
        "weight; eigenvalue of largest magnitude with its residual.",
        ["point", "layer", "weights", "trace", "share", "trace per weight", "top eigenvalue"],
        rows,
    )


def _cost_table(findings: SpectrumFindings) -> Table:
    rows = []
    for point in findings.points:
        for i, (part, cost) in enumerate(point.costs.items()):
            rows.append(
                TableRow(
                    [
                        point.name if i == 0 else "",
                        part,
                        f"{cost['products']:,}",
                        f"{cost['seconds']:.1f} s",
                    ],
                    "group" if i == 0 else "",
                )
            )
    return Table(
        "Cost",
        "Hessian-vector products with all the data, and wall-clock time.",
        ["point", "part", "products", "time"],
        rows,
    )


def _methods_text(findings: SpectrumFindings) -> list[str]:
    config = findings.config
    texts = [
        "H is the Hessian of the mean loss over the samples, in the selected weights, in "
        "evaluation mode. Its products are exact up to rounding; nothing forms the matrix. "
        f"Eigenpairs: Lanczos with full reorthogonalisation until every residual is at most "
        f"{config.tol:g} of the largest eigenvalue; the residuals given are measured by products "
        "made afterwards.",
        f"How the products were computed: {'; '.join(_methods(findings))}.",
    ]
    if any(point.trace for point in findings.points):
        texts.append(
            "Trace: random signs outside the eigenspace, whose part is known exactly, until the "
            f"standard error is {100 * config.rtol:g} % of the trace."
        )
    if any(point.density is not None for point in findings.points):
        texts.append(
            f"Density: stochastic Lanczos quadrature, {config.probes} probes of {config.steps} "
            "steps, reorthogonalised in full. Eigenvalues closer than σ are one peak in the figure."
        )
    if any(point.layers for point in findings.points):
        texts.append(
            f"Layers: traces of the diagonal blocks from {config.probes} probes that all layers "
            "share; their eigenvalues of largest magnitude by Lanczos."
        )
    return texts


def _methods(findings: SpectrumFindings) -> list[str]:
    costs = [cost for point in findings.points for cost in point.costs.values()]
    return list(dict.fromkeys(cost["method"] for cost in costs))


def _provenance(run: Run) -> list[tuple[str, str]]:
    record = run.record
    return [
        ("settings", json.dumps(record["config"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["environment"].items())),
        ("cost", json.dumps(record["cost"])),
        ("started", record["started"]),
        ("finished", record["finished"]),
        ("tables", "tables/*.csv"),
        ("eigenvectors", "eigenspace.safetensors"),
    ]


def significant(value: float, digits: int = 4) -> str:
    """Return a number with so many significant digits, the way people write it."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−", 1 if value < 0 else 0)
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}".replace("-", "−")


def with_error(value: float, error: float) -> str:
    """Return a value and its error, both to the second digit of the error."""
    if not math.isfinite(error):
        return significant(value)
    decimals = 1 - math.floor(math.log10(error)) if error > 0 else 99
    if not 0 <= decimals <= 5:
        return f"{significant(value)} ± {error:.0e}"
    return f"{value:,.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}es"
