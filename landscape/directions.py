"""Directions in weight space: what they are, how long, and at which angles they stand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hessian.subspace import Eigenspace

# Entries turned into float64 at a time, to keep copies of long vectors small.
BLOCK = 1 << 20
# Below this sine to the ones before it, rounding of float32 weights is a part of a direction.
SMALLEST_SINE = 1e-3


@dataclass(frozen=True)
class Directions:
    """Some directions of weight space, with where they come from.

    Args:
        vectors: One direction a row, shape [k, d], in the order of an objective's flat weights.
        kind: What they are, e.g. ``"random"`` or ``"eigenvectors"``.
        names: What to call each of them in a figure.
        settings: What made them: seed, normalisation, eigenvalues; JSON values.
        cosines_before: Cosines that they had before they were made orthogonal; None if they were
            not.

    Raises:
        ValueError: If there is no direction, one is zero or not finite, or the names do not fit.

    Example:
        >>> import torch
        >>> found = Directions(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), "mine", ("a", "b"))
        >>> found.norms
        tensor([3.0000, 1.4142], dtype=torch.float64)
        >>> round(float(found.cosines[0, 1]), 4)
        0.7071
    """

    vectors: Float[Tensor, "k d"]
    kind: str
    names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    cosines_before: Float64[Tensor, "k k"] | None = None

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) == 0:
            raise ValueError(
                "`vectors` must hold one direction a row, shape [k, d] with k at least 1, got "
                f"shape {list(self.vectors.shape)}."
            )
        if len(self.names) != len(self.vectors):
            raise ValueError(
                f"`names` must name each of the {len(self.vectors)} directions, got "
                f"{len(self.names)} names."
            )
        for name, length in zip(self.names, self.norms.tolist(), strict=True):
            if not (length > 0 and math.isfinite(length)):
                raise ValueError(
                    f"`vectors` must have positive, finite length, got {length} for {name}."
                )

    @property
    def size(self) -> int:
        """Number of weights d."""
        return self.vectors.shape[1]

    @property
    def basis(self) -> Float[Tensor, "d k"]:
        """The directions as columns, as `project_trajectory` and `share_in_subspace` take them."""
        return self.vectors.T

    @cached_property
    def gram(self) -> Float64[Tensor, "k k"]:
        """Inner products of all pairs, summed in float64, on the CPU."""
        k = len(self.vectors)
        found = torch.zeros(k, k, dtype=torch.float64)
        for start in range(0, self.size, BLOCK):
            part = self.vectors[:, start : start + BLOCK].to(torch.float64)
            found += (part @ part.T).cpu()
        return found

    @property
    def norms(self) -> Float64[Tensor, " k"]:
        """Lengths of the directions: what a coordinate of 1 is worth in weight space."""
        return self.gram.diagonal().sqrt()

    @property
    def cosines(self) -> Float64[Tensor, "k k"]:
        """Cosines of the angles between all pairs."""
        return self.gram / self.norms / self.norms[:, None]

    @property
    def provenance(self) -> dict[str, str]:
        """Kind, settings, lengths and largest cosine in words, for the metadata of a figure."""
        words = {"directions": f"{self.kind}: {', '.join(self.names)}"}
        words |= {f"directions, {key}": str(value) for key, value in self.settings.items()}
        words["directions, lengths"] = ", ".join(f"{x:.6g}" for x in self.norms.tolist())
        words["directions, largest cosine"] = f"{_largest_off_diagonal(self.cosines):.3g}"
        if self.cosines_before is not None:
            before = _largest_off_diagonal(self.cosines_before)
            words["directions, largest cosine before orthogonalisation"] = f"{before:.3g}"
        return words


def eigenvector_directions(space: Eigenspace) -> Directions:
    """Return Hessian eigenvectors as directions of length one, in the order of the eigenspace.

    They are used as they are, never rescaled by filter or layer: a rescaled eigenvector is none.
    Their sign, which the Hessian leaves open, is such that the entry of largest magnitude is
    positive, so that two runs draw the same picture.

    Args:
        space: From ``leading_eigenspace``; with ``which="both"``, one direction of the most
            positive and one of the most negative curvature show a saddle that random directions
            do not see.

    Returns:
        The directions; their settings hold eigenvalues and residuals.

    Example:
        >>> import torch
        >>> from hessian import Operator, leading_eigenspace
        >>> d = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
        >>> A = Operator(lambda v: d * v, 3, d.dtype, d.device)
        >>> eigenvector_directions(leading_eigenspace(A, k=2, which="both")).names
        ('eigenvector of 5', 'eigenvector of -2')

    References:
        Böttcher & Wheeler (2024), Visualizing high-dimensional loss landscapes with Hessian
        directions.
    """
    return Directions(
        with_fixed_signs(space.vectors.T),
        "Hessian eigenvectors",
        tuple(f"eigenvector of {value:.3g}" for value in space.values.tolist()),
        {
            "eigenvalues": space.values.tolist(),
            "residuals": space.residuals.tolist(),
            "converged": space.converged,
        },
    )


def difference_directions(origin: Float[Tensor, " d"], others: Mapping[str, Tensor]) -> Directions:
    """Return the differences of some points from an origin.

    The point named is at coordinate 1 of its direction.

    Args:
        origin: Weights at coordinate 0, shape [d].
        others: Weights by name, each of shape [d].

    Returns:
        One direction a point.

    Raises:
        ValueError: If there is no point, one has another shape, type or device than the origin, or
            coincides with it.

    Example:
        >>> import torch
        >>> found = difference_directions(torch.ones(2), {"B": torch.tensor([1.0, 3.0])})
        >>> found.vectors, found.names
        (tensor([[0., 2.]]), ('to B',))
    """
    if not others:
        raise ValueError("`others` must hold at least one point, got none.")
    for name, w in others.items():
        if w.shape != origin.shape or w.dtype != origin.dtype or w.device != origin.device:
            raise ValueError(
                f'`others["{name}"]` must have shape {list(origin.shape)} in {origin.dtype} on '
                f"{origin.device} like `origin`, got {list(w.shape)} in {w.dtype} on {w.device}. "
                "Weights of different architectures have no difference."
            )
    vectors = torch.stack([w - origin for w in others.values()])
    return Directions(vectors, "differences of models", tuple(f"to {name}" for name in others))


def orthogonalized(directions: Directions) -> Directions:
    """Return directions made orthogonal one after the other, each as long as it was.

    Gram-Schmidt, to be called after any normalisation, which would undo it. The first direction
    stays; the cosines from before are kept as evidence of how much the others turned.

    Args:
        directions: At least two, none in the span of those before it.

    Returns:
        Orthogonal directions of the same lengths, with ``cosines_before``.

    Raises:
        ValueError: If a direction lies in the span of those before it, to a sine of 0.001.

    Example:
        >>> import torch
        >>> found = orthogonalized(Directions(torch.tensor([[1.0, 0], [3, 4]]), "mine", ("a", "b")))
        >>> found.vectors
        tensor([[1., 0.],
                [0., 5.]])
        >>> round(float(found.cosines_before[0, 1]), 3)
        0.6
    """
    rows = directions.vectors.to(torch.float64)
    units: list[Tensor] = []
    for name, row in zip(directions.names, rows, strict=True):
        unit = row / row.norm()
        for _ in range(2):  # a second time: the first leaves rounding along the others
            for other in units:
                unit = unit - torch.dot(other, unit) * other
            sine = float(unit.norm())
            if not units or sine >= SMALLEST_SINE:
                unit = unit / sine
                continue
            raise ValueError(
                f"`directions` must be independent, but {name} lies in the span of those before "
                f"it (sine {sine:.2g}). Leave it out."
            )
        units.append(unit)
    vectors = torch.stack(units) * rows.norm(dim=1, keepdim=True)
    return replace(
        directions,
        vectors=vectors.to(directions.vectors.dtype),
        cosines_before=directions.cosines,
    )


def with_fixed_signs(vectors: Tensor) -> Tensor:
    """Rows with the sign that makes their entry of largest magnitude positive."""
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    return vectors * torch.where(vectors.gather(1, largest) < 0, -1.0, 1.0).to(vectors.dtype)


def _largest_off_diagonal(cosines: Tensor) -> float:
    """The cosine furthest from zero, with its sign; 0 for one direction."""
    others = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
    return float(others[others.abs().argmax()]) if len(others) else 0.0
