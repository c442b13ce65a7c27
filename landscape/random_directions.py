"""Random directions, scaled to the weights by filter, layer, model or single weight."""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from hessian.flat_weights import FlatWeights
from landscape.directions import Directions

Normalization = Literal["filter", "layer", "model", "weight", "none"]


def random_directions(
    weights: FlatWeights | nn.Module,
    *,
    num: int = 2,
    normalization: Normalization = "filter",
    at: Float[Tensor, " d"] | None = None,
    with_vectors: bool = False,
    keep_zeros: bool = False,
    seed: int = 0,
) -> Directions:
    """Draw Gaussian directions and scale them to the weights.

    Entries are independent standard normal numbers; then, with θ the weights and d the direction,

    - ``"filter"``: each filter (slice along the output channels; a neuron's row of a linear layer)
      becomes as long as the filter of θ, so that α = 1 is a relative perturbation of 100 % of
      every filter, and networks that differ by a rescaling of filters give the same picture;
    - ``"layer"``: the same for each parameter as a whole;
    - ``"model"``: d becomes as long as θ;
    - ``"weight"``: each entry is multiplied by its weight;
    - ``"none"``: nothing.

    A filter or layer of zeros gets a direction of zero, as does every parameter of at most one
    dimension (biases, gains of normalisation) unless ``with_vectors``. Buffers, such as running
    statistics of batch norm, are never part of a direction, and tied weights have one entry.

    Args:
        weights: An objective, whose flat layout the directions follow, or any module, whose
            parameters that require a gradient they cover.
        num: Number of directions. The first ones do not depend on it.
        normalization: What is scaled to what.
        at: The weights θ to scale to, shape [d]. Default: the model's.
        with_vectors: Whether parameters of at most one dimension get an entry as well; one is then
            scaled as a single filter.
        keep_zeros: Whether weights that are zero stay zero in every direction, so that a pruned
            model moves inside its own support.
        seed: Seed of the draws, made on the CPU: the same directions on every device.

    Returns:
        The directions. Two of them are close to orthogonal, with a cosine of order 1/√d; see
        ``Directions.cosines``, and `orthogonalized`.

    Raises:
        ValueError: If an argument is out of range, or θ is zero wherever a direction may move.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> found = random_directions(model, num=1)
        >>> d = found.vectors[0]
        >>> torch.allclose(d[:6].view(2, 3).norm(dim=1), model.weight.norm(dim=1))
        True
        >>> d[6:]
        tensor([0., 0.])

    References:
        Li et al. (2018), Visualizing the loss landscape of neural nets.
    """
    if num < 1:
        raise ValueError(f"`num` must be at least 1, got {num}.")
    if normalization not in get_args(Normalization):
        raise ValueError(
            f"`normalization` must be one of {', '.join(get_args(Normalization))}, got "
            f'"{normalization}".'
        )
    flat = weights if isinstance(weights, FlatWeights) else FlatWeights(weights)
    theta = flat.weights() if at is None else at.detach()
    flat.require_vector(theta, "at")
    transposed = dict(_transposed(flat.model))
    own = flat.unflatten(theta)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.zeros(num, flat.size, dtype=flat.dtype, device=flat.device)
    for row in vectors:
        for name, part in flat.unflatten(row).items():
            draw = _normal(part, generator)  # used or not, so that what moves does not matter
            if part.ndim <= 1 and not with_vectors:
                continue
            part.copy_(draw)
            if keep_zeros:
                part.masked_fill_(own[name] == 0, 0.0)
            _scale_(part, own[name], normalization, transposed.get(name))
        if normalization == "model":
            _match_(row, theta, (0,))
    if not bool(vectors.any(dim=1).all()):
        raise ValueError(
            "`weights` must have a weight to scale a direction to, but all that may move are zero."
            + ("" if with_vectors else " Pass `with_vectors=True` to move biases as well.")
        )
    return Directions(
        vectors,
        "random",
        tuple(f"random direction {i + 1}" for i in range(num)),
        {
            "normalization": normalization,
            "biases and gains": "random" if with_vectors else "zero",
            "zeros": "kept" if keep_zeros else "free",
            "seed": seed,
        },
    )


def _scale_(part: Tensor, own: Tensor, normalization: str, groups: int | None) -> None:
    """Scale one parameter's direction in place, where the scale is the parameter's own affair."""
    every = tuple(range(part.ndim))
    if normalization == "weight":
        part.mul_(own)
    elif normalization == "layer" or (normalization == "filter" and part.ndim < 2):
        _match_(part, own, every)
    elif normalization == "filter" and groups is None:
        _match_(part, own, every[1:])
    elif normalization == "filter" and groups is not None:
        # A transposed convolution keeps its inputs first: [groups · in, out, ...].
        shape = groups, len(part) // groups, *part.shape[1:]
        _match_(part.view(shape), own.view(shape), (1, *range(3, part.ndim + 1)))


def _match_(d: Tensor, theta: Tensor, dims: tuple[int, ...]) -> None:
    """Make d as long as theta over some dimensions, for each entry of the others, in place."""
    target, length = (
        torch.linalg.vector_norm(v, dim=dims, keepdim=True, dtype=torch.float64) for v in (theta, d)
    )
    d.mul_(torch.where(length > 0, target / length, 0.0).to(d.dtype))


def _transposed(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of weights of transposed convolutions, with the groups."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvTransposeNd):
            yield f"{name}.weight" if name else "weight", module.groups


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    draw = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=draw).to(like)
