"""Zeros that stay zeros while an optimizer trains."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pruning.masks import Masks


class KeptZeros:
    """Ends what ``keep_zeros`` began, by ``remove()`` or at the end of a ``with`` block."""

    def __init__(self, masks: Masks, handles: Sequence[RemovableHandle]) -> None:
        self.masks = masks
        """The masks that are held."""
        self._handles = handles

    def remove(self) -> None:
        """Let the optimizer train all weights again; zeros are as they are until then."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "KeptZeros":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def keep_zeros(model: nn.Module, optimizer: Optimizer, masks: Masks | None = None) -> KeptZeros:
    """Hold a sparse model's zeros while an optimizer trains it, and return the handle that ends it.

    Before each step the gradients of weights that go are set to zero, after it these weights and
    the optimizer's state for them (momentum, averages): neither momentum nor weight decay nor the
    step of an optimizer that looks at norms knows of them. The other weights train as if these had
    never been. At once, too, so that training can start from a sparse model, or go on from a
    dense optimizer.

    It works through hooks of the optimizer: with every ``torch.optim.Optimizer`` that has a state
    in the shape of its parameters, several groups, ``GradScaler``, captured steps and
    ``DistributedDataParallel``. Where gradients are put together before the step, as by
    ``clip_grad_norm_``, first call ``masks.apply_to_gradients_(model)``. An average of weights that
    began when they were dense needs ``masks.apply_`` itself.

    Costs writing zeros through one byte a weight, into gradients, weights and state; nothing waits
    for the device. Parameters without zeros cost nothing. A deep copy of the optimizer has no
    hooks: call this for it, too.

    Args:
        model: The model that trains; wrappers are taken off.
        optimizer: The optimizer that trains it, or a part of it.
        masks: Which weights stay. Default: ``Masks.of(model)``, so that every zero stays one.

    Raises:
        ValueError: If the masks are of another model, or the optimizer is. Nothing is changed.
        TypeError: If a parameter is sharded over ranks (DTensor).
        NonFiniteError: If the masks are to be the model's zeros, and a weight is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> with keep_zeros(model, optimizer):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight.data
        tensor([[0.9000, 0.0000]])
    """
    masks = Masks.of(model) if masks is None else masks
    pairs = masks.pairs(model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if pairs and not any(id(p) in trained for p, _ in pairs):
        raise ValueError(
            "`optimizer` must train parameters of `model` that have zeros, got none of them. Build "
            "it from `model.parameters()`."
        )
    params, gone = [p for p, _ in pairs], [mask for _, mask in pairs]

    def before(*_: Any) -> None:
        zero_gradients_(params, gone)

    def after(*_: Any) -> None:
        zero_weights_(optimizer, params, gone)

    after()
    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    return KeptZeros(masks, handles)


def zero_gradients_(params: Sequence[Tensor], gone: Sequence[Tensor]) -> None:
    """Set the gradients of some weights to zero."""
    for p, mask in zip(params, gone, strict=True):
        if p.grad is not None:
            p.grad.masked_fill_(mask, 0.0)


@torch.no_grad()
def zero_weights_(optimizer: Optimizer, params: Sequence[Tensor], gone: Sequence[Tensor]) -> None:
    """Set some weights, and the optimizer's state for them, to zero."""
    # Not multiplied with a mask: infinity would become NaN, and a negative weight a minus zero.
    for p, mask in zip(params, gone, strict=True):
        p.masked_fill_(mask, 0.0)
        for value in optimizer.state.get(p, {}).values():
            # Counts of steps have the shape of a scalar parameter, and must go on.
            if isinstance(value, Tensor) and value.shape == p.shape and p.ndim:
                value.masked_fill_(mask, 0)
