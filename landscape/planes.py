"""Planes through weight space, whose axes have lengths and an angle of their own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from landscape.directions import Directions

# A hundredth of the 1 % at which figures say that a point lies off the plane.
ORTHONORMAL_TOLERANCE = 1e-4
# Beyond this, coordinates of weights in float32 (eps 1.2e-7) keep no certain digit.
MAX_CONDITION = 1e6


@dataclass(frozen=True)
class Plane:
    """The plane origin + x u + y v.

    The axes need be neither of length one nor orthogonal: coordinates count multiples of u and v,
    so that a filter-normalised direction is walked once from 0 to 1. `Plane.through` makes
    orthonormal axes, whose coordinates are distances in weight space.

    Args:
        origin: Weights at x = y = 0, shape [d].
        u: Direction of the x axis, shape [d].
        v: Direction of the y axis, shape [d], not along u.
        labels: What to call the axes in a figure.
        unit: What coordinates count, if not multiples of u and v, for a figure.

    Raises:
        ValueError: If an axis is zero or not finite, or u and v are parallel: the Gram matrix of
            the axes, scaled to length one, has a condition number above 1e6.

    Example:
        >>> import torch
        >>> a, b, c = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [2.0, 0.0, 5.0]])
        >>> plane = Plane.through(a, b, c)
        >>> plane(2.0, 5.0)
        tensor([3., 0., 5.])
        >>> plane.coordinates(torch.tensor([2.0, 7.0, 5.0]))
        (1.0, 5.0, 7.0)
    """

    origin: Float[Tensor, " d"]
    u: Float[Tensor, " d"]
    v: Float[Tensor, " d"]
    labels: tuple[str, str] = ("x", "y")
    unit: str | None = None

    def __post_init__(self) -> None:
        kinds = [_kind(v) for v in (self.origin, self.u, self.v)]
        for name, kind in zip("uv", kinds[1:], strict=True):
            if kind != kinds[0] or self.origin.ndim != 1:
                raise ValueError(
                    f"`{name}` must be a flat vector like `origin`, {kinds[0]}, got {kind}. "
                    "Flatten directions in the order of the objective's weights."
                )
        lengths = self.lengths
        if not all(length > 0 and math.isfinite(length) for length in lengths):
            raise ValueError(
                "`u` and `v` must have positive, finite length, got "
                f"{lengths[0]:.6g} and {lengths[1]:.6g}."
            )
        # Eigenvalues of [[1, c], [c, 1]] are 1 ± c.
        cosine = abs(self.cosine)
        if not 1 + cosine <= MAX_CONDITION * (1 - cosine):
            raise ValueError(
                f"`u` and `v` must span a plane, but they are parallel: their cosine is "
                f"{self.cosine:.9g}. Take another direction, or `orthogonalized` ones."
            )

    @cached_property
    def gram(self) -> Float64[Tensor, "2 2"]:
        """Inner products of the axes, summed in float64, on the CPU."""
        u, v = self.u.to(torch.float64), self.v.to(torch.float64)
        uu, uv, vv = (float(torch.dot(*pair)) for pair in ((u, u), (u, v), (v, v)))
        return torch.tensor([[uu, uv], [uv, vv]], dtype=torch.float64)

    @property
    def lengths(self) -> tuple[float, float]:
        """Lengths of u and v: what a coordinate of 1 is worth in weight space."""
        return math.sqrt(float(self.gram[0, 0])), math.sqrt(float(self.gram[1, 1]))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between u and v."""
        return float(self.gram[0, 1]) / math.prod(self.lengths)

    @property
    def is_orthonormal(self) -> bool:
        """Whether coordinates are distances, to 1e-4."""
        errors = (self.lengths[0] - 1, self.lengths[1] - 1, self.cosine)
        return all(abs(error) <= ORTHONORMAL_TOLERANCE for error in errors)

    @classmethod
    def along(cls, origin: Float[Tensor, " d"], directions: Directions) -> "Plane":
        """Return the plane of two directions through an origin, its axes named after them.

        Raises:
            ValueError: If there are not two directions, they are parallel, or have another length,
                type or device than the origin.
        """
        if len(directions.vectors) != 2:
            raise ValueError(
                f"`directions` must hold two to span a plane, got {len(directions.vectors)}."
            )
        u, v = directions.vectors
        if u.shape != origin.shape or u.dtype != origin.dtype or u.device != origin.device:
            raise ValueError(
                f"`directions` must have {origin.numel()} entries in {origin.dtype} on "
                f"{origin.device} like `origin`, got {u.numel()} in {u.dtype} on {u.device}."
            )
        return cls(origin, u, v, (directions.names[0], directions.names[1]))

    @classmethod
    def through(
        cls, a: Float[Tensor, " d"], b: Float[Tensor, " d"], c: Float[Tensor, " d"]
    ) -> "Plane":
        """Return the plane through three points: origin a, x along b − a, c at positive y.

        Sums run in float64, whatever the type of the points.

        Raises:
            ValueError: If two points coincide, or all lie on one line, to the rounding error of
                their type.
        """
        base = a.to(torch.float64)
        x, y = b.to(torch.float64) - base, c.to(torch.float64) - base
        # Rounding moves a point by at most eps/2 of its length; each check compares a few.
        scale = max(float(p.to(torch.float64).norm()) for p in (a, b, c))
        rounding = 4 * torch.finfo(a.dtype).eps * scale
        for names, difference in (("a` and `b", x), ("a` and `c", y), ("b` and `c", y - x)):
            if float(difference.norm()) <= rounding:
                raise ValueError(
                    f"`{names}` must differ to span a plane, but they coincide: their distance "
                    f"is {float(difference.norm()):.3g}."
                )
        u = x / x.norm()
        v = y - torch.dot(u, y) * u
        if float(v.norm()) <= rounding:
            raise ValueError(
                "`a`, `b` and `c` must not lie on one line, but `c` is only "
                f"{float(v.norm()):.3g} away from the line through `a` and `b`. Take another "
                "third point, e.g. the bend of a trained curve."
            )
        v = v - torch.dot(u, v) * u  # a second time: the first leaves rounding along u
        return cls(a.clone(), u.to(a.dtype), (v / v.norm()).to(a.dtype))

    @property
    def size(self) -> int:
        """Number of weights d."""
        return self.origin.numel()

    def __call__(
        self, x: float | Float[Tensor, "2"], y: float | None = None
    ) -> Float[Tensor, " d"]:
        """Return the weights at (x, y), given as two numbers or as one tensor."""
        if isinstance(x, Tensor):
            x, y = x.tolist()
        if y is None:
            raise ValueError("`y` must be given along with `x`, got `x` alone.")
        return self.origin + x * self.u + y * self.v

    def coordinates(self, w: Float[Tensor, " d"]) -> tuple[float, float, float]:
        """Return (x, y) of the nearest point of the plane and the distance of w from it.

        Least squares through the Gram matrix of the axes: right whatever their lengths and angle.
        """
        difference = w.to(torch.float64) - self.origin.to(torch.float64)
        u, v = self.u.to(torch.float64), self.v.to(torch.float64)
        products = torch.stack([torch.dot(u, difference), torch.dot(v, difference)]).cpu()
        x, y = torch.linalg.solve(self.gram, products).tolist()
        return x, y, float((difference - x * u - y * v).norm())


def grid(
    xs: Sequence[float] | Float[Tensor, " nx"], ys: Sequence[float] | Float[Tensor, " ny"]
) -> Float64[Tensor, "nx ny 2"]:
    """Return the coordinates of a grid: entry [i, j] is (xs[i], ys[j]).

    Args:
        xs: Values along the first axis.
        ys: Values along the second axis; their number may differ.

    Returns:
        Coordinates to evaluate a plane at.

    Raises:
        ValueError: If an axis is empty or holds a NaN or an infinity.

    Example:
        >>> grid([0.0, 1.0], [5.0, 6.0, 7.0])[1, 2]
        tensor([1., 7.], dtype=torch.float64)
    """
    axes = [torch.as_tensor(axis, dtype=torch.float64, device="cpu") for axis in (xs, ys)]
    for name, axis in zip(("xs", "ys"), axes, strict=True):
        if axis.ndim != 1 or len(axis) == 0 or not all(map(math.isfinite, axis.tolist())):
            raise ValueError(f"`{name}` must hold at least one value, all finite, got {axis}.")
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _kind(v: Tensor) -> str:
    return f"shape {list(v.shape)} in {v.dtype} on {v.device}"
