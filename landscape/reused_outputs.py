"""The first layer's output at any point of a path or plane, from its outputs at a few."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hessian.batches import Batch, first_samples
from hessian.objective import Objective
from landscape.combinations import Combination, combine_
from landscape.first_layer import FirstLayer, input_of
from landscape.plans import UnsuitableError

REUSE_BYTES = 2 << 30
"""Outputs that take more than this are computed at every point instead."""


class ReusedOutputs:
    """Outputs of the first layer on some batches at every vector of a combination.

    Memory: as many outputs as there are vectors, one more, and two of one batch, where the layer's
    output is written on every batch, so that it stays in a cache. Where only a max pooling sees
    it, that is the maximum over the windows, taken one place of them after the other.

    Args:
        layer: The first layer.
        objective: Whose model it belongs to.
        batches: What the model is run on.
        combination: Of the path or plane.

    Raises:
        UnsuitableError: If an output is not finite.
    """

    def __init__(
        self,
        layer: FirstLayer,
        objective: Objective,
        batches: list[Batch],
        combination: Combination,
        *,
        channels_last: bool = False,
    ) -> None:
        self._layer = layer
        self._coefficients: tuple[float, ...] = ()
        form = torch.channels_last if channels_last else torch.contiguous_format
        parts = [layer.weights(objective, v) for v in combination.vectors]
        self._terms: list[list[tuple[Tensor, ...]]] = []
        with torch.no_grad():
            for batch in batches:
                inputs = input_of(layer.module, objective, batch)
                found = [layer.outputs(part, inputs) for part in parts]
                self._terms.append([tuple(_in_format(out, form) for out in outs) for outs in found])
        self._begun: list[tuple[tuple[float, ...], tuple[Tensor, ...]] | None]
        self._begun = [None] * len(batches)
        if not all(torch.isfinite(out).all() for t in self._terms for outs in t for out in outs):
            raise UnsuitableError  # a coefficient of 0 would not take them out
        shown = [terms[0][0] for terms in self._terms]
        self._out = {out.shape: (torch.empty_like(out), torch.empty_like(out)) for out in shown}

    def move_to(self, coefficients: tuple[float, ...]) -> None:
        """Take another point."""
        self._coefficients = coefficients

    @contextmanager
    def standing_in(self, i: int) -> Iterator[None]:
        """Let the layer return its output on batch i at the point, instead of computing it."""
        with self._layer.returning(self._output(i)):
            yield

    def _output(self, i: int) -> Tensor:
        # All terms but the last are the same along a row of a grid, and are kept.
        *head, last = self._terms[i]
        *front, c = self._coefficients
        begun = self._begun[i]
        if begun is None:
            begun = self._begun[i] = (), tuple(torch.empty_like(out) for out in last)
        if begun[0] != tuple(front):
            for out, *places in zip(begun[1], *head, strict=True):
                combine_(out, tuple(places), tuple(front))
            self._begun[i] = tuple(front), begun[1]
        out, other = self._out[last[0].shape]
        torch.add(begun[1][0], last[0], alpha=c, out=out)
        for a, b in zip(begun[1][1:], last[1:], strict=True):
            torch.add(a, b, alpha=c, out=other)
            torch.maximum(out, other, out=out)
        return out


def bytes_per_sample(
    layer: FirstLayer, objective: Objective, batch: Batch, combination: Combination
) -> int:
    """Return what `ReusedOutputs` takes for each sample."""
    with torch.no_grad():
        outs = layer.outputs(
            layer.weights(objective, combination.vectors[0]),
            input_of(layer.module, objective, first_samples(batch, 2)),
        )
    each = sum(out[:1].numel() * out.element_size() for out in outs)
    return (len(combination.vectors) + 1) * each


def _in_format(out: Tensor, form: torch.memory_format) -> Tensor:
    return out.contiguous(memory_format=form) if out.ndim == 4 else out.contiguous()
