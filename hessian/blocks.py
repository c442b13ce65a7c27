"""Diagonal blocks: principal submatrices of any operator, and the Hessian layer by layer."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.determinism import require_fixed_modules
from hessian.double_backward import differentiable_twice, require_second_derivative
from hessian.finiteness import all_finite
from hessian.objective import Objective
from hessian.operators import Operator
from hessian.precision import with_precision


def block_operator(operator: Operator, rows: slice | Tensor) -> Operator:
    """Return the principal submatrix A[rows, rows].

    A product costs one with A. For one layer's block of a Hessian,
    ``hessian_operator(Objective(..., parameters="layer.*"))`` is cheaper: it differentiates in that
    layer's weights only, the others as they stand in the model.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        rows: A slice, or a tensor of m distinct indices, or a mask of n truth values.

    Returns:
        The operator of shape [m, m].

    Raises:
        ValueError: If no row is chosen, one is chosen twice or is out of range, or the tensor is no
            vector.
        TypeError: If the tensor holds neither integers nor truth values.

    Example:
        >>> import torch
        >>> A = Operator.from_matrix(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> block_operator(A, slice(1, 3)) @ torch.ones(2)
        tensor([2., 3.])
    """
    index = _indices(rows, operator.size).to(operator.device, torch.int64, copy=True)

    def product(v: Tensor) -> Tensor:
        padded = v.new_zeros(operator.size, *v.shape[1:])
        padded[index] = v
        return (operator @ padded)[index]

    return Operator(
        product,
        len(index),
        operator.dtype,
        operator.device,
        None if operator.columns is None else product,
        f"block of ({operator.method})",
    )


def layer_slices(objective: Objective) -> dict[str, slice]:
    """Return where every module's weights are in w, in the model's order.

    The parameters that a module holds itself form one layer; what a parametrization holds for it
    (``weight_norm``, for instance) counts as its own. A tied weight belongs to the module that
    registers it first. The model itself is called ``"(root)"``. Where a module's weights do not
    lie next to each other in w, each further run has the name of its first parameter.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> data = torch.zeros(4, 2), torch.zeros(4, 1)
        >>> layer_slices(Objective(model, torch.nn.MSELoss(), data))
        {'0': slice(0, 9, None), '1': slice(9, 13, None)}
    """
    slices: dict[str, slice] = {}
    start, latest, last_owner = 0, "", None
    for name, shape in objective.shapes.items():
        if shape.numel() == 0:  # no rows, and a block needs at least one
            continue
        owner = name.rpartition(".")[0].partition(".parametrizations.")[0]
        if not owner or name.startswith("parametrizations."):
            owner = "(root)"
        if owner != last_owner:
            latest = name if owner in slices else owner
        stop = start + shape.numel()
        slices[latest] = slice(slices[latest].start if owner == last_owner else start, stop)
        start, last_owner = stop, owner
    return slices


def block_diagonal_operator(
    objective: Objective,
    w: Float[Tensor, " d"] | None = None,
    *,
    blocks: Mapping[str, slice] | None = None,
) -> Operator:
    """Return the Hessian at w without what couples its blocks: by default, its layers.

    A product differentiates the gradient once, for every batch, and each block's part of it a
    second time, in the weights of that block only: cheaper than one Hessian product a block,
    dearer than one. Nothing is kept between products; ``A @ V`` shares the first step.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]. Default: the model's current weights.
        blocks: Slices that cover w from its first to its last entry, in order. Default:
            ``layer_slices(objective)``.

    Returns:
        The operator of shape [d, d].

    Raises:
        ValueError: If w does not fit the objective, or the blocks leave a gap or overlap.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> objective = Objective(model, torch.nn.MSELoss(), data)
        >>> each = {"weight": slice(0, 1), "bias": slice(1, 2)}
        >>> block_diagonal_operator(objective, blocks=each) @ torch.ones(2)
        tensor([10.,  2.])
    """
    w = objective.weights() if w is None else w.detach().clone()
    objective.require_vector(w, "w")
    slices = list((layer_slices(objective) if blocks is None else blocks).values())
    _require_cover(slices, objective.size)
    lengths = [s.stop - s.start for s in slices]
    leaves = [part.clone().requires_grad_() for part in torch.split(w, lengths)]

    fixed = objective.fixed_state()

    def add(loss: Tensor, rows: Tensor, out: Tensor) -> None:
        """Add the products that belong to one term of the loss in place."""
        if not loss.requires_grad:
            return
        require_second_derivative(loss)
        slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        for s, leaf, slope in zip(slices, leaves, slopes, strict=True):
            if not slope.requires_grad:  # a loss linear in this block
                continue
            require_second_derivative(slope)
            for row, v in zip(out, rows, strict=True):
                row[s] += torch.autograd.grad(
                    slope, leaf, v[s], retain_graph=True, materialize_grads=True
                )[0]

    def all_rows(rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        with torch.enable_grad(), differentiable_twice():
            with objective.ranks.in_step(rows):
                require_fixed_modules(objective.model)
                fixed.require_same()
                for batch in objective.batches():
                    add(objective.batch_total(torch.cat(leaves), batch), rows, out)
            objective.reduce_(out).div_(objective.normalizer)
            add(objective.regularization(torch.cat(leaves)), rows, out)
        if not all_finite(out):
            objective.loss(torch.cat(leaves).detach())  # raises, and names the batch or parameter
        return out

    return Operator(
        with_precision(lambda v: all_rows(v[None])[0], objective, "full"),
        objective.size,
        objective.dtype,
        objective.device,
        with_precision(lambda V: all_rows(V.T.contiguous()).T, objective, "full"),
        f"{len(slices)} diagonal blocks, reverse over reverse",
    )


def _indices(rows: slice | Tensor, size: int) -> Tensor:
    if isinstance(rows, slice):
        index = torch.arange(size, device="cpu")[rows] if (rows.step or 1) > 0 else None
        if index is None:
            raise ValueError(f"`rows` must go forwards, got {rows}.")
    elif rows.dtype == torch.bool:
        if rows.shape != (size,):
            raise ValueError(f"`rows` must have {size} truth values, got shape {list(rows.shape)}.")
        index = rows.nonzero().squeeze(1)
    elif rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"`rows` must hold integers or truth values, got {rows.dtype}.")
    else:
        index = rows
    if index.ndim != 1 or len(index) == 0:
        raise ValueError(f"`rows` must choose at least one row, got shape {list(index.shape)}.")
    if int(index.min()) < 0 or int(index.max()) >= size:
        raise ValueError(
            f"`rows` must lie between 0 and {size - 1}, got {int(index.min())} to "
            f"{int(index.max())}."
        )
    if len(torch.unique(index)) < len(index):
        raise ValueError("`rows` must not choose a row twice.")
    return index


def _require_cover(slices: list[slice], size: int) -> None:
    ends = [0, *(s.stop for s in slices)]
    expected = [slice(start, stop) for start, stop in pairwise(ends) if start < stop]
    if slices != expected or ends[-1] != size:
        raise ValueError(
            f"`blocks` must be slices that cover all {size} weights from first to last without "
            f"gap or overlap, got {slices}."
        )
