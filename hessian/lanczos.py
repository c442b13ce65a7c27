"""The Lanczos process with full reorthogonalisation: a growing Krylov basis and its matrix T."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor
from torch import distributed as dist

from hessian.operators import Operator
from hessian.vector_rows import VectorRows, aligned, dot

Array = npt.NDArray[np.float64]

REPEAT = 0.1
"""Another pass of Gram-Schmidt follows if the last one took away this much of what it left.

Parlett's *twice is enough* repeats at 1. A pass here finds little more than rounding as a rule.
"""


@runtime_checkable
class Shards(Protocol):
    """Rows of long vectors, spread over the ranks of a process group."""

    group: dist.ProcessGroup

    def local(self, v: Tensor) -> Tensor:
        """Return this rank's rows of a full tensor."""

    def full(self, part: Tensor) -> Tensor:
        """Return the full tensor that the ranks hold parts of."""

    def sum(self, t: Tensor) -> Tensor:
        """Return the sum of a small tensor over the ranks."""


@dataclass
class Remainder:
    """A direction that A leaves the basis in: A Q = Q T + Σ p cᵀ over all remainders (p, c)."""

    vector: Tensor
    couplings: Array
    norm: float = 1.0


class KrylovBasis:
    """Orthonormal vectors q₁, q₂, … with Qᵀ A Q = T, tridiagonal until vectors are combined.

    Each step costs one product with A and 4 n m flops of reorthogonalisation for m vectors, which
    read every vector twice: what T says of A q is taken away first, so that a second pass is only
    needed where little but rounding is left. Memory: m vectors of length n, and three more.
    Scalars are kept in float64, whatever the vectors' type.

    The basis may be compressed to a few Ritz vectors, and it may be left in one direction to
    explore another one: what A maps out of it is kept, so that T stays the projection of A and
    ``residuals`` stay what they say.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        start: First direction, shape [n], not zero.
        shards: If the vectors are spread over ranks, how; products see full vectors.

    References:
        Golub & Van Loan (2013), Matrix Computations, 4th ed., section 10.3.
        Giraud, Langou, Rozloznik (2005), on why two passes of Gram-Schmidt are enough.
        Parlett (1998), The Symmetric Eigenvalue Problem, section 6.9, on when one is.
        Wu & Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems.
    """

    def __init__(self, operator: Operator, start: Tensor, *, shards: Shards | None = None) -> None:
        self.operator, self.shards = operator, shards
        part = start if shards is None else shards.local(start)
        self.rows = VectorRows(len(part), operator.dtype, operator.device)
        self.abandoned: list[Remainder] = []
        """Directions that the basis was left in, for later."""
        self.current: Remainder | None = Remainder(part / self.norm(part), np.zeros(0))
        """The direction of the next step; None once A Q leaves nothing in it."""
        self.tridiagonal = True
        self.compressions = 0
        self.largest_alpha = self.largest_beta = 0.0
        self._T = np.zeros((16, 16))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def T(self) -> Array:
        """The projection Qᵀ A Q, shape [m, m]."""
        return self._T[: len(self), : len(self)]

    @property
    def exhausted(self) -> bool:
        """Whether the present direction leads no further: there is nothing to extend by."""
        return self.current is None

    @property
    def beta(self) -> float:
        """Norm of what A leaves in the present direction: ‖A Q − Q T‖₂ if it is the only one."""
        return 0.0 if self.current is None else float(np.linalg.norm(self.current.couplings))

    @property
    def num_vectors(self) -> int:
        """Vectors of length n that are held."""
        return len(self) + len(self.abandoned) + (self.current is not None)

    def extend(self) -> None:
        """Make one product with A and add one vector to the basis.

        Raises:
            RuntimeError: If the basis is exhausted.
        """
        if self.current is None:
            raise RuntimeError(
                "The Krylov basis is exhausted; call `restart` with a new direction."
            )
        m = len(self)
        column = self.current.couplings
        q = self.rows.append(self.current.vector)
        self.current = None
        for other in self.abandoned:
            overlap = self._dot(q, other.vector)
            column = column + overlap * other.couplings
            other.vector.sub_(q, alpha=overlap)
            other.norm = self.norm(other.vector)
            other.couplings = np.append(other.couplings, 0.0)
        r = self.product(q)
        alpha = self._dot(q, r)
        if m == len(self._T):
            self._T = np.pad(self._T, (0, m))
        self._T[m, :m] = self._T[:m, m] = column
        self._T[m, m] = alpha
        r = self.rows.without_few(r, self.T[:, m])
        beta = self._orthogonalise_(r)
        self.largest_alpha = max(self.largest_alpha, abs(alpha))
        self.largest_beta = max(self.largest_beta, beta)
        if m + 1 == self.operator.size:
            self.abandoned = []
        # A remainder of the size of rounding is no direction: dividing by it would give noise.
        elif beta > self.rounding:
            self.current = Remainder(r.div_(beta), beta * np.eye(m + 1)[m])

    def restart(self, direction: Tensor) -> bool:
        """Go on from a new direction, shape [n]; False if the basis spans all.

        The direction followed so far is kept among the abandoned ones.
        """
        if len(self) == self.operator.size:
            return False
        part = direction if self.shards is None else self.shards.local(direction)
        r = part / self.norm(part)
        norm = self._orthogonalise_(r)
        if norm <= math.sqrt(torch.finfo(self.operator.dtype).eps):
            return False
        if self.current is not None:
            self.abandoned.append(self.current)
            self.tridiagonal = False
        self.current = Remainder(r.div_(norm), np.zeros(len(self)))
        return True

    def compress(self, coefficients: Array) -> None:
        """Replace the basis by Ritz vectors, the columns of C = ``ritz()[1][:, some]``."""
        C = aligned(coefficients)
        values = (C * (aligned(self.T) @ C)).sum(dim=0).numpy()
        self.rows.rotate_(coefficients)
        p = len(values)
        self._T[:p, :p] = np.diag(values)
        for remainder in (*self.abandoned, *([self.current] if self.current else [])):
            remainder.couplings = (C.T @ aligned(remainder.couplings)).numpy()
        whole = np.eye(p)
        self.abandoned = [r for r in self.abandoned if self._left(r, whole).max() > self.rounding]
        self.tridiagonal = False
        self.compressions += 1

    def restore_projection(self, T: Array) -> None:
        """Take T as it was written, for rows that were read back."""
        self._T = np.array(T)

    def follow_largest(self, coefficients: Array) -> None:
        """Go on in the direction that leaves most of A Q C outside, for C of shape [m, k]."""
        if not self.abandoned:
            return
        sizes = [self._left(other, coefficients).max() for other in self.abandoned]
        best = int(np.argmax(sizes))
        if self.current and self._left(self.current, coefficients).max() >= sizes[best]:
            return
        chosen = self.abandoned.pop(best)
        r = chosen.vector
        norm = self._orthogonalise_(r)
        if self.current is not None:
            self.abandoned.append(self.current)
            self.current = None
        if norm * float(np.linalg.norm(chosen.couplings)) > self.rounding:
            self.current = Remainder(r.div_(norm), norm * chosen.couplings)
            self.tridiagonal = False

    def residuals(self, coefficients: Array) -> Array:
        """Return ‖A Q c − Q T c‖₂ for every column c of C; a bound if directions were abandoned."""
        left = [self._left(other, coefficients) for other in self.abandoned]
        if self.current is not None:
            left.append(self._left(self.current, coefficients))
        return np.asarray(sum(left, np.zeros(coefficients.shape[1])), dtype=np.float64)

    def ritz(self, m: int | None = None) -> tuple[Array, Array]:
        """Return eigenvalues (ascending) and eigenvectors of T, or of its leading m x m block."""
        T = self.T if m is None else self.T[:m, :m]
        if self.tridiagonal:
            values, vectors = eigh_tridiagonal(np.diag(T), np.diag(T, 1))
        else:
            values, vectors = (part.numpy() for part in torch.linalg.eigh(aligned(T)))
        return np.asarray(values, dtype=np.float64), np.asarray(vectors, dtype=np.float64)

    def combine(self, coefficients: Array) -> Tensor:
        """Return Q c for coefficients of shape [m] or [m, k]; full vectors on every rank."""
        out = self.rows.combine(coefficients)
        return out if self.shards is None else self.shards.full(out)

    def product(self, v: Tensor) -> Tensor:
        """Return A v for a vector held like those of the basis."""
        if self.shards is None:
            return self.operator @ v
        return self.shards.local(self.operator @ self.shards.full(v))

    @property
    def rounding(self) -> float:
        """What rounding leaves of a vector A q, in units of A."""
        scale = self.largest_alpha + self.largest_beta
        return 10.0 * torch.finfo(self.operator.dtype).eps * scale

    def _orthogonalise_(self, r: Tensor) -> float:
        for _ in range(2):
            c = self.rows.coefficients(r)
            c = c if self.shards is None else self.shards.sum(c)
            self.rows.take_from_(r, c)
            norm = self.norm(r)
            # The rows are orthonormal: c is as long as what was taken away.
            if float(c.norm()) <= REPEAT * norm:
                break
        return norm

    def _left(self, remainder: Remainder, coefficients: Array) -> Array:
        return remainder.norm * np.abs(remainder.couplings @ coefficients)

    def _dot(self, a: Tensor, b: Tensor) -> float:
        total = dot(a, b)
        return float(total if self.shards is None else self.shards.sum(total))

    def norm(self, v: Tensor) -> float:
        """Return the Euclidean norm of a vector held like those of the basis."""
        return math.sqrt(max(self._dot(v, v), 0.0))


Response = Callable[[Tensor], Tensor]
"""A function of eigenvalues, from a float64 vector to one of the same shape."""
