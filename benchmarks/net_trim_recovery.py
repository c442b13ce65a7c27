"""How many samples give the sparse weights of a ReLU layer back: a figure for the documentation.

    OMP_NUM_THREADS=1 python benchmarks/net_trim_recovery.py

Rows of s Gaussian weights among N, Gaussian inputs, ε = 0. A row is recovered if it is off by less
than 10⁻³ of its norm. Beside it what is proved: P = (11 s + 7) μ log N samples give a row back with
probability at least 1 − N^(1 − μ), which says something for μ > 1. A minute on one thread.

References:
    Aghasi, Abdi, Nguyen & Romberg (2017), Net-Trim: convex pruning of deep neural networks with
    performance guarantee, Theorem 3.
"""

import math
import warnings
from pathlib import Path

import matplotlib as mpl
import torch
from timing import report, say
from torch import Tensor

from hessian import ConvergenceWarning
from pruning import net_trim_layer

INPUTS = 64
SPARSITIES = (2, 4, 8)
FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0, 30.0)
"""P over s log N; the last one is above what is proved for all s."""

MU = 2
"""μ, so that the probability is at least 1 − 1/N."""

DRAWS, ROWS = 25, 8
"""Matrices of samples, and rows of weights on each."""

RECOVERED = 1e-3
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "net_trim_recovery.png"


def sparse_rows(s: int, generator: torch.Generator) -> Tensor:
    """Return rows with s Gaussian weights each, at random places."""
    W = torch.zeros(ROWS, INPUTS, dtype=torch.float64)
    for row in W:
        places = torch.randperm(INPUTS, generator=generator)[:s]
        row[places] = torch.randn(s, generator=generator, dtype=torch.float64)
    return W


def proved(s: int) -> float:
    """Return P / (s log N) from which on the theorem speaks."""
    return (11 + 7 / s) * MU


def success(s: int, samples: int) -> float:
    """Return the share of rows that come back."""
    found = 0
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(1000 * s + draw)
        W = sparse_rows(s, generator)
        X = torch.randn(samples, INPUTS, generator=generator, dtype=torch.float64)
        with warnings.catch_warnings():
            # Where weights are not determined, they may also be found slowly.
            warnings.simplefilter("ignore", ConvergenceWarning)
            U = net_trim_layer(W, X, epsilon=0.0, tol=1e-5, max_iterations=4000).weights
        found += int(((U - W).norm(dim=1) < RECOVERED * W.norm(dim=1)).sum())
    return found / (DRAWS * ROWS)


def draw(rates: dict[int, list[float]]) -> None:
    """Draw the rates."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for s, marker in zip(SPARSITIES, "os^", strict=True):
        (line,) = ax.plot(FACTORS, rates[s], marker=marker, label=f"s = {s}")
        ax.axvline(proved(s), color=line.get_color(), linestyle="--", linewidth=1)
    ax.annotate(
        f"proved: P = (11 s + 7) μ log N, μ = {MU},\n"
        f"with probability ≥ 1 − N^(1 − μ) = {1 - INPUTS ** (1 - MU):.3f}",
        (proved(max(SPARSITIES)), 0.4),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=9,
    )
    ax.set_xscale("log", base=2)
    ax.set_xticks([2.0**i for i in range(-1, 6)], ["0.5", "1", "2", "4", "8", "16", "32"])
    ax.set_xlabel("samples P / (s log N)")
    ax.set_ylabel("share of rows recovered")
    ax.set_title(f"Exact recovery of sparse ReLU rows, N = {INPUTS}, ε = 0", fontsize=11)
    ax.set_ylim(-0.03, 1.03)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="upper left")
    fig.savefig(FIGURE, dpi=150, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    """Print and keep the table and the figure."""
    torch.set_num_threads(1)
    rates: dict[int, list[float]] = {}
    for s in SPARSITIES:
        rates[s] = []
        for factor in FACTORS:
            rates[s].append(success(s, round(factor * s * math.log(INPUTS))))
        say(f"s = {s}: {rates[s]}")
    draw(rates)
    lines = [
        f"N = {INPUTS}, {DRAWS * ROWS} rows a cell; share recovered at P = factor * s * log N",
        "Proved: P = (11 s + 7) mu log N gives a row back with probability >= 1 - N^(1 - mu); "
        f"mu = {MU}: {1 - INPUTS ** (1 - MU):.3f}",
        "",
        "  s   " + "".join(f"{factor:7.1f}" for factor in FACTORS) + "   proved from",
    ]
    lines += [
        f"  {s:<4}" + "".join(f"{rate:7.3f}" for rate in rates[s]) + f"{proved(s):14.1f}"
        for s in SPARSITIES
    ]
    report("net_trim_recovery", lines)


if __name__ == "__main__":
    main()
