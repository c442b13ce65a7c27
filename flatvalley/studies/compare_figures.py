"""The figures of a comparison: accuracy and loss against sparsity, and what they cost."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from flatvalley.run import Run
from flatvalley.studies.compare import CompareFindings, RowFindings
from flatvalley.studies.direct_labels import EndLabel, label_ends
from flatvalley.studies.sparsity_axes import percent_zeros, sparsity_axis
from flatvalley.studies.verify_figures import FigureText
from landscape import save_figure

COLORS = {
    "krylov": "#0072B2",
    "eigenspace": "#56B4E9",
    "path": "#009E73",
    "dp-projector": "#44AA99",
    "dp-filter": "#117733",
    "dp-transport": "#999933",
    "soft-threshold": "#999999",
    "magnitude": "#000000",
    "random": "#999999",
    "obd": "#E69F00",
    "obc": "#D55E00",
    "wanda": "#882255",
    "woodfisher": "#CC79A7",
    "net-trim": "#EE3377",
    "compensated": "#661100",
    "grda": "#332288",
    "gradual-magnitude": "#555555",
}
"""Of Okabe & Ito (2008) and Tol (2021), told apart by readers with any colour vision."""
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D")
_ERRORS = (0.9, 0.8, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001)
"""Shares of wrong answers to label, about even in their logarithm."""


def draw_comparison(findings: CompareFindings, run: Run) -> list[FigureText]:
    """Draw every figure there are numbers for, as PDF and PNG, and return their texts.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    provenance = {
        "study": "flatvalley compare",
        "settings": ", ".join(f"{key}={value}" for key, value in run.config.items()),
        "methods": ", ".join(findings.config.methods),
        "seeds": ", ".join(map(str, findings.config.seeds)),
        "versions": ", ".join(f"{k} {v}" for k, v in run.record["environment"].items()),
    }
    texts = []
    for draw in _FIGURES:
        drawn = draw(findings)
        if drawn is not None:
            figure, text = drawn
            save_figure(figure, folder / text.name, provenance)
            texts.append(text)
    return texts


def accuracy_against_sparsity(findings: CompareFindings) -> tuple[Figure, FigureText] | None:
    """Test accuracy of every row, over the sparsities."""
    if not findings.classifies:
        return None
    figure, ax = _canvas()
    # Half a sample, where all are right: the axis is logarithmic in what is wrong.
    least = 0.5 / findings.num_test_samples

    def wrong(accuracies: Sequence[float]) -> list[float]:
        return [max(1.0 - accuracy, least) for accuracy in accuracies]

    labels = _curves(ax, findings, "accuracy", wrong)
    dense = fmean(wrong(findings.dense_over_seeds("accuracy")))
    ax.axhline(dense, color="0.4", linewidth=0.9, linestyle=":")
    _accuracy_axis(ax)
    sparsity_axis(ax, findings.config.sparsities)
    labels.append(EndLabel("dense", ax.get_xlim()[1], dense, "0.4"))
    label_ends(ax, labels)
    return figure, FigureText(
        "accuracy",
        "Accuracy against sparsity",
        f"Share of {findings.num_test_samples:,} test samples classified rightly; "
        f"{_spread(findings)} Both axes are logarithmic: in the weights that are left, and in the "
        "samples that are wrong. Dotted: the dense networks.",
    )


def loss_against_sparsity(findings: CompareFindings) -> tuple[Figure, FigureText] | None:
    """Test loss of every row, over the sparsities."""
    values = [v for row in findings.rows for v in _all(row, findings, "loss")]
    if not values:
        return None
    figure, ax = _canvas()
    labels = _curves(ax, findings, "loss", list)
    dense = fmean(findings.dense_over_seeds("loss"))
    ax.axhline(dense, color="0.4", linewidth=0.9, linestyle=":")
    if min(*values, dense) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("test loss")
    sparsity_axis(ax, findings.config.sparsities)
    labels.append(EndLabel("dense", ax.get_xlim()[1], dense, "0.4"))
    label_ends(ax, labels)
    return figure, FigureText(
        "loss",
        "Loss against sparsity",
        f"Mean loss over {findings.num_test_samples:,} test samples; {_spread(findings)} The axis "
        "of zeros is logarithmic in the weights that are left. Dotted: the dense networks.",
    )


def accuracy_against_cost(findings: CompareFindings) -> tuple[Figure, FigureText] | None:
    """Test accuracy at the highest sparsity against the time it took."""
    share = findings.config.sparsities[-1]
    rows = [row for row in findings.rows if share in row.chosen]
    if not findings.classifies or len(rows) < 2:
        return None
    figure, ax = _canvas()
    least = 0.5 / findings.num_test_samples
    labels = []
    for i, row in enumerate(findings.rows):
        if row not in rows:
            continue
        style = _style(findings, i)
        x = max(fmean(row.over_seeds(share, "seconds")), 1e-3)
        wrong = [max(1.0 - a, least) for a in row.over_seeds(share, "test", "accuracy")]
        y = fmean(wrong)
        ax.errorbar(
            x,
            y,
            yerr=[[y - min(wrong)], [max(wrong) - y]],
            marker=style["marker"],
            color=style["color"],
            markersize=6,
            capsize=2,
            linewidth=1.0,
        )
        labels.append(EndLabel(row.row.label, x, y, style["color"]))
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("seconds, without the training of the dense network")
    _accuracy_axis(ax)
    label_ends(ax, labels)
    return figure, FigureText(
        "cost",
        f"What {percent_zeros(share)} of zeros cost",
        f"Test accuracy at {percent_zeros(share)} zeros against seconds of the processor (of the "
        "wall on a GPU, and for rows that train from the start); a staged method's are those of "
        "its whole run. Times depend on the machine and on what else it did. Bars: range over "
        f"{_seeds(findings)}.",
    )


def _canvas() -> tuple[Figure, Axes]:
    """A figure with room for labels at its right."""
    figure = Figure(figsize=(8.0, 4.8))
    figure.subplots_adjust(left=0.09, right=0.66, bottom=0.12, top=0.97)
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _curves(
    ax: Axes,
    findings: CompareFindings,
    key: str,
    transform: Callable[[Sequence[float]], list[float]],
) -> list[EndLabel]:
    """A line with its range for every row; returns the labels of their ends."""
    labels = []
    for i, row in enumerate(findings.rows):
        shares = [share for share in findings.config.sparsities if share in row.chosen]
        if not shares:
            continue
        style = _style(findings, i)
        values = [transform(row.over_seeds(share, "test", key)) for share in shares]
        x = [1.0 - fmean(row.over_seeds(share, "sparsity")) for share in shares]
        y = [fmean(v) for v in values]
        ax.plot(x, y, linewidth=1.5, markersize=4, **style)
        low, high = [min(v) for v in values], [max(v) for v in values]
        ax.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        labels.append(EndLabel(row.row.label, x[-1], y[-1], style["color"]))
    return labels


def _style(findings: CompareFindings, i: int) -> dict[str, Any]:
    """Colour by method, dash and marker by its place among rows of that method."""
    kind = findings.rows[i].row.kind
    place = sum(row.row.kind == kind for row in findings.rows[:i])
    # Two greys that would otherwise be one.
    shift = {"soft-threshold": 1, "gradual-magnitude": 2}.get(kind, 0)
    return {
        "color": COLORS.get(kind, "#000000"),
        "linestyle": _DASHES[(place + shift) % len(_DASHES)],
        "marker": _MARKERS[(place + shift) % len(_MARKERS)],
    }


def _accuracy_axis(ax: Axes) -> None:
    """An axis of wrong answers, logarithmic, upside down, labelled in right ones."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = [error for error in _ERRORS if low <= error <= high]
    ax.set_yticks(ticks, [f"{100 * (1 - error):.3g} %" for error in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(min(high, 1.0), low)
    ax.set_ylabel("test accuracy")


def _all(row: RowFindings, findings: CompareFindings, key: str) -> list[float]:
    return [v for share in findings.config.sparsities for v in row.over_seeds(share, "test", key)]


def _seeds(findings: CompareFindings) -> str:
    count = len(findings.config.seeds)
    return f"{count} seeds" if count > 1 else "one seed"


def _spread(findings: CompareFindings) -> str:
    count = len(findings.config.seeds)
    return (
        f"lines are means over {count} seeds, bands their range."
        if count > 1
        else "one seed, so small differences tell nothing."
    )


_FIGURES: list[Callable[[CompareFindings], tuple[Figure, FigureText] | None]] = [
    accuracy_against_sparsity,
    loss_against_sparsity,
    accuracy_against_cost,
]
