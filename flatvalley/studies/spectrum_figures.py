"""The figures of the spectrum study: eigenvalues, density, layers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from flatvalley.run import Run
from flatvalley.studies.spectrum import Measured, Record, SpectrumFindings
from flatvalley.studies.verify_figures import FigureText
from landscape import save_figure
from landscape.figure_style import COLORS, MARKERS, to_numpy

MAX_LAYERS = 40
"""Bars in one figure; the rest is in the table."""


def draw_spectrum(findings: SpectrumFindings, run: Run) -> list[FigureText]:
    """Draw every figure there are numbers for, as PDF and PNG, and return their texts."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    provenance = {
        "study": "flatvalley spectrum",
        "settings": ", ".join(f"{key}={value}" for key, value in run.config.items()),
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


def eigenvalues(findings: SpectrumFindings) -> tuple[Figure, FigureText]:
    """Eigenvalues by rank above their residuals."""
    figure = Figure(figsize=(6.0, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    # One end is positive, the other negative or near zero: only a linear axis shows both.
    linear = findings.config.which in ("smallest", "both")
    negative = any(bool((point.space.values < 0).any()) for point in findings.points)
    middle = (len(findings.points) - 1) / 2
    goals = []
    for i, point in enumerate(findings.points):
        values, residuals = to_numpy(point.space.values), to_numpy(point.space.residuals)
        order = np.argsort(-values) if linear else np.arange(len(values))
        values, residuals = values[order], residuals[order]
        ranks = np.arange(1, len(values) + 1) + 0.16 * (i - middle)
        heights = values if linear else np.abs(values)
        # An interval that reaches below zero has no lower end on a logarithmic axis.
        lower = residuals if linear else np.minimum(residuals, 0.999 * heights)
        for shown, filled in ((values >= 0, True), (values < 0, False)):
            top.errorbar(
                ranks[shown],
                heights[shown],
                yerr=np.stack([lower, residuals])[:, shown],
                fmt=MARKERS[i],
                markersize=6,
                color=COLORS[i],
                markerfacecolor=COLORS[i] if filled else "white",
                capsize=3,
                linewidth=1.2,
            )
        largest = float(np.abs(values).max())
        floor = np.finfo(np.float64).eps * largest  # rounding; a zero has no logarithm
        bottom.plot(ranks, np.maximum(residuals, floor), MARKERS[i], color=COLORS[i], markersize=5)
        goals.append(findings.config.tol * largest)
        color = "0.5" if len(findings.points) == 1 else COLORS[i]
        bottom.axhline(goals[-1], color=color, linewidth=1, linestyle="--")
    _eigenvalue_legend(top, findings, negative=negative)
    bottom.annotate(
        "tolerance",
        (0.01, max(goals)),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize="small",
        color="0.3",
    )
    bottom.set_yscale("log")
    if linear:
        top.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    else:
        top.set_yscale("log")
        _plain_ticks(top)
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    top.set_ylabel("|λ|" if negative and not linear else "eigenvalue λ")
    bottom.set_ylabel("‖H v − λ v‖")
    bottom.set_xlabel("rank, from the largest down" if linear else "rank")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    bottom.margins(y=0.25)
    return figure, FigureText(
        "eigenvalues",
        "The leading eigenvalues and their residuals",
        "Above: the eigenvalues of the Hessian of the training loss"
        + ("" if linear or not negative else ", magnitudes on a logarithmic axis")
        + (", negative ones hollow" if negative else "")
        + ". Every bar reaches one residual up and down: an eigenvalue lies within it; most bars "
        "are smaller than their marker. Below: the residuals, measured by products made after the "
        "iteration, and the tolerance that was asked for (dashed).",
    )


def _eigenvalue_legend(ax: Axes, findings: SpectrumFindings, *, negative: bool) -> None:
    handles = [
        Line2D([], [], color=COLORS[i], marker=MARKERS[i], linestyle="", label=point.name)
        for i, point in enumerate(findings.points)
        if len(findings.points) > 1
    ]
    if negative:
        hollow: dict[str, Any] = {
            "color": "0.3",
            "marker": "o",
            "markerfacecolor": "white",
            "linestyle": "",
        }
        handles.append(Line2D([], [], label="negative eigenvalue", **hollow))
    if handles:
        ax.legend(handles=handles, frameon=False, fontsize="small")


def _plain_ticks(ax: Axes) -> None:
    """Write 0.2 and 5 rather than powers of ten where an axis spans few of them."""
    low, high = ax.get_ylim()
    if high / low < 1e3:
        subs = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 7)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def density(findings: SpectrumFindings) -> tuple[Figure, FigureText] | None:
    """Spectral density with a rug of the eigenvalues that are known one by one."""
    points = [point for point in findings.points if point.density is not None]
    if not points:
        return None
    figure = Figure(figsize=(6.4, 1.0 + 2.3 * len(points)), layout="constrained")
    axes = list(figure.subplots(len(points), 1, sharex=True, squeeze=False)[:, 0])
    for i, (ax, point) in enumerate(zip(axes, points, strict=True)):
        _density_panel(ax, point, COLORS[i], title=point.name if len(points) > 1 else "")
    axes[-1].set_xlabel("eigenvalue λ")
    probes = len(next(p.density["nodes"] for p in points if p.density is not None))
    widths = " and ".join(f"{float(p.density['sigma']):.2g}" for p in points if p.density)
    return figure, FigureText(
        "density",
        "The density of all eigenvalues",
        "Stochastic Lanczos quadrature, smoothed by a Gaussian of standard deviation σ = "
        f"{widths}; the area below the curve is 1. Line and band: mean and two standard errors "
        f"over {probes} random probes. Ticks below: the eigenvalues of the first figure, which are "
        "known one by one and take part with their exact share, 1/d each, of d = "
        f"{points[0].size:,}; a peak as high as the dotted line is one eigenvalue.",
    )


def _density_panel(ax: Axes, point: Measured, color: str, title: str) -> None:
    assert point.density is not None
    columns = ("grid", "density", "standard_error")
    grid, mean, error = (to_numpy(point.density[column]) for column in columns)
    # One eigenvalue of d, smoothed, has this height: there is little to see far below it.
    single = 1 / (point.size * float(point.density["sigma"]) * math.sqrt(2 * math.pi))
    floor = 0.05 * single
    low, high = mean - 2 * error, mean + 2 * error
    # Below the floor is room for the rug.
    shown = np.where(mean >= floor, mean, np.nan)
    ax.fill_between(
        grid,
        np.maximum(low, floor),
        np.maximum(high, floor),
        where=high > floor,
        color=color,
        alpha=0.25,
        linewidth=0,
    )
    ax.plot(grid, shown, color=color, linewidth=1.4)
    ax.axhline(single, color="0.45", linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.set_ylim(floor / 5, 3 * float(high.max()))
    ax.vlines(
        to_numpy(point.space.values), 0.015, 0.085, transform=ax.get_xaxis_transform(),
        color="black", linewidth=1.0,
    )  # fmt: skip
    ax.set_ylabel("density")
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, fontsize="medium", loc="left")


def layers(findings: SpectrumFindings) -> tuple[Figure, FigureText] | None:
    """Trace and top eigenvalue of every layer's own block of the Hessian."""
    points = [point for point in findings.points if point.layers]
    if not points:
        return None
    rows = points[0].layers or []
    shown = _largest(rows)
    height = 0.9 + (0.16 + 0.17 * len(points)) * len(shown)
    figure = Figure(figsize=(8.4, max(height, 2.4)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    thickness = 0.8 / len(points)
    for i, point in enumerate(points):
        by_name = {row["name"]: row for row in point.layers or ()}
        picked = [by_name[name] for name in shown]
        at = np.arange(len(picked)) + (i - (len(points) - 1) / 2) * thickness
        for ax, key, error, factor in (
            (left, "trace", "standard_error", 2.0),
            (right, "top_eigenvalue", "residual", 1.0),
        ):
            ax.barh(
                at,
                [row[key] for row in picked],
                height=thickness,
                xerr=[factor * _bar(row[error]) for row in picked],
                color=COLORS[i],
                ecolor="0.15",
                capsize=2,
                error_kw={"linewidth": 0.9},
                label=point.name,
            )
    left.set_yticks(range(len(shown)), shown, fontsize="small")
    left.invert_yaxis()
    left.set_ylim(len(shown) - 0.45, -0.55)
    left.set_xlabel("trace")
    right.set_xlabel("eigenvalue of largest magnitude")
    for ax in (left, right):
        ax.axvline(0, color="0.3", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    if len(points) > 1:
        figure.legend(
            *right.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=len(points),
            frameon=False,
            fontsize="small",
        )
    left_out = len(rows) - len(shown)
    return figure, FigureText(
        "layers",
        "The Hessian layer by layer",
        "For every layer its own diagonal block of the Hessian, as if all other layers were "
        "frozen. Left: its trace, with two standard errors over the probes. Right: its eigenvalue "
        "of largest magnitude, with the residual. The traces add up to the trace of the whole; "
        + (
            f"of {len(rows)} layers the {len(shown)} with the largest traces are drawn, the others "
            "are in the table."
            if left_out
            else "the eigenvalues do not, because blocks are coupled."
        ),
    )


def _largest(rows: Sequence[Record]) -> list[str]:
    """Names of the layers that are drawn, in the model's order."""
    kept = sorted(rows, key=lambda row: -abs(row["trace"]))[:MAX_LAYERS]
    names = {row["name"] for row in kept}
    return [row["name"] for row in rows if row["name"] in names]


def _bar(error: float) -> float:
    return error if math.isfinite(error) else 0.0


_FIGURES: list[Callable[[SpectrumFindings], tuple[Figure, FigureText] | None]] = [
    eigenvalues,
    density,
    layers,
]
