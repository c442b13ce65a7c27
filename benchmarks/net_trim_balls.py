"""What the two balls of Net-Trim and a refit cost a cascade, and what they promise.

    OMP_NUM_THREADS=1 python benchmarks/net_trim_balls.py lenet-300-100

The dense networks and images are those of ``net_trim_study.py``; every cascade is given one ε, and
shares zeros out over the layers itself. "Above" is by how much a silent output is above its bound
at most, in units of its layer's scale. The second layer of LeNet-300-100 is solved with the bound
of the papers as well, V = X Wᵀ, which asks outputs below zero to stay as low as dense weights bring
them. Table in ``results/net_trim_balls-<plan>.txt``.
"""

import argparse
import time
import warnings
from statistics import fmean
from typing import Any

import torch
from net_trim_study import PLANS, PROGRAM, SEEDS, dense_network
from timing import report
from torch import Tensor

from flatvalley.dense_network import DenseNetwork
from hessian import ConvergenceWarning
from pruning import CalibrationWarning, NetworkTrim, net_trim, net_trim_layer

CASCADES: dict[str, dict[str, Any]] = {
    "joint": {"ball": "joint"},
    "joint, refit": {"ball": "joint", "refit": True},
    "split": {"ball": "split"},
    "split, refit": {"ball": "split", "refit": True},
}
EPSILONS = {"lenet-300-100": 0.15, "lenet-5": 0.38}
SPARSER = (0.48, 0.62, 0.75)
"""Shares of LeNet-300-100 with a refit, on all seeds."""


def cascade(dense: DenseNetwork, epsilon: float, **options: Any) -> tuple[NetworkTrim, float]:
    """Return a network pruned with one ε, and its accuracy."""
    problem = dense.problem()
    with warnings.catch_warnings():
        # The tables say both.
        warnings.simplefilter("ignore", CalibrationWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        trim = net_trim(
            problem.model,
            [(x,) for x, _ in problem.batches],
            epsilon=epsilon,
            mode="cascade",
            **PROGRAM,
            **options,
        )
    model = dense.with_weights(trim.weights, recalibrate=False)
    return trim, 100 * (dense.measure(model, dense.data.test).accuracy or 0.0)


def density(trim: NetworkTrim) -> float:
    """Return the share of all weights that is left."""
    return 1.0 - trim.sparsity


def balls(dense: DenseNetwork, epsilon: float) -> list[str]:
    """Compare the balls, with and without a refit."""
    lines = [
        f"ε = {epsilon}, seed 0",
        "",
        f"  {'':14}{'density':>8}{'right, %':>10}{'solved':>8}{'above':>10}{'CPU s':>8}   "
        "iterations by layer",
    ]
    for name, options in CASCADES.items():
        began = time.process_time()
        trim, right = cascade(dense, epsilon, **options)
        seconds = time.process_time() - began
        iterations = [own.iterations for layer in trim.layers for own in layer.trims]
        above = max(layer.violation for layer in trim.layers)
        lines.append(
            f"  {name:14}{density(trim):8.3f}{right:10.2f}{'yes' if trim.converged else 'no':>8}"
            f"{above:10.1e}{seconds:8.1f}   {', '.join(map(str, iterations))}"
        )
    return lines


def bounds_of_a_layer(dense: DenseNetwork, epsilon: float) -> str:
    """Solve the second layer of LeNet-300-100 behind a pruned first one, with either bound."""
    trim, _ = cascade(dense, epsilon)
    pruned = dense.with_weights(trim.weights, recalibrate=False)
    layer = dense.model[3]
    W = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1)
    x = torch.cat([x for x, _ in dense.problem().batches])

    def inputs(model: Any) -> Tensor:
        given: Tensor = model[:3](x).detach()
        return torch.cat([given, torch.ones(len(given), 1)], dim=1)

    before, now = inputs(dense.model), inputs(pruned)
    Y, Z = (before @ W.T).relu(), now @ W.T
    radius = 1.1**0.5 * float(((Z - Y) * (Y > 0)).norm())
    left = [
        net_trim_layer(W, now, Y, epsilon=radius, bound=V, **PROGRAM).density for V in (Z, Z.relu())
    ]
    return (
        f"Of the second layer's weights {left[0]:.3f} are left with V = X Wᵀ, {left[1]:.3f} with "
        "(X Wᵀ)₊."
    )


def by_one_epsilon() -> list[str]:
    """Prune LeNet-300-100 further, on all seeds."""
    networks = [dense_network(PLANS["lenet-300-100"], seed) for seed in SEEDS]
    lines = ["Split ball with a refit, three seeds", ""]
    for epsilon in SPARSER:
        found = [cascade(dense, epsilon, **CASCADES["split, refit"]) for dense in networks]
        left = [density(trim) for trim, _ in found]
        right = [accuracy for _, accuracy in found]
        lines.append(
            f"  ε = {epsilon}: density {min(left):.3f} to {max(left):.3f}, {fmean(right):.2f} "
            f"({min(right):.2f}–{max(right):.2f}) % right"
        )
    return lines


def main() -> None:
    """Run the plans that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="*", default="all", choices=[*EPSILONS, "all"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in EPSILONS if "all" in arguments.plans else arguments.plans:
        dense = dense_network(PLANS[name], 0)
        lines = [*(__doc__ or "").strip().splitlines(), "", *balls(dense, EPSILONS[name])]
        if name == "lenet-300-100":
            lines += ["", bounds_of_a_layer(dense, EPSILONS[name]), "", *by_one_epsilon()]
        report(f"net_trim_balls-{name}", lines)


if __name__ == "__main__":
    main()
