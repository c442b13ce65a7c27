"""The selected weights of a model as one flat vector, and back."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hessian.parameters import Selection, parameter_places, select_parameters, unwrapped


class FlatWeights:
    """The selected weights of a model as one flat vector of shape [d].

    Args:
        model: Any module; data-parallel and ``torch.compile`` wrappers are taken off.
        parameters: Which parameters make up the vector.

    Raises:
        ValueError: If no parameter is selected, or they have mixed types.
    """

    def __init__(self, model: nn.Module, parameters: Selection = None) -> None:
        self.model = unwrapped(model)
        self._parameters = select_parameters(self.model, parameters)
        first = next(iter(self._parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.shapes = {name: p.shape for name, p in self._parameters.items()}
        self._lengths = [p.numel() for p in self._parameters.values()]
        self.size = sum(self._lengths)
        self._others = {
            name: p for name, p in self.model.named_parameters() if name not in self._parameters
        }
        self._names = parameter_places(self.model)

    def weights(self) -> Float[Tensor, " d"]:
        """Return a copy of the model's current weights as one flat vector."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters.values()])

    def write_(self, w: Float[Tensor, " d"]) -> None:
        """Write w into the model. The only method that changes the model.

        Raises:
            ValueError: If w has another length, type or device than the weights.
        """
        self.require_vector(w, "w")
        with torch.no_grad():
            for p, part in zip(
                self._parameters.values(), torch.split(w.detach(), self._lengths), strict=True
            ):
                p.copy_(part.view_as(p))

    def unflatten(self, w: Float[Tensor, " d"]) -> dict[str, Tensor]:
        """Return views of w by parameter name, in the parameters' shapes.

        Raises:
            ValueError: If w has another length than the weights.
        """
        self._require_length(w, "w")
        parts = torch.split(w, self._lengths)
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def require_vector(self, v: Tensor, name: str) -> None:
        """Check that v can stand beside the weights.

        Raises:
            ValueError: Naming ``name``, if v has another length, type or device than the weights.
        """
        self._require_length(v, name)
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"`{name}` must be {self.dtype} on {self.device} like the model's weights, got "
                f"{v.dtype} on {v.device}. Convert it with `{name}.to(objective.weights())`."
            )

    def _require_length(self, v: Tensor, name: str) -> None:
        if v.shape != (self.size,):
            raise ValueError(
                f"`{name}` must be a flat vector with one entry for each of the {self.size} "
                f"selected weights, got shape {list(v.shape)}."
            )

    def _in_all_places(self, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return some weights, and the model's own for all others as constants, by every name.

        A weight that is not selected and asks for a gradient would keep activations for it.
        """
        others = {name: p.detach() for name, p in self._others.items() if p.requires_grad}
        return {
            place: tensor
            for name, tensor in (others | selected).items()
            for place in self._names[name]
        }

    def constants(self) -> dict[str, Tensor]:
        """Return what the loss depends on beside the weights: other parameters, and buffers."""
        return {**self._others, **dict(self.model.named_buffers())}
