"""Eigenpairs found with fast products, measured with exact ones, and improved where needed."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hessian.lanczos import Array, Shards
from hessian.leading_values import Indices, leading_order
from hessian.operators import Operator
from hessian.progress import Update
from hessian.subspace import Eigenspace
from hessian.vector_rows import VectorRows, aligned, dot

AT_ROUNDING = 1e3
"""Residuals below this many roundings of A may be all that its type can give."""

PATIENCE = 3
"""Rounds without headway at the level of rounding, after which there is nothing to wait for."""


@dataclass
class ExactRefinement:
    """Rayleigh-Ritz with an exact operator in a space that a fast one has found.

    The space is spanned by k products, which give the best values and vectors in it and their true
    residuals. While some pairs miss the goal, their residuals are added to the space, a product
    each. Errors of a fast product that lie where the spectrum is small, as rounding does, go away
    in one such round; any others as fast as a block Krylov method converges.

    Args:
        exact: Symmetric matrix A, shape [n, n].
        found: Eigenspace of a matrix near A.
        tol: Stop once ‖A v − λ v‖₂ ≤ tol · max |λ| for all pairs.
        max_products: Budget of products, those that were spent on ``found`` included.
        max_vectors: Most vectors in the space; as many products with them are held, too.
        shards: If the vectors are spread over ranks, how.
        update: Called after every round.

    References:
        Saad (2011), Numerical Methods for Large Eigenvalue Problems, section 8.4, on Davidson's
        method.
    """

    exact: Operator
    found: Eigenspace
    tol: float
    max_products: int
    max_vectors: int
    shards: Shards | None
    update: Update
    stalled: bool = False
    """Whether rounding keeps the residuals up."""
    products: int = field(init=False, default=0)
    """Exact products made."""
    _rows: VectorRows = field(init=False)
    _images: VectorRows = field(init=False)
    _T: Array = field(init=False, default_factory=lambda: np.zeros((0, 0)))

    def run(self) -> Eigenspace:
        """Return the eigenspace with residuals from exact products."""
        found, k = self.found, len(self.found.values)
        first = self._local(found.vectors)
        self._rows, self._images = (
            VectorRows(len(first), first.dtype, first.device) for _ in range(2)
        )
        self._extend(list(first.unbind(dim=1)))
        best, waited = math.inf, 0
        while True:
            values, vectors = (part.numpy() for part in torch.linalg.eigh(aligned(self._T)))
            order = leading_order(values, found.which)
            C = vectors[:, order[:k]]
            remainders = self._remainders(values[order[:k]], C)
            residuals = np.array([self._norm(r) for r in remainders])
            scale = float(np.abs(values).max())
            goal, worst = self.tol * scale, float(residuals.max())
            spent = found.num_products + self.products
            self.update(spent, expected=spent, error=worst, goal=goal)
            waited = 0 if worst <= 0.5 * best else waited + 1
            best = min(best, worst)
            rounding = torch.finfo(self.exact.dtype).eps * scale
            self.stalled = waited >= PATIENCE and best <= AT_ROUNDING * rounding
            wanted = [j for j in np.argsort(-residuals) if residuals[j] > goal]
            wanted = wanted[: max(0, self.max_products - spent)]
            if not wanted or self.stalled:
                return self._result(values[order[:k]], C, residuals, goal)
            if len(self._rows) + len(wanted) > self.max_vectors:
                self._compress(values, vectors, order)
            if not self._extend([remainders[j] for j in wanted], least=10.0 * rounding):
                self.stalled = True
                return self._result(values[order[:k]], C, residuals, goal)

    def _extend(self, directions: list[Tensor], least: float = 0.0) -> bool:
        """Add what is new in some directions to the space; False if that is rounding only."""
        begin = len(self._rows)
        for r in directions:
            if len(self._rows) == self.exact.size or not self._norm(r) > least:
                continue
            r = r / self._norm(r)
            for _ in range(2 if len(self._rows) else 0):
                self._rows.take_from_(r, self._sum(self._rows.coefficients(r)))
            norm = self._norm(r)
            if norm > math.sqrt(torch.finfo(r.dtype).eps):
                self._rows.append(r / norm)
        end = len(self._rows)
        if end == begin:
            return False
        new = [self._rows[i] for i in range(begin, end)]
        if self.exact.columns is not None:
            images = self._local(self.exact @ self._full(torch.stack(new, dim=1))).unbind(dim=1)
        else:
            images = tuple(self._local(self.exact @ self._full(q)) for q in new)
        self.products += len(new)
        self._T = np.pad(self._T, (0, end - begin))
        for m, image in enumerate(images, start=begin):
            self._images.append(image)
            column = self._sum(self._rows.coefficients(image)).cpu().numpy()[: m + 1]
            self._T[: m + 1, m] = self._T[m, : m + 1] = column
        return True

    def _compress(self, values: Array, vectors: Array, order: Indices) -> None:
        """Keep the leading Ritz vectors, half of what may be held and no fewer than the pairs."""
        keep = order[: max(len(self.found.values), self.max_vectors // 2)]
        self._rows.rotate_(vectors[:, keep])
        self._images.rotate_(vectors[:, keep])
        self._T = np.diag(values[keep])

    def _remainders(self, values: Array, C: Array) -> list[Tensor]:
        """Return A v − λ v for the Ritz pairs, as this rank's rows."""
        images, vectors = self._images.combine(C), self._rows.combine(C)
        pairs = zip(images.unbind(dim=1), vectors.unbind(dim=1), values, strict=True)
        return [image.sub_(v, alpha=float(value)) for image, v, value in pairs]

    def _result(self, values: Array, C: Array, residuals: Array, goal: float) -> Eigenspace:
        vectors = self._full(self._rows.combine(C))
        for v in vectors.unbind(dim=1):
            v.mul_(v[v.abs().argmax()].sign())  # one sign convention
        device = vectors.device
        return replace(
            self.found,
            values=torch.from_numpy(values).to(device),
            vectors=vectors,
            residuals=torch.from_numpy(residuals).to(device),
            num_products=self.found.num_products + self.products,
            num_exact=self.products,
            converged=bool(float(residuals.max()) <= goal),
            measured=True,
        )

    def _local(self, v: Tensor) -> Tensor:
        return v if self.shards is None else self.shards.local(v)

    def _full(self, part: Tensor) -> Tensor:
        return part if self.shards is None else self.shards.full(part)

    def _sum(self, t: Tensor) -> Tensor:
        return t if self.shards is None else self.shards.sum(t)

    def _norm(self, v: Tensor) -> float:
        return math.sqrt(max(float(self._sum(dot(v, v))), 0.0))
