"""Sparse weights from dense ones without leaving the valley: directional pruning and gRDA."""

from pruning.directional import (
    Pruned,
    directional_prune,
    first_clip,
    lambda_for_sparsity,
    magnitude_prune,
    soft_threshold,
)
from pruning.gradual_magnitude import GradualMagnitude
from pruning.grda import GRDA, TheoremWarning
from pruning.scores import Scores, directional_scores, flat_response, schedule_response
from pruning.sparsity_target import SparsityWarning
from pruning.transport import Transport

__all__ = [
    "GRDA",
    "GradualMagnitude",
    "Pruned",
    "Scores",
    "SparsityWarning",
    "TheoremWarning",
    "Transport",
    "directional_prune",
    "directional_scores",
    "first_clip",
    "flat_response",
    "lambda_for_sparsity",
    "magnitude_prune",
    "schedule_response",
    "soft_threshold",
]
