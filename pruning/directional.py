"""Directional pruning in closed form, and the soft threshold that must stand beside it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.pruned import Pruned, as_pruned, wanted_zeros
from pruning.scores import Scores, require_weights


def directional_prune(w: Float[Tensor, " d"], scores: Scores, lam: float) -> Pruned:
    """Solve min over u of ½ ‖w − u‖² + λ Σ s_j |u_j| in closed form.

    u_j = sign(w_j) max(|w_j| − λ s_j, 0): a positive score shrinks the weight to zero at
    λ = |w_j| / s_j, a negative one makes it grow for ever. With no zero in w, the move up to
    ``first_clip(w, scores)`` is −λ Π₀ sign(w), exactly in flat directions; beyond it the loss
    rises.

    Args:
        w: Weights, shape [d].
        scores: Their scores, from ``directional_scores``.
        lam: λ ≥ 0, in units of w.

    Returns:
        The unique solution (where w_j ≠ 0; a zero stays zero).

    Raises:
        ValueError: If lam is negative or not finite, or w and scores do not fit or not finite.

    Example:
        >>> import torch
        >>> s = Scores(torch.tensor([1.0, -0.2]), "projector", 0.0, 0, 0.0)
        >>> directional_prune(torch.tensor([0.5, -1.0]), s, lam=1.0).weights
        tensor([ 0.0000, -1.2000])

    References:
        Chao, Wang, Xing, Cheng (2020), Directional Pruning of Deep Neural Networks,
        definition 1.1 and its solution.
    """
    return _prune(w, _fitting_values(w, scores), lam)


def soft_threshold(w: Float[Tensor, " d"], lam: float) -> Pruned:
    """Return sign(w) max(|w| − λ, 0): directional pruning that takes every direction for flat.

    The control at equal λ, where it prunes more than DP does. Hold DP also against it at its best
    λ and at equal sparsity, to see what the Hessian gives beyond a smaller λ.

    Args:
        w: Weights, shape [d].
        lam: λ ≥ 0, in units of w.

    Raises:
        ValueError: If lam is negative or not finite, or w is not a finite flat vector.
    """
    require_weights(w)
    return _prune(w, torch.ones_like(w), lam)


def first_clip(w: Float[Tensor, " d"], scores: Scores) -> float:
    """Return the λ at which the first weight reaches zero; infinity if none ever does.

    Up to it, and with no zero in w, directional pruning moves w by −λ Π₀ sign(w) exactly, and
    the quadratic loss change is zero. Weights that are zero already do not count: they stay,
    which takes the move out of the flat directions where Π₀ sign(w) would move them.

    Raises:
        ValueError: If w and scores do not fit or are not finite.
    """
    s = _fitting_values(w, scores)
    shrinking = (s > 0) & (w != 0)
    if not shrinking.any():
        return math.inf
    return float((w[shrinking].abs() / s[shrinking]).min())


def lambda_for_sparsity(w: Float[Tensor, " d"], scores: Scores, sparsity: float) -> float:
    """Return the smallest λ at which directional pruning leaves a share ``sparsity`` of zeros.

    Weights go in the order of |w_j| / s_j. Those with s_j ≤ 0 never go.

    Args:
        w: Weights, shape [d].
        scores: Their scores.
        sparsity: Share of zeros wanted, in [0, 1]; at least ⌈sparsity · d⌉ zeros result.

    Raises:
        ValueError: If sparsity is outside [0, 1] or above what positive scores can reach (the
            message says how far they reach), or w and scores do not fit or are not finite.
    """
    s = _fitting_values(w, scores)
    wanted = wanted_zeros(sparsity, len(w))
    levels = torch.full_like(w, math.inf)
    levels[s > 0] = w[s > 0].abs() / s[s > 0]
    levels[w == 0] = 0.0
    reachable = int(torch.isfinite(levels).sum())
    if wanted > reachable:
        raise ValueError(
            f"`sparsity` must be at most {reachable / len(w):.4f}, the share of weights that reach "
            f"zero at a finite λ, got {sparsity}. Without a positive score none ever shrinks."
        )
    if wanted == 0:
        return 0.0
    lam = float(levels.sort().values[wanted - 1])
    # λ s_j may round to just under |w_j|: go up by single roundings until the weight is gone.
    step = float(torch.finfo(w.dtype).eps)
    while int((_prune(w, s, lam).weights == 0).sum()) < wanted:
        lam = max(lam * (1.0 + step), torch.finfo(w.dtype).tiny)
        step *= 2.0
    return lam


def _prune(w: Tensor, s: Tensor, lam: float) -> Pruned:
    if not 0.0 <= lam <= torch.finfo(w.dtype).max:
        raise ValueError(f"`lam` must be finite and not negative, got {lam} for {w.dtype}.")
    return as_pruned(w.sign() * (w.abs() - lam * s).clamp(min=0.0), lam)


def _fitting_values(w: Tensor, scores: Scores) -> Tensor:
    """Return the scores in the type of w, after a look at both."""
    require_weights(w)
    require_weights(scores.values, "scores.values")
    if scores.values.shape != w.shape:
        raise ValueError(
            f"`scores` must hold one score for each of the {len(w)} weights, got "
            f"{len(scores.values)}."
        )
    return scores.values.to(w)
