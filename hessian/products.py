"""The Hessian of the training loss as an operator, and the choice of how its products are made."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from hessian.batches import Batch, first_samples
from hessian.differences import CentralDifferences, difference_quotient
from hessian.double_backward import differentiable_twice, graph_nodes, require_second_derivative
from hessian.errors import SecondDerivativeError
from hessian.forward_mode import ForwardOverReverse
from hessian.objective import Objective
from hessian.operators import Operator
from hessian.precision import IN_WORDS, Precision, in_precision, with_precision
from hessian.reverse_mode import ReverseOverReverse

Method = Literal["auto", "reverse", "forward", "differences"]

ORDER: tuple[Method, ...] = ("reverse", "forward", "differences")
WORDS = {
    "reverse": "reverse over reverse",
    "forward": "forward over reverse",
    "differences": "central differences of gradients",
}


def hessian_operator(
    objective: Objective,
    w: Float[Tensor, " d"] | None = None,
    *,
    method: Method = "auto",
    precision: Precision = "full",
    memory_budget: int | None = None,
) -> Operator:
    """Return the Hessian of the training loss at w.

    ``"reverse"``, reverse over reverse, differentiates the gradient's graph. The first product
    builds it, at the price of two gradients (and one of the first batch, to see how large it is).
    Where it fits into the memory budget it is kept, for as long as the operator lives, and a
    further product is one backward pass through it; batches that do not fit cost three gradients,
    for one product or once for all columns of ``H @ V``. ``"forward"``, forward over reverse, costs
    about three gradients too. ``"differences"`` costs four gradients and is not exact.

    ``"auto"`` takes the first of these that the model's layers allow, tried on a few samples; it
    refuses differences for networks with kinks, where they are off by half and more. Which one was
    taken stands in the operator's ``method``. How many graphs are kept is logged.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]. Default: the model's current weights. A copy is
            kept, so later training does not move the operator.
        method: How a product is computed.
        precision: ``"full"``: in all bits of the weights' type, whatever torch's global settings
            say of TF32 and autocast. ``"tf32"`` (on a GPU) and ``"bfloat16"`` make matrix products
            and convolutions of float32 weights cheaper where the hardware is made for it, and H v
            wrong by some 1e-3 to 5e-2 of its length; vectors and results stay float32.
            ``leading_eigenspace(fast, exact=...)`` finds the pairs with such an operator and
            certifies them with another one.
        memory_budget: Bytes for the graphs that ``"reverse"`` keeps; 0 keeps none. Default: a
            quarter of what is free at the first product.

    Returns:
        The operator of shape [d, d]. Its products raise ``NonDeterministicError`` if the loss at
        w changed since the first product, and ``NonFiniteError`` if they are not finite.
        Differences give a ``ConvergenceWarning`` where they do not settle.

    Raises:
        ValueError: If w does not fit the objective, the budget is negative, the method is not
            known, or none is exact and the network has kinks; if the precision is not to be had
            for these weights or by this method.
        SecondDerivativeError: If ``"reverse"`` is asked for and a layer hides its second
            derivative from autograd.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> H = hessian_operator(Objective(model, torch.nn.MSELoss(), data))
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
        >>> H.method
        'reverse over reverse'

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    w = objective.weights() if w is None else w.detach().clone()
    objective.require_vector(w, "w")
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {get_args(Method)}, got {method!r}.")
    fast = in_precision(objective, precision)
    if method in ("auto", "reverse"):
        with objective.ranks.in_step(w):
            chosen = _choose(objective, w, forced=method == "reverse")
        # Ranks with other batches, or with none, may have chosen another one: the last rules.
        method = ORDER[int(objective.ranks.gather([float(ORDER.index(chosen))]).max())]
    if method == "differences" and precision != "full":
        raise ValueError(
            '`precision` must be "full" for central differences, which lose half of the digits, '
            f'got "{precision}".'
        )
    if method == "forward" and precision == "bfloat16":
        # Autocast casts a number and not its tangent: layers then see two types at once.
        raise ValueError(
            '`precision` must be "full" or "tf32" for forward over reverse, got "bfloat16".'
        )
    products: ReverseOverReverse | ForwardOverReverse | CentralDifferences
    columns = None
    if method == "reverse":
        products = ReverseOverReverse(fast, w, memory_budget)
        columns = with_precision(products.columns, objective, precision)
    elif method == "forward":
        products = ForwardOverReverse(objective, w)
    else:
        products = CentralDifferences(objective, w)
    return Operator(
        with_precision(products.product, objective, precision),
        objective.size,
        objective.dtype,
        objective.device,
        columns,
        WORDS[method] + IN_WORDS[precision],
    )


def _choose(objective: Objective, w: Tensor, *, forced: bool) -> Method:
    """Return the first method that the model's layers allow, tried on a few samples."""
    batch = next((b for b in objective.batches() if objective.batch_weight(b) > 0), None)
    if batch is None:  # fewer batches than ranks, or none that counts
        return "reverse"
    batch = _few_samples(objective, w, batch)
    try:
        _try_reverse(objective, w, batch)
        return "reverse"
    except RuntimeError as error:
        if forced or isinstance(error, torch.OutOfMemoryError):  # no other method needs less
            raise
        refused = error
    try:
        ForwardOverReverse(objective, w).batch_product(torch.ones_like(w), batch)
        return "forward"
    except RuntimeError as error:  # torch has no other word for a derivative that is missing
        if isinstance(error, torch.OutOfMemoryError):
            raise
    kinks = _kinks(objective, w, batch)
    if kinks:
        raise ValueError(
            "The Hessian of this model has no exact product: its gradient cannot be "
            f"differentiated ({refused}). Central differences of gradients would remain, but "
            f"across the kinks of {', '.join(sorted(kinks))} they are off by half and more. "
            'Replace the layer that refuses, or force them with `method="differences"`.'
        ) from refused
    return "differences"


def _try_reverse(objective: Objective, w: Tensor, batch: Batch) -> None:
    """Make one product on a batch; raises where a second derivative is missing or wrong."""
    w = w.detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(w.shape, generator=generator, device="cpu").to(w)
    product = torch.zeros_like(w)
    with torch.enable_grad(), differentiable_twice():
        total = objective.batch_total(w, batch)
        require_second_derivative(total)
        custom = _custom_functions(total)
        (gradient,) = torch.autograd.grad(total, w, create_graph=True, materialize_grads=True)
        if gradient.requires_grad:
            require_second_derivative(gradient)
            (product,) = torch.autograd.grad(gradient, w, v, materialize_grads=True)
    if not custom or _kinks(objective, w, batch):
        return

    def slope(u: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(objective.batch_total(u, batch), u, materialize_grads=True)[
                0
            ]

    # Their backward passes may hide from autograd what they depend on.
    expected, error = difference_quotient(slope, w.detach(), v)
    if float((product - expected).norm()) > (0.01 + 10.0 * error) * float(expected.norm()):
        raise SecondDerivativeError(
            f"The second derivative of the custom autograd function {' or '.join(sorted(custom))} "
            "is not the derivative of its gradient."
        )


def _custom_functions(tensor: Tensor) -> set[str]:
    """Return the names of the autograd functions in a graph that are written in Python."""
    nodes: Iterator[Any] = graph_nodes(tensor)
    return {
        type(node).__name__.removesuffix("Backward")
        for node in nodes
        if issubclass(type(node), BackwardCFunction)
        and not node._forward_cls.__module__.startswith("hessian.")
    }


def _few_samples(objective: Objective, w: Tensor, batch: Batch) -> Batch:
    """Return the first two samples of a batch, or the whole of it where it cannot be cut."""
    try:
        few = first_samples(batch, 2)
        with torch.no_grad():
            objective.batch_total(w, few)
        return few if objective.batch_weight(few) > 0 else batch
    except Exception:
        return batch  # the loss of the whole batch was evaluated when the objective was made


def _kinks(objective: Objective, w: Tensor, batch: Batch) -> frozenset[str]:
    """Return the names of the functions with kinks that the model calls on a batch."""
    with torch.no_grad(), _Listening() as heard:
        objective.batch_total(w, batch)
    return KINKED.intersection(heard.names)


KINKED = frozenset(
    (
        *("relu", "relu_", "relu6", "rrelu", "leaky_relu", "leaky_relu_", "prelu", "threshold"),
        *("hardtanh", "hardtanh_", "hardsigmoid", "hardswish", "hardshrink", "softshrink"),
        *("abs", "clamp", "clamp_", "clamp_min", "clamp_max", "maximum", "minimum", "max", "min"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "amax", "amin", "rnn_relu", "l1_loss"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "topk", "sort"),
    )
)
"""Names of torch's functions whose first derivative jumps."""


class _Listening(TorchFunctionMode):
    """Notes the names of all functions that are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))
