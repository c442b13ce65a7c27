"""What ``flatvalley spectrum`` is asked, and what it finds at one or several points."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hessian import Eigenspace
from hessian.subspace import Which

Record = dict[str, Any]
Part = Literal["trace", "density", "layers"]


@dataclass(frozen=True)
class SpectrumConfig:
    """Settings of the measurement.

    Raises:
        ValueError: If one is out of range; the message says what is needed.
    """

    k: int = 10
    which: str = "magnitude"
    """``"magnitude"``, ``"largest"``, ``"smallest"`` or ``"both"``."""
    tol: float = 1e-4
    """Residual wanted of every eigenpair, relative to the largest eigenvalue."""
    rtol: float = 0.05
    """Standard error wanted of the trace, relative to it."""
    probes: int = 10
    """Random vectors for the density and for the traces of the layers."""
    steps: int = 80
    """Lanczos steps for every probe of the density."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.probes < 2:
            raise ValueError(
                f"`probes` must be at least 2 to give a standard error, got {self.probes}."
            )
        for name in ("tol", "rtol"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name):g}.")
        if self.which not in get_args(Which):
            raise ValueError(
                f'`which` must be one of {", ".join(get_args(Which))}, got "{self.which}".'
            )


@dataclass(frozen=True)
class Limits:
    """What the measurement may cost. No number depends on it, only how far it gets."""

    max_products: int = 1000
    max_basis: int | None = None
    """Most Lanczos vectors in memory; None for what ``leading_eigenspace`` chooses."""
    memory_budget: int | None = None
    """Bytes for graphs that are kept between products; None for a share of what is free."""

    def __post_init__(self) -> None:
        if self.max_products < 2:
            raise ValueError(f"`max_products` must be at least 2, got {self.max_products}.")


@dataclass(frozen=True)
class Measured:
    """What was measured at one point, with the evidence for it."""

    name: str
    size: int
    """Number of weights."""
    samples: int
    batches: int
    loss: float
    loss_error: float
    """Standard error over the samples; NaN if the criterion cannot be taken apart by sample."""
    gradient: Tensor
    space: Eigenspace
    trace: Record | None = None
    """``value``, ``standard_error``, ``num_products`` and ``converged`` of the trace."""
    density: Mapping[str, Tensor] | None = None
    """``grid``, ``density``, ``standard_error`` on it, ``sigma``, ``nodes`` and ``weights``."""
    layers: Sequence[Record] | None = None
    """For every layer the fields of a ``LayerRow``."""
    costs: Mapping[str, Record] = field(default_factory=dict)
    """For every part ``products``, ``seconds``, ``method`` and ``warnings``."""

    @property
    def gradient_norm(self) -> float:
        """‖∇L‖₂ at the point."""
        return float(self.gradient.to(torch.float64).norm())

    @property
    def gradient_share(self) -> float:
        """‖V Vᵀ ∇L‖ / ‖∇L‖, the part of the gradient in the eigenspace; NaN without a gradient."""
        inside = float(self._coordinates().norm())
        return inside / self.gradient_norm if self.gradient_norm > 0 else math.nan

    @property
    def predicted_fall(self) -> float:
        """What the loss would fall by, on the quadratic model, along the positive eigenvectors.

        Σ (vᵢ · ∇L)² / (2 λᵢ) over the pairs with λᵢ above its residual.
        """
        values = self.space.values.cpu()
        sure = values > self.space.residuals.cpu()
        inside = self._coordinates()[sure]
        return float((inside.square() / (2 * values[sure])).sum())

    @property
    def lowest(self) -> tuple[float, float]:
        """The smallest eigenvalue among the pairs, and its residual."""
        i = int(self.space.values.argmin())
        return float(self.space.values[i]), float(self.space.residuals[i])

    def _coordinates(self) -> Tensor:
        vectors = self.space.vectors
        return (vectors.T @ self.gradient.to(vectors)).to("cpu", torch.float64)


@dataclass(frozen=True)
class SpectrumFindings:
    """What was measured at all points."""

    config: SpectrumConfig
    description: str
    points: Sequence[Measured]

    @property
    def converged(self) -> bool:
        """Whether every eigenpair, trace and layer reached its tolerance."""
        return all(
            point.space.converged
            and (point.trace is None or bool(point.trace["converged"]))
            and all(row["converged"] for row in point.layers or ())
            for point in self.points
        )
