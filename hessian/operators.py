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
from hessian.kept_graph import KeptGraph
from hessian.objective import Objective


@dataclass(frozen=True)
class Operator:
    """A real symmetric matrix A of shape [n, n], known by ``product(v) = A v``.

    Args:
        product: Maps a vector of shape [n] to A v of shape [n].
        size: The dimension n.
        dtype: Type of the vectors.
        device: Where the vectors live.

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

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return A v for v of shape [n], or A V column by column for V of shape [n, k].

        Raises:
            ValueError: If v or the product has another length than n.
            NonFiniteError: If the product is not finite.
        """
        if v.ndim == 2:
            return torch.stack([self @ column for column in v.unbind(dim=1)], dim=1)
        if v.shape != (self.size,):
            raise ValueError(
                f"A vector of length {self.size} is needed for a product with this operator, "
                f"got shape {list(v.shape)}."
            )
        out = self.product(v)
        if out.shape != v.shape:
            raise ValueError(
                f"`product` must return a vector of length {self.size}, got shape "
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


def hessian_operator(
    objective: Objective,
    w: Float[Tensor, " d"] | None = None,
    *,
    memory_budget: int | None = None,
) -> Operator:
    """Return the Hessian of the training loss at w.

    The first product builds the graph of the gradient, at the price of two gradients (and one of
    the first batch, to see how large it is). Where it fits into the memory budget it is kept, for
    as long as the operator lives, and a further product is one backward pass through it; batches
    that do not fit cost two gradients in every product.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]. Default: the model's current weights. A copy is
            kept, so later training does not move the operator.
        memory_budget: Bytes for the graphs that are kept; 0 keeps none. Default: a quarter of what
            is free at the first product.

    Returns:
        The operator of shape [d, d]. Its products raise ``NonDeterministicError`` if the loss at
        w changed since the first product, and ``NonFiniteError`` if they are not finite.

    Raises:
        ValueError: If w does not fit the objective, or the budget is negative.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> H = hessian_operator(Objective(model, torch.nn.MSELoss(), data))
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    w = objective.weights() if w is None else w.detach().clone()
    objective.require_vector(w, "w")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"`memory_budget` must not be negative, got {memory_budget} bytes.")
    graph = KeptGraph(objective, w, memory_budget)
    return Operator(graph.product, objective.size, objective.dtype, objective.device)
