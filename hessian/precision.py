"""Products in fewer bits than the weights have: TF32 on a GPU, or bfloat16."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hessian.batches import Batch, map_tensors
from hessian.objective import Objective
from hessian.torch_settings import float32_products

Precision = Literal["full", "tf32", "bfloat16"]
"""``"full"``: all bits of the weights' type; ``"tf32"``, ``"bfloat16"``: 10 or 7 bits after the
point in matrix products and convolutions, their sums and everything else in float32."""

IN_WORDS = {"full": "", "tf32": ", in TF32", "bfloat16": ", in bfloat16"}
AMPERE = (8, 0)
"""The first compute capability with TF32 and bfloat16."""


def in_precision(objective: Objective, precision: Precision) -> Objective:
    """Return the objective whose forward pass runs in this precision; the data are shared.

    Raises:
        ValueError: If the precision is not known, or not to be had for these weights.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"`precision` must be one of {get_args(Precision)}, got {precision!r}.")
    if precision == "full":
        return objective
    if objective.dtype != torch.float32:
        raise ValueError(
            f'`precision` must be "full" for weights in {objective.dtype}, got "{precision}", '
            "which makes products of float32 weights cheaper."
        )
    if precision == "tf32":
        if objective.device.type != "cuda":
            raise ValueError(
                '`precision` must be "full" or "bfloat16" away from a GPU, got "tf32" on '
                f"{objective.device}."
            )
        if torch.cuda.get_device_capability(objective.device) < AMPERE:
            raise ValueError(
                '`precision` must be "full" on a GPU without TF32, got "tf32" on '
                f"{torch.cuda.get_device_name(objective.device)}."
            )
        return objective
    return _InBFloat16(objective)


def with_precision(
    product: Callable[[Tensor], Tensor], objective: Objective, precision: Precision
) -> Callable[[Tensor], Tensor]:
    """Return a product that is made in this precision, whatever the global settings say.

    Products from several threads wait for each other.
    """
    one_at_a_time = threading.Lock()

    @wraps(product)
    def made(v: Tensor) -> Tensor:
        with one_at_a_time, _arithmetic(objective, precision):
            return product(v)

    return made


@contextmanager
def _arithmetic(objective: Objective, precision: Precision) -> Iterator[None]:
    # Autocast belongs to the forward pass alone; the way back takes each product's own type.
    with torch.autocast(objective.device.type, enabled=False):
        if objective.dtype != torch.float32:
            yield
            return
        with float32_products(tf32=precision == "tf32"):
            yield


class _InBFloat16(Objective):
    """An objective whose model runs under autocast; outputs and losses are float32."""

    def __init__(self, whole: Objective) -> None:
        self.__dict__.update(vars(whole))

    def _output_at(self, weights: dict[str, Tensor], batch: Batch) -> Any:
        # Without the cache, because a kept graph outlives it.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            output = super()._output_at(weights, batch)
        return self._whole(output)

    def _output_of(self, model: Callable[..., Any], batch: Batch) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            output = super()._output_of(model, batch)
        return self._whole(output)

    def _whole(self, output: Any) -> Any:
        """The output in the type of the weights."""
        if hasattr(output, "to_tuple"):  # a ModelOutput, made for this call
            for name, part in list(output.items()):
                output[name] = map_tensors(part, self._widened)
            return output
        return map_tensors(output, self._widened)

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor
