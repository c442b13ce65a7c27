"""What a network's outputs lose with each weight, if the others of its layer may answer."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hessian.finiteness import finite_vector
from pruning.dense_distance import DenseDistance
from pruning.layer_calls import LayerCall, LayerCalls
from pruning.layer_inputs import MomentSums
from pruning.layer_rows import LayerRows

LARGEST_FACTOR = 8192
"""Inputs of a layer beyond which its inverse of n³ flops is left out for the diagonal."""


@dataclass(frozen=True)
class LayerFactors(LayerRows):
    """Second moments of what goes into a layer, and of the slopes at what comes out."""

    inputs: Float[Tensor, "n n"]
    """E a aᵀ over samples and positions, with a one in the last place if the layer has a
    bias among w."""
    slopes: Float[Tensor, " m"]
    """E Σ g² over a sample's positions, by output."""
    num_rows: int
    """Samples times positions behind the moments of the inputs."""

    def damped(self, damping: float) -> Float64[Tensor, "n n"] | None:
        """Return A + δ I with δ a share of the mean of diag A; None where nothing ever arrives."""
        # In float64: inputs that are never active make A singular but for the damping.
        A = self.inputs.to(torch.float64, copy=True)
        mean = A.diagonal().mean()
        if not mean > 0:
            return None
        A.diagonal().add_(damping * mean)
        return A

    def stiffness(self, damping: float) -> Float64[Tensor, "m n"] | None:
        """Return B_r / [(A + δ I)⁻¹]_ii; None where A is zero or larger than LARGEST_FACTOR."""
        A = self.damped(damping) if len(self.inputs) <= LARGEST_FACTOR else None
        if A is None:
            return None
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(A)).diagonal()
        return torch.outer(self.slopes.double(), 1.0 / inverse)


@dataclass(frozen=True)
class KroneckerFactors:
    """Moments of all linear and convolution layers, and the diagonal for everything else."""

    layers: tuple[LayerFactors, ...]
    diagonal: Float[Tensor, " d"]
    """Estimate of diag G: from the moments where there are some, else from gradients alone."""
    num_gradients: int
    """Passes through the data, forward and backward, that were spent."""


def kronecker_factors(
    distance: DenseDistance, w: Float[Tensor, " d"], *, num_draws: int = 1, seed: int = 0
) -> KroneckerFactors:
    """Return the moments that approximate the Gauss-Newton matrix at w layer by layer.

    For a weight between input i and output r of a linear layer, G is near B_r A within row r:
    A = E a aᵀ of the inputs (unfolded patches, for a convolution), B_r = E g_r² of the slopes of
    the distance with random targets (K-FAC). All calls of a layer are seen, whichever module makes
    them. Grouped and transposed convolutions, the projections inside ``nn.MultiheadAttention``,
    batch norm, embeddings and whatever else holds weights have a diagonal alone, from squared
    gradients of whole batches: unbiased, since samples have independent slopes of mean 0, with a
    relative standard error of about √(2 / batches).

    Args:
        distance: The distance to the dense network.
        w: Where the moments are taken, shape [d].
        num_draws: Draws of the slopes, one forward and backward pass each.
        seed: Seed of the draws, made on the CPU.

    Raises:
        ValueError: If w does not fit, or ``num_draws`` is not positive.
        NonFiniteError: If a moment is not finite.

    References:
        Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored approximate
        curvature.
        Grosse & Martens (2016), A Kronecker-factored approximate Fisher matrix for convolution
        layers.
    """
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1, got {num_draws}.")
    distance.require_vector(w, "w")
    leaf = w.detach().clone().requires_grad_()
    tape = _Tape()
    calls = LayerCalls(distance.unflatten(leaf), tape.hear)
    diagonal = torch.zeros_like(w)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for draw in range(num_draws):
            tape.reads_inputs = draw == 0
            for batch in distance.batches():
                with calls:
                    z = distance.output(leaf, batch)
                u = distance.drawn_slopes(z, generator)
                (slope,) = torch.autograd.grad(z, leaf, u, materialize_grads=True)
                diagonal += slope.square()
    samples = num_draws * distance.num_samples
    return _finished(distance, tape, diagonal / samples, samples, num_draws)


def kronecker_saliency(
    w: Float[Tensor, " d"],
    factors: KroneckerFactors,
    distance: DenseDistance,
    *,
    damping: float = 0.01,
) -> Float[Tensor, " d"]:
    """Return for every weight twice the loss of output that its removal leaves, after an answer.

    w_ri² B_r / [(A + δ I)⁻¹]_ii: Optimal Brain Surgeon's saliency, if only weights of the same
    output answer. Weights without a Kronecker factor have w² diag G: Optimal Brain Damage's.

    Args:
        w: Weights, shape [d].
        factors: Their moments.
        distance: Names and shapes of the weights.
        damping: δ as a share of the mean of diag A.

    Raises:
        ValueError: If damping is not positive, or w does not fit.
        torch.linalg.LinAlgError: If a damped factor is singular in the weights' precision.

    References:
        Hassibi & Stork (1993), Second order derivatives for network pruning.
    """
    if not 0 < damping < math.inf:
        raise ValueError(f"`damping` must be positive and finite, got {damping}.")
    distance.require_vector(w, "w")
    stiffness = factors.diagonal.clone()
    parts = distance.unflatten(stiffness)
    for layer in factors.layers:
        rows = layer.stiffness(damping)
        if rows is not None:
            layer.write_rows_(parts, rows)
    return stiffness * w.square()


class _Tape:
    """Adds up moments of what goes into layers, and of the slopes at what comes out."""

    def __init__(self) -> None:
        self.reads_inputs = True
        self.inputs = MomentSums()
        self.slopes: dict[str, Tensor] = {}

    def hear(self, call: LayerCall) -> None:
        """Take one call in, and wait for its slopes."""
        if call.out is None or call.groups != 1:
            return
        channel, name = call.channel % call.out.ndim, call.weight

        def add(g: Tensor) -> None:
            square = g.detach().square()
            total = square.sum([i for i in range(g.ndim) if i != channel])
            self.slopes[name] = self.slopes[name] + total if name in self.slopes else total

        # A hook of now sees the slope of now, also if the output is changed in place later.
        call.out.register_hook(add)  # type: ignore[no-untyped-call]
        if self.reads_inputs:
            self.inputs.add(call)


def _finished(
    distance: DenseDistance, tape: _Tape, diagonal: Tensor, samples: int, num_draws: int
) -> KroneckerFactors:
    """Divide the sums by what they count, and put the layers' own diagonals in."""
    layers = tuple(
        LayerFactors(
            name,
            bias,
            tape.inputs.totals[name][0] / tape.inputs.rows[name],
            tape.slopes[name] / samples,
            tape.inputs.rows[name],
        )
        for name, bias in tape.inputs.biases.items()
        if name in tape.slopes
    )
    parts = distance.unflatten(diagonal)
    for layer in layers:
        layer.write_rows_(parts, torch.outer(layer.slopes, layer.inputs.diagonal()))
    finite_vector(diagonal, "diagonal of the Gauss-Newton matrix", distance)
    return KroneckerFactors(layers, diagonal, num_draws)
