"""Which weights of layers stay; parameters that belong to no layer never go."""

from collections.abc import Iterable, Sequence
from glob import escape

from jaxtyping import Bool, Float
from torch import Tensor

from hessian import Objective
from pruning.allocation import Allocation, keep_mask, prunable
from pruning.layer_inputs import LayerInputs
from pruning.pruned import wanted_zeros


def keep_in_layers(
    scores: Float[Tensor, " d"],
    w: Float[Tensor, " d"],
    objective: Objective,
    layers: Iterable[LayerInputs],
    *,
    sparsity: float,
    allocation: Allocation = "global",
    exclude: Sequence[str] = (),
) -> Bool[Tensor, " d"]:
    """Return True for the weights that stay when those of the lowest scores go.

    As ``keep_mask``, where only the layers' weights may go, without their biases.

    Raises:
        ValueError: As ``keep_mask``; and if the layers' weights are too few for the sparsity.
    """
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    prunable(w, objective, exclude)  # refuses patterns of the caller that match nothing
    own = {layer.weight for layer in layers}
    exclude += [escape(name) for name in objective.shapes if name not in own]
    open_places = prunable(w, objective, exclude)
    most = int((open_places | (w == 0)).sum())
    if wanted_zeros(sparsity, len(w)) > most:
        raise ValueError(
            f"`sparsity` must be at most {most / len(w):.10g}, the share of all parameters that "
            f"are weights of layers, without biases, normalisation and what is excluded, got "
            f"{sparsity}."
        )
    return keep_mask(
        scores, w, sparsity=sparsity, objective=objective, allocation=allocation, exclude=exclude
    )
