"""The leading eigenspace of a symmetric matrix, with the evidence for it."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.operators import Operator
from hessian.vector_rows import chunks, dot, row_dots

Which = Literal["magnitude", "largest", "smallest", "both"]


@dataclass(frozen=True)
class Eigenspace:
    """Leading eigenpairs of a symmetric matrix A, with residuals that say how good they are."""

    values: Float[Tensor, " k"]
    """Eigenvalues in float64, leading first."""
    vectors: Float[Tensor, "n k"]
    """Orthonormal eigenvectors, one a column."""
    residuals: Float[Tensor, " k"]
    """‖A v − λ v‖₂ for every pair, in units of A: from products made after the iteration, or, if
    ``measured`` is False, what the iteration concludes from the products it made."""
    gap: float
    """Estimated distance from these eigenvalues to the rest of the spectrum, in units of A.

    Taken from the next Ritz value, so it is an estimate from above. NaN where the solver knows
    none, infinity where these are all eigenvalues.
    """
    num_products: int
    """Products with A that were spent, the measuring of the residuals included if it was done."""
    converged: bool
    """Whether every residual is at most the tolerance that was asked for."""
    which: Which = "magnitude"
    """How the values lead: with ``"both"``, from the largest and the smallest in turn."""
    missed: float = math.nan
    """Bound on the chance that one more eigenvalue belongs here, as another copy of a multiple
    one or one that the start did not see; over the random directions tried. NaN if not tested, or
    tested in a basis too small for a bound."""
    measured: bool = True
    """Whether the residuals come from products of their own, which check the operator, too."""
    num_exact: int = 0
    """How many of the products were made with an ``exact`` operator beside a fast one."""

    def project_sharp(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return V Vᵀ x, the part of x in the eigenspace. Costs 4 n k flops."""
        return self.vectors @ row_dots([self.vectors.T], x).to(x.dtype)

    def project_flat(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return x − V Vᵀ x, the part of x outside the eigenspace: Π₀ x of directional pruning."""
        return x - self.project_sharp(x)

    @property
    def projector_error_bound(self) -> float:
        """Bound on ‖V Vᵀ − exact projector‖₂ by the Davis-Kahan sin Θ theorem.

        The Frobenius norm of the residuals over the gap; never more than 1, which is what two
        projectors of one rank can differ by at most. As good as the gap, which is estimated: a
        leading eigenvalue that the solver missed is not in it. NaN where the gap is unknown.

        References:
            Davis & Kahan (1970), The rotation of eigenvectors by a perturbation III.
        """
        if math.isnan(self.gap):
            return math.nan
        if self.gap <= 0:
            return 1.0
        return min(float(self.residuals.norm()) / self.gap, 1.0)

    def first(self, k: int) -> "Eigenspace":
        """Return the first k pairs, with the gap to the ones left out.

        That gap is known exactly to the pairs at hand. To the rest of the spectrum it is at least
        what the whole eigenspace keeps, and at least what the order of the values leaves.

        Raises:
            ValueError: If k is not between 1 and the number of pairs.
        """
        total = len(self.values)
        if not 1 <= k <= total:
            raise ValueError(f"`k` must be between 1 and {total}, the pairs at hand, got {k}.")
        if k == total:
            return self
        kept, rest = self.values[:k], self.values[k:]
        near = float((kept[:, None] - rest[None, :]).abs().min())
        # Nothing outside leads the last pair, whichever way the values are ordered.
        outside = float((kept.abs() - rest[-1].abs()).min())
        if self.which == "both":  # the others lie between the ends, near either
            outside = -math.inf
        far = outside if math.isnan(self.gap) else max(self.gap, outside)
        if self.which == "both" and math.isnan(self.gap):
            near = math.nan
        return replace(
            self,
            values=kept,
            vectors=self.vectors[:, :k],
            residuals=self.residuals[:k],
            gap=near if math.isnan(near) else max(min(near, far), 0.0),
        )


def measured_eigenspace(
    operator: Operator,
    vectors: Tensor,
    *,
    gap: float,
    num_products: int,
    goal: float,
    which: Which = "magnitude",
    missed: float = math.nan,
) -> Eigenspace:
    """Measure orthonormal vectors [n, k] with k products: Rayleigh quotients and residuals."""
    # Column by column, unless the operator has something better: k vectors less in memory.
    products = (
        (operator @ v for v in vectors.unbind(dim=1))
        if operator.columns is None
        else (operator @ vectors).unbind(dim=1)
    )
    values, residuals = [], []
    for v, product in zip(vectors.unbind(dim=1), products, strict=True):
        value = dot(v, product)
        parts = zip(chunks(v), chunks(product), strict=True)
        squares = [(b.double() - value * a.double()).square().sum() for a, b in parts]
        values.append(value)
        residuals.append(torch.stack(squares).sum().sqrt())
    measured = torch.stack(residuals)
    return Eigenspace(
        torch.stack(values),
        vectors,
        measured,
        gap,
        num_products,
        bool(float(measured.max()) <= goal),
        which,
        missed,
    )
