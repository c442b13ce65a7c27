"""Weights on a given support whose outputs are nearest to what a ReLU lets through."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.net_trim_targets import LayerTargets

CHUNK_BYTES = 1 << 27
"""Memory of the inputs that are gathered for the neurons worked on at a time, unless one needs
more."""

DAMPING = 1e-10
"""Added to the normal equations, as a share of their largest diagonal entry: inputs may repeat."""

MAX_STEPS = 30
"""Steps of Newton; five are usual. The last may be cut to half, eleven times."""


def refitted(U: Float[Tensor, "m n"], targets: LayerTargets) -> Float[Tensor, "m n"]:
    """Return weights with the zeros of U, and outputs at least as near to the targets.

    Least ½ ‖(X Uᵀ + S − Y)_Ω‖² + ½ ‖((X Uᵀ + S)_Ωᶜ)₊‖², which bounds the squared discrepancy of
    the outputs: a least-squares problem where what is inactive counts once it is above zero. Each
    neuron is one, convex and piecewise quadratic, and Newton's method ends in the optimum. A
    neuron whose outputs come no nearer keeps its weights. About 2 s² P flops in float64 for a
    neuron of s weights at each step.

    Args:
        U: Sparse weights.
        targets: The layer; ``bound`` is not looked at.
    """
    W = U.double()
    keep = W != 0
    sizes = keep.sum(dim=1)
    by_size = sizes.argsort(descending=True)
    counts = sizes[by_size].tolist()
    fitted = W.clone()
    start = 0
    while start < len(W) and counts[start] > 0:
        size = counts[start]
        rows = by_size[start : start + max(1, CHUNK_BYTES // (16 * size * len(targets.X)))]
        start += len(rows)
        # Smaller supports are filled up with places that are not kept, whose inputs count as zero.
        index = keep[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
        real = keep[rows].gather(1, index)
        x = targets.X.T[index].double().mul_(real[:, :, None])
        Y = targets.Y[:, rows].double().T
        S = targets.offset
        if S is not None:
            S = (S[None] if S.ndim == 1 else S)[:, rows].double().T
        near = Y if S is None else Y - S
        active = Y > 0 if targets.kind == "relu" else None
        found = _nearest(x, near, active, Y, W[rows].gather(1, index))
        fitted[rows[:, None], index] = torch.where(real, found, fitted[rows].gather(1, index))
    return fitted.to(U.dtype)


def _nearest(
    x: Float[Tensor, "k s p"],
    T: Float[Tensor, "k p"],
    active: Bool[Tensor, "k p"] | None,
    Y: Float[Tensor, "k p"],
    u: Float[Tensor, "k s"],
) -> Float[Tensor, "k s"]:
    """Return weights of neurons on inputs of their own, by Newton's method."""

    def images(weights: Tensor) -> Tensor:
        return torch.bmm(weights[:, None], x)[:, 0]

    def off(e: Tensor) -> Tensor:
        return e if active is None else torch.where(active, e, e.clamp(min=0.0))

    def error(e: Tensor) -> Tensor:
        return off(e).square().sum(dim=1)

    first, e = u, images(u) - T
    start = now = error(e)
    before = _outputs_error(e, active, Y)
    for _ in range(MAX_STEPS):
        counts = None if active is None else (active | (e > 0)).to(x)
        counted = x if counts is None else x * counts[:, None]
        H = torch.bmm(counted, x.mT)
        diagonal = H.diagonal(dim1=1, dim2=2)
        largest = diagonal.amax(dim=1, keepdim=True)
        diagonal.add_(DAMPING * largest + (largest == 0))
        gradient = torch.bmm(x, off(e)[:, :, None])
        move = -torch.cholesky_solve(gradient, torch.linalg.cholesky(H))[:, :, 0]
        along = images(move)
        length, then = torch.ones_like(now), error(e + along)
        for _ in range(11):
            worse = then > now
            length = torch.where(worse, 0.5 * length, length)
            then = error(e + length[:, None] * along)
        length = torch.where(then > now, 0.0, length)
        u = u + length[:, None] * move
        e = e + length[:, None] * along
        gained = now - torch.minimum(then, now)
        now = torch.minimum(then, now)
        if bool((gained <= 1e-12 * start).all()):
            break
    e = images(u) - T
    better = (error(e) <= start) & (_outputs_error(e, active, Y) <= before)
    return torch.where(better[:, None], u, first)


def _outputs_error(e: Tensor, active: Tensor | None, Y: Tensor) -> Tensor:
    """Return the squared discrepancy of the outputs, given that of what goes into the ReLU."""
    return (e if active is None else (e + Y).relu() - Y).square().sum(dim=1)
