"""Symmetric matrices that are known only by their products with vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from hessian.errors import NonFiniteError


@dataclass(frozen=True)
class Operator:
    """A real symmetric matrix A of shape [n, n], known by ``product(v) = A v``.

    Args:
        product: Maps a vector of shape [n] to A v of shape [n].
        size: The dimension n.
        dtype: Type of the vectors.
        device: Where the vectors live.
        columns: Maps a matrix V of shape [n, k] to A V, where that is cheaper than k products.
        method: How products are computed, in words, for reports.

    Example:
        >>> import torch
        >>> d = torch.tensor([1.0, -3.0])
        >>> A = Operator(lambda v: d * v, 2, d.dtype, d.device)
        >>> A @ torch.ones(2)
        tensor([ 1., -3.])
    """

    product: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype
    device: torch.device
    columns: Callable[[Tensor], Tensor] | None = None
    method: str = "product"

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return A v for v of shape [n], or A V column by column for V of shape [n, k].

        Raises:
            ValueError: If v or the product has another length than n.
            NonFiniteError: If the product is not finite.
        """
        if v.ndim not in (1, 2) or len(v) != self.size:
            raise ValueError(
                f"A vector of length {self.size}, or a matrix of such columns, is needed for a "
                f"product with this operator, got shape {list(v.shape)}."
            )
        if v.ndim == 2 and self.columns is None:
            return torch.stack([self @ column for column in v.unbind(dim=1)], dim=1)
        out = self.product(v) if v.ndim == 1 or self.columns is None else self.columns(v)
        if out.shape != v.shape:
            raise ValueError(
                f"A product must have the shape of its argument, {list(v.shape)}, got "
                f"{list(out.shape)}."
            )
        if not torch.isfinite(out).all():
            raise NonFiniteError("A product with the operator holds a NaN or an infinity.")
        return out

    @classmethod
    def from_matrix(cls, A: Float[Tensor, "n n"]) -> "Operator":
        """Wrap a dense symmetric matrix."""
        return cls(lambda v: A @ v, len(A), A.dtype, A.device)

    @classmethod
    def from_scipy(cls, A: Any, *, device: torch.device | str = "cpu") -> "Operator":
        """Wrap a SciPy ``LinearOperator``; products pass through NumPy on the CPU."""
        device = torch.device(device)
        kind = np.dtype(A.dtype or np.float64)
        dtype = torch.float32 if kind == np.float32 else torch.float64

        def product(v: Tensor) -> Tensor:
            # A copy, because torch takes neither reversed nor read-only arrays.
            out = np.array(A @ v.detach().cpu().numpy())
            return torch.from_numpy(out).to(device=device, dtype=dtype)

        return cls(product, int(A.shape[0]), dtype, device)

    def to_scipy(self) -> LinearOperator:
        """Return a SciPy ``LinearOperator``, for ``eigsh``, ``cg`` and their kin."""

        def matvec(x: Any) -> Any:
            v = torch.as_tensor(np.asarray(x)).reshape(-1).to(self.device, self.dtype)
            return (self @ v).cpu().numpy()

        kind = np.float32 if self.dtype == torch.float32 else np.float64
        return LinearOperator((self.size, self.size), matvec=matvec, rmatvec=matvec, dtype=kind)
