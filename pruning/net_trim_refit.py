"""Weights on a given support whose outputs are nearest to what a ReLU lets through."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruning.net_trim_targets import LayerTargets

CHUNK_BYTES = 1 << 27
"""Memory of what is gathered for the neurons worked on at a time, unless one needs more."""

DAMPING = 1e-10
"""Added to the normal equations, as a share of their largest diagonal entry: inputs may repeat."""

MAX_STEPS = 30
"""Steps of Newton; five are usual."""

MAX_HALVINGS = 10
"""Of a step that would lead further away."""


@torch.no_grad()
def refitted(U: Float[Tensor, "m n"], targets: LayerTargets) -> Float[Tensor, "m n"]:
    """Return weights with the zeros of U, and outputs at least as near to the targets.

    Least ½ ‖(X Uᵀ + S − Y)_Ω‖² + ½ ‖((X Uᵀ + S)_Ωᶜ)₊‖², which bounds the squared discrepancy of
    the outputs: a least-squares problem where what is inactive counts once it is above zero. Each
    neuron is one, convex and piecewise quadratic, and Newton's method ends in the optimum. A
    neuron whose outputs come no nearer keeps its weights. About 2 s² P flops in float64 for a
    neuron of s weights at each step.

    Args:
        U: Sparse weights.
        targets: The layer; its bound V is not looked at.
    """
    W = U.double()
    keep = W != 0
    sizes = keep.sum(dim=1)
    by_size = sizes.argsort(descending=True)
    counts = sizes[by_size].tolist()
    fitted = W.clone()
    start = 0
    while start < len(W) and counts[start] > 0:
        size = counts[start]
        # Normal equations, and six numbers for each sample.
        once = 8 * size * size + 48 * len(targets.X)
        rows = by_size[start : start + max(1, CHUNK_BYTES // (2 * once))]
        start += len(rows)
        # Smaller supports are filled up with places that are not kept, whose inputs count as zero.
        index = keep[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
        real = keep[rows].gather(1, index)
        neurons = _Neurons(targets, rows, index, real)
        found = neurons.nearest(W[rows].gather(1, index))
        fitted[rows[:, None], index] = torch.where(real, found, fitted[rows].gather(1, index))
    return fitted.to(U.dtype)


class _Neurons:
    """Some neurons of a layer, each with the inputs on its own support."""

    def __init__(
        self,
        targets: LayerTargets,
        rows: Int[Tensor, " k"],
        index: Int[Tensor, "k s"],
        real: Bool[Tensor, "k s"],
    ) -> None:
        self._X, self._index, self._real = targets.X, index, real
        self._Y = targets.Y[:, rows].double().T
        S = targets.offset
        self._T = self._Y if S is None else self._Y - (S if S.ndim == 2 else S[None])[:, rows].T
        self._active = self._Y > 0 if targets.kind == "relu" else None

    def nearest(self, u: Float[Tensor, "k s"]) -> Float[Tensor, "k s"]:
        """Return the weights of least error, found from u by Newton's method."""
        first, e = u, self._images(u).sub_(self._T)
        start = now = self._error(e)
        before = self._outputs_error(e)
        for _ in range(MAX_STEPS):
            H, gradient = self._normal(e)
            move = -torch.cholesky_solve(gradient[:, :, None], torch.linalg.cholesky(H))[:, :, 0]
            along, length = self._images(move), torch.ones_like(now)
            for _ in range(MAX_HALVINGS):
                worse = self._error(e + length[:, None] * along) > now
                if not bool(worse.any()):
                    break
                length = torch.where(worse, 0.5 * length, length)
            length *= self._error(e + length[:, None] * along) <= now
            u = u + length[:, None] * move
            e += length[:, None] * along
            then = self._error(e)
            if bool((now - then <= 1e-12 * start).all()):
                break
            now = then
        e = self._images(u).sub_(self._T)
        better = (self._error(e) <= start) & (self._outputs_error(e) <= before)
        return torch.where(better[:, None], u, first)

    def _inputs(self) -> Iterator[tuple[slice, Float[Tensor, "k s r"]]]:
        """Yield samples, and each neuron's inputs for them."""
        step = max(1, CHUNK_BYTES // (32 * self._index.numel()))
        for begin in range(0, len(self._X), step):
            rows = slice(begin, begin + step)
            yield rows, self._X[rows].T[self._index].double().mul_(self._real[:, :, None])

    def _images(self, u: Tensor) -> Tensor:
        return torch.cat([torch.bmm(u[:, None], x)[:, 0] for _, x in self._inputs()], dim=1)

    def _normal(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return the second derivatives of the error, made definite, and its gradient."""
        k, s = self._index.shape
        H, gradient = e.new_zeros(k, s, s), e.new_zeros(k, s)
        off = self._off(e)
        for rows, x in self._inputs():
            gradient += torch.bmm(x, off[:, rows, None])[:, :, 0]
            counted = x
            if self._active is not None:
                counted = x * (self._active | (e > 0))[:, None, rows]
            H.baddbmm_(counted, x.mT)
        diagonal = H.diagonal(dim1=1, dim2=2)
        largest = diagonal.amax(dim=1, keepdim=True)
        diagonal += DAMPING * largest + (largest == 0)
        return H, gradient

    def _off(self, e: Tensor) -> Tensor:
        return e if self._active is None else torch.where(self._active, e, e.clamp(min=0.0))

    def _error(self, e: Tensor) -> Tensor:
        return self._off(e).square().sum(dim=1)

    def _outputs_error(self, e: Tensor) -> Tensor:
        """Return the squared discrepancy of what comes out."""
        out = e if self._active is None else (e + self._Y).relu() - self._Y
        return out.square().sum(dim=1)
