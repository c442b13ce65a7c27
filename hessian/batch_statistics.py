"""Running statistics of batch norm that fit other weights than those they were gathered with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessian.batches import to_device
from hessian.parameters import unwrapped


def recalibrate_batch_norm_(model: nn.Module, inputs: Any) -> int:
    """Renew the running mean and variance of every batch norm layer, and return their number.

    Pruning shifts what arrives at a layer, and statistics of the dense network then no longer
    normalise it. They become the average over the batches, each of which is normalised by its own:
    make them some hundred samples large. Weights, modes and momenta stay as they are. After an
    exception the statistics do, too.

    Args:
        model: Changed in place. Only batch norm sees its batches; dropout and the like keep still.
        inputs: Batches of the model's inputs: tensors, or tuples of its arguments. Labels are not
            wanted. Costs one forward pass.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(1).eval()
        >>> recalibrate_batch_norm_(model, [torch.tensor([[1.0], [3.0]])])
        1
        >>> model.running_mean, model.running_var
        (tensor([2.]), tensor([2.]))
    """
    model = unwrapped(model)
    layers = list(batch_norm_layers(model).values())
    if not layers:
        return 0
    device = next(model.buffers()).device
    seen = 0
    # A DataLoader draws a seed for its workers when a pass begins, even without workers.
    with _averaging(model, layers), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for batch in inputs:
            arguments = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            model(*to_device(arguments, device))
            seen += 1
        if seen == 0:
            raise ValueError("`inputs` must give at least one batch, got none.")
    return len(layers)


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers that normalise by running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)
    }


@contextmanager
def normalising_by_batch(model: nn.Module, layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let these layers alone normalise by batch; modes and momenta are put back."""
    layers = list(layers)
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _averaging(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Let batch norm layers average over batches inside; put all else, or all, back."""
    before = [[b.clone() for b in layer.buffers()] for layer in layers]
    try:
        with normalising_by_batch(model, layers):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a plain average
            yield
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            for buffer, old in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(old)
        raise
