"""The figures of the verify study, each with its control in the same axes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from flatvalley.run import Run
from flatvalley.studies.verify import Findings, mean_and_error
from flatvalley.studies.verify_cell import share_ks
from landscape import (
    BezierCurve,
    Evaluation,
    Plane,
    plot_plane,
    plot_profile,
    plot_share,
    plot_trajectory,
    project_trajectory,
    save_figure,
)

# Okabe & Ito (2008), told apart by readers with any colour vision.
COLORS = {
    "transport": "#0072B2",
    "transport (minibatch)": "#56B4E9",
    "filter": "#009E73",
    "soft": "#000000",
    "soft, best lambda": "#882255",
    "magnitude": "#999999",
}
PROJECTOR_COLORS = ("#D55E00", "#E69F00", "#CC79A7", "#F0E442")
MARKERS = {"transport": "o", "transport (minibatch)": "x", "filter": "s", "soft": "v"}
CONTROLS = ("soft", "soft, best lambda", "magnitude")
NUM_DIRECTIONS = 3


@dataclass(frozen=True)
class FigureText:
    """What a figure shows and what it is to be held against."""

    name: str
    title: str
    caption: str


def draw_all(findings: Findings, run: Run) -> list[FigureText]:
    """Draw every figure into the run's folder, as PDF and PNG, and return their texts."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    provenance = {
        "study": "flatvalley verify",
        "settings": ", ".join(f"{key}={value}" for key, value in run.config.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in run.record["environment"].items()),
    }
    texts = []
    for draw in _FIGURES:
        figure, text = draw(findings)
        save_figure(figure, folder / text.name, provenance)
        texts.append(text)
    return texts


def error_against_gamma(findings: Findings) -> tuple[Figure, FigureText]:
    """Relative error of every method against the learning rate."""
    config = findings.config
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = figure.subplots()
    gammas = np.array(config.gammas)
    # Controls last, so that they are not hidden.
    for method in findings.methods:
        if method not in COLORS and not method.startswith("projector"):
            continue  # in the table only
        stats = [
            mean_and_error(findings.over_seeds(g, "methods", method, "relative_error"))
            for g in config.gammas
        ]
        mean, error = np.array(stats).T
        ax.errorbar(
            gammas,
            mean,
            yerr=2 * np.nan_to_num(error),
            label=_label(method),
            color=_color(findings, method),
            marker=MARKERS.get(method, "D"),
            markersize=5,
            linestyle="--" if method in CONTROLS else "-",
            capsize=3,
            # The hard projector lies on soft thresholding: a wide, pale line shows both.
            linewidth=5 if method == "soft" else 1.4,
            alpha=0.35 if method == "soft" else 1.0,
            zorder=0 if method == "soft" else 2,
        )
    anchor = findings.over_seeds(config.gammas[-1], "methods", "transport", "relative_error").mean()
    if len(gammas) > 1:
        guide = anchor * np.sqrt(gammas / gammas[-1])
        ax.plot(gammas, 0.82 * guide, color="0.6", linewidth=1, linestyle=":", label="slope ½")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(gammas, [f"{g:g}" for g in gammas])
    ax.minorticks_off()
    ticks = [0.05, 0.1, 0.2, 0.5, 1.0]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_ylim(min(0.8 * anchor, 0.1), 1.6)
    ax.set_xlabel("learning rate γ (at fixed training time t)")
    ax.set_ylabel("‖pruned − gRDA‖ / ‖gRDA − SGD‖")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    order, spread = findings.order
    fitted = (
        f" The fitted order of the transport error is γ^{order:.2f}"
        + ("" if np.isnan(spread) else f" ± {spread:.2f} (standard error over seeds)")
        + "; expected is γ^0.5."
        if len(gammas) > 1
        else ""
    )
    return figure, FigureText(
        "error_against_gamma",
        "How far each pruning of the SGD minimum is from gRDA",
        "Distance to gRDA's weights in units of the distance between gRDA and SGD: 0 is gRDA, 1 is "
        "as far as SGD itself. All methods start from the same SGD minimum and use gRDA's final "
        f"threshold as λ.{fitted} Controls (dashed), which know nothing of the Hessian: soft "
        "thresholding at the same λ and at the λ that comes closest to gRDA, chosen with gRDA's "
        "weights in hand, and magnitude pruning at gRDA's sparsity. Bars: two standard "
        f"errors over {config.seeds} seeds.",
    )


def measured_scores(findings: Findings) -> tuple[Figure, FigureText]:
    """Predicted scores against those that gRDA's weights imply."""
    config = findings.config
    gamma = config.gammas[-1]
    cell, record = findings.tensors[gamma, 0], findings.records[gamma, 0]
    rows = ~cell["clipped"]
    sgd, grda = cell["sgd"][rows], cell["grda"][rows]
    measured = (-sgd.sign() * (grda - sgd) / record["lambda"]).numpy()
    forms = [f"projector k={config.ks[0]}", "filter", "transport"]
    figure = Figure(figsize=(9.0, 3.3), layout="constrained")
    # Without a weight that was never clipped there is nothing to measure: empty axes say so.
    low, high = np.quantile(measured, (0.002, 0.998)) if len(measured) else (0.0, 1.0)
    low, high = low - 0.3, high + 0.3
    for ax, form in zip(figure.subplots(1, 3, sharey=True), forms, strict=True):
        predicted = cell[f"scores.{form}"][rows].numpy()
        ax.plot([low, high], [low, high], color="0.6", linewidth=1)
        ax.scatter(predicted, measured, s=5, alpha=0.35, linewidths=0, color=_color(findings, form))
        r = _correlation(predicted, measured)
        ax.set_title(f"{form}\nr = {r:.3f}" if not np.isnan(r) else form, fontsize="medium")
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        ax.set_aspect("equal")
        ax.set_xlabel("predicted score")
    figure.axes[0].set_ylabel("−sign(w) (gRDA − SGD) / λ")
    return figure, FigureText(
        "measured_scores",
        "Scores, predicted and measured",
        f"Each point is one of the {int(rows.sum())} weights that gRDA never clipped, at γ = "
        f"{gamma:g}, first seed. Across: the score that the Hessian predicts. Up: the score that "
        "gRDA's weight implies. On the grey diagonal they agree; r is their correlation. Soft "
        "thresholding, the control, predicts 1 for every weight; the hard projector with k = "
        f"{config.ks[0]} hardly differs from it.",
    )


def regimes(findings: Findings) -> tuple[Figure, FigureText]:
    """Relative errors for weights never clipped and clipped."""
    config = findings.config
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    shown = ["transport", "filter", "soft"]
    titles = {"never_clipped": "weights never clipped", "clipped": "weights clipped at some time"}
    for ax, (regime, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for method in shown:
            stats = [
                mean_and_error(
                    findings.over_seeds(g, "methods", method, f"relative_error_{regime}")
                )
                for g in config.gammas
            ]
            mean, error = np.array(stats).T
            ax.errorbar(
                config.gammas,
                mean,
                yerr=2 * np.nan_to_num(error),
                label=_label(method),
                color=_color(findings, method),
                marker=MARKERS.get(method, "D"),
                linestyle="--" if method == "soft" else "-",
                capsize=3,
                linewidth=1.4,
            )
        ax.set_xscale("log")
        ax.set_xticks(config.gammas, [f"{g:g}" for g in config.gammas])
        ax.minorticks_off()
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("learning rate γ")
        ax.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("relative error in the regime")
    figure.axes[1].legend(frameon=False, loc="upper left")
    shares = ", ".join(
        f"{findings.over_seeds(g, 'never_clipped').mean():.0%}".replace("%", " %")
        + f" at γ = {g:g}"
        for g in config.gammas
    )
    return figure, FigureText(
        "regimes",
        "The two regimes apart",
        "The theory covers weights until they clip: then gRDA re-adjusts the others, which "
        "one-shot pruning cannot. Never clipped are "
        f"{shares} of all weights. Both regimes are in units of their own part of ‖gRDA − SGD‖. A "
        "clipped weight is easier to predict when it ends at zero on both sides. Control: soft "
        "thresholding (dashed). Bars: two standard errors over seeds.",
    )


def share_in_eigenspace(findings: Findings) -> tuple[Figure, FigureText]:
    """Share of differences in the leading eigenspace against its size."""
    config = findings.config
    gamma = config.gammas[-1]
    records = [findings.records[gamma, seed] for seed in range(config.seeds)]
    shares = {
        f"{name} − SGD": torch.tensor([record["shares"][name] for record in records])
        for name in ("gRDA", "second SGD", "magnitude")
    }
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    ax = figure.subplots()
    plot_share(shares, share_ks(max(config.ks)), records[0]["size"], ax=ax)
    return figure, FigureText(
        "share_in_eigenspace",
        "How much of the way to gRDA leads in sharp directions",
        f"Share ‖VᵀΔ‖ / ‖Δ‖ of three differences in the k leading eigenvectors of the Hessian at "
        f"SGD, γ = {gamma:g}. Controls: a random direction scores √(k/d) (grey, 95 % band); a "
        "second SGD run from the same start with batches of its own, while gRDA shares SGD's; "
        "magnitude pruning at gRDA's sparsity. Bars: smallest and largest of "
        f"{config.seeds} seeds. The value is the true ratio; figure 6 of Chao et al. (2020) "
        "divides by ten copies of ‖Δ‖² and so is too small by √10.",
    )


def valley(findings: Findings) -> tuple[Figure, FigureText]:
    """Loss and test error along lines and the trained curve."""
    gamma = findings.config.gammas[0]
    cell = findings.tensors[gamma, 0]
    names = {
        "line": "line gRDA → SGD",
        "bezier": "Bézier gRDA → SGD",
        "second SGD": "line second SGD → SGD",
        "magnitude": "line magnitude-pruned → SGD",
    }
    figure = Figure(figsize=(9.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, what in ((left, "train loss"), (right, "test error")):
        profiles = {label: _profile(cell, name, what) for name, label in names.items()}
        if what == "train loss" and gamma in findings.independent_profiles:
            profiles["line to SGD from another start"] = findings.independent_profiles[gamma]
        plot_profile(
            profiles, ax=ax, ends=("other end", "SGD"), ylabel=what, log=what == "train loss"
        )
        ax.get_legend().remove()
        ax.set_title(what, fontsize="medium")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure, FigureText(
        "valley",
        "What lies between the two minima",
        f"Training loss and test error at γ = {gamma:g}, the largest distance, first seed, along "
        "the straight line and along a trained quadratic Bézier curve. Bands: two standard errors "
        "over samples. Controls: a second SGD run from the same start, the magnitude-pruned "
        "network, and SGD from another start, whose line to SGD shows what a barrier looks like. "
        "The curve was trained, so it may lie below both ends.",
    )


def loss_plane(findings: Findings) -> tuple[Figure, FigureText]:
    """The loss on the plane through SGD, gRDA and the bend of the curve."""
    gamma = findings.config.gammas[0]
    cell = findings.tensors[gamma, 0]
    plane = Plane.through(cell["grda"], cell["sgd"], cell["bend"])
    curve = BezierCurve(torch.stack([cell["grda"], cell["bend"], cell["sgd"]]))
    count, total, squares = cell["plane.sums"]
    evaluation = Evaluation(cell["plane.points"], count, total, squares)
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    ax = figure.subplots()
    points = {
        "gRDA": cell["grda"],
        "SGD": cell["sgd"],
        "bend": cell["bend"],
    }
    plot_plane(evaluation, plane, points, curve=curve, label="train loss", ax=ax)
    return figure, FigureText(
        "loss_plane",
        "The plane through gRDA, SGD and the bend of the curve",
        f"Training loss at γ = {gamma:g}, first seed; both axes in units of weight space. The "
        "bend is the control point that draws the Bézier curve (white); the curve passes below it. "
        "Dashed: the straight line.",
    )


def trajectories(findings: Findings) -> tuple[Figure, FigureText]:
    """Coordinates on the leading eigenvectors through training."""
    config = findings.config
    gamma = config.gammas[-1]
    cell = findings.tensors[gamma, 0]
    d = len(cell["sgd"])
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(d, 1, generator=generator, dtype=cell["sgd"].dtype)
    count = min(NUM_DIRECTIONS, cell["eigenvectors"].shape[1])
    basis = torch.cat([cell["eigenvectors"][:, :count], random / random.norm()], dim=1)
    found = {
        name: project_trajectory(cell[key], basis, cell["sgd"])
        for name, key in (("SGD", "sgd_path"), ("gRDA", "grda_path"))
    }
    figure = Figure(figsize=(6.4, 6.6), layout="constrained")
    axes = list(figure.subplots(count + 2, 1, sharex=True))
    values = cell["eigenvalues"]
    names = [f"eigenvector {i + 1}, λ = {float(values[i]):.2f}" for i in range(count)]
    plot_trajectory(
        found,
        cell["times"],
        axes=axes,
        names=[*names, "random direction"],
        time_label="time t = steps · γ",
    )
    return figure, FigureText(
        "trajectories",
        "The way to the minimum, seen along the sharpest directions",
        f"Coordinates of both trajectories relative to SGD's end, γ = {gamma:g}, first seed, on "
        "the leading eigenvectors of the Hessian there, on a random direction (control), and the "
        "distance outside all of these. The scales differ: the offset between the runs in the "
        "sharp directions is small beside that outside.",
    )


def _profile(cell: Mapping[str, Tensor], name: str, what: str) -> Evaluation:
    count, total, squares = cell[f"profile.{name}.{what}"]
    return Evaluation(torch.linspace(0, 1, len(count), dtype=count.dtype), count, total, squares)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _label(method: str) -> str:
    labels = {
        "soft": "soft threshold, same λ",
        "soft, best lambda": "soft threshold, best λ",
        "transport": "transport (full H)",
    }
    name = labels.get(method, method)
    return name if method in CONTROLS else f"DP, {name}"


def _color(findings: Findings, method: str) -> str:
    if method in COLORS:
        return COLORS[method]
    ks = list(findings.config.ks)
    return PROJECTOR_COLORS[ks.index(int(method.split("=")[1])) % len(PROJECTOR_COLORS)]


_FIGURES: list[Callable[[Findings], tuple[Figure, FigureText]]] = [
    error_against_gamma,
    measured_scores,
    regimes,
    share_in_eigenspace,
    valley,
    loss_plane,
    trajectories,
]
