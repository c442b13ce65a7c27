"""A Fisher matrix cut into blocks along its diagonal, and what Optimal Brain Surgeon asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hessian.torch_settings import float32_products

WORK_BYTES = 1 << 27
"""Bytes of float64 copies that are worked on at a time."""

LEAST_BUFFER = 8
"""Rows that are added at a time; an eighth of a block's width if that is more, so that blocks are
not read and written more often than needed."""


class FisherBlocks:
    """F = Σ g gᵀ within blocks of consecutive weights, and zero outside of them.

    A block of n weights is held as a matrix [n, n], or as the m rows g if these are fewer: then
    (τ I + RᵀR)⁻¹ = (I − Rᵀ (τ I + R Rᵀ)⁻¹ R) / τ (Woodbury) takes a system of m equations only.
    Systems are solved in float64, blocks of one shape together.

    Args:
        lengths: Weights of every parameter tensor, in their order. No block spans two of them.
        block_size: Weights in a block; the last of a tensor may have fewer. None makes one block
            of all tensors.
        num_rows: Rows that will come.
        like: Of the type and on the device of the rows.
    """

    def __init__(
        self, lengths: Sequence[int], block_size: int | None, num_rows: int, like: Tensor
    ) -> None:
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self._pieces: list[tuple[slice, _Blocks]] = []
        for start, count, width in _cut(lengths, block_size):
            kind = _Rows if num_rows < width else _Matrices
            step = max(1, WORK_BYTES // (32 * min(num_rows, width) ** 2))
            for first in range(0, count, step):
                some = min(step, count - first)
                begin = start + first * width
                store = like.new_zeros(some, min(num_rows, width), width)
                self._pieces.append((slice(begin, begin + some * width), kind(store)))
        size = _buffer_rows(lengths, block_size, num_rows), sum(lengths)
        self._buffer, self._filled, self._seen = like.new_empty(size), 0, 0

    def add(self, rows: Float[Tensor, "rows d"]) -> None:
        """Add Σ g gᵀ of some rows."""
        while len(rows):
            taken = rows[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rows = rows[len(taken) :]
            if self._filled == len(self._buffer):
                self._flush()

    def diagonal(self) -> Float[Tensor, " d"]:
        """Return the diagonal of F."""
        return self._joined(lambda blocks, part: blocks.diagonal())

    def product(self, v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return F v."""
        return self._joined(lambda blocks, part: blocks.product(blocks.cut(v[part]).double()))

    def inverse_diagonal(self, tau: float) -> Float[Tensor, " d"]:
        """Return the diagonal of (F + τ I)⁻¹.

        Raises:
            ValueError: If a block is not positive definite in float64, as the next two do.
        """
        return self._joined(lambda blocks, part: blocks.inverse_diagonal(tau))

    def inverse_product(self, v: Float[Tensor, " d"], tau: float) -> Float[Tensor, " d"]:
        """Return (F + τ I)⁻¹ v."""
        return self._joined(
            lambda blocks, part: blocks.inverse_product(blocks.cut(v[part]).double(), tau)
        )

    def joint_answer(
        self, gone: Float[Tensor, " d"], keep: Bool[Tensor, " d"], tau: float
    ) -> Float[Tensor, " d"]:
        """Return x = (F_kk + τ I)⁻¹ F_k: v on the weights k that stay, and 0 elsewhere.

        w_k + x has the least (u − w)ᵀ (F + τ I) (u − w) of all u that are 0 outside of k.

        Args:
            gone: v, the values of the weights that go, and 0 elsewhere.
            keep: The weights that stay.
            tau: τ > 0, in the units of F.
        """

        def ask(blocks: "_Blocks", part: slice) -> Tensor:
            return blocks.joint_answer(blocks.cut(gone[part]).double(), blocks.cut(keep[part]), tau)

        return self._joined(ask)

    def _joined(self, ask: "Callable[[_Blocks, slice], Tensor]") -> Tensor:
        """Return what the blocks answer as one vector in float64."""
        self._flush()
        return torch.cat([ask(blocks, part).reshape(-1) for part, blocks in self._pieces])

    def _flush(self) -> None:
        if self._filled:
            with float32_products(tf32=False):
                for part, blocks in self._pieces:
                    g = blocks.cut(self._buffer[: self._filled, part]).transpose(0, 1)
                    blocks.add(g, self._seen)
            self._seen += self._filled
            self._filled = 0


def block_bytes(
    lengths: Sequence[int], block_size: int | None, num_rows: int, itemsize: int
) -> int:
    """Return the bytes that ``FisherBlocks`` of these arguments hold."""
    numbers = _buffer_rows(lengths, block_size, num_rows) * sum(lengths)
    for _, count, width in _cut(lengths, block_size):
        numbers += count * width * min(width, num_rows)
    return numbers * itemsize


def fitting_block_size(lengths: Sequence[int], num_rows: int, itemsize: int, budget: int) -> int:
    """Return the largest block size whose blocks fit into a number of bytes; 0 if none does."""
    low, high = 0, max(lengths)
    while low < high:
        middle = (low + high + 1) // 2
        fits = block_bytes(lengths, middle, num_rows, itemsize) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


class _Blocks(ABC):
    """Blocks of one width that follow each other. Vectors have shape [blocks, width]."""

    def __init__(self, store: Tensor) -> None:
        self._store = store

    def cut(self, v: Tensor) -> Tensor:
        """Return the blocks of vectors, shape [..., blocks, width]."""
        return v.reshape(*v.shape[:-1], len(self._store), self._store.shape[2])

    @abstractmethod
    def add(self, g: Tensor, seen: int) -> None:
        """Add rows of shape [blocks, rows, width], after so many others."""

    @abstractmethod
    def diagonal(self) -> Tensor: ...

    @abstractmethod
    def product(self, v: Tensor) -> Tensor: ...

    @abstractmethod
    def inverse_diagonal(self, tau: float) -> Tensor: ...

    @abstractmethod
    def inverse_product(self, v: Tensor, tau: float) -> Tensor: ...

    @abstractmethod
    def joint_answer(self, gone: Tensor, keep: Tensor, tau: float) -> Tensor: ...


class _Matrices(_Blocks):
    """Blocks as matrices F, shape [blocks, width, width]."""

    def add(self, g: Tensor, seen: int) -> None:
        del seen
        self._store.baddbmm_(g.mT, g)

    def diagonal(self) -> Tensor:
        return self._store.diagonal(dim1=1, dim2=2).double()

    def product(self, v: Tensor) -> Tensor:
        return _times(self._store.double(), v)

    def inverse_diagonal(self, tau: float) -> Tensor:
        L = _factor(self._copy(), tau)
        return torch.cholesky_inverse(L).diagonal(dim1=1, dim2=2)

    def inverse_product(self, v: Tensor, tau: float) -> Tensor:
        return _solved(_factor(self._copy(), tau), v)

    def joint_answer(self, gone: Tensor, keep: Tensor, tau: float) -> Tensor:
        places, real = _places(keep)
        F = self._store.gather(1, places[:, :, None].expand(-1, -1, keep.shape[1]))
        F = F.gather(2, places[:, None].expand(-1, places.shape[1], -1)).double()
        F *= real[:, :, None] & real[:, None]
        right = real * self.product(gone).gather(1, places)
        return torch.zeros_like(gone).scatter_(1, places, _solved(_factor(F, tau), right))

    def _copy(self) -> Tensor:
        return self._store.to(torch.float64, copy=True)


class _Rows(_Blocks):
    """Blocks F = RᵀR as rows R, shape [blocks, rows, width], taken a few columns at a time."""

    def add(self, g: Tensor, seen: int) -> None:
        self._store[:, seen : seen + g.shape[1]] = g

    def diagonal(self) -> Tensor:
        return torch.cat([R.square().sum(dim=1) for R in self._columns()], dim=1)

    def product(self, v: Tensor) -> Tensor:
        return self._pulled(self._pushed(v))

    def inverse_diagonal(self, tau: float) -> Tensor:
        L = self._gram_factor(self._columns(), tau)
        shares = [
            torch.linalg.solve_triangular(L, R, upper=False).square().sum(dim=1)
            for R in self._columns()
        ]
        # A share that rounds to 1 belongs to a weight whose own curvature is beyond 1e15 τ.
        rest = (1.0 - torch.cat(shares, dim=1)).clamp(min=torch.finfo(torch.float64).eps)
        return rest / tau

    def inverse_product(self, v: Tensor, tau: float) -> Tensor:
        L = self._gram_factor(self._columns(), tau)
        return (v - self._pulled(_solved(L, self._pushed(v)))) / tau

    def joint_answer(self, gone: Tensor, keep: Tensor, tau: float) -> Tensor:
        # (τ I + R_kᵀ R_k)⁻¹ R_kᵀ y = R_kᵀ (τ I + R_k R_kᵀ)⁻¹ y, with y = R v
        places, real = _places(keep)
        L = self._gram_factor(self._kept(places, real), tau)
        y = _solved(L, self._pushed(gone))
        x = [_times(R.mT, y) for R in self._kept(places, real)]
        return torch.zeros_like(gone).scatter_(1, places, torch.cat(x, dim=1))

    def _columns(self) -> Iterator[Tensor]:
        for R in torch.split(self._store, self._step, dim=2):
            yield R.double()

    def _kept(self, places: Tensor, real: Tensor) -> Iterator[Tensor]:
        """Yield columns at places, zero where a place is not real."""
        for some, own in zip(
            torch.split(places, self._step, dim=1),
            torch.split(real, self._step, dim=1),
            strict=True,
        ):
            R = self._store.gather(2, some[:, None].expand(-1, self._store.shape[1], -1))
            yield R.double().mul_(own[:, None])

    @property
    def _step(self) -> int:
        return max(1, WORK_BYTES // (16 * self._store.shape[0] * self._store.shape[1]))

    def _gram_factor(self, columns: Iterator[Tensor], tau: float) -> Tensor:
        """Return L with L Lᵀ = τ I + R Rᵀ."""
        count, rows, _ = self._store.shape
        K = self._store.new_zeros(count, rows, rows, dtype=torch.float64)
        for R in columns:
            K.baddbmm_(R, R.mT)
        return _factor(K, tau)

    def _pushed(self, v: Tensor) -> Tensor:
        """Return R v."""
        out = v.new_zeros(self._store.shape[:2])
        for R, part in zip(self._columns(), torch.split(v, self._step, dim=1), strict=True):
            out += _times(R, part)
        return out

    def _pulled(self, y: Tensor) -> Tensor:
        """Return Rᵀ y."""
        return torch.cat([_times(R.mT, y) for R in self._columns()], dim=1)


def _cut(lengths: Sequence[int], block_size: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield start, number and width of blocks that follow each other and are equally wide."""
    if block_size is None:
        yield 0, 1, sum(lengths)
        return
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        count, rest = divmod(length, block_size)
        if count:
            yield end - length, count, block_size
        if rest:
            yield end - rest, 1, rest


def _buffer_rows(lengths: Sequence[int], block_size: int | None, num_rows: int) -> int:
    width = sum(lengths) if block_size is None else min(block_size, max(lengths))
    return min(num_rows, max(LEAST_BUFFER, min(width, num_rows) // 8))


def _factor(A: Tensor, tau: float) -> Tensor:
    """Return L with L Lᵀ = A + τ I for A that is not needed any more."""
    A.diagonal(dim1=1, dim2=2).add_(tau)
    L: Tensor
    L, info = torch.linalg.cholesky_ex(A)
    if info.any():
        raise ValueError(
            "`damping` must make every block of the Fisher matrix positive definite, which "
            f"{tau:.3g} added to its diagonal does not. Raise it."
        )
    return L


def _solved(L: Tensor, right: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ b for every block."""
    solution: Tensor = torch.cholesky_solve(right[:, :, None], L)
    return solution[:, :, 0]


def _times(A: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(A, v[:, :, None])[:, :, 0]


def _places(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of True in every row, others after them, and which are True.

    There are as many columns as the fullest row has.
    """
    order = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    places = order[:, : int(keep.sum(dim=1).max())]
    return places, keep.gather(1, places)
