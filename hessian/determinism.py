"""Refuses models whose loss would change between two evaluations, and names the module."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from hessian.errors import NonDeterministicError
from hessian.unsharded import is_sharded

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by the bytes they take, as which a tensor's bits are added up."""


def require_fixed_modules(model: nn.Module) -> None:
    """Refuse dropout, batch statistics and the tracking of statistics that are switched on.

    Raises:
        NonDeterministicError: Naming the first module that would make the loss change.
    """
    for name, module in model.named_modules():
        where = f"`{name}` ({type(module).__name__})" if name else f"the {type(module).__name__}"
        if isinstance(module, _BatchNorm):
            if module.training:
                raise NonDeterministicError(
                    "Batch norm must use its running statistics, so that the loss is a sum over "
                    f"samples, but {where} is in training mode. Call `model.eval()` first."
                )
            if module.running_mean is None:
                raise NonDeterministicError(
                    "Batch norm must use running statistics, so that the loss is a sum over "
                    f"samples, but {where} keeps none (track_running_stats=False) and would "
                    "normalise every batch by itself."
                )
        elif isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            raise NonDeterministicError(
                f"Running statistics must stay as they are, but {where} is in training mode and "
                "would renew them. Call `model.eval()` first."
            )
        elif module.training and _drops(module):
            raise NonDeterministicError(
                f"Dropout must be off, so that repeated products see the same matrix, but {where} "
                "is in training mode. Call `model.eval()` first."
            )


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.RReLU)


class FixedState:
    """Tensors that must hold the same numbers in every product, also if written to by ``.data``.

    Torch counts changes in place, but not those, and a kept graph that shares the memory would mix
    two matrices. What is compared is the sum of the bits as integers, which is exact in any order,
    at the price of reading the tensors once.

    Args:
        tensors: By name; those that are sharded over ranks are left out.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: t for name, t in tensors.items() if not is_sharded(t)}
        self._first: list[int] | None = None

    def require_same(self) -> None:
        """Compare with the first call.

        Raises:
            NonDeterministicError: Naming the first tensor that has changed.
        """
        if not self._tensors:
            return
        sums = [_sum_of_bits(t) for t in self._tensors.values()]
        device = sums[0].device
        now = torch.stack([s.to(device) for s in sums]).tolist()  # one transfer for all
        self._first = now if self._first is None else self._first
        for name, old, new in zip(self._tensors, self._first, now, strict=True):
            if old != new:
                raise NonDeterministicError(
                    f"`{name}`, which is not among the selected weights, has changed since the "
                    "first product, so the products would belong to different matrices. Build a "
                    "new operator."
                )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.view(WORDS[tensor.element_size()]).sum(dtype=torch.int64)


@contextmanager
def require_pure_forward(model: nn.Module) -> Iterator[None]:
    """Refuse a forward pass, run inside the block, that draws random numbers or writes buffers.

    The generators and the buffers are put back as they were.

    Raises:
        NonDeterministicError: Naming the buffer written, or saying that numbers were drawn.
    """
    buffers = dict(model.named_buffers())
    copies = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    versions = {name: buffer._version for name, buffer in buffers.items()}
    states = _generator_states()
    try:
        yield
        drew = any(not torch.equal(a, b) for a, b in zip(states, _generator_states(), strict=True))
        written = [
            name
            for name, buffer in model.named_buffers()
            if buffer is not buffers.get(name) or buffer._version != versions[name]
        ]
    finally:
        _restore_generators(states)
        with torch.no_grad():
            for name, buffer in buffers.items():
                if buffer._version != versions[name]:
                    buffer.copy_(copies[name])
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, buffer)
    if drew:
        raise NonDeterministicError(
            "The model draws random numbers in its forward pass, so repeated products would see "
            "different matrices. Call `model.eval()`, or switch the sampling off."
        )
    if written:
        raise NonDeterministicError(
            f"The model writes its buffer `{written[0]}` in the forward pass, so repeated products "
            "would see different matrices. Call `model.eval()`, or freeze that buffer."
        )


def _generator_states() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def _restore_generators(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
