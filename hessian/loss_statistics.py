"""The loss at one point as a mean over samples, with its standard error."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LossStatistics:
    """Count, sum and sum of squares of per-sample losses at one point, without the regulariser."""

    count: int
    total: float
    total_squares: float

    @property
    def mean(self) -> float:
        """The loss on the data: the mean over samples."""
        return self.total / self.count

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, the samples taken as independent; NaN for one sample."""
        if self.count < 2:
            return math.nan
        spread = max(self.total_squares - self.total**2 / self.count, 0.0)
        return math.sqrt(spread / (self.count - 1) / self.count)
