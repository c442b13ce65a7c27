"""Planes through weight space with orthonormal axes, in units of weight-space distance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# A hundredth of the 1 % at which figures say that a point lies off the plane.
ORTHONORMAL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Plane:
    """The plane origin + x u + y v.

    Args:
        origin: Weights at x = y = 0, shape [d].
        u: Unit vector of the x axis, shape [d].
        v: Unit vector of the y axis, orthogonal to u, shape [d].

    Raises:
        ValueError: If u and v are not orthonormal to 1e-4.

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

    def __post_init__(self) -> None:
        u, v = self.u.to(torch.float64), self.v.to(torch.float64)
        lengths, cosine = (float(u.norm()), float(v.norm())), float(torch.dot(u, v))
        errors = (lengths[0] - 1, lengths[1] - 1, cosine)
        if not all(abs(error) <= ORTHONORMAL_TOLERANCE for error in errors):
            raise ValueError(
                "`u` and `v` must be orthonormal, got lengths "
                f"{lengths[0]:.6g} and {lengths[1]:.6g} and inner product {cosine:.6g}. "
                "`Plane.through` makes such axes from three points."
            )

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
        """Return (x, y) of the nearest point of the plane and the distance of w from it."""
        difference = w.to(torch.float64) - self.origin.to(torch.float64)
        u, v = self.u.to(torch.float64), self.v.to(torch.float64)
        x, y = torch.dot(u, difference), torch.dot(v, difference)
        return float(x), float(y), float((difference - x * u - y * v).norm())


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
