"""The training loss as a function of one flat vector, and the curvature there."""

from hessian.eigensolvers import leading_eigenspace
from hessian.errors import ConvergenceWarning, NonDeterministicError, NonFiniteError
from hessian.functions import FunctionProduct, apply_function
from hessian.gauss_newton import gauss_newton_operator
from hessian.objective import LossStatistics, Objective
from hessian.operators import Operator
from hessian.products import hessian_operator
from hessian.subspace import Eigenspace
from hessian.traces import TraceEstimate, trace

__all__ = [
    "ConvergenceWarning",
    "Eigenspace",
    "FunctionProduct",
    "LossStatistics",
    "NonDeterministicError",
    "NonFiniteError",
    "Objective",
    "Operator",
    "TraceEstimate",
    "apply_function",
    "gauss_newton_operator",
    "hessian_operator",
    "leading_eigenspace",
    "trace",
]
