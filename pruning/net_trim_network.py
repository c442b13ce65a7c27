"""Net-Trim of a network: every layer as sparse as a discrepancy of its outputs allows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch import nn

from hessian.parameters import Selection
from pruning.dense_distance import DenseDistance
from pruning.net_trim_layers import trim_network
from pruning.net_trim_options import Shares, trim_options
from pruning.net_trim_program import MAX_ITERATIONS, RELAXATION, RHO, TOL, Ball, Progress
from pruning.net_trim_result import Mode, NetworkTrim
from pruning.net_trim_setup import Precision


def net_trim(
    model: nn.Module,
    calibration: Any,
    *,
    epsilon: Shares | None = None,
    layer_sparsity: Shares | None = None,
    mode: Mode = "parallel",
    gamma: float = 1.1,
    refit: bool = False,
    ball: Ball = "split",
    penalise_bias: bool = True,
    exclude: Sequence[str] = (),
    parameters: Selection = None,
    batch_size: int | None = None,
    rho: float = RHO,
    relaxation: float = RELAXATION,
    tol: float = TOL,
    max_iterations: int = MAX_ITERATIONS,
    chunk: int | None = None,
    precision: Precision = "full",
    checkpoint: str | Path | None = None,
    workers: int = 1,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> NetworkTrim:
    """Return sparse weights of a network whose layers' outputs stay near those of the dense one.

    Each layer is pruned by ``net_trim_layer``; convolutions are layers of unfolded patches, and
    each group of outputs is a program by itself. The model stays as it is: ``write_`` of the
    result puts the weights in.

    ============== ================================================================================
    mode           inputs of a layer, and ε
    ============== ================================================================================
    ``"parallel"`` those of the dense network, ε = ``epsilon`` ‖Y‖_F; layers do not depend on each
                   other, and their discrepancies add up
    ``"cascade"``  those that come from the layers pruned before, with dense outputs Y as the goal,
                   so that a layer makes up for what those before it have lost; ε = √γ times the
                   discrepancy of the dense weights there, and as in parallel where inputs are
                   still the dense ones
    ============== ================================================================================

    A layer counts as one with a ReLU after it where all that comes out of it is seen to go through
    a ReLU, directly or after max pooling, a view or dropout that is off. Batch norm right after the
    layer, and a residual connection or anything else that is then added, are known: outputs Y and ε
    are those of the ReLU, and what is added is taken from the same pass as the inputs. All other
    layers count as linear, which asks for more, and is safe; so do all but the largest of those
    that are added to each other in parallel. The result says why. Linear layers, convolutions and
    the projections inside ``nn.MultiheadAttention`` take part, whichever module calls them. Only
    their weights change, batch norms stay.

    **The bound.** Of a network that is a chain of layers, of batch norms right after them and of
    functions that bring no two inputs farther apart (ReLU, tanh, sigmoid, max pooling of disjoint
    windows, views): in parallel e_l ≤ r_l + ‖U_l‖₂ e_{l−1}, with the discrepancy r_l of layer l on
    dense inputs and the scales of its batch norm in U_l; in a cascade e_l = r_l on pruned ones,
    which is measured. It holds on the calibration inputs.

    Costs one forward pass to look at the network, one for every layer (two in a cascade), and what
    ``net_trim_layer`` costs. All rows that go into one layer are held at a time; of a linear layer
    with more rows than inputs, their moments.

    Args:
        model: Any module that returns one tensor. Dropout must be off and batch norm in evaluation
            mode.
        calibration: Inputs, as for ``DenseDistance``: a tensor [n, ...], a tuple of tensors that
            are the model's arguments, or an iterable of batches.
        epsilon: Share of ‖Y‖_F of every layer: a number, or numbers by glob patterns of the names
            of weights, of which the first that fits counts.
        layer_sparsity: Instead of ``epsilon``: the share of zeros wanted of every layer's weights,
            in the same way; biases do not count. Each layer's ε is looked for, which takes three
            to eight solves of its program, each from where the last one ended, and 16 at most,
            until no more than a thousandth of its weights are zeros too few. Zeros may be fewer
            where they jump, as when a neuron loses all weights at once; and more where dead inputs
            cost nothing, or in a cascade, where ε is at least the discrepancy of the dense weights
            (γ = 1). See ``net_trim_to_sparsity`` for zeros over all layers, with one share ε.
        mode: See the table.
        gamma: γ ≥ 1, ``"cascade"`` only. At 1, weights must come as near as the dense ones do.
        refit: Whether the weights that are left are fitted anew on their support.
        ball: As for ``net_trim_layer``. In a cascade, with ``"split"``, inactive outputs may be as
            far above zero as dense weights bring them there, V = (X Wᵀ + S)₊: all that the paper's
            V = X Wᵀ + S proves holds for it, and more weights go.
        penalise_bias: Whether biases have a penalty, and so may go.
        exclude: Glob patterns of parameters that stay as they are; biases may be named alone.
        parameters: Which parameters make up the flat vector of weights, as for ``Objective``.
        batch_size: Cuts tensors into batches. Default: one batch.
        rho: As for ``net_trim_layer``, like all that follow.
        relaxation: α.
        tol: Of the primal residual.
        max_iterations: Budget of each program.
        chunk: Samples that are worked on at a time.
        precision: Of products.
        checkpoint: A folder that keeps every layer that is finished. The same call goes on where a
            killed one stopped, with the same bits.
        workers: Processes that share the layers, on a CPU, ``"parallel"`` only. Each gets a copy of
            model and inputs and runs as many threads as torch is set to here, so that the bits are
            those of one process; call ``torch.set_num_threads`` with cores over workers before.
        group: Ranks that share the layers, ``"parallel"`` only, each with the same model and
            inputs; all return the same.
        progress: Called with the layers done and all of them, after each; with ranks, of its own.

    Raises:
        ValueError: If none or both of ``epsilon`` and ``layer_sparsity`` are given, a share is
            negative or NaN, a sparsity above 1, γ is below 1, an option is not known or out of
            range, a pattern matches nothing or leaves a layer without a share, the model calls no
            layer that may be pruned, ``checkpoint`` holds another pruning, ``workers`` or ``group``
            cannot be used or differ in what they are given, or anything that ``DenseDistance``
            refuses.
        TypeError: As ``DenseDistance``.
        RuntimeError: If a worker process dies.
        RankError: If another rank fails.
        NonDeterministicError: If dropout is on, or batch norm in training mode.
        NonFiniteError: If what goes into a layer or comes out of it is not finite; the message
            names the layer.

    Warns:
        ConvergenceWarning: For each program whose budget ran out, with the name of its layer, and
            for each layer whose zeros miss ``layer_sparsity`` by more than a hundredth of it.
        CalibrationWarning: If a layer has more inputs than there are calibration rows for it.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.1]]))
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9]])  # almost the same input twice
        >>> trim = net_trim(model, X, epsilon=0.05)
        >>> trim.weights.round(decimals=2), trim.layers[0].reason
        (tensor([1.0400, 0.0000]), 'it comes out of the network')
        >>> trim.write_(model)

    References:
        Aghasi, Abdi, Nguyen & Romberg (2017), Net-Trim: convex pruning of deep neural networks
        with performance guarantee.
    """
    options = trim_options(
        epsilon=epsilon,
        layer_sparsity=layer_sparsity,
        mode=mode,
        gamma=gamma,
        refit=refit,
        ball=ball,
        penalise_bias=penalise_bias,
        exclude=exclude,
        tol=tol,
        max_iterations=max_iterations,
        rho=rho,
        relaxation=relaxation,
        chunk=chunk,
        precision=precision,
    )
    objective = DenseDistance(
        model, calibration, kind="squared", parameters=parameters, batch_size=batch_size
    )
    return trim_network(
        objective,
        objective.weights(),
        options,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        workers=workers,
        group=group,
        progress=progress,
        stacklevel=3,
    )
