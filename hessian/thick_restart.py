"""Thick-restart Lanczos for the leading eigenpairs, with a search for those that were missed."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hessian.checkpoint import Checkpoint
from hessian.iteration_state import State, Task
from hessian.lanczos import Array, KrylovBasis, Shards
from hessian.leading_values import Indices, leading_order, merit, outer_bounds
from hessian.missed_eigenvalues import RISK, Search
from hessian.operators import Operator
from hessian.progress import Update
from hessian.subspace import Eigenspace, measured_eigenspace
from hessian.vector_rows import chunks

ROOM = 20
"""Vectors that a search for missed eigenvalues should find free in the basis."""

DRAWS = 1 << 22
"""Random numbers that are drawn at a time, so that their float64 copies stay small."""


@dataclass
class ThickRestart:
    """Lanczos that keeps Ritz vectors when the basis is full, and starts again when it is done.

    Args:
        operator: Symmetric matrix A.
        task: What is looked for.
        start: First direction, shape [n]; a random one if None.
        shards: If the basis is spread over ranks, how.
        checkpoint: Where the state is kept.
        update: Called after every product.
    """

    operator: Operator
    task: Task
    start: Tensor | None
    shards: Shards | None
    checkpoint: Checkpoint | None
    update: Update
    state: State = field(default_factory=State)
    basis: KrylovBasis = field(init=False)

    def run(self) -> Eigenspace:
        """Return the eigenspace; ``state`` tells how the iteration ended."""
        self.basis = self._begin()
        state, task = self.state, self.task
        while True:
            if not state.ended:
                self._step()
            state.ended = False
            space = self._look()
            expected = state.products if space else state.expected or task.max_products
            self.update(
                state.products, expected=expected, error=state.last_estimate, goal=state.goal
            )
            if space is not None:
                return space
            if self.checkpoint is not None:
                self.checkpoint.save(self.basis, state)

    def _step(self) -> None:
        self.basis.extend()
        self.state.products += 1
        if self.state.search is not None:
            beta = 0.0 if self.basis.exhausted else self.basis.beta
            self.state.search.step(float(self.basis.T[-1, -1]), beta)

    def _begin(self) -> KrylovBasis:
        first = (
            self.start if self.start is not None else random_direction(self.operator, self._seed)
        )
        self.state.draws = 1
        basis = KrylovBasis(self.operator, first, shards=self.shards)
        self.state.next_check = self.task.k
        if self.checkpoint is not None:
            self.checkpoint.resume(basis, self.state)
        return basis

    @property
    def _seed(self) -> int:
        """Seed of the next random direction; needs no state of a generator to be resumed."""
        return (self.task.seed + self.state.draws * 0x9E3779B97F4A7C15) % (1 << 63)

    def _look(self) -> Eigenspace | None:
        """Look at the Ritz values if it is time to, decide how to go on; the result once done."""
        basis, state, task = self.basis, self.state, self.task
        m = len(basis)
        final = self._spent
        complete = m == self.operator.size
        full = m + len(basis.abandoned) >= task.max_basis < self.operator.size
        due = state.products >= state.next_check
        if state.search is not None:
            due |= not state.search.cut_short and state.search.chance <= RISK
        if not (due or final or complete or full or basis.exhausted):
            return None
        if final and self.checkpoint is not None:
            # Before anything is decided, so that with more products all comes as if there had
            # been more from the beginning.
            state.ended = True
            self.checkpoint.save(basis, state, at_once=True)
        values, vectors = basis.ritz()
        order = leading_order(values, task.which)
        if m < task.k:
            basis.restart(self._random())  # spans nothing more: start again, orthogonally
            return None
        C = vectors[:, order[: task.k]]
        estimate = float(basis.residuals(C).max())
        state.goal = task.tol * float(np.abs(values).max())
        self._plan(estimate)
        self._judge_search(values, order, vectors, complete=complete)
        if final or complete:
            return self._result(values, order, C)
        if state.search is None and estimate <= min(state.goal, state.retry_below):
            if task.multiple and state.tested_merit is None:
                self._begin_search(values, order, vectors)
                return None
            space = self._result(values, order, C)
            # After a disappointment (rounding in float32) once more when the estimates are lower,
            # and again only if that helped.
            residual = float(space.residuals.max())
            state.stalled = not space.converged and residual > 0.5 * state.last_residual
            state.retry_below, state.last_residual = 0.1 * estimate, residual
            basis.follow_largest(C)
            if space.converged or state.stalled or basis.exhausted or self._spent:
                return space
        if state.search is None:
            basis.follow_largest(C)
        elif state.search.cut_short:
            basis.follow_largest(vectors[:, order[: task.k + len(state.search.bounds)]])
        if basis.exhausted:
            basis.restart(self._random())
        if full:
            self._compress(vectors, order, (task.k + task.max_basis) // 2)
        return None

    @property
    def _spent(self) -> bool:
        return self.state.products + self.task.reserve >= self.task.max_products

    def _plan(self, estimate: float) -> None:
        """Choose when to look next, and how many products to expect, from how estimates fall."""
        state, m = self.state, len(self.basis)
        pause, left = max(1, m // 20), math.nan
        steps = state.products - state.last_products
        if 0 < estimate < state.last_estimate < math.inf and steps > 0:
            rate = math.log(state.last_estimate / estimate) / steps
            left = max(0.0, math.log(estimate / state.goal) / rate) if state.goal > 0 else 0.0
            # Looking costs little beside a product, and a product too many costs one.
            pause = min(pause, max(1, int(min(left, m) / 2))) if state.search is None else pause
            total = state.products + left + self.task.reserve
            state.expected = int(min(math.ceil(total), self.task.max_products))
        state.last_products, state.last_estimate = state.products, estimate
        state.next_check = state.products + pause

    def _judge_search(
        self, values: Array, order: Indices, vectors: Array, *, complete: bool
    ) -> None:
        """End a search that found something, or that has become sure enough."""
        state, k = self.state, self.task.k
        now = merit(values[order[:k]], self.task.which)
        if complete:
            state.missed, state.tested_merit, state.search = 0.0, now, None
            return
        margin = self._margin
        if state.tested_merit is not None and now > state.tested_merit + margin:
            state.missed, state.tested_merit = math.nan, None
        search = state.search
        if search is None:
            return
        if now > search.merit + search.margin:
            state.search, state.missed = None, math.nan
            return
        if search.cut_short:
            # No bound without the polynomials: go on until the nearest values outside settle.
            nearest = order[k : k + len(search.bounds)]
            away = np.abs(np.subtract.outer(search.bounds, values[nearest])).min(axis=0)
            settled = self.basis.residuals(vectors[:, nearest]) <= np.maximum(state.goal, away / 10)
            sure = len(nearest) > 0 and bool(np.all(settled))
        else:
            state.missed = 0.0 if self.basis.exhausted else search.chance
            sure = state.missed <= RISK
        if sure or self.basis.exhausted:
            state.tested_merit, state.search = now, None

    @property
    def _margin(self) -> float:
        return max(self.state.goal, 2.0 * self.basis.rounding)

    def _begin_search(self, values: Array, order: Indices, vectors: Array) -> None:
        """Leave the present direction for a random one, to see what the basis has missed."""
        basis, state, task = self.basis, self.state, self.task
        room = task.max_basis - len(basis) - len(basis.abandoned) - 1
        few = task.k + (task.max_basis - task.k) // 4
        if room < min(ROOM, task.max_basis - few - 1) and few < len(basis):
            self._compress(vectors, order, few)
        leading = values[order[: task.k]]
        now, margin = merit(leading, task.which), self._margin
        if not basis.restart(self._random()):
            state.tested_merit = now
            state.next_check = state.products
            return
        bounds = outer_bounds(leading, task.which, margin)
        state.search = Search(bounds, now, margin, self.operator.size - len(basis))

    def _compress(self, vectors: Array, order: Indices, keep: int) -> None:
        keep = min(keep, self.task.max_basis - len(self.basis.abandoned) - 1)
        keep = max(keep, self.task.k)
        if self.state.search is not None:
            self.state.search.cut_short, self.state.missed = True, math.nan
        self.basis.compress(vectors[:, order[:keep]])

    def _result(self, values: Array, order: Indices, C: Array) -> Eigenspace:
        """Return the leading pairs, their residuals measured by k products or taken from T."""
        found = self.basis.combine(C)
        for v in found.unbind(dim=1):
            # One sign convention, so that figures and resumed runs agree.
            v.mul_(v[v.abs().argmax()].sign())
        k, n = self.task.k, self.operator.size
        kept, rest = values[order[:k]], values[order[k:]]
        gap = math.inf if k == n else math.nan
        if len(rest):
            gap = float(np.abs(kept[:, None] - rest[None, :]).min())
        self.state.products += self.task.reserve
        if not self.task.measure:
            residuals = torch.from_numpy(self.basis.residuals(C)).to(found.device)
            return Eigenspace(
                torch.from_numpy(kept).to(found.device),
                found,
                residuals,
                gap,
                self.state.products,
                bool(float(residuals.max()) <= self.state.goal),
                self.task.which,
                self.state.missed,
                measured=False,
            )
        return measured_eigenspace(
            self.operator,
            found,
            gap=gap,
            num_products=self.state.products,
            goal=self.state.goal,
            which=self.task.which,
            missed=self.state.missed,
        )

    def _random(self) -> Tensor:
        direction = random_direction(self.operator, self._seed)
        self.state.draws += 1
        return direction


def random_direction(operator: Operator, seed: int) -> Tensor:
    """Return a standard normal vector, drawn on the CPU: the same one on every device."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(operator.size, dtype=operator.dtype, device=operator.device)
    for part in chunks(out, DRAWS):
        part.copy_(torch.randn(len(part), generator=generator, dtype=torch.float64, device="cpu"))
    return out
