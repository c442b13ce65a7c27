"""What a Krylov iteration looks for, and where it stands: all of it that a checkpoint keeps."""

import math
from dataclasses import dataclass

from hessian.missed_eigenvalues import Search
from hessian.subspace import Which


@dataclass(frozen=True)
class Task:
    """What is looked for, and with what means."""

    k: int
    tol: float
    max_products: int
    max_basis: int
    which: Which
    seed: int
    multiple: bool
    measure: bool

    @property
    def reserve(self) -> int:
        """Products that are kept for the residuals."""
        return self.k if self.measure else 0


@dataclass
class State:
    """Where the iteration stands, beside the basis."""

    products: int = 0
    draws: int = 0
    """Random directions that were used, the start included."""
    next_check: int = 0
    """Products at which the Ritz values are looked at next."""
    last_products: int = 0
    last_estimate: float = math.inf
    retry_below: float = math.inf
    """Estimate below which residuals are measured again after they disappointed."""
    last_residual: float = math.inf
    """The largest one when they disappointed."""
    stalled: bool = False
    """Whether rounding keeps the residuals up, however low the estimates."""
    tested_merit: float | None = None
    """Merit of the leading values that a search left standing."""
    missed: float = math.nan
    expected: int = 0
    goal: float = math.nan
    search: Search | None = None
    ended: bool = False
    """Whether the budget ended before the Ritz values of the last product were looked at."""
