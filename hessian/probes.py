"""Random sign probes, and products with many of them in bounded memory."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor

from hessian.operators import Operator
from hessian.progress import Update
from hessian.subspace import Eigenspace

CHUNK_BYTES = 2**28
"""Most memory of one block of columns or rows that is worked on at once."""

MOST_COLUMNS = 16
"""Most columns of one product: more share little more work, and progress would come late."""


class SignProbes:
    """Columns of independent signs: the same ones for a seed, however many are drawn at a time.

    Args:
        operator: Gives length, type and device.
        seed: Seed of the signs, drawn on the CPU; the global random state is not used.
    """

    def __init__(self, operator: Operator, seed: int) -> None:
        self._operator = operator
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Float[Tensor, "n k"]:
        """Return the next ``count`` probes, one a column."""
        op = self._operator
        bits = torch.randint(
            0, 2, (count, op.size), generator=self._generator, dtype=torch.int8, device="cpu"
        )
        return (2 * bits.T - 1).to(device=op.device, dtype=op.dtype)


class CountedProducts:
    """Products A X in chunks of columns, counted and reported.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        update: Told about every chunk; see ``report_progress``.
        expected: Products in all, as far as is known.
        spent: Products made before, by another operator.
    """

    def __init__(
        self, operator: Operator, update: Update, expected: int, *, spent: int = 0
    ) -> None:
        self.operator, self.spent = operator, spent
        self._update = update
        self.expect(expected)

    def expect(self, products: int, *, error: float = math.nan, goal: float = math.nan) -> None:
        """Set what the next reports say."""
        self._expected, self._error, self._goal = products, error, goal

    def chunks(self, count: int) -> list[int]:
        """Cut a number of columns into what one product takes."""
        step = chunk_columns(self.operator)
        return [min(step, count - start) for start in range(0, count, step)]

    def __matmul__(self, X: Tensor) -> Tensor:
        """Return A X for X of shape [n, k]."""
        out = torch.empty_like(X)
        step = chunk_columns(self.operator)
        for start in range(0, X.shape[1], step):
            part = X[:, start : start + step]
            out[:, start : start + step] = self.operator @ part
            self.spent += part.shape[1]
            self._update(
                self.spent,
                made=part.shape[1],
                expected=max(self._expected, self.spent),
                error=self._error,
                goal=self._goal,
            )
        return out


def chunk_columns(operator: Operator) -> int:
    """Return how many columns one product may take: 1 where more would not be cheaper."""
    if operator.columns is None:
        return 1
    bytes_each = operator.size * torch.finfo(operator.dtype).bits // 8
    return max(1, min(MOST_COLUMNS, CHUNK_BYTES // max(bytes_each, 1)))


def inner(X: Num[Tensor, "n k"], Y: Num[Tensor, "n l"]) -> Float[Tensor, "k l"]:
    """Return XᵀY, summed in float64 on the CPU."""
    out = torch.zeros((X.shape[1], Y.shape[1]), dtype=torch.float64, device=X.device)
    for rows in row_blocks(len(X), X.shape[1] + Y.shape[1]):
        out += X[rows].to(torch.float64).T @ Y[rows].to(torch.float64)
    return out.cpu()


def column_dots(X: Float[Tensor, "n k"], Y: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Return xᵀy for every pair of columns, summed in float64 on the CPU."""
    out = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
    for rows in row_blocks(len(X), 2 * X.shape[1]):
        out += (X[rows].to(torch.float64) * Y[rows].to(torch.float64)).sum(dim=0)
    return out.cpu()


def row_blocks(num_rows: int, width: int) -> list[slice]:
    """Cut rows so that ``width`` float64 columns of a block stay within ``CHUNK_BYTES``."""
    step = max(1, CHUNK_BYTES // (8 * max(width, 1)))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def require_eigenspace(operator: Operator, space: Eigenspace) -> None:
    """Check that the vectors of an eigenspace fit an operator.

    Raises:
        ValueError: If they have another length.
    """
    if len(space.vectors) != operator.size:
        raise ValueError(
            f"`eigenspace` must hold vectors of the operator's length {operator.size}, got "
            f"{len(space.vectors)}."
        )


def deflated(operator: Operator, space: Eigenspace | None) -> tuple[Operator, Tensor, Tensor]:
    """Return A − V Λ Vᵀ with V and Λ in the operator's type and place.

    Nothing is assumed of V and Λ: what was taken out is known to the last bit, and added back by
    the caller. Pairs of another matrix therefore cost variance, and no bias.
    """
    if space is None:
        V = torch.empty((operator.size, 0), dtype=operator.dtype, device=operator.device)
        return operator, V, V.new_empty(0)
    require_eigenspace(operator, space)
    V = space.vectors.to(device=operator.device, dtype=operator.dtype)
    values = space.values.to(device=operator.device, dtype=operator.dtype)

    def product(v: Tensor) -> Tensor:
        return operator @ v - V @ (values * (V.T @ v))

    def columns(X: Tensor) -> Tensor:
        return operator @ X - V @ (values[:, None] * (V.T @ X))

    rest = Operator(
        product,
        operator.size,
        operator.dtype,
        operator.device,
        columns=None if operator.columns is None else columns,
        method=f"{operator.method}, {len(values)} pairs taken out",
    )
    return rest, V, values
