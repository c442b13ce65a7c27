"""How likely an eigenvalue beyond given bounds is to hide from a Krylov basis."""

import math
from dataclasses import dataclass, field

RISK = 1e-3
"""A search ends when an eigenvalue that it missed would have been this unlikely."""


@dataclass
class Search:
    """A Lanczos process in the complement of a basis, from a random direction z.

    With P the projector on the complement of the basis, the process builds the polynomials
    π₀, π₁, … that are orthonormal for the spectral measure of P A P and z. For an eigenpair (λ, u)
    of P A P that measure has the mass (z·u)² at λ, and

        (z·u)² ≤ 1 / Σ πᵢ(λ)²,

    which falls exponentially in the number of products for λ outside of what the process has seen
    of the spectrum. A copy of an eigenvalue that the basis holds is such an eigenpair: it is
    orthogonal to the whole Krylov space of its twin. The mass of a random z is known in
    distribution, so the chance that it is that small bounds the chance of a missed eigenvalue.

    References:
        Akhiezer (1965), The Classical Moment Problem, chapter 2, on 1 / Σ πᵢ² as the largest mass.
        Kuczynski & Wozniakowski (1992), on Lanczos from a random start.
    """

    bounds: list[float]
    """Where eigenvalues would matter: beyond these points, on the side away from the rest."""
    merit: float
    """Merit of the leading values when the search began; it can only grow."""
    margin: float
    """By how much the merit grows if a leading value was missed."""
    dimension: int
    """Dimension of the complement."""
    cut_short: bool = False
    """Whether the basis was compressed meanwhile, after which the bound says nothing."""
    last: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    last_beta: float = 0.0

    def __post_init__(self) -> None:
        if not self.sums:
            self.last = [1.0] * len(self.bounds)
            self.before = [0.0] * len(self.bounds)
            self.sums = [1.0] * len(self.bounds)

    def step(self, alpha: float, beta: float) -> None:
        """Take in one product: the new diagonal and off-diagonal entry of T."""
        for i, x in enumerate(self.bounds):
            if math.isinf(self.sums[i]):
                continue
            rest = (x - alpha) * self.last[i] - self.last_beta * self.before[i]
            self.before[i], self.last[i] = self.last[i], rest / beta if beta > 0 else math.inf
            self.sums[i] += self.last[i] * self.last[i]
        self.last_beta = beta

    @property
    def chance(self) -> float:
        """Bound on the chance that an eigenvalue beyond the bounds was missed."""
        # The mass of one direction is near χ²/dimension, with density 1/√(2π x) near zero.
        total = sum(math.sqrt(2 * self.dimension / (math.pi * s)) for s in self.sums)
        return min(1.0, total)
