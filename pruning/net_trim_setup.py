"""A layer in the units in which Net-Trim iterates, with the one factor that this takes."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pruning.net_trim_admm import Splitting
from pruning.net_trim_targets import LayerTargets

Precision: TypeAlias = Literal["full", "mixed"]

SEEN = 1e-10
"""Eigenvalues of Xᵀ X below this share of the largest one are of directions that no sample has."""


@dataclass(frozen=True)
class SplitOptions:
    """How a layer's program is iterated on."""

    joint: bool
    rho: float
    relaxation: float
    precision: Precision
    chunk: int | None = None


def splitting_of(
    W: Tensor,
    targets: LayerTargets,
    G: Tensor,
    penalty: Tensor,
    options: SplitOptions,
    *,
    c0: float | None = None,
) -> Splitting:
    """Return the iteration at its start: n³ flops for C⁻¹, and a copy of the targets.

    Args:
        W: Weights, whose mean magnitude is the unit of weights.
        targets: The layer.
        G: Xᵀ X in float64.
        penalty: λ.
        options: Of the iteration.
        c0: Unit of the inputs. Default: see ``input_unit``.
    """
    c0 = input_unit(G) if c0 is None else c0
    C = G / c0**2
    C.diagonal().add_(1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(C))
    dtype = torch.float64 if options.precision == "full" else torch.float32
    T = targets.X.new_empty(len(W), len(targets.X), dtype=dtype)
    active = None
    if targets.kind == "relu":
        active = torch.empty(T.shape, dtype=torch.bool, device=T.device)
    for rows, _, goal, near in targets.chunks():
        T[:, rows] = goal.div_(c0).T
        if active is not None and near is not None:
            active[:, rows] = near.T
    return Splitting(
        targets.X.to(dtype),
        T,
        active,
        penalty / mean_penalty(penalty),
        inverse,
        c0=c0,
        unit=float(W.double().abs().mean()) or 1.0,
        rho=options.rho,
        joint=options.joint,
        relaxation=options.relaxation,
        block=None if options.chunk is None else options.chunk * len(W),
    )


def mean_penalty(penalty: Tensor) -> float:
    """Return the mean of what is positive of λ."""
    return float(penalty.sum() / (penalty > 0).sum())


def input_unit(G: Tensor) -> float:
    """Return c₀: the root of the median eigenvalue of Xᵀ X, among those that are not zero.

    Half of the directions then lie above the identity in Xᵀ X / c₀² + I, and half below. The
    authors take .3 of the root of the largest entry; by that scale, the median is at .1 for layers
    of MNIST networks and at .9 for Gaussian inputs, and near it each takes the fewest iterations.
    """
    values = torch.linalg.eigvalsh(G)
    seen = values[values > SEEN * values[-1].clamp(min=0.0)]
    return math.sqrt(float(seen.median())) if len(seen) else 1.0
