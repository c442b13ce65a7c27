"""Points of a training run, or differences of two, seen in a few directions of weight space."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from scipy.special import betaincinv
from torch import Tensor

# Beyond this, coordinates of weights in float32 (eps 1.2e-7) keep no certain digit.
MAX_CONDITION = 1e6
# Rows turned into float64 at a time, to keep copies of large bases small.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Trajectory:
    """Points of a run in the coordinates of a basis, and how much of them lies outside it."""

    coordinates: Float64[Tensor, "t k"]
    """Least-squares coefficients of point − center, one point a row."""
    residuals: Float64[Tensor, " t"]
    """Distance of every point from the subspace through the center."""
    distances: Float64[Tensor, " t"]
    """Distance of every point from the center."""

    @property
    def explained_fraction(self) -> Float64[Tensor, " t"]:
        """1 − residual² / distance² of every point; NaN for a point at the center."""
        return 1 - (self.residuals / self.distances).square()


def project_trajectory(
    points: Float[Tensor, "t d"], basis: Float[Tensor, "d k"], center: Float[Tensor, " d"]
) -> Trajectory:
    """Project points onto the subspace that a basis spans through a center.

    Solves least squares through the k x k Gram matrix, so the basis need not be orthonormal and a
    coordinate of 1 means one whole basis vector. Sums run in float64.

    Args:
        points: One point a row, shape [t, d].
        basis: One direction a column, shape [d, k], e.g. leading eigenvectors.
        center: The point with coordinates 0, shape [d].

    Returns:
        Coordinates with the distances left out of the picture.

    Raises:
        ValueError: If the basis is close to dependent: its Gram matrix, columns scaled to length
            one, has a condition number above 1e6; or if a column is zero or not finite.

    Example:
        >>> import torch
        >>> basis = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
        >>> found = project_trajectory(torch.tensor([[3.0, 1.0, 4.0]]), basis, torch.zeros(3))
        >>> found.coordinates.round(decimals=6), found.residuals
        (tensor([[1., 1.]], dtype=torch.float64), tensor([4.], dtype=torch.float64))
    """
    return Projector(basis, center)(points)


class Projector:
    """What `project_trajectory` does, for points that come one after the other.

    The Gram matrix is computed once, so that a point costs k inner products.

    Args:
        basis: One direction a column, shape [d, k].
        center: The point with coordinates 0, shape [d].

    Raises:
        ValueError: If the basis is close to dependent, has a column that is zero or not finite, or
            another length than the center.

    Example:
        >>> import torch
        >>> seen = Projector(torch.tensor([[2.0], [0.0]]), torch.zeros(2))
        >>> seen(torch.tensor([[3.0, 1.0]])).coordinates
        tensor([[1.5000]], dtype=torch.float64)
    """

    def __init__(self, basis: Float[Tensor, "e k"], center: Float[Tensor, " d"]) -> None:
        if len(basis) != len(center):
            raise ValueError(
                f"`basis` must have one row for each of the {len(center)} weights of `center`, got "
                f"{len(basis)}. Directions of another model or selection do not fit."
            )
        self.basis, self.center = basis, center
        self._lengths, self._scaled = _scaled_gram(basis)

    def __call__(self, points: Float[Tensor, "t d"]) -> Trajectory:
        """Return the coordinates of some points, one a row.

        Raises:
            ValueError: If the points have another length than the center.
        """
        coordinates, _ = self.solve(points)
        residuals = torch.zeros(len(points), dtype=torch.float64)
        distances = torch.zeros(len(points), dtype=torch.float64)
        for D, B in _blocks(points, self.basis, self.center):
            distances += D.square().sum(dim=1).cpu()
            residuals += (D - coordinates.to(D) @ B.T).square().sum(dim=1).cpu()
        return Trajectory(coordinates, residuals.sqrt(), distances.sqrt())

    def solve(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return coordinates of points, [t, k], and inner products with the basis, on the CPU."""
        if points.shape[1:] != self.center.shape:
            raise ValueError(
                f"`points` must hold one point of {len(self.center)} weights a row, got shape "
                f"{list(points.shape)}."
            )
        products = torch.zeros(len(points), self.basis.shape[1], dtype=torch.float64)
        for D, B in _blocks(points, self.basis, self.center):
            products += (D @ B).cpu()
        scaled = torch.linalg.solve(self._scaled, (products / self._lengths).T).T
        return scaled / self._lengths, products


def share_in_subspace(delta: Float[Tensor, " d"], basis: Float[Tensor, "d k"]) -> float:
    """Return |P δ| / |δ| for the orthogonal projector P on the span of the basis.

    A number to hold against `random_share`: sqrt(k/d) is what a direction without any preference
    scores. Figure 6 of Chao et al. (2020) is too small by sqrt(10), since it divides by ten copies
    of |δ|²; this is the true ratio.

    Args:
        delta: A difference of weights, shape [d].
        basis: One direction a column, shape [d, k]; need not be orthonormal.

    Returns:
        The share, between 0 and 1.

    Raises:
        ValueError: If delta is zero, or the basis close to dependent as in `project_trajectory`.

    Example:
        >>> import torch
        >>> share_in_subspace(torch.tensor([3.0, 4.0]), torch.tensor([[2.0], [0.0]]))
        0.6

    References:
        Chao et al. (2020), Directional pruning of deep neural networks, figure 6.
    """
    size = float(delta.to(torch.float64).norm())
    if size == 0:
        raise ValueError("`delta` must not be zero: a share of nothing is undefined.")
    coordinates, products = Projector(basis, torch.zeros_like(delta)).solve(delta[None])
    # δᵀB (BᵀB)⁻¹ Bᵀδ: no cancellation, also for a tiny share.
    return min(math.sqrt(max(float((coordinates * products).sum()), 0.0)) / size, 1.0)


def random_share(k: int, d: int) -> float:
    """Return sqrt(k/d), the root mean square of the share of a random direction.

    The mean of the share itself is a little smaller; by Jensen's inequality, and for k = 1 by a
    factor sqrt(2/π) in high dimension.

    Args:
        k: Dimension of the subspace.
        d: Dimension of the space.

    Returns:
        The share that a difference without any preference scores.

    Raises:
        ValueError: If k is not between 1 and d.

    Example:
        >>> random_share(1, 100)
        0.1
    """
    _require_dimensions(k, d)
    return math.sqrt(k / d)


def random_share_interval(k: int, d: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval of the share of a random direction.

    Exact for a direction uniform on the sphere: the squared share follows the Beta distribution
    with parameters k/2 and (d − k)/2.

    Args:
        k: Dimension of the subspace.
        d: Dimension of the space.
        level: Probability of the interval, in (0, 1).

    Returns:
        Its two ends, as shares.

    Raises:
        ValueError: If k is not between 1 and d, or level not in (0, 1).

    Example:
        >>> low, high = random_share_interval(1, 3)  # for one of three, the share is uniform
        >>> round(low, 6), round(high, 6)
        (0.025, 0.975)
    """
    _require_dimensions(k, d)
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level}.")
    if k == d:
        return 1.0, 1.0
    low, high = (betaincinv(k / 2, (d - k) / 2, (1 + side * level) / 2) for side in (-1, 1))
    return math.sqrt(low), math.sqrt(high)


def _scaled_gram(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the columns, and their Gram matrix after scaling them to one, on the CPU."""
    gram = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)
    for start in range(0, len(basis), BLOCK):
        B = basis[start : start + BLOCK].to(torch.float64)
        gram += (B.T @ B).cpu()
    lengths = gram.diagonal().sqrt()
    for j, length in enumerate(lengths.tolist()):
        if not (length > 0 and math.isfinite(length)):
            raise ValueError(
                f"`basis` must have columns of positive, finite length, got {length} in column {j}."
            )
    scaled = gram / lengths / lengths[:, None]
    condition = float(torch.linalg.cond(scaled))
    if not condition <= MAX_CONDITION:
        raise ValueError(
            "`basis` must have independent columns, but their Gram matrix has condition number "
            f"{condition:.3g}, above {MAX_CONDITION:.0e}. Leave out a direction."
        )
    return lengths, scaled


def _blocks(points: Tensor, basis: Tensor, center: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut points − center, [t, block], and the basis, [block, k], along d, in float64."""
    for start in range(0, len(center), BLOCK):
        rows = slice(start, start + BLOCK)
        base = center[rows].to(torch.float64)
        yield points[:, rows].to(torch.float64) - base, basis[rows].to(torch.float64)


def _require_dimensions(k: int, d: int) -> None:
    if not 1 <= k <= d:
        raise ValueError(f"`k` must be between 1 and d = {d}, got {k}.")
