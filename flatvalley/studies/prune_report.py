"""The words and tables of one pruning's report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as ConsoleTable

from flatvalley.dense_network import Measured
from flatvalley.report import Picture, Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.prune import PruneFindings
from flatvalley.studies.train_report import number, percent
from flatvalley.studies.verify_figures import FigureText
from pruning import SparsityTrim

_COUNTED = {
    "products": "Products with a matrix of second derivatives",
    "iterations": "Iterations of the layers' programs, of all tries",
}


def write_prune_report(findings: PruneFindings, run: Run, figures: Sequence[FigureText]) -> Path:
    """Write ``report.html`` into the run's folder."""
    report = Report(
        title="Pruning a trained network",
        byline=(
            f"{findings.description} ({findings.num_weights:,} weights); flatvalley "
            f"{run.record['environment']['flatvalley']}, {run.record['started'][:10]}"
        ),
        verdict=_verdict(findings),
        good=not findings.notes,
        conclusion=findings.notes,
        claims=(),
        tables=[
            _networks_table(findings),
            *([_trim_table(findings, findings.result.trim)] if findings.result.trim else []),
            _layers_table(findings),
        ],
        pictures=[
            Picture(f.name, f.title, f.caption, run.path / "figures" / f"{f.name}.png")
            for f in figures
        ],
        methods=_methods_text(findings),
        provenance=[
            ("settings", json.dumps(run.record["config"])),
            ("versions", ", ".join(f"{k} {v}" for k, v in run.record["environment"].items())),
            ("started", run.record["started"]),
            ("finished", run.record["finished"]),
            ("weights", "weights.safetensors: the model's state; sparse.safetensors: compact"),
        ],
    )
    return write_report(report, run.path / "report.html")


def console_summary(findings: PruneFindings) -> ConsoleTable:
    """Return the two networks side by side, for the terminal."""
    table = ConsoleTable(title=findings.config.pruner.title)
    table.add_column("network")
    for column in ("zeros", "test loss", "accuracy", "distance", _cost(findings)[0], "seconds"):
        table.add_column(column, justify="right")
    for cells in _network_rows(findings):
        table.add_row(*cells)
    return table


def summary(findings: PruneFindings) -> dict[str, Any]:
    """Return what ``run.json`` says of the two networks."""
    result = findings.result
    return {
        "results": {
            "dense": vars(findings.dense),
            "pruned": vars(findings.pruned)
            | {"sparsity": findings.sparsity, "recalibrated": findings.recalibrated},
            "tuned": vars(findings.tuned) if findings.tuned else None,
        },
        "cost": {
            "products": result.products,
            "gradients": result.gradients,
            "iterations": result.iterations,
            "seconds": round(result.seconds, 3),
        },
        "net_trim": None if result.trim is None else _trim_summary(result.trim),
        "weights": findings.num_weights,
        "calibration_samples": findings.num_samples,
        "notes": list(findings.notes),
    }


def _verdict(findings: PruneFindings) -> str:
    head = f"{percent(findings.sparsity)} of {findings.num_weights:,} weights are zero"
    before, after = findings.dense, findings.tuned or findings.pruned
    if before.accuracy is None:
        return (
            f"{head}; the test loss is {number(after.loss)}, before it was {number(before.loss)}."
        )
    return (
        f"{head}; {percent(after.accuracy)} of the test samples are right"
        f"{' after fine-tuning' if findings.tuned else ''}, before it were "
        f"{percent(before.accuracy)}."
    )


def _tuned_text(findings: PruneFindings) -> str:
    config = findings.config
    if not config.fine_tune:
        return "The network was not trained afterwards."
    return (
        f"Then it was trained on for {config.fine_tune} epochs at a rate of "
        + (f"{config.fine_tune_lr:g}" if config.fine_tune_lr else "a tenth of the training's")
        + ", zeros kept; the files hold the weights after that."
    )


def _network_rows(findings: PruneFindings) -> list[list[str]]:
    def cells(name: str, zeros: float, measured: Measured) -> list[str]:
        return [
            name,
            percent(zeros),
            number(measured.loss),
            percent(measured.accuracy),
            number(measured.distance),
        ]

    result = findings.result
    already = 1.0 - findings.num_dense / findings.num_weights
    return [
        [*cells("dense", already, findings.dense), "–", "–"],
        [
            *cells("pruned", findings.sparsity, findings.pruned),
            f"{_cost(findings)[1]:,}",
            f"{result.seconds:.1f}",
        ],
        *(
            [[*cells("fine-tuned", findings.sparsity, findings.tuned), "–", "–"]]
            if findings.tuned
            else []
        ),
    ]


def _cost(findings: PruneFindings) -> tuple[str, int]:
    """What the method's work is counted in, and how much it was."""
    result = findings.result
    if result.iterations and not result.products:
        return "iterations", result.iterations
    return "products", result.products


def _networks_table(findings: PruneFindings) -> Table:
    kind = (
        "the mean KL divergence of the classes' probabilities"
        if findings.pruned.accuracy is not None
        else "the mean squared difference of the outputs"
    )
    plain, compact = findings.file_bytes
    return Table(
        "Before and after",
        f"On {findings.num_test_samples:,} test samples. Distance: {kind} from the dense "
        f"network's. Zeros are counted among all {findings.num_weights:,} trained weights, biases "
        f"and normalisation layers included. {_COUNTED[_cost(findings)[0]]}, and "
        "seconds of the processor (of the wall on a GPU), are those of the pruning alone. The "
        f"file of weights has {plain / 1e6:.3g} MB, the compact one {compact / 1e6:.3g} MB.",
        [
            *("network", "zeros", "test loss", "test accuracy", "distance"),
            *(_cost(findings)[0], "seconds"),
        ],
        [
            TableRow(cells, "control" if cells[0] == "dense" else "")
            for cells in _network_rows(findings)
        ],
    )


def _layers_table(findings: PruneFindings) -> Table:
    return Table(
        "What is left of every parameter",
        "Weights that are not zero.",
        ["parameter", "shape", "weights", "left", "share left"],
        [
            TableRow(
                [
                    layer.name,
                    " × ".join(map(str, layer.shape)),
                    f"{layer.size:,}",
                    f"{layer.left:,}",
                    percent(layer.density),
                ]
            )
            for layer in findings.layers
        ],
    )


def _trim_table(findings: PruneFindings, trim: SparsityTrim) -> Table:
    found = trim.trim
    size = found.output_norm
    bound = (
        "the layers prove no bound of that, as the network is no chain"
        if found.bound is None
        else f"the layers' discrepancies prove that it is at most {number(found.bound)}"
    )
    return Table(
        "What Net-Trim measured on every layer",
        f"On the calibration samples; mode {found.mode}, ε = {trim.epsilon:.3g} of the norm of a "
        "layer's outputs where its inputs are the dense ones. ε bounds the discrepancy; violation: "
        "by how much an output that was silent is above its bound, as a share of the layer's "
        "scale; after: the discrepancy after the ReLU. The network's outputs are off by "
        f"{number(found.discrepancy)}, {percent(found.discrepancy / size if size else 0.0)} of "
        f"their norm; {bound}. After a cut of the {trim.num_cut:,} smallest weights, to the share "
        f"of zeros that was wanted, they are off by {number(trim.discrepancy)}.",
        ["layer", "kind", "ε", "discrepancy", "violation", "after", "left", "iterations", "solved"],
        [
            TableRow(
                [
                    row["weight"],
                    row["kind"],
                    number(row["epsilon"]),
                    number(row["discrepancy"]),
                    f"{row['violation']:.1e}",
                    number(row["output_discrepancy"]),
                    percent(row["density"]),
                    f"{row['iterations']:,}",
                    "yes" if row["converged"] else "no",
                ],
                "" if row["converged"] else "control",
            )
            for row in findings.trimmed_layers
        ],
    )


def _trim_summary(trim: SparsityTrim) -> dict[str, Any]:
    found = trim.trim
    return {
        "mode": found.mode,
        "epsilon": trim.epsilon,
        "networks_solved": trim.num_solved,
        "weights_cut": trim.num_cut,
        "discrepancy": found.discrepancy,
        "discrepancy_after_cut": trim.discrepancy,
        "bound": found.bound,
        "output_norm": found.output_norm,
        "converged": found.converged,
        "skipped": dict(found.skipped),
    }


def _methods_text(findings: PruneFindings) -> list[str]:
    config, method = findings.config, findings.config.pruner.method
    if method.calibrates:
        seen = (
            f"It saw {findings.num_samples:,} training samples, "
            f"{'with' if config.pruner.labels else 'without'} their labels."
        )
    elif method.replays:
        seen = "It made the training once more, with all that was seen in it."
    else:
        seen = "It saw no samples."
    texts = [
        f"Method: {config.pruner.title}. {seen} {_tuned_text(findings)} No setting was "
        "chosen by the test samples here.",
    ]
    if config.exclude:
        texts.append(f"Excluded, and counted all the same: {', '.join(config.exclude)}.")
    if findings.recalibrated:
        texts.append(
            "Mean and variance of batch norm were renewed on the calibration samples for the "
            "sparse weights; those of the dense network are as it was trained."
        )
    return texts
