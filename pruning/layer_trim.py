"""The sparse weights of one layer, and the evidence that comes with them."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

SLACK = 1e-3
"""How far, as a share, a discrepancy may exceed its ε, and inactive outputs the layer's scale."""

RESOLUTION = 1e-6
"""A discrepancy of this share of the targets' norm counts as none: ε = 0 is met up to it."""

DUAL_SHARE = 10.0
"""By what the dual residual may be larger than the primal one: in the objective it counts times the
distance from the optimum."""


@dataclass(frozen=True)
class LayerTrim:
    """Sparse weights of a layer, and what was measured on them in float64."""

    weights: Float[Tensor, "m n"]
    epsilon: float
    discrepancy: float
    """‖(X Uᵀ + S − Y)_Ω‖_F for the weights U, over active outputs Ω; with ``ball="joint"`` that of
    inactive ones above their bound is in it."""
    violation: float
    """By how much an inactive output is above its bound at most, in units of ``scale``."""
    output_discrepancy: float
    """‖ReLU(X Uᵀ + S) − Y‖_F over all outputs, or the same without a ReLU."""
    scale: float
    """Root mean square of the targets of active outputs, in units of the outputs."""
    target_norm: float
    """‖(Y − S)_Ω‖_F: a discrepancy of 10⁻⁶ of it counts as none."""
    objective: float
    """Σ λ |U|."""
    lower_bound: float
    """No weights that satisfy the constraints have an objective below this, by duality; −inf where
    some penalty is zero. After a refit it is still that of the program before."""
    iterations: int
    primal_residual: float
    """Distance between the copies of weights and outputs, as a share of their norm."""
    dual_residual: float
    """What is left of the Lagrangian's gradient, as a share of its parts."""
    converged: bool
    """Whether the weights are feasible, and the residuals at most ``tol`` and ten times that; a
    refit changes weights, which must be feasible then, and leaves the residuals as they were."""
    joint: bool
    """Whether inactive outputs are in the discrepancy rather than bounded one by one."""
    seconds: float
    flops: float
    """Of the iterations' matrix products."""

    @property
    def ratio(self) -> float:
        """Discrepancy over ε; infinity for a discrepancy at ε = 0."""
        if self.epsilon > 0.0:
            return self.discrepancy / self.epsilon
        return math.inf if self.discrepancy else 0.0

    @property
    def feasible(self) -> bool:
        """Whether the discrepancy is at most ε (1 + 10⁻³), and violations are at most 10⁻³."""
        most = max(self.epsilon * (1.0 + SLACK), RESOLUTION * self.target_norm)
        return self.discrepancy <= most and (self.joint or self.violation <= SLACK)

    @property
    def gap(self) -> float:
        """How far the objective may be above the least one, as a share of it; slack may hide it."""
        if self.objective == 0.0:
            return 0.0
        return (self.objective - self.lower_bound) / self.objective

    @property
    def density(self) -> float:
        """Share of weights that are not zero."""
        return float((self.weights != 0).double().mean())


def shortfall(trim: LayerTrim, tol: float) -> str:
    """Return what a trim that has not converged fell short of, and what to do."""
    violation, remedy = "", "Raise `max_iterations`, or `epsilon` if no weights may come as near."
    if not trim.joint:
        violation = f", inactive outputs up to {trim.violation:.2g} of the scale (goal {SLACK:g})"
        if trim.violation > SLACK:
            remedy = (
                "Raise `max_iterations`, try `refit=True`, which sees to the bounds itself, or "
                '`ball="joint"`.'
            )
    return (
        f"Net-Trim did not converge in {trim.iterations} iterations: discrepancy "
        f"{trim.discrepancy:.6g} for ε = {trim.epsilon:.6g}{violation}, residuals "
        f"{trim.primal_residual:.1e} and {trim.dual_residual:.1e} (goals {tol:g} and "
        f"{DUAL_SHARE * tol:g}). {remedy}"
    )
