"""One cell of the verify study: one seed, one learning rate, trained and measured."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from flatvalley.coupled import CoupledConfig, CoupledResult, Progress, train_coupled
from flatvalley.data import Dataset, load_dataset
from flatvalley.models import tanh_mlp
from flatvalley.run import read_tensors, write_tensors
from hessian import (
    ConvergenceWarning,
    Eigenspace,
    Objective,
    Operator,
    hessian_operator,
    leading_eigenspace,
)
from landscape import (
    Barrier,
    BezierCurve,
    Evaluation,
    Line,
    Plane,
    barrier,
    evaluate,
    grid,
    share_in_subspace,
    train_bezier,
    zero_one_loss,
)
from pruning import (
    Pruned,
    Scores,
    directional_prune,
    directional_scores,
    first_clip,
    flat_response,
    magnitude_prune,
    soft_threshold,
)

DTYPE = torch.float64
NUM_PATH_POINTS = 61
NUM_PLANE_POINTS = 41
BEZIER_EPOCHS = 40
BEZIER_LR = 0.1
SOFT_SHARES = [i / 50 for i in range(76)]


@dataclass(frozen=True)
class CellConfig:
    """What one cell depends on; two cells with equal settings have equal results."""

    data: str
    hidden: int
    ks: tuple[int, ...]
    training: CoupledConfig
    with_plane: bool
    """Whether the loss plane through SGD, gRDA and the bend is evaluated."""


def run_cell(config: CellConfig, path: Path, progress: Progress | None = None) -> None:
    """Train and measure one cell, and leave everything in one safetensors file at ``path``.

    Training keeps its state in a checkpoint beside it, so that a cell that was cut off goes on.
    Uses one thread: the matrices are far too small for more, and the numbers do not depend on
    the machine's core count.

    Args:
        config: Settings.
        path: The file to write.
        progress: Called with training steps done and in all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = process_time()
        data = load_dataset(config.data, dtype=DTYPE)
        checkpoint = path.with_suffix(".checkpoint")
        trained = train_coupled(
            lambda: network(config, data),
            data.train_inputs,
            data.train_labels,
            config.training,
            checkpoint=checkpoint,
            progress=progress,
        )
        seconds = process_time() - began
        tensors, record = _measure(config, data, trained)
        record["cost"] |= {
            "training_cpu_seconds": seconds,
            "measuring_cpu_seconds": process_time() - began - seconds,
        }
        write_tensors(path, tensors, {"config": asdict(config), "record": record})
        checkpoint.unlink(missing_ok=True)
    finally:
        torch.set_num_threads(threads)


def read_cell(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a cell's tensors and its record of measurements."""
    tensors, metadata = read_tensors(path)
    return tensors, metadata["record"]


def network(config: CellConfig, data: Dataset) -> nn.Module:
    """Return the cell's network with its initial weights."""
    sizes = [data.train_inputs[0].numel(), config.hidden, data.num_classes]
    return tanh_mlp(sizes, seed=config.training.seed, dtype=DTYPE)


def _measure(
    config: CellConfig, data: Dataset, trained: CoupledResult
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = network(config, data)
    train = data.train_inputs, data.train_labels
    loss = Objective(model, nn.CrossEntropyLoss(), train)
    error = Objective(model, zero_one_loss, (data.test_inputs, data.test_labels))
    H = hessian_operator(loss, trained.sgd)
    space = _eigenspace(H, config)
    scores = _scores(config, trained, H, space)
    pruned = {
        name: directional_prune(trained.sgd, s, trained.threshold) for name, s in scores.items()
    }
    pruned |= _controls(trained, scores["transport"])
    magnitude = pruned["magnitude"]
    gradient = loss.gradient(trained.sgd)
    differences = {
        "gRDA": trained.grda - trained.sgd,
        "second SGD": trained.second_sgd - trained.sgd,
        "magnitude": magnitude.weights - trained.sgd,
    }
    curve = _bezier(config, data, trained)
    paths: dict[str, Line | BezierCurve] = {
        "line": Line(trained.grda, trained.sgd),
        "bezier": curve,
        "second SGD": Line(trained.second_sgd, trained.sgd),
        "magnitude": Line(magnitude.weights, trained.sgd),
    }
    tensors = {
        "start": trained.start,
        "sgd": trained.sgd,
        "grda": trained.grda,
        "second_sgd": trained.second_sgd,
        "magnitude": magnitude.weights,
        "bend": curve.control_points[1],
        "clipped": trained.clipped,
        "eigenvalues": space.values,
        "eigenvectors": space.vectors[:, : min(config.ks)],
        "times": trained.times,
        "sgd_path": trained.sgd_path,
        "grda_path": trained.grda_path,
    }
    tensors |= {f"scores.{name}": s.values for name, s in scores.items()}
    record: dict[str, Any] = {
        "gamma": config.training.gamma,
        "seed": config.training.seed,
        "lambda": trained.threshold,
        "size": len(trained.sgd),
        "never_clipped": float((~trained.clipped).double().mean()),
        "points": {
            name: _quality(loss, error, w)
            for name, w in (
                ("SGD", trained.sgd),
                ("gRDA", trained.grda),
                ("second SGD", trained.second_sgd),
            )
        },
        "methods": {
            name: _compare(p, trained, loss, error) | _evidence(scores.get(name), trained.sgd)
            for name, p in pruned.items()
        },
        "gradient_norm": float(gradient.norm()),
        "start_loss": loss.loss(trained.start),
        "eigenspace": _eigenspace_record(space, config.ks),
        "shares": {
            name: [share_in_subspace(D, space.vectors[:, :k]) for k in share_ks(max(config.ks))]
            for name, D in differences.items()
        },
        "curvature": {
            name: _loss_change(loss, H, trained.sgd, D, gradient) for name, D in differences.items()
        },
        "cost": {
            "steps": config.training.num_steps,
            "transport_products": trained.transport.num_products,
        },
    }
    record["barriers"], profiles = _walk(paths, {"train loss": loss, "test error": error})
    tensors |= profiles
    if config.with_plane:
        plane = Plane.through(trained.grda, trained.sgd, curve.control_points[1])
        points = _plane_points(plane, list(curve.control_points))
        tensors |= {"plane.points": points, "plane.sums": _sums(evaluate(loss, plane, points))}
    return tensors, record


def _eigenspace_record(space: Eigenspace, ks: Sequence[int]) -> dict[str, Any]:
    return {
        "k": len(space.values),
        "largest": float(space.values.max()),
        "smallest_kept": float(space.values.abs().min()),
        "worst_residual": float(space.residuals.max()),
        "converged": space.converged,
        "projector_error_bound": {str(k): space.first(k).projector_error_bound for k in ks},
        "num_products": space.num_products,
    }


def _loss_change(
    loss: Objective, H: Operator, w: Tensor, D: Tensor, gradient: Tensor
) -> dict[str, float]:
    """The change of the training loss from w to w + D, to first and second order and measured."""
    return {
        "distance": float(D.norm()),
        "linear": float(gradient @ D),
        "quadratic": 0.5 * float(D @ (H @ D)),
        "measured": loss.loss(w + D) - loss.loss(w),
    }


def _walk(
    paths: Mapping[str, Line | BezierCurve], objectives: Mapping[str, Objective]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Barriers on every path in every measure, and the profiles they are read from."""
    records: dict[str, Any] = {}
    profiles: dict[str, Tensor] = {}
    for name, path in paths.items():
        for what, objective in objectives.items():
            found = barrier(objective, path, num_points=NUM_PATH_POINTS)
            records.setdefault(name, {})[what] = barrier_record(found)
            profiles[f"profile.{name}.{what}"] = _sums(found.evaluation)
    return records, profiles


def _sums(evaluation: Evaluation) -> Tensor:
    return torch.stack([evaluation.count, evaluation.total, evaluation.total_squares])


def barrier_record(found: Barrier) -> dict[str, Any]:
    """Return a barrier's numbers without its profile."""
    return {
        "over_chord": asdict(found.excess_over_chord),
        "over_mean": asdict(found.excess_over_mean),
        "highest": float(found.evaluation.mean.max()),
    }


def share_ks(largest: int) -> list[int]:
    """Return the sizes of eigenspace at which shares are taken: 1, 2, 5, 10, 20, 50, …, largest."""
    steps = [m * 10**e for e in range(6) for m in (1, 2, 5)]
    return [k for k in steps if k < largest] + [largest]


def _eigenspace(H: Operator, config: CellConfig) -> Eigenspace:
    with warnings.catch_warnings():
        # Whether it converged is in the record, and in the report beside the numbers.
        warnings.simplefilter("ignore", ConvergenceWarning)
        k = max(config.ks)
        return leading_eigenspace(H, k=k, tol=1e-8, max_products=1000 + 2 * k)


def _scores(
    config: CellConfig, trained: CoupledResult, H: Operator, space: Eigenspace
) -> dict[str, Scores]:
    response = flat_response(mu=config.training.mu, t=config.training.time)
    found = {
        "transport": directional_scores(trained.sgd, trained.transport),
        "transport (minibatch)": directional_scores(trained.sgd, trained.batch_transport),
        "filter": directional_scores(trained.sgd, H, response=response),
    }
    for k in sorted(config.ks, reverse=True):
        found[f"projector k={k}"] = directional_scores(trained.sgd, space.first(k))
    return found


def _controls(trained: CoupledResult, transport: Scores) -> dict[str, Pruned]:
    """What prunings without the Hessian, or with its knowledge scrambled, come to."""
    w = trained.sgd
    sparsity = 1.0 - float((trained.grda != 0).double().mean())
    # The best share of λ is chosen with gRDA's weights in hand: no method could do that.
    best = min(
        (soft_threshold(w, share * trained.threshold) for share in SOFT_SHARES),
        key=lambda pruned: float((pruned.weights - trained.grda).norm()),
    )
    generator = torch.Generator().manual_seed(0)
    shuffled = transport.values[torch.randperm(len(w), generator=generator)]
    return {
        "permuted scores": directional_prune(
            w, replace(transport, values=shuffled), trained.threshold
        ),
        "soft": soft_threshold(w, trained.threshold),
        "soft, best lambda": best,
        "soft, same sparsity": soft_threshold(w, _level(w, sparsity)),
        "magnitude": magnitude_prune(w, sparsity),
    }


def _level(w: Tensor, sparsity: float) -> float:
    zeros = round(sparsity * len(w))
    return float(w.abs().sort().values[zeros - 1]) if zeros else 0.0


def _bezier(config: CellConfig, data: Dataset, trained: CoupledResult) -> BezierCurve:
    minibatches = Objective(
        network(config, data),
        nn.CrossEntropyLoss(),
        (data.train_inputs, data.train_labels),
        batch_size=config.training.batch_size,
    )
    found = train_bezier(
        minibatches,
        trained.grda,
        trained.sgd,
        epochs=BEZIER_EPOCHS,
        lr=BEZIER_LR,
        seed=config.training.seed,
    )
    return found.curve


def _quality(loss: Objective, error: Objective, w: Tensor) -> dict[str, float]:
    return {
        "train_loss": loss.loss(w),
        "test_accuracy": 1.0 - error.loss(w),
        "sparsity": float((w == 0).double().mean()),
    }


def _compare(
    pruned: Pruned, trained: CoupledResult, loss: Objective, error: Objective
) -> dict[str, float]:
    """How close pruned weights come to gRDA's, all together and by regime."""
    D, moved = trained.grda - trained.sgd, pruned.weights - trained.sgd
    missed = pruned.weights - trained.grda
    zeros, expected = pruned.weights == 0, trained.grda == 0
    either = int((zeros | expected).sum())
    result = {
        "lam": pruned.lam,
        "relative_error": float(missed.norm() / D.norm()),
        "cosine": float(torch.dot(moved, D) / (moved.norm() * D.norm())),
        # Jaccard index of the two sets of zeros, and what independent sets of their sizes score.
        "zeros_overlap": int((zeros & expected).sum()) / either if either else 1.0,
        "zeros_overlap_by_chance": _chance_overlap(zeros, expected),
    }
    for regime, rows in (("never_clipped", ~trained.clipped), ("clipped", trained.clipped)):
        if rows.any():
            result[f"relative_error_{regime}"] = float(missed[rows].norm() / D[rows].norm())
    return result | _quality(loss, error, pruned.weights)


def _chance_overlap(a: Tensor, b: Tensor) -> float:
    p, q = float(a.double().mean()), float(b.double().mean())
    return p * q / (p + q - p * q) if p + q > 0 else 1.0


def _evidence(scores: Scores | None, w: Tensor) -> dict[str, float]:
    if scores is None:
        return {}
    return {
        "mean_score": scores.mean,
        "score_error": scores.error,
        "first_clip": first_clip(w, scores),
        "num_products": scores.num_products,
        "lowest_eigenvalue": scores.lowest_eigenvalue,
    }


def _plane_points(plane: Plane, points: Sequence[Tensor]) -> Tensor:
    """A grid over the plane with a margin of a quarter around the points."""
    xs, ys = torch.tensor([plane.coordinates(w)[:2] for w in points], dtype=DTYPE).T
    margin = 0.25 * float(xs.max() - xs.min())

    def axis(values: Tensor) -> Tensor:
        low, high = float(values.min()) - margin, float(values.max()) + margin
        return torch.linspace(low, high, NUM_PLANE_POINTS, dtype=DTYPE)

    return grid(axis(xs), axis(ys))
