"""What a network's outputs lose with each weight, if the others of its layer may answer."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hessian.finiteness import finite_vector
from pruning.dense_distance import DenseDistance

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
PATCH_ELEMENTS = 1 << 24
"""Entries of unfolded patches that are held at a time."""

LARGEST_FACTOR = 8192
"""Inputs of a layer beyond which its inverse of n³ flops is left out for the diagonal."""


class CalibrationWarning(UserWarning):
    """There are too few calibration inputs for what is to be learned from them."""


@dataclass(frozen=True)
class LayerFactors:
    """Second moments of what goes into a layer, and of the slopes at what comes out."""

    weight: str
    bias: str | None
    inputs: Float[Tensor, "n n"]
    """E a aᵀ over samples and positions, with a one in the last place if the layer has a
    bias among w."""
    slopes: Float[Tensor, " m"]
    """E Σ g² over a sample's positions, by output."""
    num_rows: int
    """Samples times positions behind the moments of the inputs."""


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
    tape = _Tape(distance.unflatten(leaf))
    diagonal = torch.zeros_like(w)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for draw in range(num_draws):
            tape.reads_inputs = draw == 0
            for batch in distance.batches():
                with tape:
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
        if len(layer.inputs) > LARGEST_FACTOR:
            continue
        # In float64: inputs that are never active make A singular but for the damping.
        A = layer.inputs.to(torch.float64, copy=True)
        mean = A.diagonal().mean()
        if not mean > 0:  # nothing ever arrives here
            continue
        A.diagonal().add_(damping * mean)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(A)).diagonal()
        _write_rows(parts, layer, torch.outer(layer.slopes.double(), 1.0 / inverse))
    return stiffness * w.square()


class _Tape(TorchFunctionMode):
    """Watches linear and convolution calls with known weights, whichever module makes them."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__()
        # Views of one vector: the place in memory tells them apart, also after they are cut anew.
        self._names = {(t.data_ptr(), t.shape): name for name, t in parts.items() if t.numel()}
        self.reads_inputs = True
        self.biases: dict[str, str | None] = {}
        self.inputs: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.slopes: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._see(out, *_linear_call(*args, **(kwargs or {})))
        elif func in CONVOLUTIONS:
            call = _convolution_call(CONVOLUTIONS[func], *args, **(kwargs or {}))
            if call is not None:
                self._see(out, *call)
        return out

    def _see(self, out: Tensor, W: Tensor, bias: Tensor | None, x: "_Rows") -> None:
        name = self._names.get((W.data_ptr(), W.shape))
        if name is None:
            return
        own = None if bias is None else self._names.get((bias.data_ptr(), bias.shape))
        own = self.biases.setdefault(name, own)
        channel = x.channel % out.ndim

        def add(g: Tensor) -> None:
            square = g.detach().square()
            total = square.sum([i for i in range(g.ndim) if i != channel])
            self.slopes[name] = self.slopes[name] + total if name in self.slopes else total

        # A hook of now sees the slope of now, also if the output is changed in place later.
        out.register_hook(add)  # type: ignore[no-untyped-call]
        if self.reads_inputs:
            with torch.no_grad():
                for rows in x.parts():
                    if own is not None:
                        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
                    moment = rows.T @ rows
                    known = name in self.inputs
                    self.inputs[name] = self.inputs[name] + moment if known else moment
                    self.counts[name] = self.counts.get(name, 0) + len(rows)


class _Rows:
    """What a call multiplies its weights with, as rows, a part at a time."""

    def __init__(self, x: Tensor, channel: int, unfold: Any = None) -> None:
        self.x, self.channel, self._unfold = x.detach(), channel, unfold

    def parts(self) -> Any:
        if self._unfold is None:
            yield self.x.reshape(-1, self.x.shape[-1])
            return
        each = self._unfold(self.x[:1])
        step = max(1, PATCH_ELEMENTS // each.numel())
        for part in torch.split(self.x, step):
            yield self._unfold(part)


def _linear_call(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None, _Rows]:
    return weight, bias, _Rows(input, -1)


def _convolution_call(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None, _Rows] | None:
    """Return weight, bias and the patches; None for grouped convolutions."""
    if groups != 1:
        return None
    size = weight.shape[2:]
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    spans = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    if padding == "same":
        ends = [(span // 2, span - span // 2) for span in spans]
    else:
        ends = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]

    def patches(x: Tensor) -> Tensor:
        x = functional.pad(x, [p for pair in reversed(ends) for p in pair])
        for i in range(dims):
            x = x.unfold(2 + i, spans[i] + 1, stride[i])[..., :: dilation[i]]
        order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
        return x.permute(order).reshape(-1, weight[0].numel())

    x = input if input.ndim == dims + 2 else input[None]
    return weight, bias, _Rows(x, -1 - dims, patches)


def _each(value: Any, dims: int) -> list[int]:
    listed = [value] if isinstance(value, int) else list(value)
    return listed * dims if len(listed) == 1 else listed


def _finished(
    distance: DenseDistance, tape: _Tape, diagonal: Tensor, samples: int, num_draws: int
) -> KroneckerFactors:
    """Divide the sums by what they count, and put the layers' own diagonals in."""
    layers = tuple(
        LayerFactors(
            name,
            bias,
            tape.inputs[name] / tape.counts[name],
            tape.slopes[name] / samples,
            tape.counts[name],
        )
        for name, bias in tape.biases.items()
        if name in tape.slopes
    )
    parts = distance.unflatten(diagonal)
    for layer in layers:
        _write_rows(parts, layer, torch.outer(layer.slopes, layer.inputs.diagonal()))
    finite_vector(diagonal, "diagonal of the Gauss-Newton matrix", distance)
    return KroneckerFactors(layers, diagonal, num_draws)


def _write_rows(parts: dict[str, Tensor], layer: LayerFactors, rows: Tensor) -> None:
    """Write values by output and input, the bias last, where the layer's weights are."""
    weight = parts[layer.weight]
    weight.copy_(rows[:, : weight[0].numel()].reshape(weight.shape))
    if layer.bias is not None:
        parts[layer.bias].copy_(rows[:, -1])
