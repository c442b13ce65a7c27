"""Curves through weight space in closed form, exact at both ends."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Path: TypeAlias = Callable[[float], Tensor]
"""Maps t to weights of shape [d]; t = 0 is the start, t = 1 the end."""


@dataclass(frozen=True)
class Line:
    """The straight line (1 − t) start + t end.

    An entry in which both ends agree stays what it is for every t in [0, 1], so a line between two
    sparse points is zero where both are.

    Args:
        start: Weights at t = 0, shape [d].
        end: Weights at t = 1, shape [d].

    Raises:
        ValueError: If the ends differ in shape, type or device.

    Example:
        >>> import torch
        >>> Line(torch.tensor([0.0, 1.0]), torch.tensor([4.0, 1.0]))(0.25)
        tensor([1., 1.])
    """

    start: Float[Tensor, " d"]
    end: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        _require_alike(self.start, self.end)

    @property
    def size(self) -> int:
        """Number of weights d."""
        return self.start.numel()

    def __call__(self, t: float) -> Float[Tensor, " d"]:
        """Return the weights at t. Outside [0, 1] the line goes on."""
        if t == 0:
            return self.start.clone()  # also keeps the sign of a zero, which lerp loses
        if t == 1:
            return self.end.clone()
        return torch.lerp(self.start, self.end, float(t))


@dataclass(frozen=True)
class BezierCurve:
    """The curve Σ_k B_k(t) P_k with the Bernstein polynomials B_k(t) = C(m, k) (1 − t)^(m−k) t^k.

    It starts at the first control point and ends at the last; the others pull it towards them.
    Differentiable in the control points. Outside [0, 1] the polynomial goes on, and grows like
    |t|^m.

    Args:
        control_points: Points P_0 to P_m, one a row, shape [m + 1, d].

    Raises:
        ValueError: If there are fewer than two control points.

    Example:
        >>> import torch
        >>> curve = BezierCurve(torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 0.0]]))
        >>> curve(0.5)
        tensor([1., 1.])
        >>> curve.coefficients(0.25).tolist()
        [0.5625, 0.375, 0.0625]

    References:
        Garipov et al. (2018), Loss surfaces, mode connectivity, and fast ensembling of DNNs.
    """

    control_points: Float[Tensor, "m d"]

    def __post_init__(self) -> None:
        _require_points(self.control_points)

    @property
    def order(self) -> int:
        """Degree m of the polynomial: 1 is a line, 2 has one bend."""
        return len(self.control_points) - 1

    @property
    def size(self) -> int:
        """Number of weights d."""
        return self.control_points.shape[1]

    def coefficients(self, t: float) -> Float64[Tensor, " m"]:
        """Return B_0(t) to B_m(t), which sum to one, on the CPU."""
        m = self.order
        return torch.tensor(
            [math.comb(m, k) * (1 - t) ** (m - k) * t**k for k in range(m + 1)],
            dtype=torch.float64,
        )

    def __call__(self, t: float) -> Float[Tensor, " d"]:
        """Return the weights at t, in the type of the control points."""
        if t == 0:
            return self.control_points[0].clone()
        if t == 1:
            return self.control_points[-1].clone()
        return self.coefficients(t).to(self.control_points) @ self.control_points


@dataclass(frozen=True)
class PolyChain:
    """The polygonal chain that visits its points at t = 0, 1/m, 2/m, …, 1 on straight lines.

    Differentiable in the points. Outside [0, 1] the first and the last segment go on.

    Args:
        control_points: Points P_0 to P_m, one a row, shape [m + 1, d].

    Raises:
        ValueError: If there are fewer than two points.

    Example:
        >>> import torch
        >>> chain = PolyChain(torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 0.0]]))
        >>> chain(0.25)
        tensor([0.5000, 1.0000])
        >>> chain.coefficients(0.25).tolist()
        [0.5, 0.5, 0.0]

    References:
        Garipov et al. (2018), Loss surfaces, mode connectivity, and fast ensembling of DNNs.
    """

    control_points: Float[Tensor, "m d"]

    def __post_init__(self) -> None:
        _require_points(self.control_points)

    @property
    def num_segments(self) -> int:
        """Number of straight lines m."""
        return len(self.control_points) - 1

    @property
    def size(self) -> int:
        """Number of weights d."""
        return self.control_points.shape[1]

    def coefficients(self, t: float) -> Float64[Tensor, " m"]:
        """Return the weights of the points, at most two not zero, which sum to one, on the CPU."""
        place = t * self.num_segments
        k = min(max(math.floor(place), 0), self.num_segments - 1)
        found = torch.zeros(len(self.control_points), dtype=torch.float64)
        found[k], found[k + 1] = k + 1 - place, place - k
        return found

    def __call__(self, t: float) -> Float[Tensor, " d"]:
        """Return the weights at t, in the type of the points."""
        place = t * self.num_segments
        k = min(max(math.floor(place), 0), self.num_segments - 1)
        start, end = self.control_points[k], self.control_points[k + 1]
        if place == k:  # the points themselves are met exactly
            return start.clone()
        return end.clone() if place == k + 1 else torch.lerp(start, end, place - k)


def _require_points(points: Tensor) -> None:
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(
            "`control_points` must have shape [m + 1, d] with at least a start and an end, "
            f"got {list(points.shape)}."
        )


def _require_alike(start: Tensor, end: Tensor) -> None:
    kinds = [f"{list(p.shape)} {p.dtype} on {p.device}" for p in (start, end)]
    if start.ndim != 1 or kinds[0] != kinds[1]:
        raise ValueError(
            "`start` and `end` must be flat vectors of one length, type and device, got "
            f"{kinds[0]} and {kinds[1]}."
        )
