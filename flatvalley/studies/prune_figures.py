"""The figures of one pruning: what is left of every parameter, and the loss from stage to stage."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from flatvalley.run import Run
from flatvalley.studies.prune import Layer, PruneFindings
from flatvalley.studies.sparsity_axes import sparsity_axis
from flatvalley.studies.verify_figures import FigureText
from landscape import save_figure

BLUE, ORANGE = "#0072B2", "#D55E00"
"""Of Okabe & Ito (2008)."""
MOST_NAMED = 40
"""Parameters up to which each has a row and a name."""


def draw_pruning(findings: PruneFindings, run: Run) -> list[FigureText]:
    """Draw every figure there are numbers for, as PDF and PNG, and return their texts.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    provenance = {
        "study": "flatvalley prune",
        "settings": ", ".join(f"{key}={value}" for key, value in run.config.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in run.record["environment"].items()),
    }
    drawn = [layer_densities(findings)]
    if len(findings.stages) > 1:
        drawn.append(loss_by_stage(findings))
    for figure, text in drawn:
        save_figure(figure, folder / text.name, provenance)
    return [text for _, text in drawn]


def layer_densities(findings: PruneFindings) -> tuple[Figure, FigureText]:
    """What is left of every parameter."""
    layers = [layer for layer in findings.layers if layer.size]
    overall = 1.0 - findings.sparsity
    least = min((layer.density for layer in layers if layer.left), default=overall)
    low = 10.0 ** math.floor(math.log10(min(least, overall)) - 0.15)
    named = len(layers) <= MOST_NAMED
    height = 1.3 + 0.24 * len(layers) if named else 3.8
    figure = Figure(figsize=(7.2, height), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    # An empty parameter stands at the edge, as an open circle.
    values = [max(layer.density, low) for layer in layers]
    if named:
        _named_dots(ax, layers, values, overall)
        axis: Axis = ax.xaxis
        ax.set_xlim(low, 1.08)
        ax.set_xlabel("share of the weights that is left")
    else:
        ax.plot(values, ".-", color=BLUE, linewidth=0.8)
        ax.axhline(overall, color=ORANGE, linewidth=1.2)
        ax.set_yscale("log")
        ax.set_ylim(low, 1.08)
        axis = ax.yaxis
        ax.set_xlabel("parameter, in the order of the network")
        ax.set_ylabel("share of the weights that is left")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axis.set_minor_formatter(NullFormatter())
    emptied = [layer.name for layer in layers if not layer.left]
    listed = ", ".join(emptied[:5]) + (f" and {len(emptied) - 5} more" if emptied[5:] else "")
    words = f" Nothing is left of {listed} (open circles)." if emptied else ""
    return figure, FigureText(
        "layers",
        "What is left of every parameter",
        f"Share of the weights that are not zero, on a logarithmic axis. Orange: the whole "
        f"network, {100 * overall:.3g} %.{words} The numbers are in tables/layers.csv.",
    )


def _named_dots(ax: Axes, layers: Sequence[Layer], values: Sequence[float], overall: float) -> None:
    """A row for every parameter: its name, a dot, and its counts."""
    ax.set_xscale("log")
    ax.axvline(overall, color=ORANGE, linewidth=1.2, zorder=1)
    ax.hlines(range(len(layers)), overall, values, color=BLUE, linewidth=1.2, zorder=2)
    for i, (layer, value) in enumerate(zip(layers, values, strict=True)):
        face = BLUE if layer.left else "white"
        ax.plot(value, i, "o", color=BLUE, markerfacecolor=face, zorder=3, clip_on=False)
        ax.annotate(
            f"{layer.left:,} of {layer.size:,}",
            (1.0, i),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="0.25",
            annotation_clip=False,
        )
    ax.set_yticks(range(len(layers)), [layer.name for layer in layers])
    ax.set_ylim(len(layers) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.annotate(
        f"all {100 * overall:.3g} %",
        (overall, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        color=ORANGE,
        fontsize=8,
        ha="center",
    )


def loss_by_stage(findings: PruneFindings) -> tuple[Figure, FigureText]:
    """Loss on the calibration samples before and after the weights that stay have moved."""
    stages = findings.result.stages
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    left = [1.0 - stage.sparsity for stage in stages]
    after = [stage.loss for stage in stages]
    ax.plot(left, after, "o-", color=BLUE, linewidth=1.4, markersize=4)
    if all(value > 0 for value in after):
        ax.set_yscale("log")
    sparsity_axis(ax, [stage.sparsity for stage in stages])
    ax.set_ylabel("loss on the calibration samples")
    return figure, FigureText(
        "stages",
        "Loss from stage to stage",
        "After each stage, in the curvature's own loss: the distance to the dense network's "
        "outputs, or the training loss for methods that take labels. The axis of zeros is "
        "logarithmic in the weights that are left. The evidence of every stage is in "
        "tables/stages.csv.",
    )
