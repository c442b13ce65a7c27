"""The words and tables of the verify study's report."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.table import Table as ConsoleTable

from flatvalley.report import Picture, Report, write_report
from flatvalley.run import Run
from flatvalley.studies.verify import Findings
from flatvalley.studies.verify_figures import FigureText
from flatvalley.studies.verify_tables import (
    method_name,
    number,
    percent,
    plus_minus,
    report_tables,
    spread,
)

# Minima whose barrier is below this share of that between independent runs share a valley.
VALLEY_SHARE = 0.1


def write_verify_report(findings: Findings, run: Run, figures: Sequence[FigureText]) -> Path:
    """Write ``report.html`` into the run's folder."""
    pictures = [
        Picture(f.name, f.title, f.caption, run.path / "figures" / f"{f.name}.png") for f in figures
    ]
    config, size = findings.config, _size(findings)
    report = Report(
        title="Does gRDA perform directional pruning?",
        byline=(
            f"{config.data}, tanh network with {size:,} weights, float64, {config.seeds} seeds; "
            f"flatvalley {run.record['environment']['flatvalley']}, {run.record['started'][:10]}"
        ),
        verdict="Yes, to first order along the training path; the Hessian at its end tells less."
        if findings.holds
        else "Not shown: at least one of the claims below does not hold in this run.",
        good=findings.holds,
        conclusion=_conclusion(findings),
        claims=findings.claims,
        tables=report_tables(findings),
        pictures=pictures,
        methods=_methods_text(findings),
        provenance=_provenance(run),
    )
    return write_report(report, run.path / "report.html")


def console_summary(findings: Findings) -> ConsoleTable:
    """Return the summary for the terminal: relative errors by method and learning rate."""
    table = ConsoleTable(title="Distance to gRDA's minimum, in units of ‖gRDA − SGD‖")
    table.add_column("pruning of the SGD minimum")
    gammas = findings.config.gammas
    for gamma in gammas:
        table.add_column(f"γ = {gamma:g}", justify="right")
    for method in findings.methods:
        cells = [
            plus_minus(findings.over_seeds(g, "methods", method, "relative_error")) for g in gammas
        ]
        style = "bold" if method == "transport" else ""
        table.add_row(method_name(method), *cells, style=style)
    table.add_section()
    for label, point in (
        ("sparsity of gRDA", "sparsity"),
        ("test accuracy of gRDA", "test_accuracy"),
    ):
        table.add_row(
            label, *[percent(findings.over_seeds(g, "points", "gRDA", point)) for g in gammas]
        )
    table.add_row(
        "test accuracy of SGD",
        *[percent(findings.over_seeds(g, "points", "SGD", "test_accuracy")) for g in gammas],
    )
    return table


def _conclusion(findings: Findings) -> list[str]:
    config = findings.config
    smallest = config.gammas[-1]

    def away(method: str) -> str:
        errors = findings.over_seeds(smallest, "methods", method, "relative_error")
        return f"{100 * float(errors.mean()):.0f} %"

    cosine = float(findings.over_seeds(smallest, "methods", "transport", "cosine").mean())
    paragraphs = [
        f"At the smallest learning rate, γ = {smallest:g}, directional pruning of SGD's end point "
        f"with the transport scores ends {away('transport')} of the distance between SGD and gRDA "
        f"away from gRDA's weights (cosine {cosine:.3f}). These scores carry the Hessian along "
        "SGD's whole path. The Hessian at the end point alone does less: the filter scores are "
        f"{away('filter')} away, a hard projector (k = {config.ks[-1]}) "
        f"{away(f'projector k={config.ks[-1]}')}.",
        f"Controls: soft thresholding at the same λ is {away('soft')} away, at its best λ, chosen "
        f"with gRDA's weights in hand, {away('soft, best lambda')}; the transport scores permuted "
        f"among the weights {away('permuted scores')}; magnitude pruning at gRDA's sparsity "
        f"{away('magnitude')}.",
    ]
    if len(config.gammas) > 1:
        order, spread = findings.order
        means = [
            float(findings.over_seeds(g, "methods", "transport", "relative_error").mean())
            for g in config.gammas
        ]
        local = [
            f"{math.log(a / b) / math.log(x / y):.2f} from {x:g} to {y:g}"
            for (a, b), (x, y) in zip(pairwise(means), pairwise(config.gammas), strict=True)
        ]
        paragraphs.append(
            f"The error of the transport scores falls like γ^{order:.2f}"
            + ("" if math.isnan(spread) else f" ± {spread:.2f}")
            + f" at fixed training time ({', '.join(local)}); expected to first order is γ^½."
        )
    paragraphs += [
        _valley_sentence(findings),
        _limits_sentence(findings),
    ]
    return paragraphs


def _limits_sentence(findings: Findings) -> str:
    gamma = findings.config.gammas[0]

    def loss(group: str, name: str) -> str:
        return f"{float(findings.over_seeds(gamma, group, name, 'train_loss').mean()):.3f}"

    zeros = percent(findings.over_seeds(gamma, "points", "gRDA", "sparsity"))
    gradient, curvature, measured = (
        float(findings.over_seeds(gamma, "curvature", "gRDA", part).mean())
        for part in ("linear", "quadratic", "measured")
    )
    return (
        "What this does not show. SGD's end point is not yet a minimum: of the "
        f"loss change to gRDA at γ = {gamma:g}, {measured:.3f}, the gradient that is left there "
        f"accounts for {gradient:.3f} and ½ Δᵀ H Δ for {curvature:.3f}, and some eigenvalues are "
        "slightly negative. Nor does it show that gRDA's minimum is the best sparse one. Close to "
        f"gRDA is not the same as good. At γ = {gamma:g}, with {zeros} zeros, the training loss is "
        f"{loss('points', 'gRDA')} for gRDA, {loss('methods', 'transport')} for DP with the "
        f"transport scores and {loss('methods', 'magnitude')} for magnitude pruning at the same "
        f"sparsity, against {loss('points', 'SGD')} for SGD. The theory covers weights until they "
        "clip, and most did; the regimes are reported apart."
    )


def _valley_sentence(findings: Findings) -> str:
    gamma = findings.config.gammas[0]
    line, curve = (
        float(findings.over_seeds(gamma, "barriers", p, "train loss", "over_chord", "value").max())
        for p in ("line", "bezier")
    )
    others = [
        r["barrier"]["over_chord"]["value"] for r in findings.independent if r["gamma"] == gamma
    ]
    pruned = findings.over_seeds(
        gamma, "barriers", "magnitude", "train loss", "over_chord", "value"
    )
    found = (
        f"at γ = {gamma:g}, where they are farthest apart, the training loss exceeds the chord "
        f"between them by at most {number(line)} on the straight line and {number(curve)} on a "
        "trained curve, over all seeds."
    )
    if not others:
        return f"Between the end points, {found} One seed gives no second start to compare with."
    control = (
        f"Between SGD runs from different starts it does so by {spread(others)}; from SGD to its "
        f"magnitude-pruned copy by at most {number(float(pruned.max()))}, so this alone does not "
        "single gRDA out."
    )
    if max(line, curve) < VALLEY_SHARE * min(others):
        return f"No ridge lies between the two end points: {found} {control}"
    return f"Whether a ridge lies between the two end points is open: {found} {control}"


def _methods_text(findings: Findings) -> list[str]:
    config = findings.config
    return [
        f"SGD and gRDA start from the same weights and see the same minibatches of "
        f"{config.batch_size} for t = {config.time:g} units of training time (t / γ steps); a "
        "second SGD run sees them in another order. gRDA soft-thresholds a dual vector with "
        f"g = c √γ t^μ, c = {config.c:g}, μ = {config.mu:g}. No momentum, no weight decay.",
        "Directional pruning takes SGD's weights w to sign(w) max(|w| − λ s, 0) with λ = gRDA's "
        "final threshold. The scores s = sign(w) Π₀ sign(w) come in three forms: projector (Π₀ = "
        "I − V Vᵀ with k leading eigenvectors), filter (φ(H), φ(h) = ₁F₁(1; 1+μ; −h t), by one "
        "Lanczos run), and transport (the first-order difference of the two algorithms, carried "
        "along SGD's path by Hessian-vector products).",
        "Transport with the minibatch's Hessian, one product a step, is the exact linearisation of "
        "the coupled pair; with the Hessian of the training loss, one product for every "
        f"{config.training(config.gammas[0], 0).transport_interval:g} of training time or every "
        "step, whichever is longer, it is the theorem's. The loss is the mean "
        "cross-entropy over the training images, a fixed function without augmentation or dropout. "
        "Test images take no part in any choice.",
    ]


def _provenance(run: Run) -> list[tuple[str, str]]:
    record = run.record
    return [
        ("settings", json.dumps(record["config"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["environment"].items())),
        ("cost", json.dumps(record["cost"])),
        ("started", record["started"]),
        ("finished", record["finished"]),
        ("tables", "tables/*.csv, one seed a row; tables/summary.csv over seeds"),
        ("weights", "cells/*.safetensors: SGD, gRDA, controls, scores, trajectories"),
    ]


def _size(findings: Findings) -> int:
    return int(next(iter(findings.records.values()))["size"])
