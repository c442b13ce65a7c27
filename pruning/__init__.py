"""Sparse weights from dense ones without leaving the valley: directional pruning and gRDA."""

from hessian.batch_statistics import recalibrate_batch_norm_
from pruning.calibration import CalibrationWarning
from pruning.compensated import CompensatedPruned, compensate, compensated_prune
from pruning.compensated_solvers import EigenspaceSolver, KrylovSolver, Stage
from pruning.dense_distance import DenseDistance
from pruning.directional import (
    directional_prune,
    first_clip,
    lambda_for_sparsity,
    soft_threshold,
)
from pruning.directional_path import PathPruned, directional_path, directional_paths
from pruning.gradual_magnitude import GradualMagnitude
from pruning.grda import GRDA, TheoremWarning
from pruning.keep_zeros import KeptZeros, keep_zeros
from pruning.layer_inputs import LayerInputs, input_moments
from pruning.layer_trim import LayerTrim
from pruning.magnitude import magnitude_prune, random_prune
from pruning.masks import Masks
from pruning.net_trim_layer import net_trim_layer, net_trim_path
from pruning.net_trim_network import net_trim
from pruning.net_trim_program import LayerProgram
from pruning.net_trim_result import NetworkTrim, TrimmedLayer
from pruning.net_trim_sparsity import (
    SparsityTrim,
    net_trim_to_sparsities,
    net_trim_to_sparsity,
)
from pruning.obc import LayerError, LayerTrace, ObcPruned, ObcTraces, obc_traces
from pruning.obd import ObdPruned, obd_prune
from pruning.pruned import Pruned
from pruning.scores import Scores, directional_scores, flat_response, schedule_response
from pruning.sparse_layers import to_dense, to_sparse
from pruning.sparse_linear import SparseLinear
from pruning.sparsity_target import SparsityWarning
from pruning.transport import Transport
from pruning.wanda import wanda_prune
from pruning.woodfisher import FisherStage, WoodFisherPruned, woodfisher_prune

__all__ = [
    "GRDA",
    "CalibrationWarning",
    "CompensatedPruned",
    "DenseDistance",
    "EigenspaceSolver",
    "FisherStage",
    "GradualMagnitude",
    "KeptZeros",
    "KrylovSolver",
    "LayerError",
    "LayerInputs",
    "LayerProgram",
    "LayerTrace",
    "LayerTrim",
    "Masks",
    "NetworkTrim",
    "ObcPruned",
    "ObcTraces",
    "ObdPruned",
    "PathPruned",
    "Pruned",
    "Scores",
    "SparseLinear",
    "SparsityTrim",
    "SparsityWarning",
    "Stage",
    "TheoremWarning",
    "Transport",
    "TrimmedLayer",
    "WoodFisherPruned",
    "compensate",
    "compensated_prune",
    "directional_path",
    "directional_paths",
    "directional_prune",
    "directional_scores",
    "first_clip",
    "flat_response",
    "input_moments",
    "keep_zeros",
    "lambda_for_sparsity",
    "magnitude_prune",
    "net_trim",
    "net_trim_layer",
    "net_trim_path",
    "net_trim_to_sparsities",
    "net_trim_to_sparsity",
    "obc_traces",
    "obd_prune",
    "random_prune",
    "recalibrate_batch_norm_",
    "schedule_response",
    "soft_threshold",
    "to_dense",
    "to_sparse",
    "wanda_prune",
    "woodfisher_prune",
]
