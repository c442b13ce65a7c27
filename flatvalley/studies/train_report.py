"""The words and tables of a training's report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as ConsoleTable

from flatvalley.recipes import RECIPES
from flatvalley.report import Picture, Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.train_figures import title
from flatvalley.studies.verify_figures import FigureText
from flatvalley.training import TARGET_TOLERANCE, RunResult, TrainResult

_SCHEDULES = {
    "constant": "constant",
    "paper": "constant to half of the epochs, then linear to a hundredth at nine tenths",
    "cosine": "half a cosine towards 0",
}


def write_train_report(result: TrainResult, run: Run, figures: Sequence[FigureText]) -> Path:
    """Write ``report.html`` into the run's folder."""
    record = run.record
    config = result.config
    report = Report(
        title="Training side by side" if len(result.runs) > 1 else "Training",
        byline=(
            f"{config.model} ({result.num_weights:,} weights) on {config.data}, {config.epochs} "
            f"epochs, seed {config.seed}; flatvalley {record['environment']['flatvalley']}, "
            f"{record['started'][:10]}"
        ),
        verdict=_verdict(result),
        good=result.reached,
        conclusion=[*_conclusion(result), *result.notes],
        claims=(),
        tables=[_ends_table(result), *_published_table(result, record)],
        pictures=[
            Picture(f.name, f.title, f.caption, run.path / "figures" / f"{f.name}.png")
            for f in figures
        ],
        methods=_methods_text(result),
        provenance=_provenance(result, run),
    )
    return write_report(report, run.path / "report.html")


def console_summary(result: TrainResult) -> ConsoleTable:
    """Return how every run ended, for the terminal."""
    table = ConsoleTable(title=f"After {result.config.epochs} epochs")
    table.add_column("run", no_wrap=True)
    for column in ("train loss", "test loss", "accuracy", "zeros"):
        table.add_column(column, justify="right")
    for run, spec in zip(result.runs, result.config.specs, strict=True):
        table.add_row(
            title(spec),
            number(run.row["train_loss"]),
            number(run.row["test_loss"]),
            percent(run.row["test_accuracy"]),
            percent(run.row["sparsity"]),
        )
    return table


def number(value: float | None) -> str:
    """Return a loss with four significant digits."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Return a share in percent with two decimals."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def _verdict(result: TrainResult) -> str:
    missed = [run for run in result.runs if run.missed]
    if not missed:
        wanted = [run for run in result.runs if run.target is not None]
        count = f"{result.num_steps:,} steps"
        if wanted:
            return f"Trained to the end, {count}; every wanted sparsity was reached."
        return f"Trained to the end, {count}."
    names = ", ".join(run.name for run in missed)
    return f"Trained to the end, but {names} did not reach the wanted sparsity."


def _conclusion(result: TrainResult) -> list[str]:
    dense = next((run for run in result.runs if run.sparsity == 0.0), None)
    lines = []
    for run, spec in zip(result.runs, result.config.specs, strict=True):
        accuracy = run.row["test_accuracy"]
        if accuracy is None:
            continue
        text = f"{title(spec)}: {percent(accuracy)} of the test samples right"
        if run.sparsity > 0:
            text += f", {percent(run.sparsity)} of all weights zero"
            if dense is not None:
                points = 100 * (accuracy - float(dense.row["test_accuracy"]))
                text += f", {abs(points):.2f} points {'above' if points > 0 else 'below'} SGD"
        lines.append(f"{text}.")
    return lines


def _ends_table(result: TrainResult) -> Table:
    validation = bool(result.config.validation)
    columns = ["run", "training loss"]
    columns += ["validation accuracy"] if validation else []
    columns += ["test loss", "test accuracy", "zeros", "weights left", "threshold", "c"]
    rows = []
    for run, spec in zip(result.runs, result.config.specs, strict=True):
        row = run.row
        left = round((1 - run.sparsity) * result.num_weights)
        cells = [title(spec), number(row["train_loss"])]
        cells += [percent(row["validation_accuracy"])] if validation else []
        cells += [
            number(row["test_loss"]),
            percent(row["test_accuracy"]),
            percent(row["sparsity"]),
            f"{left:,}",
            number(row["threshold"]),
            number(row["c"]),
        ]
        rows.append(TableRow(cells, "control" if spec.name == "sgd" else ""))
    return Table(
        "Where the runs ended",
        f"After the last epoch, not the best one. Zeros are counted among all "
        f"{result.num_weights:,} trained weights, biases and normalisation layers included. "
        "Training loss is the mean over the last epoch as it was trained. Threshold and c are "
        "gRDA's at the end.",
        columns,
        rows,
    )


def _published_table(result: TrainResult, record: dict[str, Any]) -> list[Table]:
    """What the paper printed for a recipe, beside what was found here."""
    name = str((record["config"].get("recipe") or {}).get("name"))
    published = RECIPES[name].published if name in RECIPES else {}
    if not published:
        return []
    found = {run.name: run for run in result.runs}
    rows = []
    for run_name, (accuracy, zeros) in published.items():
        here: RunResult | None = found.get(run_name)
        rows.append(
            TableRow(
                [
                    run_name,
                    percent(accuracy),
                    percent(zeros),
                    percent(None if here is None else here.row["test_accuracy"]),
                    percent(None if here is None else here.sparsity),
                ]
            )
        )
    changed = ", ".join(record["config"]["recipe"]["overrides"]) or "nothing"
    return [
        Table(
            "Beside the published figures",
            f"Published: last epoch, mean over the authors' logs, {RECIPES[name].origin}. Changed "
            f"here from the recipe {name}: {changed}. A shorter training, other images (JPEG) or "
            "another epoch are other experiments.",
            ["run", "published accuracy", "published zeros", "accuracy here", "zeros here"],
            rows,
        )
    ]


def _methods_text(result: TrainResult) -> list[str]:
    config = result.config
    schedule = _SCHEDULES.get(config.schedule, config.schedule)
    texts = [
        f"All runs start from the same weights (seed {config.seed}) and see the same batches of "
        f"{config.batch_size}, with the same augmentation and the same draws of dropout: all of "
        f"it depends on the seed and the step alone. Learning rate {config.lr:g}, {schedule}. "
        f"Augmentation: {config.augment}. Precision: {config.precision}.",
    ]
    kinds = {spec.name for spec in config.specs}
    if "grda" in kinds:
        texts.append(
            "gRDA steps a dual vector v that starts at the initial weights, and trains "
            "sign(v) max(|v| − g, 0). Its threshold grows by c γ^(μ+½) (n^μ − (n−1)^μ) in step n; "
            "with a wanted sparsity, c is set by the zeros measured on the way."
        )
    if "magnitude" in kinds:
        texts.append(
            "Magnitude: SGD, and from the first steps to three quarters of them (unless begin and "
            "end say otherwise) the smallest weights of the whole network are set to zero for "
            "good, along the cubic schedule of Zhu & Gupta (2017)."
        )
    if config.validation:
        texts.append(
            f"{100 * config.validation:g} % of the training samples were held out to choose "
            "settings by; the test samples were looked at once, after the last epoch."
        )
    else:
        texts.append(
            "The test samples were looked at while training was under way. Choose no setting by "
            "them: hold out training samples (validation) for that."
        )
    return texts


def _provenance(result: TrainResult, run: Run) -> list[tuple[str, str]]:
    record = run.record
    seconds = sum(float(row["training_seconds"]) for row in result.tables["time"])
    return [
        ("settings", json.dumps(record["config"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["environment"].items())),
        ("cost", f"{result.num_steps:,} steps, {seconds:.0f} s of training for all runs together"),
        ("started", record["started"]),
        ("finished", record["finished"]),
        ("tables", "tables/epochs.csv, steps.csv, time.csv"),
        ("weights", "weights.safetensors in a folder for each run; sparse.safetensors: compact"),
        ("targets", f"reached if within {TARGET_TOLERANCE:g} of the sparsity wanted"),
    ]
