"""The move of the weights that stay which makes up best for those that go, by products only."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hessian import NonFiniteError, Objective, Operator, gauss_newton_operator
from pruning.conjugate_gradients import LinearSolution, conjugate_gradients

HALVINGS = 6
"""Times that a step is halved before it is given up."""


@dataclass(frozen=True)
class Step:
    """A removal with its compensating move, and what the quadratic model and the loss say."""

    weights: Float[Tensor, " d"]
    predicted_change: float
    """Change of the loss by the quadratic model with the Gauss-Newton matrix, without damping."""
    loss_before: float
    loss: float
    length: float
    """Share of the compensating move that was taken; 0 if none lowered the loss."""
    solution: LinearSolution
    num_products: int
    num_losses: int
    """Forward passes over the data for the line search."""


def compensating_step(
    objective: Objective,
    w: Float[Tensor, " d"],
    alive: Bool[Tensor, " d"],
    *,
    tau: float,
    tol: float = 1e-4,
    progress: float = 5e-4,
    max_products: int = 50,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    memory_budget: int | None = None,
) -> Step:
    """Set weights to zero and move those that stay, to keep the loss as low as one step can.

    With z the weights that go, f those that stay and G the Gauss-Newton matrix at w:
    (G_ff + τ I) x = −(g_f − G_fz w_z), by conjugate gradients. Where w is already zero outside
    ``alive`` this is one damped Gauss-Newton step. The move x is halved as long as that lowers
    the true loss; one that does not lower it at all is not made.

    Args:
        objective: What is to stay low, such as a ``DenseDistance``.
        w: Weights before, shape [d].
        alive: True for those that stay.
        tau: τ > 0, in units of G.
        tol: Stop once the relative residual is this small.
        progress: Stop once an iteration lowers the quadratic by less than this share of it.
        max_products: Budget of products, one for G_fz w_z included.
        preconditioner: Near the inverse of G + τ I; only its block of the weights that stay is
            used.
        memory_budget: Bytes for graphs, as for ``gauss_newton_operator``.

    Raises:
        ValueError: If tau is not positive, the budget is below 2 products, or shapes do not fit.
        NonFiniteError: If the loss, its gradient or a product is not finite at w.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"`tau` must be positive and finite, got {tau}.")
    if max_products < 2:
        raise ValueError(f"`max_products` must be at least 2, got {max_products}.")
    keep = alive.to(w)
    loss_before, g = objective.loss_and_gradient(w)
    G = gauss_newton_operator(objective, w, memory_budget=memory_budget)
    u = keep * w - w
    removes = bool(u.any())
    bent = G @ u if removes else u
    slope, bend = _dot(g, u), _dot(u, bent)
    b = -keep * (g + bent)
    inside = Operator(
        lambda v: keep * (G @ v) + tau * v, objective.size, w.dtype, w.device, None, G.method
    )
    solution = conjugate_gradients(
        inside,
        b,
        tol=tol,
        progress=progress,
        max_products=max_products - removes,
        preconditioner=None if preconditioner is None else lambda r: keep * preconditioner(r),
    )
    x, base = solution.x, keep * w
    length, loss, num_losses = shortened(lambda a: _loss(objective, base + a * x))
    # xᵀ (G + τ) x from the value that conjugate gradients carry: no product.
    pull = _dot(b, x)
    bent_x = 2.0 * (solution.value + pull) - tau * _dot(x, x)
    predicted = slope + 0.5 * bend - length * pull + 0.5 * length**2 * bent_x
    spent = solution.num_products + removes
    return Step(
        base + length * x, predicted, loss_before, loss, length, solution, spent, num_losses
    )


def shortened(loss: Callable[[float], float]) -> tuple[float, float, int]:
    """Return the length among 1, ½, ¼, … behind which the loss rises again, or 0 if none helps.

    Returns the length, the loss there, and how often the loss was asked for.
    """
    best, lowest, asked = 1.0, loss(1.0), 1
    for i in range(1, HALVINGS + 1):
        shorter, asked = loss(0.5**i), asked + 1
        if shorter >= lowest < math.inf:
            break
        best, lowest = 0.5**i, shorter
    at_zero = loss(0.0)
    return (best, lowest, asked + 1) if lowest < at_zero else (0.0, at_zero, asked + 1)


def _loss(objective: Objective, w: Tensor) -> float:
    """The loss, infinite where a step leads out of the numbers."""
    try:
        return objective.loss(w)
    except NonFiniteError:
        return math.inf


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))
