"""The principal components of a trajectory, through the Gram matrix of its points."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from landscape.directions import BLOCK, Directions, with_fixed_signs

Center = Literal["mean", "last"]


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions along which the points of a run spread most."""

    directions: Directions
    """Orthonormal components, the one with the largest share first."""
    center: Float[Tensor, " d"]
    """The point that is subtracted: coordinates 0."""
    explained: Float64[Tensor, " k"]
    """Share of the squared distances from the center that lies along each component."""


def principal_components(
    points: Float[Tensor, "t d"], *, num: int = 2, center: Center = "mean"
) -> PrincipalComponents:
    """Return the principal components of a trajectory.

    Pass ``directions.basis`` and ``center`` to `project_trajectory` for the coordinates, or to a
    plane. A large share of the first two is no finding by itself: a random walk in high dimension
    has it as well, and draws Lissajous curves. Points are weights alone; running statistics of
    batch norm have other units and do not belong in the distance.

    Args:
        points: One checkpoint a row, shape [t, d].
        num: Number of components, at most t − 1.
        center: ``"mean"`` subtracts the mean of the points, as principal component analysis does;
            ``"last"`` the last point, as Li et al. (2018) write.

    Returns:
        Components with their shares. Costs the Gram matrix, t² d multiplications, and no matrix of
        d rows but the points themselves.

    Raises:
        ValueError: If there are fewer than two points, all points are equal, they are not finite,
            or they span fewer than ``num`` dimensions.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [3.0, 1.0], [6.0, 0.0], [9.0, 1.0]])
        >>> found = principal_components(points, num=1)
        >>> round(float(found.explained[0]), 2)
        0.98

    References:
        Li et al. (2018), Visualizing the loss landscape of neural nets, section 7.
        Antognini & Sohl-Dickstein (2018), PCA of high dimensional random walks with comparison to
        neural network training.
    """
    if points.ndim != 2 or len(points) < 2:
        got = f"shape {list(points.shape)}" if points.ndim != 2 else str(len(points))
        raise ValueError(
            "`points` must hold at least 2 checkpoints, one a row, to have a component, got "
            f"{got}. Record more."
        )
    t = len(points)
    if not 1 <= num <= t - 1:
        raise ValueError(f"`num` must be between 1 and {t - 1}, got {num} for {t} points.")
    if center not in ("mean", "last"):
        raise ValueError(f'`center` must be "mean" or "last", got "{center}".')
    gram = torch.zeros(t, t, dtype=torch.float64)
    size = 0.0
    for rows in _columns(points):
        M = _centered(points[:, rows], center)
        gram += (M @ M.T).cpu()
        size = max(size, float(points[:, rows].abs().max()))
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("`points` must be finite, got a NaN or an infinity.")
    # Rounding moves an entry by half a unit in the last place, and a Gram entry by d of these.
    rounding = points.shape[1] * (torch.finfo(points.dtype).eps * size) ** 2
    values, U = torch.linalg.eigh(gram)
    values, U = values.flip(0), U.flip(1)
    rank = int((values > max(rounding, 1e-13 * float(values[0]))).sum())
    if rank == 0:
        raise ValueError(
            f"`points` must differ, but all {t} checkpoints are equal to rounding. Did the weights "
            "train, and were copies of them kept?"
        )
    if rank < num:
        raise ValueError(
            f"`points` must span at least {num} dimensions, got {rank}. Lower `num`, or record "
            "more checkpoints."
        )
    vectors = torch.empty(num, points.shape[1], dtype=points.dtype, device=points.device)
    scale = U[:, :num] / values[:num].sqrt()
    for rows in _columns(points):
        M = _centered(points[:, rows], center)
        vectors[:, rows] = (scale.to(M).T @ M).to(points.dtype)
    explained = values[:num] / values.clamp(min=0).sum()
    words = {"center": center, "checkpoints": t, "explained": explained.tolist()}
    names = tuple(f"PC {i + 1} ({100 * x:.1f} %)" for i, x in enumerate(explained.tolist()))
    origin = points.mean(dim=0, dtype=torch.float64).to(points.dtype)
    return PrincipalComponents(
        Directions(with_fixed_signs(vectors), "principal components", names, words),
        origin if center == "mean" else points[-1].clone(),
        explained,
    )


def _columns(points: Tensor) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, points.shape[1], BLOCK)]


def _centered(part: Tensor, center: Center) -> Tensor:
    M = part.to(torch.float64)
    return M - (M.mean(dim=0) if center == "mean" else M[-1])
