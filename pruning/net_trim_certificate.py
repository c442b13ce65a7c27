"""What sparse weights of a layer do to its outputs, measured on them in float64."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.net_trim_targets import LayerTargets


@dataclass(frozen=True)
class Certificate:
    """How far the outputs of weights are from where they must be."""

    active: float
    """‖(X Uᵀ − T)_Ω‖_F."""
    above: float
    """‖((X Uᵀ − T)_Ωᶜ)₊‖_F."""
    violation: float
    """Largest entry of (X Uᵀ − T)_Ωᶜ that is positive, over the layer's scale."""
    outputs: float
    """‖ReLU(X Uᵀ + S) − Y‖_F, or without the ReLU where there is none."""


def certify(U: Float[Tensor, "m n"], targets: LayerTargets, scale: float) -> Certificate:
    """Return what weights do to the outputs of a layer; 2 N M P flops in float64.

    Args:
        U: Weights.
        targets: The layer.
        scale: What a violation counts in.
    """
    W = U.double()
    sums = torch.zeros(3, dtype=torch.float64, device=W.device)
    worst = torch.zeros((), dtype=torch.float64, device=W.device)
    for rows, X, T, active in targets.chunks():
        Z = X @ W.T
        if targets.kind == "relu":
            sums[2] += _outputs_off(Z, targets, rows)
        Z -= T
        if active is None:
            sums[0] += Z.square().sum()
            continue
        sums[0] += (Z * active).square().sum()
        above = Z.masked_fill_(active, 0.0).clamp_(min=0.0)
        sums[1] += above.square().sum()
        if above.numel():
            worst = torch.maximum(worst, above.max())
    near, over, off = sums.tolist()
    near += targets.hidden
    off = near if targets.kind == "linear" else off
    largest = float(worst)
    return Certificate(
        math.sqrt(near),
        math.sqrt(over),
        largest / scale if scale else math.inf if largest else 0.0,
        math.sqrt(off),
    )


def _outputs_off(Z: Tensor, targets: LayerTargets, rows: slice) -> Tensor:
    S = targets.offset
    if S is not None:
        Z = Z + (S if S.ndim == 1 else S[rows])
    return (Z.relu() - targets.Y[rows]).square().sum()


def lower_bound(
    multipliers: Float[Tensor, "p m"],
    targets: LayerTargets,
    penalty: Float[Tensor, "m n"],
    radius: float,
    *,
    joint: bool,
) -> float:
    """Return an objective that no feasible weights are below, in float64; 2 N M P flops.

    For any Λ that is not positive where outputs are inactive, and |Λᵀ X| ≤ λ: Σ λ |U| ≥ ⟨Λ, X Uᵀ⟩
    ≥ ⟨Λ, T⟩ − ε ‖Λ_Ω‖_F. Multipliers of the wrong sign are left out, and all are shrunk to fit.

    Args:
        multipliers: Λ, or a guess of it.
        targets: The layer.
        penalty: λ.
        radius: ε, less what is hidden.
        joint: Whether inactive outputs share the ball: then ‖Λ‖_F instead of ‖Λ_Ω‖_F.

    Returns:
        The bound; −inf where some penalty is zero and its entry of Λᵀ X is not.
    """
    through = torch.zeros_like(penalty, dtype=torch.float64)
    inside = torch.zeros((), dtype=torch.float64, device=penalty.device)
    length = inside.clone()
    for rows, X, T, active in targets.chunks():
        L = multipliers[rows].double()
        near = L
        if active is not None:
            L = torch.where(active, L, L.clamp(max=0.0))
            near = L if joint else L * active
        through.addmm_(L.T, X)
        inside += (L * T).sum()
        length += near.square().sum()
    needed = (through.abs() / penalty).nan_to_num(nan=0.0, posinf=math.inf).max()
    if not math.isfinite(float(needed)):
        return -math.inf
    return float((inside - radius * length.sqrt()) / needed.clamp(min=1.0))
