"""The neurons of a layer a few at a time, each with the inputs on its own support alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruning.net_trim_targets import LayerTargets

CHUNK_BYTES = 1 << 27
"""Memory of what is gathered for the neurons worked on at a time, unless one needs more."""


def in_chunks(U: Float[Tensor, "m n"], targets: LayerTargets) -> Iterator["Supports"]:
    """Yield the neurons that have weights, those of similar numbers together.

    Args:
        U: Sparse weights.
        targets: The layer.
    """
    keep = U != 0
    sizes = keep.sum(dim=1)
    by_size = sizes.argsort(descending=True)
    counts = [count for count in sizes[by_size].tolist() if count > 0]
    start = 0
    while start < len(counts):
        size = counts[start]
        # Two matrices of inputs, and eight numbers for each sample.
        once = 16 * size * size + 64 * len(targets.X)
        rows = by_size[start : min(start + max(1, CHUNK_BYTES // (2 * once)), len(counts))]
        start += len(rows)
        # Smaller supports are filled up with places that are not kept, whose inputs count as zero.
        index = keep[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
        yield Supports(targets, rows, index, keep[rows].gather(1, index))


@dataclass(frozen=True)
class Supports:
    """Some neurons of a layer: k of them, with at most s weights each."""

    targets: LayerTargets
    rows: Int[Tensor, " k"]
    """Which neurons."""
    index: Int[Tensor, "k s"]
    """Which inputs."""
    real: Bool[Tensor, "k s"]
    """Which of these count: those in front."""

    def of(self, U: Float[Tensor, "m n"]) -> Float[Tensor, "k s"]:
        """Return the weights on the supports."""
        return U[self.rows].gather(1, self.index).double()

    def put(self, u: Float[Tensor, "k s"], into: Float[Tensor, "m n"]) -> None:
        """Write weights on the supports into a matrix."""
        held = into[self.rows[:, None], self.index]
        into[self.rows[:, None], self.index] = torch.where(self.real, u.to(into.dtype), held)

    @cached_property
    def goal(self) -> tuple[Float[Tensor, "k p"], Bool[Tensor, "k p"] | None]:
        """T, and what is active; None for: all."""
        parts = [self.targets.goal(part) for part in self._parts()]
        T = torch.cat([T[:, self.rows] for T, _ in parts]).T.contiguous()
        active = [on[:, self.rows] for _, on in parts if on is not None]
        return T, torch.cat(active).T.contiguous() if active else None

    def images(self, u: Float[Tensor, "k s"]) -> Float[Tensor, "k p"]:
        """Return the products of all samples with weights; 2 n k p flops."""
        X = self.targets.X
        whole = u.new_zeros(len(u), X.shape[1]).scatter_add_(1, self.index, u * self.real)
        return torch.cat([whole @ X[part].double().T for part in self._parts()], dim=1)

    def gradient(self, off: Float[Tensor, "k p"]) -> Float[Tensor, "k s"]:
        """Return sums of inputs, weighted by sample; 2 n k p flops."""
        X = self.targets.X
        whole = off.new_zeros(len(off), X.shape[1])
        for part in self._parts():
            whole.addmm_(off[:, part], X[part].double())
        return whole.gather(1, self.index) * self.real

    def moments(self, on: Bool[Tensor, "k p"] | None) -> Float[Tensor, "k s s"]:
        """Return second moments of the inputs of samples that count; 2 s² k p flops."""
        k, s = self.index.shape
        gram = torch.zeros(k, s, s, dtype=torch.float64, device=self.index.device)
        for part in self._parts():
            x = self.targets.X[part].T[self.index].double().mul_(self.real[:, :, None])
            gram.baddbmm_(x if on is None else x * on[:, None, part], x.mT)
        return gram

    def add_moments_(self, gram: Float[Tensor, "k s s"], weights: Float[Tensor, "k p"]) -> None:
        """Add second moments of inputs with weights by sample, of which few are not zero."""
        # One by one: numbers of samples differ too much to be filled up to the largest.
        sizes = self.real.sum(dim=1).tolist()
        for own, weight, index, size in zip(gram, weights, self.index, sizes, strict=True):
            for samples in weight.nonzero()[:, 0].split(self._at_once):
                x = self.targets.X[samples].index_select(1, index[:size]).double()
                own[:size, :size].addmm_((x * weight[samples, None]).T, x)

    @property
    def _at_once(self) -> int:
        """Samples that are worked on at a time."""
        return max(1, CHUNK_BYTES // (32 * max(self.index.numel(), self.targets.X.shape[1])))

    def _parts(self) -> Iterator[slice]:
        for begin in range(0, len(self.targets.X), self._at_once):
            yield slice(begin, begin + self._at_once)


def newton_move(
    H: Float[Tensor, "k s s"], gradient: Float[Tensor, "k s"], damping: Float[Tensor, " k"]
) -> Float[Tensor, "k s"]:
    """Return −H⁻¹ g, with shares of its largest diagonal entry added to the diagonal in place."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    largest = diagonal.amax(dim=1, keepdim=True)
    diagonal += damping[:, None] * largest + (largest == 0)
    move: Tensor = torch.cholesky_solve(-gradient[:, :, None], torch.linalg.cholesky(H))
    return move[:, :, 0]
