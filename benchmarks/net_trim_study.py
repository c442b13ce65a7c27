"""Net-Trim, parallel and cascade, with and without a refit, beside magnitude, Wanda and OBC.

    OMP_NUM_THREADS=1 python benchmarks/net_trim_study.py lenet-300-100

The cascade comes first, at a few ε. All others then prune every layer to the number of zeros that
it left there: Net-Trim by an ε for each layer (and a cut of the smallest weights, a thousandth of
the layer at most), Wanda in equal shares of every output; OBC fits the weights that stay on dense
inputs, or on those that come from the pruned layers before. Biases stay out of it: they are neither
pruned nor penalised. With a refit the ball is split, and every silent output keeps to its bound;
without one it is joint, since on convolutions the split one takes thousands of iterations. Methods
look at the same calibration images, without labels; the dense networks are those of
``pruning_tables.py``. Nothing is trained again, but in the columns "tuned": one epoch of SGD at a
tenth of the rate, zeros kept.

"Off" is the measured ‖f̂ − f‖_F of the outputs over the calibration images, in percent of ‖f‖_F, and
"bound" what the layers' discrepancies prove of it. Table in ``results/net_trim_study-<plan>.txt``,
figure of the plans that are done in ``docs/images/net_trim_study.png``. Networks that are done are
kept in ``runs/net_trim_study``; an interrupted plan goes on where it was stopped.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from pruning_tables import PLANS as NETWORKS
from timing import report, say
from torch import Tensor

from flatvalley.dense_network import DenseNetwork, load_dense
from flatvalley.fine_tuning import fine_tune_
from flatvalley.pruning_problem import PruningProblem
from flatvalley.studies.compare_cell import dense_config, train_cell, training_folder
from flatvalley.studies.compare_config import DEFAULT_TRAINING
from flatvalley.studies.compare_figures import COLORS
from flatvalley.studies.direct_labels import EndLabel, label_ends
from flatvalley.train_config import TrainConfig, file_name
from hessian.atomic import write_atomically
from pruning import (
    CalibrationWarning,
    NetworkTrim,
    magnitude_prune,
    net_trim,
    obc_traces,
    wanda_prune,
)
from pruning.allocation import parameter_slices
from pruning.net_trim_bound import output_distance

PROGRAM: dict[str, Any] = {"penalise_bias": False, "precision": "mixed", "tol": 1e-3}
CASCADE, REFIT = "cascade", "cascade, refit"
TRIMS: dict[str, dict[str, Any]] = {
    CASCADE: {"mode": "cascade", "ball": "joint"},
    REFIT: {"mode": "cascade", "ball": "split", "refit": True},
    "parallel": {"mode": "parallel", "ball": "joint"},
}
TUNED = (*TRIMS, "magnitude", "Wanda", "OBC, pruned inputs")
FOLDER = Path("runs")
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "net_trim_study.png"
STYLES = {
    REFIT: (COLORS["net-trim"], "-", "o"),
    CASCADE: (COLORS["net-trim"], (0, (5, 1.5)), "s"),
    "parallel": (COLORS["net-trim"], (0, (1.5, 1.5)), "^"),
    "magnitude": (COLORS["magnitude"], "-", "o"),
    "Wanda": (COLORS["wanda"], "-", "o"),
    "OBC, dense inputs": (COLORS["obc"], (0, (5, 1.5)), "s"),
    "OBC, pruned inputs": (COLORS["obc"], "-", "o"),
}
"""Rows of the tables, and how they are drawn."""


@dataclass(frozen=True)
class Plan:
    """One kind of network."""

    training: TrainConfig
    folder: Path
    """Of the dense networks."""
    epsilons: tuple[float, ...]
    """Chosen by the densities that they give on the first seed."""
    calibration: int
    calibration_batch: int
    tuned: int
    """Training images of the fine-tuning; 0 for all."""
    tuned_from: float
    """Density from which on downwards networks are tuned."""


def _plan(name: str, *rest: Any) -> Plan:
    return Plan(NETWORKS[name].training, FOLDER / "pruning_tables" / name, *rest)


PLANS = {
    "digits": Plan(
        DEFAULT_TRAINING,
        FOLDER / "net_trim_study" / "digits",
        (0.04, 0.07, 0.14, 0.25, 0.38),
        1_000,
        1_000,
        0,
        0.25,
    ),
    "lenet-300-100": _plan("lenet-300-100", (0.046, 0.07, 0.12, 0.24, 0.42), 2_000, 2_000, 0, 0.25),
    "lenet-5": _plan("lenet-5", (0.072, 0.146, 0.2), 500, 250, 12_000, 0.25),
}
SEEDS = (0, 1, 2)
DRAWN = ("lenet-300-100", "lenet-5")
Point = dict[str, Any]


class Study:
    """The networks of one seed, and what was measured on them."""

    def __init__(self, name: str, seed: int) -> None:
        self.plan, self.seed = PLANS[name], seed
        self._folder = FOLDER / "net_trim_study" / name

    def points(self, row: str) -> list[Point] | None:
        """Return what is known of a row, by density."""
        file = self._file(row)
        return list(json.loads(file.read_text())) if file.exists() else None

    def run(self, rows: Sequence[str], dense: DenseNetwork, problem: PruningProblem) -> None:
        """Compute those of some rows that are missing."""
        for row in rows:
            if self.points(row) is None:
                points = []
                for weights, facts in self._networks(row, problem):
                    points.append(self._measured(row, dense, problem, weights) | facts)
                    last = points[-1]
                    say(
                        f"  seed {self.seed}, {row}: density {last['density']:.4f}, "
                        f"{100 * last['accuracy']:.2f} % right, off by {100 * last['off']:.2f} %"
                    )
                text = json.dumps(points, indent=1) + "\n"
                self._file(row).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._file(row), text.encode())

    def _networks(self, row: str, problem: PruningProblem) -> Iterator[tuple[Tensor, Point]]:
        """Yield the weights of a row from dense to sparse, with what is known of them."""
        inputs = [(x,) for x, _ in problem.batches]
        options = {**PROGRAM, **TRIMS.get(row, {})}
        if row == CASCADE:
            for share in self.plan.epsilons:
                began = time.process_time()
                trim = net_trim(problem.model, inputs, epsilon=share, **options)
                yield trim.weights, _evidence(trim, time.process_time() - began)
            return
        counts = [point["zeros"] for point in self.points(CASCADE) or ()]
        if row in TRIMS:
            sizes = {name: shape.numel() for name, shape in problem.objective.shapes.items()}
            for zeros in counts:
                began = time.process_time()
                shares = {escape(name): count / sizes[name] for name, count in zeros.items()}
                trim = net_trim(problem.model, inputs, layer_sparsity=shares, **options)
                seconds = time.process_time() - began
                weights, cut = _with_zeros(trim, zeros)
                yield weights, _evidence(trim, seconds) | {"cut": cut}
            return
        prune = _rival(row, problem)
        for zeros in counts:
            yield prune(zeros), {}

    def _measured(
        self, row: str, dense: DenseNetwork, problem: PruningProblem, weights: Tensor
    ) -> Point:
        model = dense.with_weights(weights, recalibrate=False)
        test = dense.data.test
        off, size = output_distance(problem.objective, weights, problem.w)
        density = int(weights.count_nonzero()) / len(weights)
        point = {
            "density": density,
            "zeros": {
                name: int((part == 0).sum())
                for name, part in problem.objective.unflatten(weights).items()
                if part.ndim > 1
            },
            "accuracy": dense.measure(model, test).accuracy,
            "off": off / size,
            "tuned": None,
        }
        if row in TUNED and density <= self.plan.tuned_from:
            training = dense_config(self.plan.training, self.seed)
            fewer = replace(training, train_samples=self.plan.tuned)
            fine_tune_(model, fewer, training.specs[0], epochs=1, lr=0.1 * training.lr)
            point["tuned"] = dense.measure(model, test).accuracy
        return point

    def _file(self, row: str) -> Path:
        return self._folder / f"{file_name(row)}_seed{self.seed}.json"


def _with_zeros(trim: NetworkTrim, zeros: Mapping[str, int]) -> tuple[Tensor, int]:
    """Return weights with as many zeros in every layer, and how many were cut for it."""
    weights, before = trim.weights.clone(), int(trim.weights.count_nonzero())
    places = torch.split(weights, [shape.numel() for shape in trim.shapes.values()])
    for name, part in zip(trim.shapes, places, strict=True):
        if name in zeros:
            part[part.abs().argsort(stable=True)[: zeros[name]]] = 0.0
            found = int((part == 0).sum())
            if found != zeros[name]:
                raise RuntimeError(f"{found} zeros in {name} instead of {zeros[name]}.")
    return weights, before - int(weights.count_nonzero())


def _evidence(trim: NetworkTrim, seconds: float) -> Point:
    """What Net-Trim itself says of a network, before weights are cut."""
    return {
        "violation": max(layer.violation for layer in trim.layers),
        "discrepancy": trim.discrepancy / trim.output_norm,
        "bound": None if trim.bound is None else trim.bound / trim.output_norm,
        "converged": trim.converged,
        "layers": {layer.weight: layer.discrepancy for layer in trim.layers},
        "iterations": sum(own.iterations for layer in trim.layers for own in layer.trims),
        "seconds": seconds,
    }


def _rival(row: str, problem: PruningProblem) -> Callable[[Mapping[str, int]], Tensor]:
    """Return a function that prunes to numbers of zeros by weight."""
    distance, w = problem.distance(), problem.w
    if row == "Wanda":
        return partial(_wanda, problem)
    places = parameter_slices(distance)
    traces = obc_traces(distance, w) if row.startswith("OBC") else None

    def prune(zeros: Mapping[str, int]) -> Tensor:
        total = sum(zeros.values()) / len(w)
        shares = {
            escape(name): count / (places[name].stop - places[name].start)
            for name, count in zeros.items()
        }
        if traces is not None:
            inputs = "pruned" if "pruned" in row else "dense"
            return traces.prune(total, shares, inputs=inputs).weights
        return magnitude_prune(
            w, total, objective=distance, allocation=shares, exclude=_others(problem, zeros)
        ).weights

    return prune


def _wanda(problem: PruningProblem, zeros: Mapping[str, int]) -> Tensor:
    """Prune one weight after the other, each alone."""
    weights = problem.w.clone()
    for name, count in zeros.items():
        alone = wanda_prune(
            problem.w,
            problem.objective,
            count / len(weights),
            exclude=_others(problem, [name]),
        )
        weights[~alone.mask] = 0.0
    return weights


def _others(problem: PruningProblem, names: Sequence[str] | Mapping[str, int]) -> list[str]:
    return [escape(name) for name in problem.objective.shapes if name not in names]


def dense_network(plan: Plan, seed: int) -> DenseNetwork:
    """Return the dense network of a seed, trained if it is not there."""
    training = dense_config(plan.training, seed)
    folder = training_folder(plan.folder, training)
    weights = folder / file_name(training.runs[0]) / "weights.safetensors"
    if not weights.exists():
        train_cell(training, folder, lambda done, steps: None)
    return load_dense(
        training,
        weights,
        trained=training.specs[0],
        calibration=plan.calibration,
        calibration_batch=plan.calibration_batch,
    )


def run_plan(name: str, seeds: Sequence[int]) -> None:
    """Compute what is missing of a plan, and keep its table."""
    rows = [CASCADE, *(row for row in STYLES if row != CASCADE)]
    for seed in seeds:
        study = Study(name, seed)
        if any(study.points(row) is None for row in rows):
            dense = dense_network(PLANS[name], seed)
            with warnings.catch_warnings():
                # The table says how many calibration images there are.
                warnings.simplefilter("ignore", CalibrationWarning)
                study.run(rows, dense, dense.problem())
        tabulate(name)


def tabulate(name: str) -> None:
    """Keep the table of the seeds that are done in part or whole."""
    plan = PLANS[name]
    dense = [
        dense_network(plan, seed) for seed in SEEDS if Study(name, seed).points(CASCADE) is not None
    ]
    accuracies = [100 * (d.measure(d.model, d.data.test).accuracy or 0.0) for d in dense]
    found = known(name)
    lines = [
        *(__doc__ or "").strip().splitlines(),
        "",
        f"{plan.training.model}, {plan.training.data}: {plan.calibration:,} calibration images; "
        f"tuned on {plan.tuned or 'all'} training images. Dense: {_range(accuracies)} % right.",
        "",
        f"  {'':20}{'density':>8}{'seeds':>6}{'right, %':>22}{'tuned, %':>22}{'off, %':>9}"
        f"{'bound, %':>10}",
    ]
    for i in range(len(plan.epsilons)):
        for row in STYLES:
            points = [seed[row][i] for seed in found.values() if row in seed]
            if not points:
                continue
            bounds = [p["bound"] for p in points if p.get("bound") is not None]
            tuned = [100 * p["tuned"] for p in points if p["tuned"] is not None]
            lines.append(
                f"  {row:20}{fmean(p['density'] for p in points):8.3f}{len(points):6}"
                f"{_range([100 * p['accuracy'] for p in points]):>22}"
                f"{_range(tuned) if tuned else '–':>22}"
                f"{100 * fmean(p['off'] for p in points):9.2f}"
                + (f"{100 * fmean(bounds):10.1f}" if bounds else f"{'–':>10}")
            )
        lines.append("")
    report(f"net_trim_study-{name}", lines + claims(found))


def known(name: str) -> dict[int, dict[str, list[Point]]]:
    """Return the rows that are done, by seed."""
    found = {}
    for seed in SEEDS:
        rows = {row: Study(name, seed).points(row) for row in STYLES}
        done = {row: points for row, points in rows.items() if points is not None}
        if done:
            found[seed] = done
    return found


def claims(found: Mapping[int, Mapping[str, list[Point]]]) -> list[str]:
    """Say what holds of what was to be shown."""
    lines = []
    obc = "OBC, pruned inputs"
    both = [rows for rows in found.values() if REFIT in rows and obc in rows]
    if both:
        at = min(
            range(len(both[0][REFIT])),
            key=lambda i: abs(fmean(rows[REFIT][i]["density"] for rows in both) - 0.2),
        )
        for key, words in (("accuracy", ""), ("tuned", ", tuned")):
            below = [
                100 * (rows[obc][at][key] - rows[REFIT][at][key])
                for rows in both
                if rows[obc][at][key] is not None and rows[REFIT][at][key] is not None
            ]
            if below:
                lines.append(
                    f"At density {fmean(rows[REFIT][at]['density'] for rows in both):.2f}{words}: "
                    f"OBC leads {REFIT} by {fmean(below):.2f} points in the mean, {max(below):.2f} "
                    f"at most. Within 1 point: "
                    f"{'yes' if max(below) <= 1.0 else 'no'}."
                )
    trims = [
        point
        for rows in found.values()
        for row in TRIMS
        for point in rows.get(row, ())
        if point["bound"] is not None
    ]
    if trims:
        held = sum(p["discrepancy"] <= p["bound"] * (1 + 1e-6) for p in trims)
        solved = sum(p["converged"] for p in trims)
        lines.append(
            f"The chained bound holds on {held} of {len(trims)} networks; all layers' programs are "
            f"solved in {solved}."
        )
    worst = [p["violation"] for rows in found.values() for p in rows.get(REFIT, ())]
    if any(worst):  # a network without ReLU has no silent outputs
        lines.append(
            f"With a refit no silent output is above its bound by more than {max(worst):.1e} of "
            "its layer's scale."
        )
    pairs = [
        (a["off"], b["off"])
        for rows in found.values()
        if "cascade" in rows and "parallel" in rows
        for a, b in zip(rows["cascade"], rows["parallel"], strict=True)
    ]
    if pairs:
        lines.append(
            f"At equal zeros the cascade's outputs are nearer than the parallel ones' on "
            f"{sum(a < b for a, b in pairs)} of {len(pairs)} networks, "
            f"{min(b / a for a, b in pairs):.1f} to {max(b / a for a, b in pairs):.1f} times."
        )
    return lines


def _range(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def draw() -> None:
    """Draw wrong answers against density, before and after fine-tuning."""
    mpl.use("Agg")
    names = [name for name in DRAWN if known(name)]
    figure = Figure(figsize=(11.0, 3.9 * len(names)))
    figure.subplots_adjust(left=0.07, right=0.87, top=0.95, bottom=0.08, wspace=0.65, hspace=0.32)
    grid = figure.subplots(len(names), 2, squeeze=False)
    for name, axes in zip(names, grid, strict=True):
        for ax, key in zip(axes, ("accuracy", "tuned"), strict=True):
            _panel(ax, known(name), key)
            words = "not trained again" if key == "accuracy" else "after short fine-tuning"
            title = {"lenet-300-100": "LeNet-300-100", "lenet-5": "LeNet-5"}[name]
            ax.set_title(f"{title}, {words}", fontsize=10, loc="left")
    figure.savefig(FIGURE, dpi=150, metadata={"Software": None})


def _panel(ax: Any, found: Mapping[int, Mapping[str, list[Point]]], key: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xscale("log")
    ax.set_yscale("log")
    labels, densities = [], set()
    for row, (color, dashes, marker) in STYLES.items():
        rows = [seed[row] for seed in found.values() if row in seed]
        drawn = [p for p in zip(*rows, strict=True) if all(q[key] is not None for q in p)]
        if not drawn:
            continue
        x = [fmean(q["density"] for q in p) for p in drawn]
        wrong = [[100 * (1 - q[key]) for q in p] for p in drawn]
        y = [fmean(values) for values in wrong]
        ax.plot(x, y, color=color, linestyle=dashes, marker=marker, markersize=4, linewidth=1.5)
        low, high = [min(values) for values in wrong], [max(values) for values in wrong]
        ax.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        labels.append(EndLabel(row, x[-1], y[-1], color))
        densities |= set(x)
    high, low = 1.08 * max(densities), min(densities) / 1.08
    ax.set_xlim(high, low)
    ticks = [t for t in (0.4, 0.3, 0.2, 0.1, 0.05) if low <= t <= high]
    ax.set_xticks(ticks, [f"{100 * t:g} %" for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    ticks = [t for t in (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 90.0) if low <= t <= high]
    ax.set_yticks(ticks, [f"{t:g} %" for t in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("weights that are left")
    ax.set_ylabel("test images that are wrong")
    label_ends(ax, labels)


def main() -> None:
    """Run the plans that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="*", default="all", choices=[*PLANS, "all"])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for plan in PLANS if "all" in arguments.plans else arguments.plans:
        run_plan(plan, arguments.seeds)
    if any(known(name) for name in DRAWN):
        draw()


if __name__ == "__main__":
    main()
