"""The training loss as a function of one flat vector, and the curvature there."""

from hessian.blocks import block_diagonal_operator, block_operator, layer_slices
from hessian.densities import SpectralCurve, SpectralDensity, spectral_density
from hessian.diagonals import DiagonalEstimate, diagonal
from hessian.distributed import RowShards
from hessian.eigensolvers import leading_eigenspace
from hessian.errors import (
    ConvergenceWarning,
    NonDeterministicError,
    NonFiniteError,
    RankError,
    SecondDerivativeError,
)
from hessian.fisher import fisher_operator
from hessian.function_traces import function_trace, logdet
from hessian.functions import FunctionProduct, apply_function
from hessian.gauss_newton import gauss_newton_operator
from hessian.layers import LayerRow, LayerTable, layer_table
from hessian.loss_statistics import LossStatistics
from hessian.objective import Objective
from hessian.operators import Operator
from hessian.products import hessian_operator
from hessian.storage import load_eigenspace, save, to_pandas
from hessian.subspace import Eigenspace
from hessian.tensor_files import DamagedFileError
from hessian.traces import TraceEstimate, trace
from hessian.unsharded import unsharded

__all__ = [
    "ConvergenceWarning",
    "DamagedFileError",
    "DiagonalEstimate",
    "Eigenspace",
    "FunctionProduct",
    "LayerRow",
    "LayerTable",
    "LossStatistics",
    "NonDeterministicError",
    "NonFiniteError",
    "Objective",
    "Operator",
    "RankError",
    "RowShards",
    "SecondDerivativeError",
    "SpectralCurve",
    "SpectralDensity",
    "TraceEstimate",
    "apply_function",
    "block_diagonal_operator",
    "block_operator",
    "diagonal",
    "fisher_operator",
    "function_trace",
    "gauss_newton_operator",
    "hessian_operator",
    "layer_slices",
    "layer_table",
    "leading_eigenspace",
    "load_eigenspace",
    "logdet",
    "save",
    "spectral_density",
    "to_pandas",
    "trace",
    "unsharded",
]
