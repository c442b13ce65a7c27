"""The words and tables of the verify study's report."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.table import Table as ConsoleTable

from flatvalley.report import Picture, Report, Table, TableRow, write_report
from flatvalley.run import Run
from flatvalley.studies.verify import Array, Findings, mean_and_error
from flatvalley.studies.verify_figures import FigureText

ROUNDING = 1e-14
# Minima whose barrier is below this share of that between independent runs share a valley.
VALLEY_SHARE = 0.1
LOSS_CHANGE = ("linear", "quadratic", "measured")
CONTROLS = (
    "permuted scores",
    "soft",
    "soft, best lambda",
    "soft, same sparsity",
    "magnitude",
)
AGREEMENT = (
    "relative_error",
    "relative_error_never_clipped",
    "relative_error_clipped",
    "cosine",
    "zeros_overlap",
)
NAMES = {
    "transport": "DP, transport (full Hessian)",
    "transport (minibatch)": "DP, transport (minibatch Hessian)",
    "filter": "DP, filter φ(H)",
    "permuted scores": "DP, transport scores permuted",
    "soft": "soft threshold, same λ",
    "soft, best lambda": "soft threshold, best λ",
    "soft, same sparsity": "soft threshold, same sparsity",
    "magnitude": "magnitude, same sparsity",
}


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
        tables=[
            _agreement_table(findings),
            _quality_table(findings),
            _barriers_table(findings),
            _certificates_table(findings),
        ],
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
            _plus_minus(findings.over_seeds(g, "methods", method, "relative_error")) for g in gammas
        ]
        table.add_row(
            _name(method), *cells, style="bold" if method == "transport" else "", end_section=False
        )
    table.add_section()
    for label, point in (
        ("sparsity of gRDA", "sparsity"),
        ("test accuracy of gRDA", "test_accuracy"),
    ):
        table.add_row(
            label, *[_percent(findings.over_seeds(g, "points", "gRDA", point)) for g in gammas]
        )
    table.add_row(
        "test accuracy of SGD",
        *[_percent(findings.over_seeds(g, "points", "SGD", "test_accuracy")) for g in gammas],
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

    zeros = _percent(findings.over_seeds(gamma, "points", "gRDA", "sparsity"))
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
        f"between them by at most {_number(line)} on the straight line and {_number(curve)} on a "
        "trained curve, over all seeds."
    )
    if not others:
        return f"Between the end points, {found} One seed gives no second start to compare with."
    control = (
        f"Between SGD runs from different starts it does so by {_spread(others)}; from SGD to its "
        f"magnitude-pruned copy by at most {_number(float(pruned.max()))}, so this alone does not "
        "single gRDA out."
    )
    if max(line, curve) < VALLEY_SHARE * min(others):
        return f"No ridge lies between the two end points: {found} {control}"
    return f"Whether a ridge lies between the two end points is open: {found} {control}"


def _agreement_table(findings: Findings) -> Table:
    rows = []
    for gamma in findings.config.gammas:
        lam = findings.over_seeds(gamma, "lambda")[0]
        for i, method in enumerate(findings.methods):
            found = {
                column: findings.over_seeds(gamma, "methods", method, column)
                for column in AGREEMENT
            }
            shown = [
                _percent(values) if "overlap" in column else _plus_minus(values)
                for column, values in found.items()
            ]
            chance = findings.over_seeds(gamma, "methods", method, "zeros_overlap_by_chance")
            shown[-1] += f" ({100 * float(chance.mean()):.0f} %)"
            label = f"γ = {gamma:g}, λ = {lam:.3f}" if i == 0 else ""
            rows.append(TableRow([label, _name(method), *shown], _kind(i, method)))
    return Table(
        "How close every pruning of the SGD minimum comes to gRDA",
        "Relative error: ‖pruned − gRDA‖ / ‖gRDA − SGD‖, over all weights, over those that gRDA "
        "never clipped, and over those it clipped at some time. Cosine: between the two moves from "
        "SGD. Overlap of zeros: Jaccard index of the two sets of zeros, and in brackets what "
        "independent sets of the same sizes score. Mean ± standard error over "
        f"{findings.config.seeds} seeds. Grey: controls; the best λ is chosen with gRDA's weights "
        "in hand, as no method could.",
        [
            "",
            "method",
            "relative error",
            "never clipped",
            "clipped",
            "cosine",
            "overlap of zeros (by chance)",
        ],
        rows,
    )


def _quality_table(findings: Findings) -> Table:
    rows = []
    for gamma in findings.config.gammas:
        sources = [("points", "SGD"), ("points", "gRDA")]
        sources += [("methods", method) for method in findings.methods]
        for i, (group, name) in enumerate(sources):
            label = f"γ = {gamma:g}" if i == 0 else ""
            columns = ("sparsity", "train_loss", "test_accuracy")
            numbers = [findings.over_seeds(gamma, group, name, column) for column in columns]
            cells = [_percent(numbers[0]), _plus_minus(numbers[1]), _percent(numbers[2])]
            rows.append(TableRow([label, _name(name), *cells], _kind(i, name)))
    return Table(
        "How good the pruned networks are",
        "Nothing is retrained after pruning. Sparsity counts zeros among all weights and biases. "
        f"Mean ± standard error over {findings.config.seeds} seeds. Grey: controls.",
        ["", "method", "sparsity", "train loss", "test accuracy"],
        rows,
    )


def _kind(row: int, method: str) -> str:
    return "group" if row == 0 else "control" if method in CONTROLS else ""


def _barriers_table(findings: Findings) -> Table:
    names = {
        "line": "gRDA → SGD, straight line",
        "bezier": "gRDA → SGD, trained Bézier curve",
        "second SGD": "second SGD (same start) → SGD, line",
        "magnitude": "magnitude-pruned → SGD, line",
    }
    rows = []
    for gamma in findings.config.gammas:
        for i, (path, label) in enumerate(names.items()):

            def column(what: str, *keys: str, gamma: float = gamma, path: str = path) -> str:
                return _spread(findings.over_seeds(gamma, "barriers", path, what, *keys))

            rows.append(
                TableRow(
                    [
                        f"γ = {gamma:g}" if i == 0 else "",
                        label,
                        column("train loss", "over_chord", "value"),
                        column("train loss", "over_chord", "location"),
                        column("train loss", "over_mean", "value"),
                        column("test error", "over_chord", "value"),
                    ],
                    "group" if i == 0 else "control" if path in ("second SGD", "magnitude") else "",
                )
            )
        others = [row["barrier"] for row in findings.independent if row["gamma"] == gamma]
        if others:
            rows.append(
                TableRow(
                    [
                        "",
                        "SGD → SGD from another start, line",
                        _spread([b["over_chord"]["value"] for b in others]),
                        _spread([b["over_chord"]["location"] for b in others]),
                        _spread([b["over_mean"]["value"] for b in others]),
                        "–",
                    ],
                    "control",
                )
            )
    return Table(
        "Barriers",
        "Height of the loss between the ends: max L(t) − ((1−t) L(0) + t L(1)) (over the chord) "
        "and max L(t) − (L(0) + L(1)) / 2 (over the mean; positive for unequal ends even without "
        "a barrier), with the t of the former. Smallest and largest over seeds. Standard errors "
        "over samples are in tables/barriers.csv.",
        ["", "path", "train loss, over chord", "at t", "over mean", "test error, over chord"],
        rows,
    )


def _certificates_table(findings: Findings) -> Table:
    config = findings.config
    rows = []
    for gamma in config.gammas:
        space = findings.records[gamma, 0]["eigenspace"]
        transport = findings.records[gamma, 0]["methods"]["transport"]
        soft = findings.records[gamma, 0]["methods"]["filter"]
        curvature = findings.records[gamma, 0]["curvature"]["gRDA"]
        bounds = space["projector_error_bound"]
        rows.append(
            TableRow(
                [
                    f"γ = {gamma:g}",
                    f"{space['largest']:.3f}",
                    f"{soft['lowest_eigenvalue']:.2g}",
                    f"{space['worst_residual']:.1e}" + ("" if space["converged"] else " (not met)"),
                    ", ".join(f"{_number(bounds[str(k)])} (k={k})" for k in config.ks),
                    f"{_number(soft['score_error'])}",
                    " / ".join(str(r["num_products"]) for r in (space, soft, transport)),
                    f"{curvature['distance']:.2f}",
                    " / ".join(f"{curvature[part]:.3f}" for part in LOSS_CHANGE),
                    f"{findings.records[gamma, 0]['gradient_norm']:.3f}",
                ],
                "group",
            )
        )
    return Table(
        "Certificates and cost",
        "First seed. Eigenpairs: largest residual ‖H v − λ v‖ of all pairs, measured by products "
        "made after the iteration, and the Davis-Kahan bound on the projector for each k. Filter: "
        "estimated error of φ(H) sign(w) in the 2-norm. Negative eigenvalues count "
        "as 0 in φ. Products: Hessian-vector products for the eigenspace, the filter "
        "and the transport. ΔL: loss change from SGD to gRDA by its first-order part ∇Lᵀ Δ, by "
        "½ Δᵀ H Δ, and measured. ‖∇L‖ and λ_min at SGD's end point say how far that is from a "
        "minimum.",
        [
            "",
            "λ_max",
            "λ_min seen",
            "residual",
            "projector bound",
            "filter error",
            "products (eig / filter / transport)",
            "‖gRDA − SGD‖",
            "ΔL linear / quadratic / measured",
            "‖∇L‖",
        ],
        rows,
    )


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


def _name(method: str) -> str:
    if method.startswith("projector"):
        return f"DP, {method}"
    return NAMES.get(method, method)


def _size(findings: Findings) -> int:
    return int(next(iter(findings.records.values()))["size"])


def _plus_minus(values: Sequence[float] | Array) -> str:
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def _percent(values: Sequence[float] | Array) -> str:
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:.1f} %" if math.isnan(error) else f"{mean:.1f} ± {error:.1f} %"


def _spread(values: Sequence[float] | Array) -> str:
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} … {high}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    # Differences of losses of order 1 are known to rounding only.
    return "0" if abs(value) < ROUNDING else f"{value:.2g}"
