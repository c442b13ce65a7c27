"""The iteration that solves Net-Trim's program: two matrix products, and passes over outputs."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK_ENTRIES, BLOCK_ENTRIES_ON_GPU = 1 << 17, 1 << 24
"""Outputs that are worked on at a time between two products: on a CPU, what its caches hold."""

ANCHOR_ENTRIES = 1 << 20
"""Inputs or outputs that an anchor copies to float64 at a time."""

BALANCED = 1.5
"""Root of the quotient of residuals up to which ρ stays."""

LONGEST_CHANGE = 5.0
"""By what ρ changes at most at a time."""

PRIMAL_WEIGHT = 32.0
"""Dual over primal residual in balance. What is returned must be feasible in every entry, so the
primal one matters more: on layers of MNIST networks 16 to 64 took a quarter of the iterations of 1.
"""


class Measures(NamedTuple):
    """How far an iteration is from the optimum."""

    primal: float
    """Distance between the two copies of outputs and weights, as a share of the targets' norm."""
    dual: float
    """What is left of the Lagrangian's gradient, as a share of the penalties' norm."""


class _Block(NamedTuple):
    """Some of the outputs: what is worked out for them, their state, and what is asked of them."""

    D: Float[Tensor, " b"]
    v: Float[Tensor, " b"]
    T: Float[Tensor, " b"]
    active: Float[Tensor, " b"] | None
    spare: Float[Tensor, " b"]


class Splitting:
    """Alternating directions for: least Σ λ |U| such that X Uᵀ is in a set around T.

    Two copies, (outputs in the set, sparse weights) and (X Uᵀ, U), are brought together. As a
    fixed point, which is the same iteration with half the memory: a state (v, V) is projected on
    the graph of U ↦ (X Uᵀ − T, U), where it meets (q, U); (2 q − v, 2 U − V) is projected on the
    set and shrunk to sparse weights; and the state moves by α times what these are off (q, U).
    Scaled duals are v − q and V − U. The projection on the graph follows the moves alone,
    U += α (moveᵀ X + Move) C⁻¹, so that the rounding of float32 is one of moves, which fade; C is
    ill-conditioned, and what they leave in U is put right by ``anchor``.

    All is in units of c₀ and of the weights' mean magnitude, so that ρ has none. Outputs are held
    as [m, p], a row for each neuron: products with X take a tenth less time than those of [p, m].

    Args:
        X: Inputs, shape [p, n]; their dtype is that of all products.
        T: Targets and bounds over c₀, shape [m, p].
        active: Which outputs must be near T; the others must not be above it. None: all.
        penalty: λ over its mean, shape [m, n].
        inverse: C⁻¹ = (Xᵀ X / c₀² + I)⁻¹, shape [n, n].
        c0: What X and T count in.
        unit: Mean magnitude of the weights.
        rho: ρ to begin with.
        joint: Whether inactive outputs above T share the ball with the active ones.
        relaxation: α, in (0, 2).
        block: Outputs that are worked on at a time between two products.
    """

    def __init__(
        self,
        X: Float[Tensor, "p n"],
        T: Float[Tensor, "m p"],
        active: Bool[Tensor, "m p"] | None,
        penalty: Float[Tensor, "m n"],
        inverse: Float[Tensor, "n n"],
        *,
        c0: float,
        unit: float,
        rho: float,
        joint: bool,
        relaxation: float,
        block: int | None = None,
    ) -> None:
        self.c0, self.unit, self.rho, self.alpha = c0, unit, rho, relaxation
        self._X, self._T, self._joint = X, T, joint
        self._penalty, self._inverse = penalty.to(X.dtype), inverse.to(X.dtype)
        self._exact_inverse = None if X.dtype == torch.float64 else inverse
        self._sizes = math.sqrt(float(_square(T))), math.sqrt(float(_square(penalty)))
        self._v, self._D = -T, torch.empty_like(T)
        self._blocks = self._in_blocks(active, block)
        self._U = torch.zeros_like(self._penalty)
        self._V, self._R = torch.zeros_like(self._U), torch.empty_like(self._U)
        self.sparse = torch.zeros_like(self._U)
        self._share = self._U.new_zeros(())

    def _in_blocks(self, active: Tensor | None, block: int | None) -> list[_Block]:
        """Return views of all that is as large as the outputs, a block at a time."""
        if block is None:
            block = BLOCK_ENTRIES_ON_GPU if self._X.is_cuda else BLOCK_ENTRIES
        spare = self._T.new_empty(min(block, self._T.numel()))
        # As numbers: products of numbers with truth values take three times as long.
        on = None if active is None else active.to(self._T.dtype)
        blocks = []
        for start in range(0, self._T.numel(), block):
            part = slice(start, start + block)
            D, v, T = (t.view(-1)[part] for t in (self._D, self._v, self._T))
            near = None if on is None else on.view(-1)[part]
            blocks.append(_Block(D, v, T, near, spare[: len(D)]))
        return blocks

    @property
    def ball_is_loose(self) -> bool:
        """Whether outputs were well inside the ball at the last iteration."""
        return float(self._share) == 1.0

    def start_at(self, W: Float[Tensor, "m n"]) -> None:
        """Begin at weights, with no duals."""
        self._U.copy_(W)
        self._V.copy_(W)
        self._products(1.0)
        torch.sub(self._D, self._T, out=self._v)

    def step(self, radius: float) -> None:
        """Do one iteration with a ball of some radius, over c₀; nothing waits for the device."""
        self._iterate(radius)

    def measured_step(self, radius: float) -> Measures:
        """Do one iteration and return how far it was from the optimum."""
        apart = _square(self._iterate(radius)) + _square(self._D)
        outputs, penalties = self._sizes
        left = math.sqrt(float(_square(self._R)))
        return Measures(
            math.sqrt(float(apart)) / outputs, left * self.rho / (self.unit * penalties)
        )

    def anchor(self) -> None:
        """Project the state on the graph anew, in float64; what float32 has lost is made good."""
        if self._exact_inverse is None:
            return
        R = self._V.double()
        step = max(1, ANCHOR_ENTRIES // max(self._X.shape[1], len(self._T)))
        for start in range(0, len(self._X), step):
            rows = slice(start, start + step)
            V = self._v[:, rows].double().add_(self._T[:, rows])
            R.addmm_(V, self._X[rows].double(), alpha=1.0 / self.c0)
        self._U.copy_(R @ self._exact_inverse)

    def balance(self, measures: Measures) -> bool:
        """Bring the residuals nearer to each other by ρ; return whether it changed."""
        if min(measures) <= 0.0:
            return False
        factor = math.sqrt(PRIMAL_WEIGHT * measures.primal / measures.dual)
        if 1.0 / BALANCED <= factor <= BALANCED:
            return False
        self.change_rho(min(max(factor, 1.0 / LONGEST_CHANGE), LONGEST_CHANGE))
        return True

    def change_rho(self, factor: float) -> None:
        """Multiply ρ: the duals, v − q and V − U, are divided by as much; no factor is renewed."""
        self.rho *= factor
        self._products(1.0)
        for D, v, T, _, _ in self._blocks:
            q = D.sub_(T)
            v.sub_(q).div_(factor).add_(q)
        self._V.sub_(self._U).div_(factor).add_(self._U)

    def multipliers(self) -> Float[Tensor, "p m"]:
        """Return Λ, such that |Λᵀ X| ≤ λ c₀ and Λ ≤ 0 where inactive, but for what is left.

        A view of what the next step overwrites.
        """
        self._products(1.0)
        return self._D.sub_(self._T).sub_(self._v).mul_(-self.rho / self.unit).T

    def _products(self, factor: float) -> None:
        """Put factor · U Xᵀ / c₀ into D."""
        U = torch.mul(self._U, factor / self.c0, out=self._R)
        torch.mm(U, self._X.T, out=self._D)

    def _iterate(self, radius: float) -> Tensor:
        """Move the state; the moves of outputs and their sum with that of weights stay in D, R."""
        self._products(2.0)
        total = self._U.new_zeros((), dtype=torch.float64)
        for block in self._blocks:
            block.D.sub_(block.v).sub_(block.T, alpha=2.0)
            # In the products' own precision: a float64 sum of float32 takes a pass of its own.
            total += torch.linalg.vector_norm(self._in_ball(block)).double().square()
        tiny = torch.finfo(torch.float64).tiny
        share = (radius / total.sqrt().clamp(min=tiny)).clamp(max=1.0).to(self._D.dtype)
        self._share = share
        for block in self._blocks:
            self._move(block, share)
        reflected = torch.mul(self._U, 2.0, out=self.sparse).sub_(self._V)
        cut = torch.mul(self._penalty, self.unit / self.rho, out=self._R)
        reflected.sub_(torch.clamp(reflected, -cut, cut))
        move = self.sparse - self._U
        self._V.add_(move, alpha=self.alpha)
        left = torch.mm(self._D, self._X, out=self._R).div_(self.c0).add_(move)
        self._U.addmm_(left, self._inverse, alpha=self.alpha)
        return move

    def _in_ball(self, block: _Block) -> Tensor:
        """Return what of D the ball is about."""
        if block.active is None:
            return block.D
        near = torch.mul(block.D, block.active, out=block.spare)
        if self._joint:
            near += (block.D - near).clamp_(min=0.0)
        return near

    def _move(self, block: _Block, share: Tensor) -> None:
        """Put what is in the set less q = (D + v) / 2 into D, and α of it on v."""
        D, v = block.D, block.v
        if block.active is None:
            D.mul_(share - 0.5).sub_(v, alpha=0.5)
        else:
            near = torch.mul(D, block.active, out=block.spare)
            D.sub_(near)
            # Where inactive: min(D, 0) − D / 2 = −|D| / 2, and the share of what is above.
            above = D.clamp(min=0.0).mul_(share) if self._joint else None
            D.abs_().add_(v).mul_(-0.5).add_(near.mul_(share - 0.5))
            if above is not None:
                D.add_(above)
        v.add_(D, alpha=self.alpha)


def _square(values: Tensor) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return total.square()
