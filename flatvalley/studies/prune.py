"""What ``flatvalley prune`` does: one trained network made sparse, and measured around it."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flatvalley.dense_network import DenseNetwork, Measured
from flatvalley.fine_tuning import fine_tune_
from flatvalley.pruners import Pruner, pruner
from flatvalley.pruning_problem import PrunedAt, PruningProblem, require_sparsities
from flatvalley.run import Run
from flatvalley.sparse_weights import save_sparse_weights
from flatvalley.studies.prune_sources import Source
from flatvalley.trainees import model_state
from hessian import ConvergenceWarning
from pruning import CalibrationWarning
from pruning.allocation import Allocation

NOTED = (ConvergenceWarning, CalibrationWarning)
"""Warnings that the report repeats."""


@dataclass(frozen=True)
class PruneConfig:
    """Settings of one pruning.

    Raises:
        ValueError: If one is out of range; the message says what it must be.

    Example:
        >>> PruneConfig("magnitude", 0.9, allocation=("*.bias=0", "uniform"))
        Traceback (most recent call last):
        ...
        ValueError: `allocation` must be global, uniform, or PATTERN=SHARE for some, got "uniform".
    """

    method: str
    """See :func:`flatvalley.pruners.pruner`."""
    sparsity: float
    """Share of zeros wanted among all weights that are trained."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of parameters that stay as many as they are."""
    allocation: tuple[str, ...] = ()
    """``global``, ``uniform``, or sparsities by glob pattern such as ``*.bias=0.5``."""
    recalibrate: bool = True
    """Whether the statistics of batch norm are renewed for the sparse weights."""
    fine_tune: int = 0
    """Epochs that the sparse network is trained on, its zeros kept."""
    fine_tune_lr: float | None = None
    """Learning rate of that; None for a tenth of the training's."""

    def __post_init__(self) -> None:
        require_sparsities([self.sparsity])
        pruner(self.method)
        _allocation(self.allocation)
        if self.fine_tune < 0:
            raise ValueError(f"`fine_tune` must be at least 0, got {self.fine_tune}.")
        if self.fine_tune_lr is not None and not (
            self.fine_tune and 0 < self.fine_tune_lr < math.inf
        ):
            raise ValueError(
                "`fine_tune_lr` must be positive and finite, and go with `fine_tune`, got "
                f"{self.fine_tune_lr}."
            )

    @property
    def pruner(self) -> Pruner:
        """The method, parsed."""
        return pruner(self.method)

    @property
    def shares(self) -> Allocation | None:
        """The allocation, parsed; None for the method's own."""
        return _allocation(self.allocation)


@dataclass(frozen=True)
class Layer:
    """What is left of one parameter."""

    name: str
    shape: tuple[int, ...]
    size: int
    left: int
    """Weights that are not zero."""

    @property
    def density(self) -> float:
        """Share of the weights that is left."""
        return self.left / self.size if self.size else 1.0


@dataclass(frozen=True)
class PruneFindings:
    """The sparse network beside the dense one."""

    config: PruneConfig
    description: str
    """What was pruned, in a line."""
    dense: Measured
    pruned: Measured
    tuned: Measured | None
    """After fine-tuning, if there was any."""
    result: PrunedAt
    layers: tuple[Layer, ...]
    num_weights: int
    num_dense: int
    """Weights of the dense network that are not zero."""
    num_samples: int
    """Calibration samples."""
    num_test_samples: int
    recalibrated: bool
    notes: tuple[str, ...]
    file_bytes: tuple[int, int]
    """Sizes of the files of weights: plain, and compact."""

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights."""
        return 1.0 - sum(layer.left for layer in self.layers) / self.num_weights

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The evidence of every stage as rows of a table."""
        return [asdict(stage) for stage in self.result.stages]

    @property
    def trimmed_layers(self) -> list[dict[str, Any]]:
        """What Net-Trim measured on every layer, before the cut, as rows of a table."""
        layers = () if self.result.trim is None else self.result.trim.trim.layers
        return [
            {
                "weight": layer.weight,
                "kind": layer.kind,
                "reason": layer.reason,
                "epsilon": layer.epsilon,
                "discrepancy": layer.discrepancy,
                "violation": layer.violation,
                "output_discrepancy": layer.output_discrepancy,
                "drift": layer.drift,
                "objective": sum(trim.objective for trim in layer.trims),
                "lower_bound": sum(trim.lower_bound for trim in layer.trims),
                "density": layer.density,
                "iterations": sum(trim.iterations for trim in layer.trims),
                "seconds": sum(trim.seconds for trim in layer.trims),
                "converged": layer.converged,
            }
            for layer in layers
        ]


def prune(run: Run, dense: DenseNetwork, config: PruneConfig, source: Source) -> PruneFindings:
    """Prune a network, measure it, and write its weights into the run's folder.

    The weights are written once all is computed, every file whole or not at all: a run that is cut
    off leaves none. The model stays as it is.

    Args:
        run: The folder.
        dense: The network.
        config: Settings.
        source: What it is, and how it was trained.

    Raises:
        ValueError: If the method cannot do what is asked, or the sparsity cannot be reached.
        NonFiniteError: If a weight, a loss or a product is not finite.
    """
    problem = dense.problem(exclude=config.exclude, allocation=config.shares)
    with noted() as notes:
        (result,) = config.pruner.prune(problem, [config.sparsity])
    recalibrated = config.recalibrate and dense.has_batch_norm
    model = dense.with_weights(result.weights, recalibrate=recalibrated)
    test = dense.data.test
    before, after = dense.measure(dense.model, test), dense.measure(model, test)
    tuned = None
    if config.fine_tune:
        rate = config.fine_tune_lr
        fine_tune_(model, source.config, source.trained, epochs=config.fine_tune, lr=rate)
        tuned = dense.measure(model, test)
    ends = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    state = model_state(model)
    sparse = save_sparse_weights(run.path / "sparse.safetensors", state)
    plain = run.write_tensors("weights.safetensors", state)
    return PruneFindings(
        config,
        source.description,
        before,
        after,
        tuned,
        result,
        layers_of(problem, torch.cat(ends)),
        len(result.weights),
        int(torch.count_nonzero(problem.w)),
        problem.num_samples,
        test.num_samples,
        recalibrated,
        tuple(notes),
        (plain.stat().st_size, sparse.stat().st_size),
    )


def _allocation(texts: Sequence[str]) -> Allocation | None:
    if not texts:
        return None
    if texts in (("global",), ("uniform",)):
        return "global" if texts == ("global",) else "uniform"
    found = {}
    for text in texts:
        pattern, _, share = text.rpartition("=")
        try:
            found[pattern] = float(share)
        except ValueError:
            pattern = ""
        if not pattern:
            raise ValueError(
                f'`allocation` must be global, uniform, or PATTERN=SHARE for some, got "{text}".'
            )
    return found


def layers_of(problem: PruningProblem, w: Tensor) -> tuple[Layer, ...]:
    """Return what weights leave of every parameter."""
    return tuple(
        Layer(name, tuple(t.shape), t.numel(), int(torch.count_nonzero(t)))
        for name, t in problem.objective.unflatten(w).items()
    )


@contextmanager
def noted() -> Iterator[list[str]]:
    """Collect what methods of pruning warn of, each text once; other warnings are shown."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        for category in NOTED:
            warnings.simplefilter("always", category)
        yield notes
    for warning in caught:
        if issubclass(warning.category, NOTED):
            if str(warning.message) not in notes:
                notes.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def prune_tables(findings: PruneFindings) -> dict[str, Sequence[dict[str, Any]]]:
    """Return the study's tables by name: rows of plain numbers."""
    result = findings.result
    tables: dict[str, Sequence[dict[str, Any]]] = {
        "networks": [
            {"network": "dense", "sparsity": 1.0 - findings.num_dense / findings.num_weights}
            | asdict(findings.dense),
            {"network": "pruned", "sparsity": findings.sparsity}
            | asdict(findings.pruned)
            | {
                "products": result.products,
                "gradients": result.gradients,
                "iterations": result.iterations,
                "seconds": result.seconds,
            },
            *(
                [{"network": "tuned", "sparsity": findings.sparsity} | asdict(findings.tuned)]
                if findings.tuned
                else []
            ),
        ],
        "layers": [
            {
                "parameter": layer.name,
                "shape": "x".join(map(str, layer.shape)),
                "weights": layer.size,
                "left": layer.left,
                "density": layer.density,
            }
            for layer in findings.layers
        ],
    }
    evidence = {"stages": findings.stages, "trimmed_layers": findings.trimmed_layers}
    return tables | {name: rows for name, rows in evidence.items() if rows}
