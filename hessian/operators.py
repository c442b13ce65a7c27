"""Symmetric matrices that are known only by their products with vectors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from hessian.errors import NonFiniteError
from hessian.finiteness import all_finite


@dataclass(frozen=True)
class Operator:
    """A real symmetric matrix A of shape [n, n], known by ``product(v) = A v``.

    Operators of one size, type and device form sums and multiples: ``A + B``, ``A - B``,
    ``2.0 * A``, ``-A``, ``A.shifted(tau)``.

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
        >>> (2.0 * A).shifted(1.0) @ torch.ones(2)
        tensor([ 3., -5.])
    """

    product: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype
    device: torch.device
    columns: Callable[[Tensor], Tensor] | None = None
    method: str = "product"

    # NumPy's numbers leave `c * A` to us, instead of making an array of objects.
    __array_ufunc__ = None

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
        if v.ndim == 2 and v.shape[1] == 0:
            return v.clone()
        if v.ndim == 2 and self.columns is None:
            return torch.stack([self @ column for column in v.unbind(dim=1)], dim=1)
        out = self.product(v) if v.ndim == 1 or self.columns is None else self.columns(v)
        if out.shape != v.shape:
            raise ValueError(
                f"A product must have the shape of its argument, {list(v.shape)}, got "
                f"{list(out.shape)}."
            )
        if not all_finite(out):
            raise NonFiniteError("A product with the operator holds a NaN or an infinity.")
        return out

    def __add__(self, other: Any) -> "Operator":
        """Return A + B. A product costs one of each.

        Raises:
            ValueError: If B has another size, type or device.
            TypeError: If B is a number.
        """
        if isinstance(other, Real):
            raise TypeError(
                f"A sum needs two operators, got the number {other}. `A.shifted({other})` adds "
                "that multiple of the identity."
            )
        if not isinstance(other, Operator):
            return NotImplemented
        ours, theirs = (self.size, self.dtype, self.device), (other.size, other.dtype, other.device)
        if ours != theirs:
            raise ValueError(
                "Operators must share size, type and device to be added, got "
                f"{ours[0]}, {ours[1]} on {ours[2]} and {theirs[0]}, {theirs[1]} on {theirs[2]}."
            )
        return self._like(
            lambda v: (self @ v) + (other @ v),
            by_columns=self.columns is not None or other.columns is not None,
            method=f"{self.method} + {other.method}",
        )

    def __sub__(self, other: Any) -> "Operator":
        """Return A − B. A product costs one of each."""
        return self + (-other) if isinstance(other, Operator) else self + other

    def __mul__(self, factor: Any) -> "Operator":
        """Return c A for a real number c.

        Raises:
            ValueError: If c is not finite.
        """
        if not isinstance(factor, Real):
            return NotImplemented
        c = _finite(float(factor), "factor")
        return self._like(
            lambda v: c * (self @ v),
            by_columns=self.columns is not None,
            method=f"{c:g} ({self.method})",
        )

    __rmul__ = __mul__

    def __neg__(self) -> "Operator":
        """Return −A."""
        return -1.0 * self

    def shifted(self, tau: float) -> "Operator":
        """Return A + τ I, whose eigenvalues are those of A moved by τ.

        Raises:
            ValueError: If τ is not finite.
        """
        tau = _finite(tau, "tau")
        return self._like(
            lambda v: (self @ v) + tau * v,
            by_columns=self.columns is not None,
            method=f"{self.method}, shifted by {tau:g}",
        )

    def _like(
        self, product: Callable[[Tensor], Tensor], *, by_columns: bool, method: str
    ) -> "Operator":
        columns = product if by_columns else None
        return Operator(product, self.size, self.dtype, self.device, columns, method)

    @classmethod
    def from_matrix(cls, A: Float[Tensor, "n n"]) -> "Operator":
        """Wrap a dense symmetric matrix.

        Raises:
            ValueError: If A is not symmetric, up to rounding.
        """
        slack = math.sqrt(torch.finfo(A.dtype).eps) * A.abs().max() if A.numel() else 0.0
        # A NaN is no asymmetry: the product names it.
        if ((A - A.T).abs() > slack).any():
            raise ValueError(
                "`A` must be symmetric, got a matrix that differs from its transpose by up to "
                f"{float((A - A.T).abs().max()):.2e}. Pass `(A + A.T) / 2` if that is meant."
            )
        return cls(lambda v: A @ v, len(A), A.dtype, A.device, lambda V: A @ V, "dense matrix")

    @classmethod
    def from_scipy(cls, A: Any, *, device: torch.device | str = "cpu") -> "Operator":
        """Wrap a SciPy ``LinearOperator`` or sparse matrix; products pass through NumPy.

        Its symmetry is taken on trust.

        Raises:
            ValueError: If A is not square.
            TypeError: If A is complex.
        """
        device = torch.device(device)
        size = _square(A.shape)
        kind = np.dtype(A.dtype or np.float64)
        if kind.kind == "c":
            raise TypeError(f"`A` must be real, got {kind}.")
        dtype = torch.float32 if kind == np.float32 else torch.float64

        def product(v: Tensor) -> Tensor:
            # A copy, because torch takes neither reversed nor read-only arrays.
            out = np.array(A @ v.detach().cpu().numpy())
            return torch.from_numpy(out).to(device=device, dtype=dtype)

        return cls(product, size, dtype, device, product, "SciPy")

    @classmethod
    def from_curvlinops(cls, C: Any) -> "Operator":
        """Wrap a linear operator of curvlinops, at no cost beyond its own products.

        Args:
            C: A ``PyTorchLinearOperator``, of shape [n, n]. Where it does not declare itself
                self-adjoint, its symmetry is probed with two products.

        Raises:
            TypeError: If C is no such operator.
            ValueError: If C is not square or not symmetric.

        References:
            Dangel et al. (2025), Position: Curvature matrices should be democratized via linear
            operators. https://github.com/f-dangel/curvlinops
        """
        if not all(hasattr(C, name) for name in ("shape", "dtype", "device", "SELF_ADJOINT")):
            raise TypeError(
                "`C` must be a curvlinops PyTorchLinearOperator, with `shape`, `dtype`, `device` "
                f"and `SELF_ADJOINT`, got {type(C).__name__}."
            )

        def product(v: Tensor) -> Tensor:
            out: Tensor = C @ v
            return out.detach()

        size, device = _square(C.shape), torch.device(C.device)
        operator = cls(product, size, C.dtype, device, product, f"curvlinops {type(C).__name__}")
        if not C.SELF_ADJOINT:
            _require_symmetric(operator, type(C).__name__)
        return operator

    @classmethod
    def from_pyhessian(cls, solver: Any) -> "Operator":
        """Wrap the product of a PyHessian ``hessian`` object, over its batch or its data loader.

        PyHessian weights batches by their length, so a ragged last batch is right where the
        criterion is a mean. Gradients that the model holds are put back after each product.

        Args:
            solver: A ``pyhessian.hessian``. It has set its model to evaluation mode, and has
                selected every parameter that requires a gradient.

        Raises:
            TypeError: If ``solver`` is no such object.
            ValueError: If it weights the batches of a loader wrongly, because its criterion is not
                a mean, or if a parameter has no part in the loss.
        """
        from hessian.pyhessian_product import solver_product  # few use it

        product, size, first = solver_product(solver)
        return cls(product, size, first.dtype, first.device, method="PyHessian")

    def to_scipy(self) -> LinearOperator:
        """Return a SciPy ``LinearOperator``, for ``eigsh``, ``cg``, ``lobpcg`` and their kin."""

        def product(x: Any) -> Any:
            # A copy, because SciPy hands out read-only arrays.
            return (self @ torch.tensor(x, dtype=self.dtype, device=self.device)).cpu().numpy()

        def matvec(x: Any) -> Any:
            return product(np.asarray(x).reshape(-1))

        kind = np.float32 if self.dtype == torch.float32 else np.float64
        return LinearOperator(
            (self.size, self.size),
            matvec=matvec,
            rmatvec=matvec,
            matmat=product,
            rmatmat=product,
            dtype=kind,
        )


def _finite(number: float, name: str) -> float:
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be a finite number, got {number}.")
    return float(number)


def _square(shape: tuple[int, ...]) -> int:
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"A symmetric matrix must be square, got shape {list(shape)}.")
    return int(shape[0])


def _require_symmetric(operator: Operator, name: str) -> None:
    """Compare uᵀ A v with vᵀ A u for two random vectors."""
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(operator.size, 2, generator=generator, dtype=torch.float64, device="cpu")
    V = V.to(operator.device, operator.dtype)
    AV = operator @ V
    one, other = float(V[:, 0] @ AV[:, 1]), float(V[:, 1] @ AV[:, 0])
    scale = float(V.norm(dim=0).max() * AV.norm(dim=0).max())
    if abs(one - other) > math.sqrt(torch.finfo(operator.dtype).eps) * scale:
        raise ValueError(
            f"The operator must be symmetric, got a {name} with uᵀ A v = {one:.6g} and "
            f"vᵀ A u = {other:.6g} for the same two vectors."
        )
