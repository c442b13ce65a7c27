"""Net-Trim of one layer: the weights of least ℓ₁ norm that keep what comes out of it."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from pruning.layer_trim import LayerTrim
from pruning.net_trim_checks import require_goal
from pruning.net_trim_program import (
    MAX_ITERATIONS,
    RELAXATION,
    RHO,
    TOL,
    Ball,
    LayerProgram,
    Progress,
)
from pruning.net_trim_setup import Precision
from pruning.net_trim_targets import Kind


def net_trim_layer(
    W: Float[Tensor, "m n"],
    X: Float[Tensor, "p n"],
    Y: Float[Tensor, "p m"] | None = None,
    *,
    epsilon: float,
    kind: Kind = "relu",
    bound: Float[Tensor, "p m"] | None = None,
    offset: Tensor | None = None,
    penalty: Tensor | float | None = None,
    penalise_bias: bool = True,
    ball: Ball = "split",
    refit: bool = False,
    start: Float[Tensor, "m n"] | None = None,
    rho: float = RHO,
    relaxation: float = RELAXATION,
    tol: float = TOL,
    max_iterations: int = MAX_ITERATIONS,
    chunk: int | None = None,
    precision: Precision = "full",
    progress: Progress | None = None,
) -> LayerTrim:
    """Return the weights U of least Σ λ |U| that keep a layer's outputs to a discrepancy of ε.

    With Ω the outputs that are active, Y > 0, and S what is added to the products:

    ============ ==============================================================================
    ``"split"``  ‖(X Uᵀ + S − Y)_Ω‖_F ≤ ε, and (X Uᵀ + S)_Ωᶜ ≤ V for every entry by itself
    ``"joint"``  ‖(X Uᵀ + S − Y)_Ω‖² + ‖((X Uᵀ + S − V)_Ωᶜ)₊‖² ≤ ε²: allows more, so is sparser
    linear       ‖X Uᵀ + S − Y‖_F ≤ ε
    ============ ==============================================================================

    For V = 0 all give ‖ReLU(X Uᵀ + S) − Y‖_F ≤ ε. Solved by alternating directions with one
    factor of Xᵀ X; weights come from its sparse copy, so that zeros are exact, and the constraints
    are checked on them, in float64. 4 N M P + 2 N² M flops an iteration, for N inputs, M outputs
    and P samples, and a few hundred iterations. A linear layer with more samples than inputs is
    solved by its moments, as if P were N.

    Memory beside W, X and Y: four matrices [p, m] in the precision of the products, ten of [m, n],
    three of [n, n], a copy of X where its dtype differs, and what ``chunk`` says.

    Args:
        W: Weights of the layer, a row an output; a bias is the last column.
        X: Inputs of the layer, a row a sample (or position); ones in the last column for a bias.
        Y: What should come out, after the ReLU. Default: what comes out with W.
        epsilon: ε, in units of the outputs; 0.1 ‖Y‖_F, say.
        kind: ``"relu"`` for a layer with a ReLU after it, ``"linear"`` for any other: then Y is
            what comes out of the layer itself.
        bound: V, at most which inactive outputs may be. Default: 0. To prune on inputs that have
            changed, pass its (X Wᵀ + S)₊, and W stays feasible for an ε of its own discrepancy.
        offset: S, added to the products: a bias that stays, shape [m], or a residual connection,
            shape [p, m].
        penalty: λ: a number, one for each input, or one for each weight. Default: 1.
        penalise_bias: Whether the weights in the last column have a penalty.
        ball: See the table.
        refit: Whether to fit the weights that are left anew: the nearest outputs on their support,
            where inactive outputs count once they are above zero, and with the split ball are at
            most V. Their objective may then be above the least one.
        start: Weights to start from. Default: zero.
        rho: ρ to begin with, in units in which inputs and weights are about 1; it is adapted.
        relaxation: α of over-relaxation, in (0, 2).
        tol: Of the primal residual, as a share of the targets' norm; the dual one, as a share of
            the penalties' norm, may be ten times as large. The default gives objectives to 10⁻⁴.
        max_iterations: Budget.
        chunk: Samples whose inputs and outputs are held in float64, and worked on between the
            products, at a time. Default: 32 MiB of them, and what the caches hold.
        precision: Of products and states: float64, or float32 (``"mixed"``) with the factor and all
            that is measured in float64.
        progress: Called with the iterations done and the budget, every 20 iterations.

    Returns:
        The weights, in the dtype of W, with what was measured on them. Where they are not feasible
        or the residuals not small at the end of the budget, ``converged`` is False. With the split
        ball single outputs are the last to be feasible; with hundreds of thousands of samples, as
        in convolutions, they may take thousands of iterations. A refit keeps to the bounds itself,
        so it needs fewer, and the joint ball has none.

    Raises:
        ValueError: If shapes do not fit, Y has negative entries before a ReLU, ε is negative or
            NaN, λ is negative or all zero, ``penalise_bias=False`` without a last column of ones,
            ε is smaller than what any weights of a linear layer reach, or an option is not known
            or out of range.
        TypeError: If a matrix is not of floating point.
        NonFiniteError: If a matrix has a NaN or an infinity, or the outputs or the squares of the
            inputs overflow.

    Warns:
        ConvergenceWarning: If the budget ran out, with what the weights fell short of.

    Example:
        >>> import torch
        >>> W = torch.tensor([[1.0, 0.1]])
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9]])  # almost the same input twice
        >>> trim = net_trim_layer(W, X, epsilon=0.05)
        >>> trim.weights.round(decimals=2), trim.converged
        (tensor([[1.0600, 0.0000]]), True)

    References:
        Aghasi, Abdi, Nguyen & Romberg (2017), Net-Trim: convex pruning of deep neural networks
        with performance guarantee.
        Aghasi, Abdi & Romberg (2020), Fast convex pruning of deep neural networks.
        Boyd, Parikh, Chu, Peleato & Eckstein (2011), Distributed optimization and statistical
        learning via the alternating direction method of multipliers, section 3.
    """
    program = LayerProgram(
        W,
        X,
        Y,
        kind=kind,
        bound=bound,
        offset=offset,
        penalty=penalty,
        penalise_bias=penalise_bias,
        ball=ball,
        rho=rho,
        relaxation=relaxation,
        chunk=chunk,
        precision=precision,
    )
    return program.solve(
        epsilon,
        refit=refit,
        start=start,
        tol=tol,
        max_iterations=max_iterations,
        progress=progress,
        stacklevel=3,
    )


def net_trim_path(
    program: LayerProgram,
    epsilons: Sequence[float],
    *,
    refit: bool = False,
    tol: float = TOL,
    max_iterations: int = MAX_ITERATIONS,
    progress: Progress | None = None,
) -> tuple[LayerTrim, ...]:
    """Return the weights for many ε, each started where the last one ended, with one factor.

    Args:
        program: The layer's program.
        epsilons: In the order in which they are solved; neighbours should be near.
        refit: As for ``net_trim_layer``.
        tol: As for ``net_trim_layer``.
        max_iterations: Budget of each.
        progress: Called with the number of ε done and of all.

    Raises:
        ValueError: As ``net_trim_layer``; no ε is solved for then.

    Warns:
        ConvergenceWarning: For each ε at which the budget ran out.

    Example:
        >>> import torch
        >>> program = LayerProgram(torch.tensor([[1.0, 0.1]]), torch.eye(2))
        >>> [trim.density for trim in net_trim_path(program, [0.0, 0.2, 2.0])]
        [1.0, 0.5, 0.0]
    """
    for epsilon in epsilons:
        require_goal(epsilon, tol, max_iterations)
    trims = []
    for done, epsilon in enumerate(epsilons, start=1):
        trims.append(
            program.solve(
                epsilon, refit=refit, tol=tol, max_iterations=max_iterations, stacklevel=3
            )
        )
        if progress is not None:
            progress(done, len(epsilons))
    return tuple(trims)
