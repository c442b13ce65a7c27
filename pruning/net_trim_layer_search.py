"""The ε that leaves one layer a wanted share of zeros by Net-Trim."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from pruning.layer_trim import SLACK, LayerTrim
from pruning.net_trim_options import TrimOptions
from pruning.net_trim_problem import GroupProblem
from pruning.net_trim_shares import (
    HIGHEST,
    LOWEST,
    aim_of,
    between,
    is_reached,
    nearest_share,
    next_share,
)

WITHIN = 1e-3
"""Share of a layer's weights that may be zeros too few; tries end there."""

MISSED = 0.01
"""Share of a layer's weights by which zeros may be off before a warning says so."""

MAX_TRIES = 16


def sparse_to(
    problems: Sequence[GroupProblem], sparsity: float, options: TrimOptions, *, has_bias: bool
) -> tuple[list[LayerTrim], list[str]]:
    """Return sparse weights of a layer, before a refit, with at most so many zeros.

    ε is the same share of the norm of outputs in all groups, found by interpolation in its
    logarithm, and at least the discrepancy of the dense weights. Every try starts where the last
    one ended.

    Args:
        problems: Of the layer's groups.
        sparsity: Share of zeros among the layer's weights, without a bias.
        options: As for ``net_trim``.
        has_bias: Whether the last column of weights is a bias.

    Returns:
        The trims of the programs, of the try that comes nearest from below, or from above if all
        have more zeros, and by how much that missed what was wanted, if it did. Zeros jump where
        all weights of a neuron go at once.
    """
    total = sum(_weights(problem, has_bias) for problem in problems)
    wanted, slack = round(sparsity * total), WITHIN * total
    zeros: dict[float, int] = {}
    best: list[LayerTrim] = []

    def attempt(share: float) -> None:
        nonlocal best
        trims = [
            problem.sparse(
                max(share * problem.norm, problem.drift or 0.0),
                before_refit=options.refit,
                **options.goal,
            )
            for problem in problems
        ]
        zeros[share] = sum(map(partial(_zeros, has_bias), problems, trims))
        if share == nearest_share(zeros, wanted):
            best = trims

    drifts = [p.drift / p.norm for p in problems if p.drift is not None and p.norm > 0.0]
    lowest = max(LOWEST, min(drifts, default=LOWEST))
    # With the norm of all targets for ε, nothing is left that keeps weights from zero.
    ends = [p.program.target_norm / p.norm for p in problems if p.norm > 0.0]
    highest = max(HIGHEST, *ends, *drifts, lowest) * (1.0 + SLACK)
    if lowest > LOWEST or wanted <= slack:  # no ε is smaller, so no try has fewer zeros
        attempt(lowest)
    if wanted == total:
        attempt(highest)
    while len(zeros) < MAX_TRIES and wanted - slack > zeros.get(lowest, -1):
        if is_reached(zeros, wanted, slack) or _jumps(zeros, wanted, options):
            break
        aim = aim_of(len(zeros), wanted, slack)
        attempt(next_share(zeros, wanted, aim, lowest, highest))
    found = zeros[nearest_share(zeros, wanted)]
    told = []
    if abs(found - wanted) > MISSED * total:
        told = [f"{found / total:.1%} of its weights are zeros instead of {wanted / total:.1%}."]
    return best, told


def _jumps(zeros: Mapping[float, int], wanted: int, options: TrimOptions) -> bool:
    """Whether zeros go from fewer to more than wanted by less than the residuals tell apart."""
    low, high = between(zeros, wanted, 0.0, math.inf)
    return high < low * (1.0 + options.tol)


def _weights(problem: GroupProblem, has_bias: bool) -> int:
    m, n = problem.program.shape
    return m * (n - has_bias)


def _zeros(has_bias: bool, problem: GroupProblem, trim: LayerTrim) -> int:
    weights = problem.own(trim).weights
    return int((weights[:, :-1] if has_bias else weights).eq(0).sum())
