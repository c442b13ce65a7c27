"""Optimal Brain Surgeon of rows that share a matrix: the order of removal, and the best fit."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 32
"""Removals after which the inverses are renewed: about as many as cost least, on two CPUs."""

CHUNK_BYTES = 1 << 27
"""Memory of the inverses that are worked on at a time, unless one is larger."""

NEVER = 1e300
"""Added to what a removal costs where it is not wanted; below infinity, which is: not again."""


def removal_order(
    H: Float[Tensor, "n n"],
    W: Float[Tensor, "m n"],
    stays: Bool[Tensor, "m n"],
    *,
    rows_at_once: int | None = None,
) -> tuple[Int[Tensor, "m n"], Float[Tensor, "m n"]]:
    """Return in which order a row's weights go, and by how much each removal raises the error.

    The error of a row w moved to u is (u − w)ᵀ H (u − w). What goes next is what raises it least
    if all that are left answer: argmin w_j² / [H⁻¹]_jj, with w and H⁻¹ of what is left. Zeros go
    first, weights that stay come last, at infinity. About (2/3) f³ flops for a row of f weights,
    f³ more where some are zero.

    Args:
        H: Symmetric and positive definite, float64.
        W: Rows of weights, float64.
        stays: True for weights that never go.
        rows_at_once: Rows that are worked on together, with 8 n² bytes each. Default: 128 MiB.

    Raises:
        torch.linalg.LinAlgError: If H is not positive definite.
    """
    n = len(H)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    floor = 1.0 / float(H.diagonal().max())
    left = (W != 0) | stays
    sizes = left.sum(dim=1)
    by_size = sizes.argsort(descending=True)
    counts = sizes[by_size].tolist()
    order = torch.empty(W.shape, dtype=torch.long, device=W.device)
    losses = torch.zeros_like(W)
    start = 0
    while start < len(W):
        size = counts[start]
        step = rows_at_once or max(1, CHUNK_BYTES // (8 * max(size, 1) ** 2))
        rows = by_size[start : start + step]
        start += len(rows)
        if size == n:
            index = torch.arange(n, device=W.device).repeat(len(rows), 1)
            M = inverse.repeat(len(rows), 1, 1)
        else:
            # Zeros are out of it. Shorter rows are filled up with some, which lean on nothing.
            index = left[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            M = torch.cholesky_inverse(
                torch.linalg.cholesky(_within(H, left[rows], index[:, :size]))
            )
        zeros, index = index[:, size:], index[:, :size]
        barrier = torch.zeros_like(index, dtype=W.dtype)
        barrier.masked_fill_(stays[rows].gather(1, index), NEVER)
        work = _Rows(M, W[rows].gather(1, index), barrier, floor=floor)
        blocks = [work.remove(min(BLOCK, size - done)) for done in range(0, size, BLOCK)]
        places = torch.cat([zeros[:, :0], *(gone for gone, _ in blocks)], dim=1)
        order[rows] = torch.cat([zeros, index.gather(1, places)], dim=1)
        losses[rows, n - size :] = torch.cat([losses[rows, :0], *(cost for _, cost in blocks)], 1)
    losses.clamp_(min=0.0)
    losses[losses >= NEVER] = math.inf
    return order, losses


def _within(H: Tensor, real: Tensor, index: Tensor) -> Tensor:
    """Return each row's block of H, [rows, size, size], with ones where a row is filled up."""
    real = real.gather(1, index)
    A = H[index[:, :, None], index[:, None, :]] * (real[:, :, None] & real[:, None, :])
    A.diagonal(dim1=1, dim2=2).add_(~real)
    return A


def best_fit(
    H: Float[Tensor, "n n"],
    W: Float[Tensor, "m n"],
    keep: Bool[Tensor, "m n"],
    shift: Float[Tensor, "m n"] | None = None,
) -> Float[Tensor, "m n"]:
    """Return the rows u, zero where they are not kept, of least error (u − w)ᵀ H (u − w).

    Rows that lose nothing but zeros come back as they are. s³/3 flops for a row that keeps s.

    Args:
        H: Symmetric and positive definite, float64.
        W: Rows of weights, float64.
        keep: True for weights that may differ from zero.
        shift: Rows b, where the error has a term 2 bᵀ (u − w) as well.

    Raises:
        torch.linalg.LinAlgError: If H is not positive definite.
    """
    pull = W.masked_fill(keep, 0.0) @ H
    if shift is not None:
        pull -= shift
    sizes = keep.sum(dim=1) * (pull != 0).any(dim=1)
    by_size = sizes.argsort(descending=True)
    counts = sizes[by_size].tolist()
    fitted = W.masked_fill(~keep, 0.0)
    start = 0
    while start < len(W) and counts[start] > 0:
        size = counts[start]
        rows = by_size[start : start + max(1, CHUNK_BYTES // (8 * size * size))]
        start += len(rows)
        # Shorter supports are filled up with places that are not kept, and there with ones.
        index = keep[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
        A = _within(H, keep[rows], index)
        b = pull[rows].gather(1, index) * keep[rows].gather(1, index)
        move = torch.cholesky_solve(b[:, :, None], torch.linalg.cholesky(A))[:, :, 0]
        fitted[rows[:, None], index] += move
    return fitted


class _Rows:
    """Rows of weights, each with the inverse of the matrix of those that are left.

    Within a block, removals are kept as vectors u with H⁻¹ = M − Σ u uᵀ; at its end they are put
    into M by one product, and what went is forgotten: the last places take those of the removed.
    """

    def __init__(self, M: Tensor, w: Tensor, barrier: Tensor, *, floor: float) -> None:
        self.M = M
        self.w, self.barrier, self.floor = w, barrier, floor
        self.places = torch.arange(w.shape[1], device=w.device).repeat(len(w), 1)
        self._every = torch.arange(len(w), device=w.device)

    def remove(self, count: int) -> tuple[Tensor, Tensor]:
        """Remove that many weights of every row, one by one; return their places and costs."""
        every, w, barrier = self._every, self.w, self.barrier.clone()
        d = self.M.diagonal(dim1=1, dim2=2).clone()
        U = w.new_empty(len(w), count, w.shape[1])
        losses = w.new_empty(len(w), count)
        gone = torch.empty(len(w), count, dtype=torch.long, device=w.device)
        for i in range(count):
            losses[:, i], j = (w.square().div_(d).add_(barrier)).min(dim=1)
            gone[:, i], at = j, j[:, None]
            column = self.M[every, j]
            if i:
                shares = U[every, :i, j]
                column = torch.baddbmm(column[:, None], shares[:, None], U[:, :i], alpha=-1)[:, 0]
            root = d.gather(1, at).rsqrt_()
            u = torch.mul(column, root, out=U[:, i])
            w.addcmul_(u, w.gather(1, at) * root, value=-1)
            # No entry of the inverse's diagonal is below the floor, but for rounding; and what is
            # removed has 0 there, which must not be divided by.
            d.addcmul_(u, u, value=-1).clamp_(min=self.floor)
            barrier.scatter_(1, at, math.inf)
        places = self.places.gather(1, gone)
        if count < w.shape[1]:
            self._forget(gone, U)
        return places, losses

    def _forget(self, gone: Tensor, U: Tensor) -> None:
        left = self.w.shape[1] - gone.shape[1]
        holes = gone.sort(dim=1).values
        is_gone = torch.zeros_like(self.places, dtype=torch.uint8).scatter_(1, gone, 1)
        # As many of the last places are left as there are holes before them: these pair up first.
        # The others pair up among the last places, which are cut off.
        last = is_gone[:, left:].argsort(dim=1, stable=True) + left
        for values, dim in (
            (self.M, 1),
            (self.M, 2),
            (U, 2),
            (self.w, 1),
            (self.barrier, 1),
            (self.places, 1),
        ):
            _copy_places_(values, dim, last, holes)
        self.w, self.barrier = self.w[:, :left], self.barrier[:, :left]
        self.places, U = self.places[:, :left], U[:, :, :left]
        self.M = self.M[:, :left, :left].baddbmm_(U.mT, U, alpha=-1)


def _copy_places_(values: Tensor, dim: int, source: Tensor, target: Tensor) -> None:
    """Copy from places to places along a dimension; each row of the first dimension has its own."""
    shape = [source.shape[1] if i == dim else size for i, size in enumerate(values.shape)]

    def spread(places: Tensor) -> Tensor:
        return places.view(
            len(places), *[1] * (dim - 1), -1, *[1] * (values.ndim - dim - 1)
        ).expand(shape)

    values.scatter_(dim, spread(target), values.gather(dim, spread(source)))
