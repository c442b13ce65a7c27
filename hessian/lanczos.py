"""The Lanczos process with full reorthogonalisation: a growing Krylov basis and its matrix T."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from hessian.operators import Operator

Array = npt.NDArray[np.float64]


class KrylovBasis:
    """Orthonormal vectors q₁, q₂, … with Qᵀ A Q = T tridiagonal.

    Each step costs one product with A and 8 n m flops of reorthogonalisation for m vectors.
    Memory: m vectors of length n. Scalars are kept in float64, whatever the vectors' type.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        start: First direction, shape [n], not zero.

    References:
        Golub & Van Loan (2013), Matrix Computations, 4th ed., section 10.3.
        Giraud, Langou, Rozloznik (2005), on why two passes of Gram-Schmidt are enough.
    """

    def __init__(self, operator: Operator, start: Tensor) -> None:
        self.operator = operator
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self._rows = torch.empty(
            (min(32, operator.size), operator.size), dtype=operator.dtype, device=operator.device
        )
        self._next: Tensor | None = start / start.norm()

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans an invariant subspace: A Q = Q T with nothing left over."""
        return self._next is None

    @property
    def beta(self) -> float:
        """The last off-diagonal entry: ‖A Q − Q T‖₂, zero once the basis is exhausted."""
        return 0.0 if self.exhausted else self.betas[-1]

    def extend(self) -> None:
        """Make one product with A and add one vector to the basis.

        Raises:
            RuntimeError: If the basis is exhausted.
        """
        if self._next is None:
            raise RuntimeError(
                "The Krylov basis is exhausted; call `restart` with a new direction."
            )
        m = len(self)
        if m == len(self._rows):
            more = torch.empty_like(self._rows[: self.operator.size - m])
            self._rows = torch.cat([self._rows, more])
        q = self._rows[m] = self._next
        r = self.operator @ q
        self.alphas.append(_dot(q, r))
        r, beta = self._orthogonalised(r)
        self.betas.append(beta)
        # A remainder of the size of rounding is no direction: dividing by it would give noise.
        finished = m + 1 == self.operator.size or beta <= self.rounding
        self._next = None if finished else r / beta

    def restart(self, direction: Tensor) -> bool:
        """Go on from a new direction after the basis is exhausted; False if it spans all."""
        if len(self) == self.operator.size:
            return False
        r, norm = self._orthogonalised(direction / direction.norm())
        if norm <= math.sqrt(torch.finfo(self.operator.dtype).eps):
            return False
        self.betas[-1] = 0.0
        self._next = r / norm
        return True

    def ritz(self, m: int | None = None) -> tuple[Array, Array]:
        """Return eigenvalues (ascending) and eigenvectors of T, or of its leading m x m block."""
        m = len(self) if m is None else m
        values, vectors = eigh_tridiagonal(np.array(self.alphas[:m]), np.array(self.betas[: m - 1]))
        return np.asarray(values, dtype=np.float64), np.asarray(vectors, dtype=np.float64)

    def combine(self, coefficients: Array) -> Tensor:
        """Return Q c for coefficients of shape [m] or [m, k]."""
        c = torch.from_numpy(np.ascontiguousarray(coefficients)).to(self._rows)
        return self._rows[: len(self)].T @ c

    def _orthogonalised(self, r: Tensor) -> tuple[Tensor, float]:
        Q = self._rows[: len(self)]
        for _ in range(2):
            r = r - Q.T @ (Q @ r)
        return r, math.sqrt(max(_dot(r, r), 0.0))

    @property
    def rounding(self) -> float:
        """What rounding leaves of a vector A q, in units of A."""
        scale = max(abs(a) for a in self.alphas) + max(self.betas)
        return 10.0 * torch.finfo(self.operator.dtype).eps * scale


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.to(torch.float64), b.to(torch.float64)))


Response = Callable[[Tensor], Tensor]
"""A function of eigenvalues, from a float64 vector to one of the same shape."""
