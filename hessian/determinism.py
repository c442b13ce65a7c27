"""Refuses models whose loss would change between two evaluations, and names the module."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hessian.errors import NonDeterministicError


def require_fixed_modules(model: nn.Module) -> None:
    """Refuse dropout and batch statistics that are switched on.

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


@contextmanager
def require_pure_forward(model: nn.Module) -> Iterator[None]:
    """Refuse a forward pass, run inside the block, that draws random numbers or writes buffers.

    The generators are put back as they were.

    Raises:
        NonDeterministicError: Naming the buffer written, or saying that numbers were drawn.
    """
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    states = _generator_states()
    try:
        yield
        drew = any(not torch.equal(a, b) for a, b in zip(states, _generator_states(), strict=True))
    finally:
        _restore_generators(states)
    if drew:
        raise NonDeterministicError(
            "The model draws random numbers in its forward pass, so repeated products would see "
            "different matrices. Call `model.eval()`, or switch the sampling off."
        )
    for name, buffer in model.named_buffers():
        if buffer._version != versions.get(name):
            raise NonDeterministicError(
                f"The model writes its buffer `{name}` in the forward pass, so repeated products "
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
