"""Trains the bend of a Bezier curve between two solutions so that the loss along it is low."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hessian.batches import Batch
from hessian.determinism import require_fixed_modules
from hessian.errors import NonFiniteError
from hessian.objective import Objective
from landscape.evaluate import Progress, warn_about_batch_norm
from landscape.paths import BezierCurve, Line


@dataclass(frozen=True)
class ConnectedCurve:
    """A trained curve and how the training went."""

    curve: BezierCurve
    losses: Float64[Tensor, " epochs"]
    """Mean training loss of every epoch, at the random t of its minibatches, before each step."""
    num_gradients: int
    """Minibatch gradients spent."""


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
) -> ConnectedCurve:
    """Connect two points by a Bezier curve of low loss.

    Minimises the expectation of L(curve(t)) over uniform t by SGD with momentum, one t and one
    gradient a minibatch. The learning rate is constant for the first half, falls linearly to 1 %
    at nine tenths, and stays there. No weight decay. The mean over t can be low with a peak left
    in between: check with `barrier`.

    Args:
        objective: The training loss; its batches are the minibatches, held in memory and visited
            in a new random order every epoch.
        start: Weights at t = 0, kept fixed, shape [d].
        end: Weights at t = 1, kept fixed, shape [d].
        epochs: Passes over the data, each a forward and a backward pass.
        lr: Initial learning rate. A control point sees only its share B_k(t) of each gradient, at
            most half for one bend, so more than for ordinary training is fine.
        order: Degree of the curve; ``order - 1`` control points are trained.
        momentum: Of SGD, in [0, 1).
        seed: Seed of t and of the order of batches; the global random state is not used.
        bend: Where the interior control points begin, shape [d] or [order - 1, d]. Default: on
            the straight line, equally spaced, where a symmetric ridge gives no push to either side.
        progress: Called with the epochs done and their number after every epoch.

    Returns:
        The curve, ends exactly as given, and the loss of every epoch.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.
        NonDeterministicError: If dropout or batch statistics are switched on.
        NonFiniteError: If the loss or its gradient is not finite; names epoch and learning rate.

    Warns:
        BatchNormWarning: If the model normalises by running statistics.

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
    _require_settings(epochs, lr, order, momentum)
    points = _initial_points(Line(start, end), order, bend)
    require_fixed_modules(objective.model)
    warn_about_batch_norm(objective)
    generator = torch.Generator().manual_seed(seed)
    batches = list(objective.batches())
    velocity = torch.zeros_like(points[1:-1])
    losses = torch.zeros(epochs, dtype=torch.float64)
    for epoch in range(epochs):
        rate = lr * _rate_factor(epoch / epochs)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            loss, gradient = _control_gradient(objective, BezierCurve(points), t, batches[i])
            if not (math.isfinite(loss) and bool(torch.isfinite(gradient).all())):
                raise NonFiniteError(
                    f"The loss or its gradient is not finite in epoch {epoch + 1} of {epochs} at "
                    f"t = {t:.3f} with learning rate {rate:.3g} (loss {loss:.3g}). Lower `lr`."
                )
            velocity.mul_(momentum).add_(gradient)
            points[1:-1].sub_(velocity, alpha=rate)
            losses[epoch] += loss * objective.batch_weight(batches[i]) / objective.normalizer
        if progress is not None:
            progress(epoch + 1, epochs)
    return ConnectedCurve(BezierCurve(points), losses, epochs * len(batches))


def _control_gradient(
    objective: Objective, curve: BezierCurve, t: float, batch: Batch
) -> tuple[float, Tensor]:
    """Loss of the batch at curve(t), and its gradient B_k(t) ∇L in the interior control points."""
    w = curve(t).requires_grad_()
    with torch.enable_grad():
        loss = objective.batch_loss(w, batch)
        (gradient,) = torch.autograd.grad(loss, w, materialize_grads=True)
    coefficients = curve.coefficients(t)[1:-1].to(gradient)
    return float(loss.detach()), coefficients[:, None] * gradient


def _rate_factor(fraction: float) -> float:
    """Share of the learning rate after a fraction of training, as in dnn-mode-connectivity."""
    if fraction <= 0.5:
        return 1.0
    return max(1.0 - 0.99 * (fraction - 0.5) / 0.4, 0.01)


def _initial_points(line: Line, order: int, bend: Tensor | None) -> Tensor:
    points = torch.stack([line(k / order) for k in range(order + 1)]).detach()
    if bend is None:
        return points
    interior = bend.detach()[None] if bend.ndim == 1 else bend.detach()
    if interior.shape != points[1:-1].shape or interior.dtype != points.dtype:
        raise ValueError(
            f"`bend` must hold {order - 1} control point(s) of {line.size} weights in "
            f"{points.dtype}, got shape {list(bend.shape)} in {bend.dtype}."
        )
    points[1:-1] = interior
    return points


def _require_settings(epochs: int, lr: float, order: int, momentum: float) -> None:
    if epochs < 1:
        raise ValueError(f"`epochs` must be at least 1, got {epochs}.")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"`lr` must be positive and finite, got {lr}.")
    if order < 2:
        raise ValueError(
            f"`order` must be at least 2 to leave a control point to train, got {order}."
        )
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
