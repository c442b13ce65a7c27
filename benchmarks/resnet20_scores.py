"""Which scores come close to gRDA: transport, filter and projector, on networks with real data.

SGD and gRDA with a constant c are trained side by side: the same start, the same batches, the same
changes of the images. Directional pruning of SGD's end then tries to be gRDA's end, with λ the
threshold g that gRDA really had after its last step, by three kinds of scores:

  transport   the training replayed, with a Hessian product of every step's minibatch, in the mode
              of training (``flatvalley.transport_replay``);
  filter      φ(H) sign(w) for the mean of H over fixed training images without augmentation, batch
              norm by its running statistics, and the training time that SGD had;
  projector   the same Hessian's 20 leading eigenvectors projected out.

Beside them what knows no Hessian: the soft threshold at the same λ (all scores 1), magnitude
pruning at gRDA's sparsity; and two controls: transport scores permuted among the weights, and a
second run of SGD from the same start with another order of the batches, which is what noise does.

  error     |pruned − gRDA| / |gRDA − SGD|: 0 is gRDA, 1 is SGD left as it was
  kept      the same over the weights that gRDA keeps
  cosine    of the two differences from SGD
  overlap   weights that are zero in both, of those that are zero in either
  zeros     share of zeros

Mean over seeds, and the range of the error. An interrupted plan goes on where it was stopped.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pruning_tables import PLANS as TABLES
from timing import report, say
from torch import Tensor

from flatvalley.dense_network import DenseNetwork, load_dense
from flatvalley.run import read_tensors, write_tensors
from flatvalley.train_config import TrainConfig
from flatvalley.training import TrainResult, model_factory, train
from hessian import ConvergenceWarning, hessian_operator
from pruning import (
    Scores,
    directional_prune,
    directional_scores,
    flat_response,
    magnitude_prune,
    soft_threshold,
)

MU, K = 0.6, 20
OTHER_ORDER = 1000
"""Added to the seed of the second run of SGD: of its batches, not of its start."""
METHODS = {
    "transport": "DP, transport",
    "filter": "DP, filter",
    "projector": f"DP, projector k = {K}",
    "soft": "soft threshold",
    "magnitude": "magnitude, gRDA's sparsity",
    "permuted": "control: scores permuted",
    "second": "control: second SGD",
}
MEASURES = ("error", "kept", "cosine", "overlap", "zeros")
Measured = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """One kind of network, at several sparsities of gRDA."""

    training: TrainConfig
    constants: tuple[float, ...]
    calibration: int
    max_products: int
    """Of the filter, and of the projector."""
    seeds: tuple[int, ...]

    def side_by_side(self, seed: int) -> TrainConfig:
        """Return the settings of SGD with all gRDA beside it."""
        runs = ("sgd", *(f"grda:c={c:g},mu={MU}" for c in self.constants))
        return replace(self.training, runs=runs, seed=seed)


PLANS = {
    "lenet-300-100": Plan(
        replace(TABLES["lenet-300-100"].training, eval_every=10),
        (0.0015, 0.003, 0.005),
        2_000,
        500,
        (0, 1, 2),
    ),
    "resnet20": Plan(
        # At a rate of .1 a small difference grows without bound, and there is no transport.
        replace(TABLES["resnet20"].training, eval_every=8, train_samples=2_000, lr=0.02),
        (0.05, 0.1),
        500,
        150,
        (0,),
    ),
}


def trained(plan: Plan, seed: int, folder: Path) -> tuple[TrainResult, Tensor]:
    """Return SGD and gRDA, and the weights of the second SGD; train what is missing."""
    config = plan.side_by_side(seed)
    result = train(config, folder / "trained")
    other = replace(config, runs=("sgd",), seed=seed + OTHER_ORDER)
    start = model_factory(config, 10)
    second = train(other, folder / "second", make_model=start)
    return result, second.runs[0].vector(start())


def dense_network(plan: Plan, seed: int, folder: Path) -> DenseNetwork:
    """Return the end of SGD, with its calibration images."""
    config = plan.side_by_side(seed)
    weights = folder / "trained" / "sgd" / "weights.safetensors"
    return load_dense(
        config, weights, trained=config.specs[0], calibration=plan.calibration,
        calibration_batch=500,
    )  # fmt: skip


def transport(dense: DenseNetwork, w: Tensor, max_products: int) -> Scores:
    """Return the scores of the replayed training, whatever it takes."""
    assert dense.replay is not None
    began = time.monotonic()

    def told(step: int, steps: int) -> None:
        if step % (steps // 10) == 0:
            say(f"  step {step} of {steps}, {(time.monotonic() - began) / step:.2f} s a step")

    replayed = dense.replay.run(w, mu=MU, progress=told)
    say(f"  replayed within {replayed.miss:.1e} of the weights")
    return replayed.scores


def soft_projector(dense: DenseNetwork, w: Tensor, max_products: int) -> Scores:
    """Return the filter's scores, as the method ``dp-filter`` has them."""
    assert dense.training_time is not None
    H = hessian_operator(dense.problem().objective, w)
    response = flat_response(mu=MU, t=dense.training_time)
    return directional_scores(w, H, response=response, tol=0.01, max_products=max_products)


def hard_projector(dense: DenseNetwork, w: Tensor, max_products: int) -> Scores:
    """Return the projector's scores, as the method ``dp-projector`` has them."""
    space, _ = dense.problem().eigenspace(K, 0.01, max_products, 0)
    return directional_scores(w, space)


FORMS: Mapping[str, Callable[[DenseNetwork, Tensor, int], Scores]] = {
    "transport": transport,
    "projector": hard_projector,
    "filter": soft_projector,
}


def scores_of(plan: Plan, seed: int, folder: Path, w: Tensor) -> dict[str, Scores]:
    """Return all scores of a seed; compute what is missing."""
    found: dict[str, Scores] = {}
    dense = None
    for form, compute in FORMS.items():
        path = folder / f"{form}.safetensors"
        if not path.exists():
            dense = dense or dense_network(plan, seed, folder)
            say(f"seed {seed}: {form}")
            began = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("always", ConvergenceWarning)
                scores = compute(dense, w, plan.max_products)
            evidence = {
                "error": scores.error,
                "products": scores.num_products,
                "lowest": scores.lowest_eigenvalue,
                "seconds": time.process_time() - began,
            }
            write_tensors(path, {"values": scores.values}, evidence)
        tensors, kept = read_tensors(path)
        numbers = [math.nan if kept[k] is None else kept[k] for k in ("error", "lowest")]
        found[form] = Scores(
            tensors["values"], form, numbers[0], kept["products"], numbers[1]
        )  # fmt: skip
        say(f"seed {seed}: {form}, {kept['products']} products, {kept['seconds']:.0f} s")
    return found


def compared(u: Tensor, sgd: Tensor, grda: Tensor) -> Measured:
    """Return how close weights u are to gRDA's."""
    u, sgd, grda = u.double(), sgd.double(), grda.double()
    moved, wanted, missed = u - sgd, grda - sgd, u - grda
    kept, zero, expected = grda != 0, u == 0, grda == 0
    either = int((zero | expected).sum())
    return {
        "error": float(missed.norm() / wanted.norm()),
        "kept": float(missed[kept].norm() / wanted[kept].norm()),
        "cosine": float(moved @ wanted / (moved.norm() * wanted.norm())),
        "overlap": int((zero & expected).sum()) / either if either else math.nan,
        "zeros": float(zero.double().mean()),
    }


def seed_findings(plan: Plan, seed: int, folder: Path) -> dict[float, dict[str, Any]]:
    """Return everything about one seed, by c."""
    result, second = trained(plan, seed, folder)
    make = model_factory(result.config, 10)
    w = result["sgd"].vector(make())
    scores = scores_of(plan, seed, folder, w)
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    scores["permuted"] = replace(scores["transport"], values=scores["transport"].values[order])
    found = {}
    for c, run in zip(plan.constants, result.runs[1:], strict=True):
        grda, lam = run.vector(make()), float(run.row["threshold"])
        pruned = {form: directional_prune(w, s, lam).weights for form, s in scores.items()}
        pruned |= {
            "soft": soft_threshold(w, lam).weights,
            "magnitude": magnitude_prune(w, float((grda == 0).double().mean())).weights,
            "second": second,
        }
        found[c] = {
            "lambda": lam,
            "accuracies": (result["sgd"].test_accuracy, run.test_accuracy),
            "sparsity": run.sparsity,
            "distance": float((grda - w).norm()),
            "scores": {
                form: {
                    "mean": s.mean,
                    "deviation": float(s.values.double().std()),
                    "error": s.error / float(s.values.norm()),
                    "products": s.num_products,
                }
                for form, s in scores.items()
            },
            "methods": {name: compared(pruned[name], w, grda) for name in METHODS},
        }
    return found


def table(plan: Plan, found: Mapping[int, Mapping[float, Mapping[str, Any]]]) -> list[str]:
    """Return the lines of all constants, mean over seeds."""
    lines = []
    for c in plan.constants:
        seeds = [findings[c] for findings in found.values()]
        mean = {name: fmean(s[name] for s in seeds) for name in ("lambda", "sparsity", "distance")}
        sgd, grda = (100 * fmean(s["accuracies"][i] for s in seeds) for i in (0, 1))
        lines += [
            "",
            f"c = {c:g}: λ = {mean['lambda']:.4g}, gRDA has {100 * mean['sparsity']:.1f} % zeros "
            f"and {grda:.2f} % accuracy (SGD {sgd:.2f}), |gRDA − SGD| = {mean['distance']:.3g}",
            f"{'':28}{'error':>7}{'range':>14}" + "".join(f"{name:>9}" for name in MEASURES[1:]),
        ]
        for name, title in METHODS.items():
            rows = [s["methods"][name] for s in seeds]
            errors = [row["error"] for row in rows]
            span = f"{min(errors):.3f}-{max(errors):.3f}"
            lines.append(
                f"{title:28}{fmean(errors):7.3f}{span:>14}"
                + "".join(f"{fmean(row[key] for row in rows):9.3f}" for key in MEASURES[1:])
            )
    lines.append("")
    for form in FORMS:
        rows = [findings[plan.constants[0]]["scores"][form] for findings in found.values()]
        mean = {key: fmean(row[key] for row in rows) for key in rows[0]}
        word = {"projector": "at most", "filter": "about"}.get(form)
        bound = f", error {word} {mean['error']:.2g} of their norm" if word else ""
        lines.append(
            f"{form}: mean score {mean['mean']:.3f}, standard deviation {mean['deviation']:.3g}, "
            f"{mean['products']:,.0f} products{bound}"
        )
    return lines


def run_plan(name: str, seeds: Sequence[int]) -> list[str]:
    """Compute what is missing of a plan; return its lines."""
    plan = PLANS[name]
    plan = replace(plan, seeds=tuple(seeds) or plan.seeds)
    found = {}
    for seed in plan.seeds:
        say(f"{name}, seed {seed}")
        found[seed] = seed_findings(plan, seed, Path("runs") / "resnet20_scores" / name / f"{seed}")
    training = plan.training
    samples = f"{training.train_samples:,}" if training.train_samples else "all"
    return [
        f"{name}, {training.data}: {samples} training images, {training.epochs} epochs, batch "
        f"{training.batch_size}, learning rate {training.lr} ({training.schedule}),",
        f"augmentation {training.augment}, mu {MU}; {plan.calibration:,} images for filter and "
        f"projector; seeds {', '.join(map(str, plan.seeds))}.",
        *table(plan, found),
    ]


def main() -> None:
    """Run the plans that are asked for, each with a table of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="*", default="all", choices=[*PLANS, "all"])
    parser.add_argument("--quick", action="store_true", help="LeNet-300-100 alone")
    parser.add_argument("--seeds", nargs="*", type=int, default=(), help="default: the plan's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in (
        ["lenet-300-100"]
        if arguments.quick
        else PLANS
        if "all" in arguments.plans
        else arguments.plans
    ):
        lines = [*(__doc__ or "").strip().splitlines(), "", *run_plan(name, arguments.seeds)]
        report("resnet20_scores" if name == "resnet20" else f"resnet20_scores_{name}", lines)


if __name__ == "__main__":
    main()
