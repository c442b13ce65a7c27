"""The trace of a symmetric matrix from random probes."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.operators import Operator


@dataclass(frozen=True)
class TraceEstimate:
    """An unbiased estimate of a trace with its standard error."""

    value: float
    standard_error: float
    """Standard deviation of the samples over the square root of their number."""
    samples: Float[Tensor, " p"]
    """vᵀ A v for every probe, in float64."""
    num_products: int


def trace(operator: Operator, *, num_probes: int = 30, seed: int = 0) -> TraceEstimate:
    """Estimate the trace by Hutchinson's method with random signs.

    The variance of one probe is 2 (‖A‖²_F − Σ A_jj²), so a diagonal matrix needs one probe only.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        num_probes: Number of probes, each one product; at least 2 for a standard error.
        seed: Seed of the probes, drawn on the CPU; the global random state is not used.

    Returns:
        The mean over probes with its standard error.

    Raises:
        ValueError: If ``num_probes`` is below 2.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import torch
        >>> trace(Operator.from_matrix(torch.diag(torch.tensor([1.0, 2.0])))).value
        3.0

    References:
        Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
    """
    if num_probes < 2:
        raise ValueError(
            f"`num_probes` must be at least 2 to give a standard error, got {num_probes}."
        )
    generator = torch.Generator().manual_seed(seed)
    samples = torch.empty(num_probes, dtype=torch.float64)
    for i in range(num_probes):
        bits = torch.randint(0, 2, (operator.size,), generator=generator)
        v = (2 * bits - 1).to(device=operator.device, dtype=operator.dtype)
        samples[i] = torch.dot(v.to(torch.float64), (operator @ v).to(torch.float64))
    error = float(samples.std()) / math.sqrt(num_probes)
    return TraceEstimate(float(samples.mean()), error, samples, num_probes)
