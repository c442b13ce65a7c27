"""WoodFisher: Optimal Brain Surgeon with blocks of an empirical Fisher matrix."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from hessian.finiteness import finite_vector
from hessian.fisher import Kind
from hessian.memory import free_memory
from pruning.allocation import Allocation, keep_mask, zeros_by_parameter
from pruning.dense_distance import DenseDistance
from pruning.fisher_blocks import FisherBlocks, block_bytes, fitting_block_size
from pruning.pruned import Pruned, as_pruned
from pruning.sample_gradients import fisher_rows, require_samples
from pruning.scores import require_weights
from pruning.stages import Schedule, stage_counts

Update = Literal["joint", "single", "none"]

DEFAULT_ROWS = 1000
"""Gradients of which F is made, each of as many samples as that takes."""

FREE_SHARE = 0.5
"""Share of the free memory that blocks may take if no budget is given."""


@dataclass(frozen=True)
class FisherStage:
    """What one stage did, and what it says about itself."""

    sparsity: float
    predicted_change: float
    """½ (u − w)ᵀ F (u − w): the change of the loss by the blocks of the stage's Fisher matrix."""
    loss: float
    """Loss after the stage."""
    tau: float
    """Damping used, in units of the Fisher matrix."""
    num_gradients: int


@dataclass(frozen=True)
class WoodFisherPruned(Pruned):
    """Weights after WoodFisher, and how they came about."""

    stages: tuple[FisherStage, ...]
    predicted_change: float
    """Sum of the stages' predictions."""
    measured_change: float
    """Loss at the end less loss at the start."""
    num_gradients: int
    """Gradients of single samples, or of a few together, that were made."""


def woodfisher_prune(
    w: Float[Tensor, " d"],
    objective: Objective,
    sparsity: float,
    *,
    block_size: int | None = 500,
    damping: float = 0.1,
    kind: Kind | None = None,
    num_samples: int | None = None,
    samples_per_row: int | None = None,
    stages: int | Sequence[float] = 1,
    schedule: Schedule = "geometric",
    update: Update = "joint",
    allocation: Allocation = "global",
    exclude: Sequence[str] = (),
    seed: int = 0,
    memory_budget: int | None = None,
    on_stage: Callable[[FisherStage, Tensor], None] | None = None,
) -> WoodFisherPruned:
    """Remove the weights of least w_q² / [F⁻¹]_qq, and move the others to make up for them.

    F is τ I plus the Fisher matrix, as far as it lies in blocks of ``block_size`` consecutive
    weights of one parameter tensor: the empirical one of an ``Objective``, with its labels, or
    that of drawn targets for a ``DenseDistance``, without any. One ranking goes over all blocks.
    Every stage takes F anew at the weights it finds.

    With m rows (``num_samples`` over ``samples_per_row``), d weights and blocks of B, a stage
    makes m gradients, holds d · min(m, B) numbers, and takes at most some 3 m d · min(m, B) flops
    for the blocks, in float64 where they are solved. So one block of all weights is affordable.
    The ``temperature`` of a ``DenseDistance`` is worth a try, as for ``compensated_prune``.

    Args:
        w: Weights, shape [d]. Zeros stay zero.
        objective: The loss, or the distance to the dense network.
        sparsity: Share of zeros wanted, in [0, 1]: ⌈sparsity · d⌉ zeros, or more where w has them
            already.
        block_size: Weights in a block; None for one block of all weights, over tensors, too.
            Blocks of more weights than there are rows fit the samples rather than the network.
        damping: τ as a share of the mean of diag F over the weights alive. A larger one moves the
            weights less. The paper takes τ = 1e-5 whatever F is.
        kind: ``"empirical"`` or ``"monte_carlo"``, as for ``fisher_operator``. Default: the second
            for a ``DenseDistance``, which has no other, else the first.
        num_samples: Samples whose gradients make F, evenly spread over the data. Default: all.
        samples_per_row: Samples whose gradients are added up before their outer product is taken.
            Default: as many as leave about 1000 rows. Rows of many samples tell more than as many
            rows of one.
        stages: Sparsities on the way, increasing; the last one may be left out. Or their number.
        schedule: How a number of stages cuts the way. ``"geometric"``: every stage removes the
            same share of the weights that are left. ``"cubic"``: the weights to go fall with the
            cube of the stages to go, as in the paper.
        update: ``"joint"`` makes the best move for all weights that go together. ``"single"`` adds
            up the best moves for each of them alone, as the paper does, which is far off where
            many go. ``"none"`` leaves the others where they are.
        allocation: ``"global"``, ``"uniform"`` for equal shares of all parameters, or sparsities
            by glob pattern; see ``keep_mask``.
        exclude: Glob patterns of parameters that stay as many as they are. They may move, and
            count for the sparsity.
        seed: Seed of the draws, made on the CPU; the global random state is not used.
        memory_budget: Bytes for the blocks. Default: half of what is free.
        on_stage: Called after every stage with its evidence and the weights; do not change them.

    Returns:
        The weights, with the evidence of every stage.

    Raises:
        ValueError: If w is not finite or does not fit, a number or a name is out of range, the
            sparsity cannot be reached, stages do not increase, a pattern matches nothing, the
            damping is too small for float64, or the objective is shared by several processes.
        TypeError: If the model's output is not one tensor, or targets are to be drawn for a
            criterion that is no likelihood we know.
        MemoryError: If the blocks do not fit into the budget; the message says which would.
        NonFiniteError: If a gradient or a loss is not finite.

    Example:
        >>> import torch
        >>> from pruning import DenseDistance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.1]]))
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9]])  # almost the same input twice
        >>> distance = DenseDistance(model, X, kind="squared")
        >>> pruned = woodfisher_prune(distance.weights(), distance, 0.5, damping=1e-3)
        >>> pruned.weights.round(decimals=1)  # magnitude pruning leaves 1.0
        tensor([1.1000, 0.0000])

    References:
        Singh & Alistarh (2020), WoodFisher: efficient second-order approximation for neural
        network compression.
        Hassibi & Stork (1993), Second order derivatives for network pruning.
    """
    require_weights(w)
    objective.require_vector(w, "w")
    _check(block_size, damping, update, memory_budget)
    kind = kind or ("monte_carlo" if isinstance(objective, DenseDistance) else "empirical")
    each = 1 if samples_per_row is None else samples_per_row
    num_samples = require_samples(objective, w, kind, num_samples, each)
    if samples_per_row is None:
        samples_per_row = -(-num_samples // DEFAULT_ROWS)
    # A wish that cannot be met is refused before anything is paid for.
    zeros_by_parameter(
        w, sparsity=sparsity, objective=objective, allocation=allocation, exclude=exclude
    )
    goals = stage_counts(
        len(w), zeros=int((w == 0).sum()), sparsity=sparsity, stages=stages, schedule=schedule
    )
    # A batch may end with fewer samples than a row has.
    uneven = len(objective.places) if samples_per_row > 1 else 0
    num_rows = num_samples // samples_per_row + uneven
    _require_room(w, objective, block_size, num_rows, memory_budget)
    before = loss = objective.loss(w)
    made: list[FisherStage] = []
    for goal in goals:
        gone = int((w == 0).sum())
        if gone >= goal:  # counts that were rounded for every tensor were there already
            continue
        blocks, num_gradients = _blocks_at(
            w,
            objective,
            block_size,
            num_rows,
            fisher_rows(
                objective,
                w,
                kind=kind,
                num_samples=num_samples,
                samples_per_row=samples_per_row,
                seed=seed,
            ),
        )
        diagonal = finite_vector(blocks.diagonal(), "diagonal of the Fisher matrix", objective)
        mean = float(diagonal[w != 0].mean())
        # Outputs that no weight moves leave F = 0, and any τ the same ranking.
        tau = damping * mean if mean > 0 else 1.0
        inverse = blocks.inverse_diagonal(tau)
        keep = keep_mask(
            0.5 * w.double().square() / inverse,
            w,
            sparsity=sparsity,
            objective=objective,
            allocation=allocation,
            exclude=exclude,
            progress=(goal - gone) / (goals[-1] - gone),
        )
        pruned = torch.where(keep, w + _answer(blocks, w, keep, inverse, tau, update), 0.0)
        move = (pruned - w).double()
        predicted = 0.5 * float(move @ blocks.product(move))
        del blocks  # before the next ones are made
        w, loss = pruned, objective.loss(pruned)
        made.append(FisherStage(as_pruned(w).sparsity, predicted, loss, tau, num_gradients))
        if on_stage is not None:
            on_stage(made[-1], w)
    found = as_pruned(w)
    return WoodFisherPruned(
        found.weights,
        found.mask,
        found.sparsity,
        found.lam,
        tuple(made),
        sum(stage.predicted_change for stage in made),
        loss - before,
        sum(stage.num_gradients for stage in made),
    )


def _check(block_size: int | None, damping: float, update: str, memory_budget: int | None) -> None:
    if block_size is not None and block_size < 1:
        raise ValueError(
            f"`block_size` must be at least 1, or None for one block, got {block_size}."
        )
    if not 0 < damping < math.inf:
        raise ValueError(f"`damping` must be positive and finite, got {damping}.")
    if update not in get_args(Update):
        raise ValueError(f"`update` must be one of {get_args(Update)}, got {update!r}.")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"`memory_budget` must be at least 1 byte, got {memory_budget}.")


def _require_room(
    w: Tensor, objective: Objective, block_size: int | None, num_rows: int, budget: int | None
) -> None:
    """Refuse blocks that do not fit, and say which would."""
    lengths, itemsize = _lengths(objective), max(w.itemsize, torch.float32.itemsize)
    needed = block_bytes(lengths, block_size, num_rows, itemsize)
    if budget is None:
        budget = int(FREE_SHARE * free_memory(w.device))
    if needed <= budget:
        return
    fits = fitting_block_size(lengths, num_rows, itemsize, budget)
    cure = f"Pass `block_size={fits}` or less" if fits else "Not even blocks of one weight fit"
    size = "one block of all weights" if block_size is None else f"blocks of {block_size:,} weights"
    raise MemoryError(
        f"{size[0].upper()}{size[1:]} from {num_rows:,} gradients of {len(w):,} weights need "
        f"{needed / 2**30:.3g} GiB, and {budget / 2**30:.3g} GiB may be used. {cure}, take fewer "
        "`num_samples`, or raise `memory_budget`."
    )


def _blocks_at(
    w: Tensor,
    objective: Objective,
    block_size: int | None,
    num_rows: int,
    rows: Iterable[Tensor],
) -> tuple[FisherBlocks, int]:
    """Return the blocks of the weights alive, and how many rows they are made of."""
    blocks, count = FisherBlocks(_lengths(objective), block_size, num_rows, w), 0
    alive = w != 0
    for some in rows:
        blocks.add(some * alive)
        count += len(some)
    return blocks, count


def _answer(
    blocks: FisherBlocks, w: Tensor, keep: Tensor, inverse: Tensor, tau: float, update: str
) -> Tensor:
    """Return the move of the weights that stay; what it says of others is not looked at."""
    gone = torch.where(keep, 0.0, w)
    if update == "joint":
        return blocks.joint_answer(gone, keep, tau).to(w)
    if update == "single":
        return -blocks.inverse_product(gone / inverse, tau).to(w)
    return torch.zeros_like(w)


def _lengths(objective: Objective) -> list[int]:
    return [shape.numel() for shape in objective.shapes.values()]
