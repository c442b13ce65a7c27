"""Optimal Brain Surgeon over all layers at once, with the Hessian known by its eigenspace."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hessian import Eigenspace
from hessian.vector_rows import CHUNK, row_dots

Choose: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""From costs [d], weights [d] and a number to the mask of weights that stay when about so many
more go."""


@dataclass(frozen=True)
class Removal:
    """Weights after a removal with its compensation."""

    weights: Float[Tensor, " d"]
    alive: Bool[Tensor, " d"]
    predicted_change: float
    """½ δᵀ V Λ Vᵀ δ of the move δ: without the damping, and to second order."""


def remove_compensated(
    w: Float[Tensor, " d"],
    alive: Bool[Tensor, " d"],
    eigenspace: Eigenspace,
    *,
    tau: float,
    count: int,
    batch: float = 0.02,
    choose: Choose | None = None,
) -> Removal:
    """Remove the ``count`` weights that cost least, a batch at a time, and let the rest answer.

    The Hessian is taken for V Λ Vᵀ + τ I, with the positive eigenvalues alone. With
    M = (τ Λ⁻¹ + V_Aᵀ V_A)⁻¹ for the weights A alive, [H_A⁻¹]_jj = (1 − v_jᵀ M v_j) / τ. The lowest
    w_j² / [H_A⁻¹]_jj go, and those that stay, f, move by V_f (τ Λ⁻¹ + V_fᵀ V_f)⁻¹ V_zᵀ w_z: the
    effect of the removed weights z on every sharp direction is kept. A batch costs 2 d k² flops,
    memory beside the eigenspace is a few vectors and k x k matrices.

    Args:
        w: Weights, shape [d], zero outside ``alive``.
        alive: True for weights that are not yet removed.
        eigenspace: Sharp directions of the loss in w; parts outside ``alive`` do not count.
        tau: τ > 0, in units of H: what stands for all eigenvalues that are not known.
        count: Weights to remove.
        batch: Share of the weights alive that goes before everything is computed anew; one weight
            at least, so 0 is one by one.
        choose: Given costs, w and a number, returns True for the weights that stay when about so
            many more go. Default: those that cost least go.

    Raises:
        ValueError: If tau is not positive, batch is not in [0, 1], or fewer than ``count`` weights
            are alive.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"`tau` must be positive and finite, got {tau}.")
    if not 0.0 <= batch <= 1.0:
        raise ValueError(f"`batch` must be in [0, 1], a share of the weights alive, got {batch}.")
    if not 0 <= count <= int(alive.sum()):
        raise ValueError(
            f"`count` must be between 0 and {int(alive.sum())}, the weights alive, got {count}."
        )
    surgeon = _Surgeon(w, alive.clone(), eigenspace, tau)
    while count > 0:
        size = min(count, max(1, int(batch * int(surgeon.alive.sum()))))
        gone = _next(surgeon, size, choose)
        while len(gone) == 0 and size < count:  # shares of small parameters round to nothing
            size = min(2 * size, count)
            gone = _next(surgeon, size, choose)
        if len(gone) == 0:
            break
        surgeon.remove_(gone)
        count -= len(gone)
    along = row_dots([eigenspace.vectors.T], surgeon.w - w)
    values = eigenspace.values.to(along).clamp(min=0.0)
    return Removal(surgeon.w, surgeon.alive, 0.5 * float((values * along.square()).sum()))


def _next(surgeon: "_Surgeon", size: int, choose: Choose | None) -> Tensor:
    """Return the places of about so many weights that go next."""
    cost = surgeon.costs()
    if choose is not None:
        return (surgeon.alive & ~choose(cost, surgeon.w, size)).nonzero()[:, 0]
    cost[~surgeon.alive] = math.inf
    return cost.topk(size, largest=False).indices


class _Surgeon:
    """Weights alive, and the Gram matrix of the rows √Λ v_j that belong to them."""

    def __init__(self, w: Tensor, alive: Tensor, space: Eigenspace, tau: float) -> None:
        self.w, self.alive, self._tau = w.clone(), alive, tau
        self._V = space.vectors
        self._root = space.values.to(w.device, torch.float64).clamp(min=0.0).sqrt()
        k = len(self._root)
        self._gram = torch.zeros(k, k, dtype=torch.float64, device=w.device)
        for begin in range(0, len(w), CHUNK):
            part = slice(begin, begin + CHUNK)
            rows = self._V[part].double() * self._root * self.alive[part, None]
            self._gram += rows.T @ rows

    def costs(self) -> Tensor:
        """Return w_j² / [H_A⁻¹]_jj for all weights."""
        inverse = self._inverse()
        out = torch.empty_like(self.w)
        for begin in range(0, len(out), CHUNK):
            part = slice(begin, begin + CHUNK)
            rows = self._V[part].double() * self._root
            # Weights outside A may come out above 1; theirs is not used.
            leverage = ((rows @ inverse) * rows).sum(dim=1).clamp(max=1.0)
            left = (1.0 - leverage).clamp(min=torch.finfo(torch.float64).eps)
            out[part] = (self.w[part].double().square() * self._tau / left).to(out)
        return out

    def remove_(self, gone: Tensor) -> None:
        """Set weights to zero and move the rest."""
        rows = self._V[gone].double() * self._root
        self._gram -= rows.T @ rows
        self.alive[gone] = False
        c = self._root * (self._inverse() @ (rows.T @ self.w[gone].double()))
        self.w += (self._V @ c.to(self._V)).to(self.w)
        self.w *= self.alive

    def _inverse(self) -> Tensor:
        """(τ I + √Λ V_Aᵀ V_A √Λ)⁻¹; the Gram matrix may have lost its last digits."""
        eye = torch.eye(len(self._gram), dtype=torch.float64, device=self._gram.device)
        inverse: Tensor = torch.linalg.inv(self._gram + self._tau * eye)
        return inverse
