"""The words and tables of a comparison's report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as ConsoleTable

from flatvalley.report import Picture, Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.compare import CompareFindings, RowFindings
from flatvalley.studies.sparsity_axes import percent_zeros
from flatvalley.studies.verify_figures import FigureText

TableLine = Mapping[str, Any]
SEES = {
    "nothing": "no samples",
    "inputs": "inputs",
    "labels": "inputs, labels",
    "training": "the training",
}
"""What a row looks at, for the reader."""


def compare_tables(findings: CompareFindings) -> dict[str, Sequence[TableLine]]:
    """Return the study's tables by name: rows of plain numbers."""
    dense = [
        {"seed": seed} | {f"test_{key}": value for key, value in record["test"].items()}
        for seed, record in findings.dense.items()
    ]
    rows = [
        {
            "row": row.row.text,
            "sparsity": share,
            "chosen": row.chosen.get(share, ""),
            "seeds": len(row.over_seeds(share, "sparsity")),
        }
        | _statistics(row, share)
        for row in findings.rows
        for share in findings.config.sparsities
    ]
    return {"summary": rows, "cells": findings.cells, "dense": dense}


def summary(findings: CompareFindings) -> dict[str, Any]:
    """Return what ``run.json`` says of the comparison."""
    return {
        "methods": list(findings.config.methods),
        "seeds": list(findings.config.seeds),
        "weights": findings.num_weights,
        "results": {
            row.row.text: {
                f"{share:g}": {"chosen": text} | _statistics(row, share)
                for share, text in row.chosen.items()
            }
            for row in findings.rows
        },
        "remarks": {row.row.text: list(row.remarks) for row in findings.rows if row.remarks},
        "complete": findings.complete,
    }


def write_compare_report(
    findings: CompareFindings, run: Run, figures: Sequence[FigureText]
) -> Path:
    """Write ``report.html`` into the run's folder."""
    training = findings.config.training
    report = Report(
        title="Pruning without retraining, method by method",
        byline=(
            f"{training.model} ({findings.num_weights:,} weights) on {training.data}, "
            f"{_seeds(findings)}; flatvalley {run.record['environment']['flatvalley']}, "
            f"{run.record['started'][:10]}"
        ),
        verdict=_verdict(findings),
        good=findings.complete,
        conclusion=_conclusion(findings),
        claims=(),
        tables=[
            *([_main_table(findings, "accuracy")] if findings.classifies else []),
            _main_table(findings, "loss"),
            _main_table(findings, "distance"),
            _cost_table(findings),
            *_chosen_tables(findings),
        ],
        pictures=[
            Picture(f.name, f.title, f.caption, run.path / "figures" / f"{f.name}.png")
            for f in figures
        ],
        methods=_methods_text(findings),
        provenance=[
            ("settings", json.dumps(run.record["config"])),
            ("methods", "; ".join(findings.config.methods)),
            ("versions", ", ".join(f"{k} {v}" for k, v in run.record["environment"].items())),
            ("started", run.record["started"]),
            ("finished", run.record["finished"]),
            ("tables", "tables/summary.csv, tables/cells.csv: one network a row; tables/dense.csv"),
        ],
    )
    return write_report(report, run.path / "report.html")


def console_summary(findings: CompareFindings) -> ConsoleTable:
    """Return mean and range over seeds by method and sparsity, for the terminal."""
    key = "accuracy" if findings.classifies else "loss"
    table = ConsoleTable(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"Test {key}{' in %' if key == 'accuracy' else ''}, mean over {_seeds(findings)}"
        + (" and range" if len(findings.config.seeds) > 1 else ""),
    )
    table.add_column("method", min_width=14)
    for share in findings.config.sparsities:
        table.add_column(percent_zeros(share), justify="right", no_wrap=True)
    for name in ("products", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = _lines(findings.dense_over_seeds(key), key)
    table.add_row("dense", *[dense] * len(findings.config.sparsities), "–", "–", style="dim")
    best = _best(findings, key)
    for row in findings.rows:
        cells = []
        for share in findings.config.sparsities:
            text = _lines(row.over_seeds(share, "test", key), key)
            cells.append(f"[bold]{text}[/]" if best.get(share) is row else text)
        table.add_row(row.row.label, *cells, *_cost(row, findings))
    return table


def _statistics(row: RowFindings, share: float) -> dict[str, float]:
    """Mean, lowest and highest of every measure over seeds."""
    found: dict[str, float] = {}
    measures = [("test", key) for key in ("accuracy", "loss", "distance")]
    costs = [(key,) for key in ("products", "gradients", "iterations", "seconds")]
    for keys in [*measures, ("sparsity",), *costs]:
        values = row.over_seeds(share, *keys)
        if values:
            name = "_".join(keys) if keys[0] == "test" else f"{keys[0]}_reached"
            name = name if keys[0] in ("test", "sparsity") else keys[0]
            found[name] = fmean(values)
            if keys[0] == "test":
                found |= {f"{name}_low": min(values), f"{name}_high": max(values)}
    return found


def _best(findings: CompareFindings, key: str) -> dict[float, RowFindings]:
    """The row with the best mean among those that do not train, by sparsity."""
    sign = 1.0 if key == "accuracy" else -1.0
    best = {}
    for share in findings.config.sparsities:
        rows = [row for row in findings.rows if share in row.chosen and not row.row.retrains]
        if rows:
            best[share] = max(rows, key=lambda r: sign * fmean(r.over_seeds(share, "test", key)))
    return best


def _verdict(findings: CompareFindings) -> str:
    key = "accuracy" if findings.classifies else "loss"
    best = _best(findings, key)
    if not best:
        return "No method reached any sparsity."
    share = max(best)
    row = best[share]
    others = [
        other
        for other in findings.rows
        if other is not row and share in other.chosen and not other.row.retrains
    ]
    sign = 1.0 if key == "accuracy" else -1.0
    text = (
        f"At {percent_zeros(share)} zeros the best {key} without retraining is that of "
        f"{row.row.title}: {_value(fmean(row.over_seeds(share, 'test', key)), key)}; dense "
        f"{_value(fmean(findings.dense_over_seeds(key)), key)}"
    )
    if others:
        second = max(others, key=lambda r: sign * fmean(r.over_seeds(share, "test", key)))
        text += (
            f", next best {second.row.title} "
            f"{_value(fmean(second.over_seeds(share, 'test', key)), key)}"
        )
    return f"{text}."


def _conclusion(findings: CompareFindings) -> list[str]:
    return [f"{row.row.title}: {remark}" for row in findings.rows for remark in row.remarks]


def _main_table(findings: CompareFindings, key: str) -> Table:
    titles = {
        "accuracy": "Test accuracy",
        "loss": "Test loss",
        "distance": "Distance to the dense network",
    }
    words = {
        "accuracy": f"In percent of {findings.num_test_samples:,} test samples.",
        "loss": f"Mean over {findings.num_test_samples:,} test samples.",
        "distance": (
            "Mean KL divergence of the classes' probabilities from the dense network's, over the "
            "test samples."
            if findings.classifies
            else "Mean squared difference of the outputs, over the test samples."
        ),
    }
    shares = findings.config.sparsities
    several = len(findings.config.seeds) > 1
    spread = " Mean over seeds, lowest and highest in brackets." if several else " One seed."
    dense = _cell(findings.dense_over_seeds(key), key)
    rows = [TableRow(["dense", *[dense] * len(shares)], "control")]
    for row in findings.rows:
        cells = [_cell(row.over_seeds(share, "test", key), key) for share in shares]
        rows.append(TableRow([row.row.label, *cells], "control" if row.row.retrains else ""))
    return Table(
        titles[key],
        f"{words[key]}{spread} Columns: share of zeros among all {findings.num_weights:,} trained "
        "weights. Grey: dense, and rows that train from the start. –: not reached.",
        ["method", *[percent_zeros(share) for share in shares]],
        rows,
    )


def _cost_table(findings: CompareFindings) -> Table:
    rows = []
    for row in findings.rows:
        cells = [row.row.label, SEES[row.row.sees]]
        for key in ("products", "gradients", "iterations"):
            count = _last(row, findings, key)
            cells.append("–" if count is None else f"{count:,.0f}")
        rows.append(
            TableRow([*cells, _cost(row, findings)[1]], "control" if row.row.retrains else "")
        )
    return Table(
        "What it cost",
        "For the highest sparsity that was reached, mean over seeds; of a staged method, its whole "
        "run. Products are with a matrix of second derivatives; gradients are of "
        "single samples, and of batches where a training is made or replayed; iterations are those "
        "of Net-Trim's programs, each about three passes through one layer. Seconds of the "
        "processor (of the wall on a GPU, and for rows that train) depend on the machine.",
        ["method", "sees", "products", "gradients", "iterations", "seconds"],
        rows,
    )


def _chosen_tables(findings: CompareFindings) -> list[Table]:
    rows = [
        TableRow([row.row.title, *[row.chosen.get(s, "–") for s in findings.config.sparsities]])
        for row in findings.rows
        if len(row.row.candidates) > 1
    ]
    table = Table(
        "Settings that were chosen",
        "By the mean accuracy over seeds on training samples that were held out, ties by the "
        "loss; never by the test samples.",
        ["method", *[percent_zeros(share) for share in findings.config.sparsities]],
        rows,
    )
    return [table] if rows else []


def _methods_text(findings: CompareFindings) -> list[str]:
    config, training = findings.config, findings.config.training
    held_out = (
        f"{100 * training.validation:g} % of the training samples were held out, from the training "
        "and from the calibration, to choose settings by."
        if training.validation
        else "No setting was chosen here."
    )
    texts = [
        f"One dense network a seed: {training.runs[0]}, learning rate {training.lr:g} "
        f"({training.schedule}), batches of {training.batch_size}, {training.epochs} epochs. "
        f"{held_out} The test samples were looked at once for every number in the tables.",
        f"Methods look at {findings.num_calibration_samples:,} calibration samples, drawn by the "
        "seed from those trained on and not augmented. Nothing is trained after pruning, but for "
        "rows marked so, which train from the dense network's start on the same batches.",
    ]
    if config.exclude:
        texts.append(f"Excluded, and counted all the same: {', '.join(config.exclude)}.")
    if any(record["batch_norm"] for record in findings.dense.values()):
        texts.append(
            "Mean and variance of batch norm were renewed on the calibration samples for every "
            "sparse network that was not trained."
            if config.recalibrate
            else "Batch norm kept the dense network's mean and variance."
        )
    return texts


def _cost(row: RowFindings, findings: CompareFindings) -> tuple[str, str]:
    products, seconds = (_last(row, findings, key) for key in ("products", "seconds"))
    return (
        "–" if products is None else f"{products:,.0f}",
        "–" if seconds is None else f"{seconds:.1f}" if seconds < 99.5 else f"{seconds:,.0f}",
    )


def _last(row: RowFindings, findings: CompareFindings, key: str) -> float | None:
    """A cost's mean over seeds at the highest sparsity that was reached."""
    reached = [share for share in findings.config.sparsities if share in row.chosen]
    values = row.over_seeds(reached[-1], key) if reached else []
    return fmean(values) if values else None


def _cell(values: Sequence[float], key: str) -> str:
    """Mean and range over seeds."""
    if len(values) < 2:
        return _value(values[0], key, bare=True) if values else "–"
    low, high = (_value(v, key, bare=True) for v in (min(values), max(values)))
    return f"{_value(fmean(values), key, bare=True)} ({low}–{high})"


def _lines(values: Sequence[float], key: str) -> str:
    """The same in two narrow lines."""
    if len(values) < 2 or key != "accuracy":
        return _cell(values, key).replace(" (", "\n").removesuffix(")")
    return f"{100 * fmean(values):.2f}\n{100 * min(values):.1f}–{100 * max(values):.1f}"


def _value(value: float, key: str, *, bare: bool = False) -> str:
    if key != "accuracy":
        return f"{value:#.3g}".removesuffix(".")
    return f"{100 * value:.2f}" if bare else f"{100 * value:.2f} %"


def _seeds(findings: CompareFindings) -> str:
    count = len(findings.config.seeds)
    return f"{count} seeds" if count > 1 else "one seed"
