"""The sparse weights of a network by Net-Trim, with what was measured on every layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hessian.flat_weights import FlatWeights
from pruning.layer_trim import LayerTrim
from pruning.net_trim_survey import Between
from pruning.net_trim_targets import Kind
from pruning.net_trim_targets import Mode as Mode
from pruning.pruned import Pruned


@dataclass(frozen=True)
class TrimmedLayer:
    """What Net-Trim did to one layer."""

    weight: str
    bias: str | None
    """The bias that was pruned with it."""
    kind: Kind
    reason: str
    """Why it was taken for a layer without a ReLU after it; empty where it was not."""
    between: tuple[Between, ...]
    """What is between the layer and its ReLU: its outputs are those after it."""
    trims: tuple[LayerTrim, ...]
    """One for each group of outputs, in order; a bias is the last column of their weights."""
    drift: float
    """The discrepancy of the dense weights on the inputs of the program: 0 on dense inputs."""

    @property
    def epsilon(self) -> float:
        """ε over all groups."""
        return math.hypot(*(trim.epsilon for trim in self.trims))

    @property
    def discrepancy(self) -> float:
        """The discrepancy that ε bounds, over all groups."""
        return math.hypot(*(trim.discrepancy for trim in self.trims))

    @property
    def output_discrepancy(self) -> float:
        """‖Ŷ − Y‖_F of what comes out, after the ReLU if there is one, on the program's inputs."""
        return math.hypot(*(trim.output_discrepancy for trim in self.trims))

    @property
    def violation(self) -> float:
        """By how much an inactive output is above its bound at most, in its group's scale."""
        return max(trim.violation for trim in self.trims)

    @property
    def density(self) -> float:
        """Share of weights that are not zero, with the bias."""
        kept = sum(int((trim.weights != 0).sum()) for trim in self.trims)
        return kept / sum(trim.weights.numel() for trim in self.trims)

    @property
    def converged(self) -> bool:
        """Whether the programs of all groups are solved."""
        return all(trim.converged for trim in self.trims)


@dataclass(frozen=True)
class NetworkTrim(Pruned):
    """Sparse weights of a network, and how far they are from the dense one, layer by layer."""

    mode: Mode
    layers: tuple[TrimmedLayer, ...]
    """In the order of their first calls."""
    skipped: Mapping[str, str]
    """Why other weights of two dimensions or more stayed as they are, by name."""
    discrepancy: float
    """‖f̂(x) − f(x)‖_F of the network's outputs over all calibration inputs, as measured."""
    output_norm: float
    """‖f(x)‖_F of the dense network."""
    bound: float | None
    """What the layers' discrepancies prove of the network's, see ``net_trim``; None for a network
    that is no chain."""
    shapes: Mapping[str, torch.Size] = field(repr=False)
    """Of the parameters behind ``weights``, by name, in order."""

    @property
    def converged(self) -> bool:
        """Whether the programs of all layers are solved."""
        return all(layer.converged for layer in self.layers)

    def parameters(self) -> dict[str, Tensor]:
        """Return views of the weights by the names of parameters."""
        parts = torch.split(self.weights, [shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def write_(self, model: nn.Module) -> None:
        """Write the weights into a model: all of them or, after an error, none.

        Raises:
            ValueError: If the model lacks a parameter, or has one of another shape, type or device.
        """
        named = dict(model.named_parameters())
        missing = [name for name in self.shapes if name not in named]
        if missing:
            raise ValueError(
                f"`model` must have the parameters that were pruned, got none named {missing[0]}."
            )
        flat = FlatWeights(model, lambda name, _: name in self.shapes)
        if list(flat.shapes.items()) != list(self.shapes.items()):
            raise ValueError(
                "`model` must have the pruned parameters in their order and shapes, "
                f"{_listed(self.shapes)}, got {_listed(flat.shapes)}."
            )
        kinds = [f"{like.dtype} on {like.device}" for like in (self.weights, flat.weights())]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"`model` must have its parameters in {kinds[0]}, got {kinds[1]}. Move the model, "
                "or prune it as it is."
            )
        before = flat.weights()
        try:
            flat.write_(self.weights)
        except BaseException:
            flat.write_(before)
            raise


def _listed(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
