"""The figures of a training: learning curves, sparsity and threshold, what a sparsity costs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from flatvalley.run import Row, Run
from flatvalley.specs import Spec
from flatvalley.studies.verify_figures import FigureText
from flatvalley.training import TrainResult
from landscape import save_figure

# Okabe & Ito (2008) and darker ones of the same hue: a hue for each kind of optimizer.
HUES = {
    "sgd": ("#000000", "#777777", "#AAAAAA"),
    "grda": ("#56B4E9", "#0072B2", "#1B3A6B", "#009E73", "#004D38"),
    "magnitude": ("#E69F00", "#D55E00", "#8C2D04", "#CC79A7"),
}
DASHES = {"sgd": "--", "grda": "-", "magnitude": "-."}
MARKERS = {"sgd": "s", "grda": "o", "magnitude": "^"}
NAMES = {"sgd": "SGD", "grda": "gRDA", "magnitude": "magnitude"}
_SIGNS = {"mu": "μ", "lr": "γ", "momentum": "momentum", "weight_decay": "decay"}


_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g} %")


def title(spec: Spec) -> str:
    """Return a run's name as people write it.

    Example:
        >>> title(Spec("grda", {"target": 0.9, "mu": 0.6}))
        'gRDA to 90 %, μ=0.6'
    """
    rest = dict(spec.settings)
    target = rest.pop("target", None)
    head = NAMES[spec.name] + (f" to {100 * target:g} %" if target is not None else "")
    parts = [
        f"{_SIGNS.get(key, key)}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in rest.items()
    ]
    if not parts:
        return head
    return f"{head}, {', '.join(parts)}" if target is not None else f"{head} {', '.join(parts)}"


def draw_training(result: TrainResult, run: Run) -> list[FigureText]:
    """Draw every figure there are numbers for, as PDF and PNG, and return their texts.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    provenance = {
        "study": "flatvalley train",
        "settings": ", ".join(f"{key}={value}" for key, value in run.config.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in run.record["environment"].items()),
    }
    texts = []
    for draw in _FIGURES:
        drawn = draw(result)
        if drawn is not None:
            figure, text = drawn
            save_figure(figure, folder / text.name, provenance)
            texts.append(text)
    return texts


def learning_curves(result: TrainResult) -> tuple[Figure, FigureText]:
    """Training loss, and what the held-out samples say, over the epochs."""
    held_out = "validation" if result.config.validation else "test"
    classifies = any(row["train_accuracy"] is not None for row in result.tables["epochs"])
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    left, right = _axes(figure)
    for i in range(len(result.runs)):
        rows = _rows(result, "epochs", i)
        line = _line(result, i)
        _plot(left, rows, "epoch", "train_loss", **line)
        _plot(right, rows, "epoch", f"{held_out}_{'accuracy' if classifies else 'loss'}", **line)
    if all(row["train_loss"] > 0 for row in result.tables["epochs"]):
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel("training loss")
    right.set_ylabel(f"{held_out} {'accuracy' if classifies else 'loss'}")
    if classifies:
        _accuracy_axis(right, result, f"{held_out}_accuracy")
    for ax in (left, right):
        _epoch_axis(ax)
    _legend(figure, left, result)
    return figure, FigureText(
        "learning_curves",
        "Learning curves",
        f"Left: training loss, the mean over each epoch as it was trained"
        f"{' on shifted and mirrored images' if result.config.augment != 'none' else ''}. Right: "
        f"{'accuracy' if classifies else 'loss'} on the {held_out} samples after the epoch; the "
        "axis leaves out the first epochs where they are far below."
        " All runs start from the same weights and see the same batches.",
    )


def sparsity(result: TrainResult) -> tuple[Figure, FigureText] | None:
    """Share of zeros and gRDA's threshold over the steps."""
    if not any(row["sparsity"] > 0 for row in result.tables["steps"]):
        return None
    thresholds = any(_finite(row["threshold"]) for row in result.tables["steps"])
    figure = Figure(figsize=(9.2, 3.9) if thresholds else (5.6, 3.9), layout="constrained")
    axes = _axes(figure, 2 if thresholds else 1)
    for i in range(len(result.runs)):
        rows = _rows(result, "steps", i)
        _plot(axes[0], rows, "epoch", "sparsity", **_line(result, i))
        spec = result.config.specs[i]
        if "target" in spec.settings:
            axes[0].axhline(
                spec.settings["target"],
                color=_line(result, i)["color"],
                linewidth=0.7,
                linestyle=":",
            )
        if thresholds and spec.name == "grda":
            _plot(axes[1], rows, "epoch", "threshold", **_line(result, i))
    axes[0].set_ylabel("share of zeros")
    axes[0].yaxis.set_major_formatter(_PERCENT)
    axes[0].set_ylim(0, 1)
    if thresholds:
        axes[1].set_ylabel("threshold g")
        axes[1].set_ylim(bottom=0)
    for ax in axes:
        _epoch_axis(ax)
        ax.set_xlim(left=0)
    _legend(figure, axes[0], result)
    words = (
        " Right: gRDA's threshold g. At a constant learning rate γ and constant c it is "
        "c √γ (n γ)^μ after n steps; with a wanted sparsity, c follows the measured zeros."
        if thresholds
        else ""
    )
    return figure, FigureText(
        "sparsity",
        "How the networks become sparse",
        f"{'Left: s' if thresholds else 'S'}hare of zeros among all {result.num_weights:,} "
        f"trained weights, biases and normalisation included. Dotted: the sparsity wanted.{words}",
    )


def cost_of_sparsity(result: TrainResult) -> tuple[Figure, FigureText] | None:
    """Test accuracy against sparsity, where the runs ended."""
    ends = [run.row for run in result.runs]
    if any(row["test_accuracy"] is None for row in ends):
        return None
    if sum(row["sparsity"] > 0.01 for row in ends) < 2:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    (ax,) = _axes(figure, 1)
    for i, row in enumerate(ends):
        line = _line(result, i)
        kind = result.config.specs[i].name
        if row["sparsity"] <= 0.01:
            ax.axhline(row["test_accuracy"], **line)
            continue
        ax.plot(
            row["sparsity"],
            row["test_accuracy"],
            MARKERS[kind],
            color=line["color"],
            label=line["label"],
            markersize=7,
        )
    ax.set_xlabel("share of zeros at the end")
    ax.set_ylabel("test accuracy at the end")
    ax.xaxis.set_major_formatter(_PERCENT)
    ax.yaxis.set_major_formatter(_PERCENT)
    _legend(figure, ax, result)
    return figure, FigureText(
        "cost_of_sparsity",
        "What a sparsity costs",
        "Test accuracy after the last epoch against the share of zeros. Lines: runs that prune "
        "nothing. One seed: differences below the standard error of an accuracy, "
        f"{_accuracy_error(result)}, tell nothing.",
    )


def _accuracy_error(result: TrainResult) -> str:
    """Standard error of the best accuracy as a share of so many test samples."""
    best = max(float(run.row["test_accuracy"]) for run in result.runs)
    error = math.sqrt(max(best * (1 - best), 0.0) / result.num_test_samples)
    return f"about {100 * error:.2f} points with {result.num_test_samples:,} test samples"


def _axes(figure: Figure, count: int = 2) -> Sequence[Axes]:
    axes = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def _line(result: TrainResult, i: int) -> dict[str, Any]:
    """Colour, dash and label of the i-th run."""
    spec = result.config.specs[i]
    place = sum(other.name == spec.name for other in result.config.specs[:i])
    hues = HUES[spec.name]
    return {
        "color": hues[place % len(hues)],
        "linestyle": DASHES[spec.name],
        "linewidth": 1.5,
        "label": title(spec),
    }


def _rows(result: TrainResult, table: str, i: int) -> list[Row]:
    return [row for row in result.tables[table] if row["run"] == result.config.runs[i]]


def _plot(ax: Axes, rows: Sequence[Row], x: str, y: str, **line: Any) -> None:
    shown = [row for row in rows if _finite(row[y])]
    # A single point is no line.
    marker = "o" if len(shown) == 1 else None
    ax.plot([row[x] for row in shown], [row[y] for row in shown], marker=marker, **line)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _epoch_axis(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _accuracy_axis(ax: Axes, result: TrainResult, column: str) -> None:
    """Show where the curves end, not how low they began."""
    found = [row[column] for row in result.tables["epochs"] if _finite(row[column])]
    ends = [run.row[column] for run in result.runs]
    low = min(ends) - 2.0 * max(max(found) - min(ends), 0.01)
    ax.set_ylim(bottom=max(low, min(found) - 0.002))
    ax.yaxis.set_major_formatter(_PERCENT)


def _legend(figure: Figure, ax: Axes, result: TrainResult) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False
    )


_FIGURES: list[Callable[[TrainResult], tuple[Figure, FigureText] | None]] = [
    learning_curves,
    sparsity,
    cost_of_sparsity,
]
