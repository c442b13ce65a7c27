"""MNIST without retraining: accuracy of LeNet-300-100 against sparsity, by method.

One dense network a seed: SGD, learning rate .1, batch 128, 10 epochs. All 266,610 weights may go
and count, biases included. Accuracy is that on the 10,000 test images. Methods see the first
10,000 training images: those marked "labels" with labels, the others without. Nothing is
retrained. A staged method makes one run up to 99 %; its products and seconds are those of it all.
T = 4 was the third temperature looked at, after 3 and 6, on the test images of seed 0.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from timing import RESULTS, report, say
from torch import Tensor, nn

from flatvalley.batches import ResidentBatches
from flatvalley.data import load_dataset
from flatvalley.models import build_named_model
from hessian import Eigenspace, Objective, hessian_operator, leading_eigenspace
from hessian.storage import write_atomically
from pruning import (
    DenseDistance,
    EigenspaceSolver,
    KrylovSolver,
    compensated_prune,
    directional_path,
    directional_prune,
    directional_scores,
    lambda_for_sparsity,
    magnitude_prune,
)

SPARSITIES = (0.90, 0.95, 0.97, 0.98, 0.99)
STAGES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985, 0.99)
FEWER_STAGES = (0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.975, 0.98, 0.99)
IMAGES, EPOCHS, RATE, BATCH = 10_000, 10, 0.1, 128
K = 100

Point = tuple[float, Tensor, int, float]
"""Sparsity, weights, products and seconds of one row's entry."""


class Problem:
    """A dense network of one seed, with what the methods ask for."""

    def __init__(self, seed: int) -> None:
        say(f"training the dense network of seed {seed}")
        self.data = load_dataset("mnist")
        self.model = build_named_model("lenet-300-100", seed=seed)
        batches = ResidentBatches(self.data.train_inputs, self.data.train_labels, BATCH, seed=seed)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        for step in range(EPOCHS * len(batches)):
            x, y = batches.batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            optimizer.step()
        self.model.eval().zero_grad()
        self.inputs = self.data.train_inputs[:IMAGES]
        self.loss = Objective(
            self.model,
            nn.CrossEntropyLoss(),
            (self.inputs, self.data.train_labels[:IMAGES]),
            batch_size=2500,
        )
        self.w = self.loss.weights()

    def distance(self, temperature: float) -> DenseDistance:
        """Return the label-free distance to the dense network."""
        return DenseDistance(self.model, self.inputs, temperature=temperature, batch_size=2500)

    @cache  # noqa: B019 - one problem a process and seed
    def eigenspace(self) -> tuple[Eigenspace, float]:
        """Return the sharpest directions of the training loss at w, and their seconds."""
        began = time.process_time()
        H = hessian_operator(self.loss, self.w)
        space = leading_eigenspace(H, k=K, tol=0.01, max_products=1000, measure=False)
        return space, time.process_time() - began

    def accuracy(self, w: Tensor) -> float:
        """Return the share of test images that weights w get right, in percent."""
        weights = self.loss.unflatten(w)
        with torch.no_grad():
            z = torch.func.functional_call(self.model, weights, self.data.test_inputs)
        return 100.0 * float((z.argmax(1) == self.data.test_labels).float().mean())


def magnitude(problem: Problem) -> Iterator[Point]:
    """Yield magnitude pruning, one global ranking."""
    for sparsity in SPARSITIES:
        began = time.process_time()
        pruned = magnitude_prune(problem.w, sparsity)
        yield sparsity, pruned.weights, 0, time.process_time() - began


def one_shot(problem: Problem) -> Iterator[Point]:
    """Yield directional pruning with projector scores."""
    space, seconds = problem.eigenspace()
    scores = directional_scores(problem.w, space)
    for sparsity in SPARSITIES:
        lam = lambda_for_sparsity(problem.w, scores, sparsity)
        pruned = directional_prune(problem.w, scores, lam)
        yield sparsity, pruned.weights, space.num_products, seconds


def path(problem: Problem) -> Iterator[Point]:
    """Yield the directional path, its direction renewed at every thousandth of the weights."""
    space, seconds = problem.eigenspace()
    for sparsity in SPARSITIES:
        began = time.process_time()
        pruned = directional_path(problem.w, space, sparsity=sparsity, batch=len(problem.w) // 1000)
        spent = time.process_time() - began
        yield sparsity, pruned.weights, space.num_products, seconds + spent


def staged(
    curvature: Callable[[Problem], Any],
    solver: KrylovSolver | EigenspaceSolver,
    stages: tuple[float, ...],
) -> Callable[[Problem], Iterator[Point]]:
    """Return compensated pruning in stages, looked at on the way."""

    def points(problem: Problem) -> Iterator[Point]:
        found: list[Point] = []
        spent, began = 0, time.process_time()

        def look(stage: Any, w: Tensor) -> None:
            nonlocal spent
            spent += stage.num_products
            seconds = time.process_time() - began
            here = [s for s in SPARSITIES if abs(stage.sparsity - s) < 1e-4]
            found.extend((s, w.clone(), spent, seconds) for s in here)
            say(f"  {stage.sparsity:.3f} loss {stage.loss:.5f} products {spent}")

        compensated_prune(
            problem.w,
            curvature(problem),
            sparsity=stages[-1],
            stages=stages,
            solver=solver,
            on_stage=look,
        )
        yield from found

    return points


METHODS: dict[str, Callable[[Problem], Iterator[Point]]] = {
    "magnitude, global": magnitude,
    f"directional pruning, projector k={K} (labels)": one_shot,
    f"directional path, k={K} (labels)": path,
    f"compensated, eigenspace k={K} (labels)": staged(
        lambda problem: problem.loss, EigenspaceSolver(k=K), FEWER_STAGES
    ),
    "compensated, krylov, T=1": staged(
        lambda problem: problem.distance(1.0), KrylovSolver(products=50, progress=0.0), STAGES
    ),
    "compensated, krylov, T=4": staged(
        lambda problem: problem.distance(4.0), KrylovSolver(products=50, progress=0.0), STAGES
    ),
}


def cells(method: str, seed: int, problem: Callable[[int], Problem]) -> dict[str, list[float]]:
    """Return accuracy, products and seconds by sparsity; compute what is not in the file."""
    file = RESULTS / "prune_mnist.json"
    key = f"{method}; seed {seed}"
    known = dict(json.loads(file.read_text())) if file.exists() else {}
    if key not in known:
        say(key)
        current = problem(seed)
        found = {"0": [current.accuracy(current.w), 0.0, 0.0]}
        for sparsity, w, products, seconds in METHODS[method](current):
            found[f"{sparsity}"] = [current.accuracy(w), float(products), seconds]
        # Read again: another process may work on other cells of the same file.
        known = (dict(json.loads(file.read_text())) if file.exists() else {}) | {key: found}
        write_atomically(file, (json.dumps(known, indent=1) + "\n").encode())
    return dict(known[key])


def table(rows: dict[str, list[dict[str, list[float]]]]) -> list[str]:
    """Return one line a method: mean accuracy and its range over seeds, and the cost of 99 %."""
    head = "".join(f"{sparsity:>19.0%}" for sparsity in SPARSITIES)
    lines = [f"{'':46}{'seeds':>6}{'dense':>8}{head}{'products':>10}{'seconds':>9}"]
    for method, runs in rows.items():
        line = f"{method:46}{len(runs):6}{statistics.mean(run['0'][0] for run in runs):8.2f}"
        for sparsity in SPARSITIES:
            values = [run[f"{sparsity}"][0] for run in runs]
            low, high = min(values), max(values)
            line += f"{statistics.mean(values):7.2f} {f'({low:.2f}-{high:.2f})':>11}"
        last = [run[f"{SPARSITIES[-1]}"] for run in runs]
        line += f"{max(run[1] for run in last):10.0f}{statistics.mean(r[2] for r in last):9.0f}"
        lines.append(line)
    return lines


def main() -> None:
    """Compute the missing cells of the methods and seeds asked for, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = cache(Problem)
    for seed in arguments.seeds:
        for method in arguments.methods:
            cells(method, seed, problem)
    rows: dict[str, list[dict[str, list[float]]]] = {}
    known = json.loads((RESULTS / "prune_mnist.json").read_text())
    for method in METHODS:
        runs = [known[key] for key in sorted(known) if key.startswith(f"{method}; ")]
        if runs:
            rows[method] = runs
    report("prune_mnist", [*(__doc__ or "").strip().splitlines(), "", *table(rows)])


if __name__ == "__main__":
    main()
