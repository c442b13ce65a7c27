"""The Hessian of the training loss as an operator, and how its products are computed."""

from jaxtyping import Float
from torch import Tensor

from hessian.kept_graph import KeptGraph
from hessian.objective import Objective
from hessian.operators import Operator


def hessian_operator(
    objective: Objective,
    w: Float[Tensor, " d"] | None = None,
    *,
    memory_budget: int | None = None,
) -> Operator:
    """Return the Hessian of the training loss at w.

    The first product builds the graph of the gradient, at the price of two gradients (and one of
    the first batch, to see how large it is). Where it fits into the memory budget it is kept, for
    as long as the operator lives, and a further product is one backward pass through it; batches
    that do not fit cost two gradients in every product.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]. Default: the model's current weights. A copy is
            kept, so later training does not move the operator.
        memory_budget: Bytes for the graphs that are kept; 0 keeps none. Default: a quarter of what
            is free at the first product.

    Returns:
        The operator of shape [d, d]. Its products raise ``NonDeterministicError`` if the loss at
        w changed since the first product, and ``NonFiniteError`` if they are not finite.

    Raises:
        ValueError: If w does not fit the objective, or the budget is negative.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> H = hessian_operator(Objective(model, torch.nn.MSELoss(), data))
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    w = objective.weights() if w is None else w.detach().clone()
    objective.require_vector(w, "w")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"`memory_budget` must not be negative, got {memory_budget} bytes.")
    graph = KeptGraph(objective, w, memory_budget)
    return Operator(graph.product, objective.size, objective.dtype, objective.device)
