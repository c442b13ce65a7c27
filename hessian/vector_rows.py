"""Many long vectors as rows of a few blocks, with the matrix products of a Krylov method."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ROWS = 8
"""Rows of a block: growing by one block never holds an old and a new copy of all vectors."""

SLAB = 1 << 14
"""Entries of every row that are combined at a time, so that they are read from memory once."""

CHUNK = 1 << 15
"""Entries that are summed in float64 at a time: their copies stay in the cache."""

DEVICE_CHUNK = 1 << 22
"""The same on an accelerator, where many small steps cost more than the memory of a copy."""


class VectorRows:
    """Rows q₁, q₂, …, each of length n, appended one by one and rotated in place.

    Memory: as many rows as there are, rounded up to eight.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Tensor:
        return self._blocks[i // ROWS][i % ROWS]

    def append(self, v: Tensor) -> Tensor:
        """Copy v into a new last row and return that row."""
        if self._count == ROWS * len(self._blocks):
            block = torch.empty((ROWS, self.size), dtype=self.dtype, device=self.device)
            self._blocks.append(block)
        self._count += 1
        row = self[self._count - 1]
        row.copy_(v)
        return row

    def coefficients(self, v: Tensor) -> Tensor:
        """Return Q v, the dot products of every row with v, in float64."""
        return row_dots([rows for _, rows in self._used()], v)

    def take_from_(self, v: Tensor, coefficients: Tensor) -> None:
        """Make v − Qᵀ c of v, which is no row."""
        coefficients = coefficients.to(self.dtype)
        for first, rows in self._used():
            v.addmv_(rows.T, coefficients[first : first + len(rows)], alpha=-1)

    def without_few(self, v: Tensor, coefficients: npt.NDArray[np.float64]) -> Tensor:
        """Return v − Qᵀ c as a new vector, quickly where most of c is zero."""
        out = v.clone()  # v itself may be a row: a product may return its argument
        for first, rows in self._used():
            entries = np.flatnonzero(coefficients[first : first + len(rows)])
            if len(entries):
                low, high = int(entries[0]), int(entries[-1]) + 1
                c = self._matrix(coefficients[first + low : first + high])
                out.addmv_(rows[low:high].T, c, alpha=-1)
        return out

    def combine(self, coefficients: npt.NDArray[np.float64]) -> Tensor:
        """Return Qᵀ C for C of shape [m] or [m, k]; every column lies in one piece."""
        C = self._matrix(coefficients)
        if C.ndim == 1:
            out = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            self.take_from_(out, -C)
            return out
        out = torch.zeros((C.shape[1], self.size), dtype=self.dtype, device=self.device)
        for begin in range(0, self.size, SLAB):
            part = slice(begin, begin + SLAB)
            for first, rows in self._used():
                out[:, part].addmm_(C[first : first + len(rows)].T, rows[:, part])
        return out.T

    def rotate_(self, coefficients: npt.NDArray[np.float64]) -> None:
        """Replace the rows Q by Cᵀ Q for C of shape [m, p], p ≤ m, in place."""
        C = self._matrix(coefficients).T.contiguous()
        for begin in range(0, self.size, SLAB):
            part = slice(begin, begin + SLAB)
            new = C @ torch.cat([rows[:, part] for _, rows in self._used()])
            for first, rows in self._used():
                some = new[first : first + len(rows)]
                rows[: len(some), part] = some
        self._count = len(C)
        del self._blocks[-(-self._count // ROWS) :]

    def _used(self) -> Iterator[tuple[int, Tensor]]:
        for i, block in enumerate(self._blocks):
            yield ROWS * i, block[: self._count - ROWS * i]

    def _matrix(self, coefficients: npt.NDArray[np.float64]) -> Tensor:
        return aligned(coefficients).to(dtype=self.dtype, device=self.device)


def aligned(x: npt.NDArray[np.float64]) -> Tensor:
    """Copy an array to where torch's matrix products give the same bits every time.

    Their rounding depends on the alignment of the memory, which NumPy leaves to chance.
    """
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def row_dots(blocks: Sequence[Tensor], v: Tensor) -> Tensor:
    """Return the dot products of v with the rows of all blocks, in float64.

    Summed in float64 over chunks: a float32 sum over millions of entries loses the small ones after
    a large one, and with them the orthogonality of a basis.
    """
    length = max(len(v), 1) if v.dtype == torch.float64 else _chunk_length(v.device)
    total = torch.zeros(sum(map(len, blocks)), dtype=torch.float64, device=v.device)
    pieces = zip(*(torch.split(rows, length, dim=1) for rows in blocks), strict=True)
    for part, piece in zip(torch.split(v, length), pieces, strict=True):
        total += torch.cat([rows @ part for rows in piece])
    return total


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return aᵀ b as a float64 scalar tensor, summed in float64 without long copies."""
    if a.dtype == torch.float64 or len(a) <= CHUNK:
        return torch.dot(a.double(), b.double())
    parts = zip(chunks(a), chunks(b), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in parts]).sum()


def chunks(v: Tensor, length: int | None = None) -> Iterator[Tensor]:
    """Yield the consecutive parts of a vector, of a length that suits its device."""
    length = length or _chunk_length(v.device)
    for begin in range(0, len(v), length):
        yield v[begin : begin + length]


def _chunk_length(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else DEVICE_CHUNK
