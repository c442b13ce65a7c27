"""Trains the bends of a curve between two solutions so that the loss along it is low."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Generic, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessian.batches import Batch
from hessian.determinism import require_fixed_modules
from hessian.errors import NonFiniteError
from hessian.objective import Objective
from landscape.curve_checkpoint import CurveCheckpoint, describe_optimizer, digest
from landscape.evaluate import Progress, warn_about_batch_norm
from landscape.paths import BezierCurve, Line, PolyChain

Curve = TypeVar("Curve", BezierCurve, PolyChain)
MakeOptimizer: TypeAlias = Callable[[list[Tensor], float], torch.optim.Optimizer]
"""Called as ``make([interior], lr)``: ``torch.optim.Adam`` itself, or a ``partial`` of one."""
BatchNormInTraining = Literal["batch", "frozen"]


@dataclass(frozen=True)
class ConnectedCurve(Generic[Curve]):
    """A trained curve and how the training went."""

    curve: Curve
    losses: Float64[Tensor, " epochs"]
    """Mean training loss of every epoch, at the random t of its minibatches, before each step,
    without weight decay."""
    num_gradients: int
    """Minibatch gradients spent, those before a resumption included."""


def train_curve(
    objective: Objective,
    start: Float[Tensor, " d"],
    end: Float[Tensor, " d"],
    *,
    kind: type[Curve],
    epochs: int,
    lr: float,
    num_bends: int = 1,
    optimizer: MakeOptimizer | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_norm: BatchNormInTraining = "batch",
    keep_zeros: bool | Bool[Tensor, " d"] = False,
    seed: int = 0,
    bend: Float[Tensor, "*interior n"] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    progress: Progress | None = None,
) -> ConnectedCurve[Curve]:
    """Connect two points by a curve of low loss.

    Minimises the expectation of L(curve(t)) over uniform t, one t and one gradient a minibatch; a
    control point k sees its share B_k(t) of the gradient. The learning rate is constant for the
    first half, falls linearly to 1 % at nine tenths, and stays there. The mean over t can be low
    with a peak left in between: check with `barrier`.

    Args:
        objective: The training loss; its batches are the minibatches, held in memory and visited
            in a new random order every epoch.
        start: Weights at t = 0, kept fixed, shape [d].
        end: Weights at t = 1, kept fixed, shape [d].
        kind: `BezierCurve`, smooth, or `PolyChain`, straight lines between bends.
        epochs: Passes over the data, each a forward and a backward pass.
        lr: Initial learning rate. A control point sees only its share of each gradient, at most
            half for one bend of a Bezier curve, so more than for ordinary training is fine.
        num_bends: Number of control points between the ends, all of them trained.
        optimizer: Makes the optimizer from a list of one tensor, the interior control points
            [num_bends, d], and ``lr``; its ``step`` needs no closure. Default: SGD.
        momentum: Of the default SGD, in [0, 1).
        weight_decay: Coefficient c of ½ c |curve(t)|², added to the loss.
        batch_norm: ``"batch"`` normalises by the statistics of each minibatch, as training does,
            and leaves the running ones alone: they have to be computed anew at every point of
            the curve that is evaluated. ``"frozen"`` uses the model's running statistics
            everywhere, which belong to the model's own weights only.
        keep_zeros: Whether weights that are zero at both ends stay zero along the curve; or a
            mask, True where weights stay zero, all of them zero at both ends.
        seed: Seed of t and of the order of batches; the global random state is not used.
        bend: Where the interior control points begin, shape [d] or [num_bends, d]. Default: on
            the straight line, equally spaced, where a symmetric ridge gives no push to either side.
        checkpoint: File that keeps the state of the training. After a kill, the same call goes on
            from there and ends with the same bits (on one thread, or wherever else a repeated
            training does). It stays after success; remove it once the result is safe.
        checkpoint_every: Epochs between two writes.
        progress: Called with the epochs done and their number after every epoch.

    Returns:
        The curve, ends exactly as given, and the loss of every epoch.

    Raises:
        ValueError: If an argument is out of range, a shape does not fit, or the checkpoint is of
            another training.
        TypeError: If a checkpoint is asked for, and the state of the optimizer is not tensors and
            numbers.
        NonDeterministicError: If dropout or batch statistics are switched on in the model.
        NonFiniteError: If the loss or its gradient is not finite; names epoch and learning rate.
        DamagedFileError: If the checkpoint cannot be read.

    Warns:
        BatchNormWarning: If the model normalises by running statistics, and they are frozen.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(2, 1), torch.ones(2, 1)))
        >>> ends = torch.tensor([0.0]), torch.tensor([2.0])
        >>> found = train_curve(objective, *ends, kind=PolyChain, num_bends=2, epochs=1, lr=0.1)
        >>> found.curve.control_points.shape
        torch.Size([4, 1])

    References:
        Garipov et al. (2018), Loss surfaces, mode connectivity, and fast ensembling of DNNs.
    """
    _require_settings(epochs, lr, num_bends, momentum, weight_decay, checkpoint_every)
    objective.require_vector(start, "start")
    objective.require_vector(end, "end")
    points = _initial_points(Line(start, end), num_bends, bend)
    zeros = _kept_zeros(start, end, keep_zeros)
    if zeros is not None:
        points.masked_fill_(zeros, 0.0)
    require_fixed_modules(objective.model)
    if batch_norm == "frozen":
        warn_about_batch_norm(objective)
    # Shares its memory with the points, so that a step moves the curve.
    interior = points[1:-1].requires_grad_()
    make = optimizer or partial(_sgd, momentum=momentum)
    trains = make([interior], lr)
    rates = [group["lr"] for group in trains.param_groups]
    generator = torch.Generator().manual_seed(seed)
    batches = list(objective.batches())
    shares = [objective.batch_weight(batch) / objective.normalizer for batch in batches]
    losses = torch.zeros(epochs, dtype=torch.float64)
    saved = None
    if checkpoint is not None:
        problem = {
            "kind": kind.__name__,
            "epochs": epochs,
            "optimizer": describe_optimizer(trains),
            "weight_decay": weight_decay,
            "batch_norm": batch_norm,
            "keep_zeros": None if zeros is None else digest(zeros),
            "seed": seed,
            "start, end or bend": digest(points),
            "data": [objective.num_samples, objective.normalizer, len(batches)],
        }
        saved = CurveCheckpoint(FilePath(checkpoint), problem, points, trains, generator, losses)
    with _batch_statistics(objective.model, batch_norm):
        done = saved.resume() if saved is not None else 0
        for epoch in range(done, epochs):
            factor = _rate_factor(epoch / epochs)
            for group, rate in zip(trains.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            steps = []
            for i in torch.randperm(len(batches), generator=generator).tolist():
                t = float(torch.rand((), generator=generator, dtype=torch.float64))
                loss, gradient = _control_gradient(
                    objective, kind(points), t, batches[i], weight_decay
                )
                if zeros is not None:
                    gradient.masked_fill_(zeros, 0.0)
                steps.append((t, loss * shares[i], torch.isfinite(gradient).all()))
                interior.grad = gradient
                trains.step()
                if zeros is not None:  # whatever the optimizer makes of a gradient of zero
                    interior.detach().masked_fill_(zeros, 0.0)
            losses[epoch] = _epoch_loss(steps, f"epoch {epoch + 1} of {epochs}", lr * factor)
            last = epoch + 1 == epochs
            if saved is not None and (last or (epoch + 1) % checkpoint_every == 0):
                saved.save(epoch + 1)
            if progress is not None:
                progress(epoch + 1, epochs)
    return ConnectedCurve(kind(points.detach()), losses, epochs * len(batches))


def train_bezier(
    objective: Objective,
    start: Float[Tensor, " d"],
    end: Float[Tensor, " d"],
    *,
    epochs: int,
    lr: float,
    order: int = 2,
    momentum: float = 0.9,
    seed: int = 0,
    bend: Float[Tensor, "*interior n"] | None = None,
    progress: Progress | None = None,
) -> ConnectedCurve[BezierCurve]:
    """Connect two points by a Bezier curve of low loss: `train_curve` with SGD and no weight decay.

    Args:
        objective: The training loss; its batches are the minibatches.
        start: Weights at t = 0, kept fixed, shape [d].
        end: Weights at t = 1, kept fixed, shape [d].
        epochs: Passes over the data, each a forward and a backward pass.
        lr: Initial learning rate.
        order: Degree of the curve; ``order - 1`` control points are trained.
        momentum: Of SGD, in [0, 1).
        seed: Seed of t and of the order of batches.
        bend: Where the interior control points begin, shape [d] or [order - 1, d]. Default: on
            the straight line.
        progress: Called with the epochs done and their number after every epoch.

    Returns:
        The curve, ends exactly as given, and the loss of every epoch.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.
        NonDeterministicError: If dropout or batch statistics are switched on in the model.
        NonFiniteError: If the loss or its gradient is not finite; names epoch and learning rate.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(2, 1), torch.ones(2, 1)))
        >>> ends = torch.tensor([0.0]), torch.tensor([2.0])
        >>> train_bezier(objective, *ends, epochs=1, lr=0.1).curve.control_points.shape
        torch.Size([3, 1])

    References:
        Garipov et al. (2018), Loss surfaces, mode connectivity, and fast ensembling of DNNs.
    """
    if order < 2:
        raise ValueError(
            f"`order` must be at least 2 to leave a control point to train, got {order}."
        )
    return train_curve(
        objective,
        start,
        end,
        kind=BezierCurve,
        epochs=epochs,
        lr=lr,
        num_bends=order - 1,
        momentum=momentum,
        seed=seed,
        bend=bend,
        progress=progress,
    )


def _sgd(params: list[Tensor], lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=momentum)


def _control_gradient(
    objective: Objective,
    curve: BezierCurve | PolyChain,
    t: float,
    batch: Batch,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss of the batch at curve(t), and its gradient B_k(t) ∇L in the interior control points."""
    with torch.no_grad():
        w = curve(t)
    with torch.enable_grad():
        w.requires_grad_()
        loss = objective.batch_loss(w, batch)
        (gradient,) = torch.autograd.grad(loss, w, materialize_grads=True)
    if weight_decay:
        gradient = gradient + weight_decay * w.detach()
    coefficients = curve.coefficients(t)[1:-1].to(gradient)
    return loss.detach(), coefficients[:, None] * gradient


def _epoch_loss(steps: list[tuple[float, Tensor, Tensor]], when: str, rate: float) -> float:
    """Sum of an epoch's losses, fetched from the device once; names the first bad step."""
    parts = torch.stack([loss.to(torch.float64) for _, loss, _ in steps]).cpu()
    fine = torch.stack([good for _, _, good in steps]).cpu() & torch.isfinite(parts)
    if not bool(fine.all()):
        first = int((~fine).nonzero()[0])
        raise NonFiniteError(
            f"The loss or its gradient is not finite in {when} at t = {steps[first][0]:.3f} with "
            f"learning rate {rate:.3g}. Lower `lr`."
        )
    return float(parts.sum())


@contextmanager
def _batch_statistics(model: nn.Module, batch_norm: BatchNormInTraining) -> Iterator[None]:
    """Batch norm by the statistics of the batch, its running ones neither used nor renewed."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    layers = layers if batch_norm == "batch" else []
    before = [(m.training, m.track_running_stats) for m in layers]
    try:
        for m in layers:
            m.training, m.track_running_stats = True, False
        yield
    finally:
        for m, (training, tracks) in zip(layers, before, strict=True):
            m.training, m.track_running_stats = training, tracks


def _rate_factor(fraction: float) -> float:
    """Share of the learning rate after a fraction of training, as in dnn-mode-connectivity."""
    if fraction <= 0.5:
        return 1.0
    return max(1.0 - 0.99 * (fraction - 0.5) / 0.4, 0.01)


def _kept_zeros(start: Tensor, end: Tensor, keep_zeros: bool | Tensor) -> Tensor | None:
    if isinstance(keep_zeros, Tensor):
        zeros = keep_zeros.to(start.device)
        moving = zeros & ((start != 0) | (end != 0))
        if bool(moving.any()):
            raise ValueError(
                "`keep_zeros` must be True only where both ends are zero, got "
                f"{int(moving.sum())} weights that are not."
            )
        return zeros
    return (start == 0) & (end == 0) if keep_zeros else None


def _initial_points(line: Line, num_bends: int, bend: Tensor | None) -> Tensor:
    steps = num_bends + 1
    points = torch.stack([line(k / steps) for k in range(steps + 1)]).detach()
    if bend is None:
        return points
    interior = bend.detach()[None] if bend.ndim == 1 else bend.detach()
    if interior.shape != points[1:-1].shape or interior.dtype != points.dtype:
        raise ValueError(
            f"`bend` must hold {num_bends} control point(s) of {line.size} weights in "
            f"{points.dtype}, got shape {list(bend.shape)} in {bend.dtype}."
        )
    points[1:-1] = interior
    return points


def _require_settings(
    epochs: int,
    lr: float,
    num_bends: int,
    momentum: float,
    weight_decay: float,
    checkpoint_every: int,
) -> None:
    counts = {"epochs": epochs, "num_bends": num_bends, "checkpoint_every": checkpoint_every}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"`lr` must be positive and finite, got {lr}.")
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"`weight_decay` must be at least 0 and finite, got {weight_decay}.")
