"""Optimal Brain Damage: weights go by what the diagonal of the Hessian says they are worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from hessian.finiteness import finite_vector
from hessian.fisher import Kind
from pruning.allocation import Allocation, keep_mask, zeros_by_parameter
from pruning.pruned import Pruned, as_pruned
from pruning.sample_gradients import fisher_rows, require_samples
from pruning.scores import require_weights


@dataclass(frozen=True)
class ObdPruned(Pruned):
    """Weights after Optimal Brain Damage, and how they came about."""

    predicted_change: float
    """½ Σ h_jj w_j² over the weights that went."""
    measured_change: float
    """L after less L before."""
    num_gradients: int
    """Gradients of single samples that the diagonal cost."""


def obd_prune(
    w: Float[Tensor, " d"],
    objective: Objective,
    sparsity: float,
    *,
    diagonal: Float[Tensor, " d"] | None = None,
    kind: Kind = "monte_carlo",
    num_samples: int | None = None,
    seed: int = 0,
    allocation: Allocation = "global",
    exclude: Sequence[str] = (),
) -> ObdPruned:
    """Set the weights of least ½ h_jj w_j² to zero; the others stay where they are.

    That is what the loss rises by at a minimum with a diagonal Hessian. By default h is the
    diagonal of the Gauss-Newton matrix, which is never negative, estimated without bias from one
    gradient of every sample, for targets drawn from the network: a ``DenseDistance`` needs no
    labels for it, and no more an ``Objective``, whose own are not looked at. Single gradients
    cost several times as much as that of a batch, as they are written out. Where inputs go
    together, as neighbouring pixels do, the diagonal says little, and this may be worse than
    ``magnitude_prune``.

    Args:
        w: Weights, shape [d]. Zeros stay zero.
        objective: The loss, or the distance to the dense network.
        sparsity: Share of zeros wanted, in [0, 1]: ⌈sparsity · d⌉ zeros, or more where w has them
            already.
        diagonal: Another diagonal h, shape [d], such as ``hessian.diagonal(hessian_operator(
            objective, w)).value``; what is negative in it counts as 0. Leaves no gradients to pay.
        kind: ``"empirical"`` takes the targets of the data instead of drawn ones.
        num_samples: Samples for the diagonal, evenly spread over the data. Default: all.
        seed: Seed of the draws, made on the CPU; the global random state is not used.
        allocation: ``"global"``, ``"uniform"`` for equal shares of all parameters, or sparsities
            by glob pattern; see ``keep_mask``.
        exclude: Glob patterns of parameters that stay, and count for the sparsity.

    Returns:
        The weights, with the change of the loss as predicted and as measured by two forward passes.

    Raises:
        ValueError: If w or the diagonal does not fit or is not finite, the sparsity is out of range
            or cannot be reached, a pattern matches nothing, ``num_samples`` is out of range, or
            the objective is shared by several processes.
        TypeError: If the model's output is not one tensor, or targets are to be drawn for a
            criterion that is no likelihood we know.
        NonFiniteError: If a gradient or a loss is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> X = torch.tensor([[0.1, 1.0], [-0.1, 1.0]])  # the larger weight matters less
        >>> objective = Objective(model, torch.nn.MSELoss(), (X, model(X).detach()))
        >>> obd_prune(objective.weights(), objective, 0.5).weights
        tensor([0., 1.])

    References:
        LeCun, Denker, Solla (1990), Optimal Brain Damage.
    """
    require_weights(w)
    objective.require_vector(w, "w")
    # A wish that cannot be met is refused before anything is paid for.
    zeros_by_parameter(
        w, sparsity=sparsity, objective=objective, allocation=allocation, exclude=exclude
    )
    num_gradients = 0
    if diagonal is None:
        num_gradients = require_samples(objective, w, kind, num_samples)
        h = torch.zeros_like(w)
        for rows in fisher_rows(objective, w, kind=kind, num_samples=num_samples, seed=seed):
            h += rows.square().sum(dim=0)
        finite_vector(h, "diagonal of the Fisher matrix", objective)
    else:
        require_weights(diagonal, "diagonal")
        if diagonal.shape != w.shape:
            raise ValueError(
                f"`diagonal` must hold one entry for each of the {len(w)} weights, got "
                f"{len(diagonal)}."
            )
        h = diagonal.to(w.device).clamp(min=0.0)
    worth = 0.5 * h * w.square()
    keep = keep_mask(
        worth, w, sparsity=sparsity, objective=objective, allocation=allocation, exclude=exclude
    )
    pruned = as_pruned(torch.where(keep, w, 0.0))
    return ObdPruned(
        pruned.weights,
        pruned.mask,
        pruned.sparsity,
        pruned.lam,
        float(worth[~keep].sum(dtype=torch.float64)),
        objective.loss(pruned.weights) - objective.loss(w),
        num_gradients,
    )
