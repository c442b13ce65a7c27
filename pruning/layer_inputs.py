"""What goes into each layer of a network: second moments, by one pass without gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hessian import NonFiniteError, Objective
from hessian.determinism import require_fixed_modules
from hessian.finiteness import all_finite
from pruning.layer_calls import LayerCall, LayerCalls
from pruning.layer_rows import LayerRows
from pruning.scores import require_weights


@dataclass(frozen=True)
class LayerInputs(LayerRows):
    """Second moments of what a layer multiplies its weights by.

    With rows Δ_r of a change of the layer's weights, its output changes by Σ_r Δ_rᵀ A Δ_r, summed
    over positions and squared, in the mean over samples.
    """

    moments: Float[Tensor, "groups n n"] | Float[Tensor, " n"]
    """A: the mean over samples of Σ a aᵀ over their positions, with a one in the last place of a
    if the layer has a bias among w. One matrix a group of outputs; all outputs are one group, but
    for grouped convolutions and for the joint projection of queries, keys and values. A table of
    embeddings has the diagonal alone, which is all there is: how often each of its rows is looked
    up."""
    num_rows: int
    """Samples times positions behind the moments."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the layer has among w."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def diagonals(self) -> Float[Tensor, "groups n"]:
        """Mean squares of the inputs, summed over positions, by group."""
        is_table = self.moments.ndim == 1
        return self.moments[None] if is_table else self.moments.diagonal(dim1=1, dim2=2)

    def rows(self, parts: Mapping[str, Tensor]) -> Shaped[Tensor, "m n"]:
        """Return a copy of values beside the weights as a matrix: a row an output, bias last."""
        if self.moments.ndim == 1:
            return parts[self.weight].T.clone()
        return super().rows(parts)

    def write_rows_(self, parts: Mapping[str, Tensor], rows: Shaped[Tensor, "m n"]) -> None:
        """Write a matrix of values, as ``rows`` gives it, into values beside the weights."""
        if self.moments.ndim == 1:
            parts[self.weight].copy_(rows.T)
        else:
            super().write_rows_(parts, rows)


def input_moments(
    objective: Objective, w: Float[Tensor, " d"] | None = None
) -> tuple[LayerInputs, ...]:
    """Return the second moments of the inputs of all layers, in the order of their first calls.

    Linear layers, convolutions (of unfolded patches, by group), the projections inside
    ``nn.MultiheadAttention`` and tables of embeddings are seen, in all their calls and whichever
    module makes them; transposed convolutions, recurrent layers, normalisation and everything
    else are not. A table that is also the weight of a linear layer counts as that layer. Batches
    are streamed: beside them, memory holds one matrix a layer and group.

    Args:
        objective: Model and data. Labels are not looked at.
        w: Where the moments are taken, shape [d]. Default: the model's weights.

    Raises:
        ValueError: If w does not fit or is not finite, the objective is shared among processes,
            or no such layer is called.
        NonDeterministicError: If dropout is on, or batch norm in training mode.
        NonFiniteError: If what goes into a layer is not finite.

    Example:
        >>> import torch
        >>> from pruning import DenseDistance
        >>> distance = DenseDistance(torch.nn.Linear(2, 1, bias=False), 2 * torch.eye(2))
        >>> (layer,) = input_moments(distance)
        >>> layer.weight, layer.moments[0]
        ('weight', tensor([[2., 0.],
                [0., 2.]]))

    References:
        Frantar & Alistarh (2022), Optimal Brain Compression: the matrix H = 2 X Xᵀ, but for the
        factor.
    """
    w = objective.weights() if w is None else w
    require_weights(w)
    objective.require_vector(w, "w")
    require_fixed_modules(objective.model)
    if objective.ranks.size > 1:
        raise ValueError(
            f"`objective` must not be shared among processes here, got {objective.ranks.size} of "
            "them. Build it without `group`."
        )
    sums = MomentSums()
    calls = LayerCalls(objective.unflatten(w.detach()), sums.add)
    with torch.no_grad():
        for batch in objective.batches():
            with calls:
                objective.output(w.detach(), batch)
    if not sums.totals:
        raise ValueError(
            "`objective` must have a model that calls a linear, convolution, attention or "
            f"embedding layer with weights among {', '.join(objective.shapes)}, got none."
        )
    for name, total in sums.totals.items():
        if not all_finite(total):
            raise NonFiniteError(
                f"What goes into the layer of `{name}` holds a NaN or an infinity, or overflows "
                "when squared. Look at the calibration inputs."
            )
    return tuple(
        LayerInputs(name, sums.biases[name], total / objective.num_samples, sums.rows[name])
        for name, total in sums.totals.items()
    )


def changed_moments(
    objective: Objective, layer: LayerInputs, w: Float[Tensor, " d"], dense: Float[Tensor, " d"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return moments of what goes into one layer at w, and of how it differs from that at dense.

    E a aᵀ, E a sᵀ and E s sᵀ, in the units and groups of ``layer.moments``, of the inputs a at w
    and their difference s = a − a_dense. Two passes without gradients; the inputs of one batch,
    unfolded, are held at a time.
    """
    sums = [torch.zeros_like(layer.moments) for _ in range(3)]
    with torch.no_grad():
        for batch in objective.batches():
            at_w, at_dense = (_inputs_of(objective, layer, v, batch) for v in (w, dense))
            for a, before in zip(at_w, at_dense, strict=True):
                s = a - before
                for total, moment in zip(sums, (a.mT @ a, a.mT @ s, s.mT @ s), strict=True):
                    total += moment
    A, N, Q = (total / objective.num_samples for total in sums)
    return A, N, Q


def _inputs_of(objective: Objective, layer: LayerInputs, w: Tensor, batch: Any) -> list[Tensor]:
    """Return what one layer multiplies its weights by in a batch, [groups, rows, inputs]."""
    seen: list[Tensor] = []

    def hear(call: LayerCall) -> None:
        one = None if layer.bias is None else float(call.bias == layer.bias)
        # Of a tied table of embeddings only the linear layer is wanted.
        seen.extend(part.to(layer.moments) for part in call.parts(one) if part.ndim == 3)

    own = {name: part for name, part in objective.unflatten(w).items() if name in layer.names}
    with LayerCalls(own, hear):
        objective.output(w, batch)
    return seen


class MomentSums:
    """Σ a aᵀ of the inputs of layers, by the name of their weights."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.biases: dict[str, str | None] = {}
        self.rows: dict[str, int] = {}

    @torch.no_grad()
    def add(self, call: LayerCall) -> None:
        """Take the inputs of one call in."""
        name = call.weight
        bias = self.biases.setdefault(name, call.bias)
        # The same weights may be called again with another bias, or with none.
        one = None if bias is None else float(call.bias == bias)
        for part in call.parts(one):
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            moment = part if part.ndim == 1 else part.mT @ part
            known = self.totals.get(name)
            if known is None or known.ndim < moment.ndim:
                self.totals[name], self.rows[name] = moment, 0
            elif known.ndim == moment.ndim:
                known += moment
            else:  # a table of embeddings, tied to a linear layer
                return
            self.rows[name] += int(part.sum()) if part.ndim == 1 else part.shape[1]
