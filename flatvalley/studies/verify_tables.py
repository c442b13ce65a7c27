"""The tables of the verify study's report, as text."""

import math
from collections.abc import Sequence

from flatvalley.report import Table, TableRow
from flatvalley.studies.verify import Array, Findings, mean_and_error

ROUNDING = 1e-14
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


def report_tables(findings: Findings) -> list[Table]:
    """Return the report's tables in their order."""
    return [
        _agreement_table(findings),
        _quality_table(findings),
        _barriers_table(findings),
        _certificates_table(findings),
    ]


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
                percent(values) if "overlap" in column else plus_minus(values)
                for column, values in found.items()
            ]
            chance = findings.over_seeds(gamma, "methods", method, "zeros_overlap_by_chance")
            shown[-1] += f" ({100 * float(chance.mean()):.0f} %)"
            label = f"γ = {gamma:g}, λ = {lam:.3f}" if i == 0 else ""
            rows.append(TableRow([label, method_name(method), *shown], _kind(i, method)))
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
            cells = [percent(numbers[0]), plus_minus(numbers[1]), percent(numbers[2])]
            rows.append(TableRow([label, method_name(name), *cells], _kind(i, name)))
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
                return spread(findings.over_seeds(gamma, "barriers", path, what, *keys))

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
                        spread([b["over_chord"]["value"] for b in others]),
                        spread([b["over_chord"]["location"] for b in others]),
                        spread([b["over_mean"]["value"] for b in others]),
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
                    ", ".join(f"{number(bounds[str(k)])} (k={k})" for k in config.ks),
                    f"{number(soft['score_error'])}",
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


def method_name(method: str) -> str:
    """Name of a method for the reader."""
    if method.startswith("projector"):
        return f"DP, {method}"
    return NAMES.get(method, method)


def plus_minus(values: Sequence[float] | Array) -> str:
    """Mean and standard error over seeds."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def percent(values: Sequence[float] | Array) -> str:
    """Mean and standard error over seeds of a share, in per cent."""
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:.1f} %" if math.isnan(error) else f"{mean:.1f} ± {error:.1f} %"


def spread(values: Sequence[float] | Array) -> str:
    """Smallest and largest value."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} … {high}"


def number(value: float | None) -> str:
    """Two significant digits, and a dash for what is missing."""
    if value is None:
        return "–"
    # Differences of losses of order 1 are known to rounding only.
    return "0" if abs(value) < ROUNDING else f"{value:.2g}"
