"""Cheap stand-ins for the inverse of the damped Gauss-Newton matrix, for conjugate gradients."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.allocation import parameter_slices
from pruning.dense_distance import DenseDistance
from pruning.saliency import KroneckerFactors, LayerFactors

Preconditioning = Literal["none", "diagonal", "rows"]
Preconditioner = Callable[[Tensor], Tensor]

MAX_BLOCK_ELEMENTS = 1 << 27
"""Entries of a layer's blocks beyond which it is divided by its diagonal instead."""

ROWS_TOGETHER = 32
"""Outputs that are solved in one batch; their blocks are filled up to the largest of them."""


def diagonal_preconditioner(factors: KroneckerFactors, tau: float) -> Preconditioner:
    """Return r ↦ r / (diag G + τ): d flops."""
    inverse = 1.0 / (factors.diagonal + tau)
    return lambda r: r * inverse


def row_preconditioner(
    factors: KroneckerFactors, distance: DenseDistance, alive: Bool[Tensor, " d"], tau: float
) -> Preconditioner:
    """Return r ↦ P r with P = (B_r A_ff + τ I)⁻¹ for the weights f of output r that stay.

    One block for every output of a linear or convolution layer: with f weights that stay, f³ flops
    and f² numbers at the start, and f² flops a call. The sparser the network, the cheaper. Weights
    without a layer, and layers whose blocks would take more than ``MAX_BLOCK_ELEMENTS`` numbers,
    are divided by their diagonal.

    Args:
        factors: Moments of the layers.
        distance: Names and shapes of the weights.
        alive: True for the weights that stay, shape [d]; elsewhere P is diagonal.
        tau: τ > 0, in units of the Gauss-Newton matrix.
    """
    plain = diagonal_preconditioner(factors, tau)
    places = {
        name: torch.arange(part.start, part.stop, device=alive.device).reshape(
            distance.shapes[name]
        )
        for name, part in parameter_slices(distance).items()
    }
    blocks = [
        block
        for layer in factors.layers
        for block in _blocks(layer, layer.rows(places), alive, tau)
    ]

    def apply(r: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        out = plain(r)
        for index, filled, inverse in blocks:
            rows = (r[index] * filled)[:, :, None]
            out[index[filled]] = (inverse @ rows)[:, :, 0][filled]
        return out

    return apply


def _blocks(
    layer: LayerFactors, places: Tensor, alive: Tensor, tau: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield places [rows, f], which of them are filled, and inverses [rows, f, f]."""
    stays = alive[places]
    counts = stays.sum(dim=1)
    if int(counts.square().sum()) > MAX_BLOCK_ELEMENTS:
        return
    # Rows of about the same length together, and in a row those that stay first.
    for rows in torch.split(counts.argsort(), ROWS_TOGETHER):
        most = int(counts[rows].max())
        inputs = stays[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        filled = stays[rows].gather(1, inputs)
        A = layer.inputs[inputs[:, :, None], inputs[:, None, :]]
        A = A * (layer.slopes[rows][:, None, None] * (filled[:, :, None] & filled[:, None, :]))
        A.diagonal(dim1=1, dim2=2).add_(tau)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(A))
        yield places[rows].gather(1, inputs), filled, inverse
