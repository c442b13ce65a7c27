"""Simultaneous bands around a curve of means, for statements about its maximum."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

DRAWS = 10_000
"""Draws of the limiting Gaussian process; the 95 % quantile is then good to about 1 %."""


@dataclass(frozen=True)
class Band:
    """Means of samples at several points, and a band that holds all true means at once."""

    mean: Float64[Tensor, " m"]
    standard_error: Float64[Tensor, " m"]
    factor: float
    """Half-width of the band in standard errors; above 1.96 at 95 %, for all points at once."""

    @property
    def low(self) -> Float64[Tensor, " m"]:
        """The lower edge."""
        return self.mean - self.factor * self.standard_error

    @property
    def high(self) -> Float64[Tensor, " m"]:
        """The upper edge."""
        return self.mean + self.factor * self.standard_error


def simultaneous_band(
    samples: Float64[Tensor, "m n"], *, confidence: float = 0.95, seed: int = 0
) -> Band:
    """Return a band that holds the true means at all points together with some confidence.

    The largest of many noisy means is too high on average, because it was selected. The band makes
    up for that: the true maximum lies between the highest points of its edges, with at least the
    confidence asked for, whichever point looks highest. Its width is the quantile of the largest
    |Z_t| of the Gaussian process with the correlations of the samples, which are strong between
    points that share their samples; so it is much narrower than m separate tests would make it.

    Args:
        samples: Value of every sample at every point, all finite; the samples are independent.
        confidence: Between 0 and 1.
        seed: Of the draws, made on the CPU.

    Returns:
        Means, standard errors, and the factor. Points at which all samples agree have no error.
        With fewer than two samples errors and factor are NaN. Some hundred samples are needed for
        the confidence to be what it says.

    References:
        Chernozhukov, Chetverikov, Kato (2013), Gaussian approximations and multiplier bootstrap
        for maxima of sums of high-dimensional random vectors.
    """
    n = samples.shape[1]
    mean = samples.mean(dim=1)
    if n < 2:
        return Band(mean, torch.full_like(mean, math.nan), math.nan)
    centred = samples - mean[:, None]
    error = centred.norm(dim=1) / math.sqrt((n - 1) * n)
    # Rounding leaves something of differences that vanish identically.
    rounding = torch.finfo(samples.dtype).eps * samples.abs().amax(dim=1)
    moves = error > rounding
    if not bool(moves.any()):
        return Band(mean, torch.where(moves, error, 0.0), 0.0)
    unit = centred[moves] / centred[moves].norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(unit @ unit.T)
    root = vectors * values.clamp(min=0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(DRAWS, len(root), generator=generator, dtype=torch.float64)
    largest = (normal @ root.T).abs().amax(dim=1)
    factor = float(torch.quantile(largest, confidence))
    return Band(mean, torch.where(moves, error, 0.0), factor)
