"""How far a pruned network's outputs are from the dense one's, without labels."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hessian import NonFiniteError, Objective
from hessian.batches import TensorBatches, as_batches, one_pass, to_device
from hessian.criteria import Criterion
from hessian.determinism import require_fixed_modules
from hessian.finiteness import all_finite
from hessian.parameters import Selection, unwrapped

Kind = Literal["kl", "squared"]


class DenseDistance(Objective):
    """The mean distance between the outputs of a network at w and at its present weights.

    An ``Objective`` whose targets are the network's own outputs: zero, with zero gradient, at the
    present weights. There its Hessian is its Gauss-Newton matrix, and for ``"kl"`` the Fisher
    matrix. Outputs are computed once, at construction, and kept beside the inputs.

    Args:
        model: Any module that returns one tensor. Its present weights are the dense ones. Dropout
            must be off and batch norm in evaluation mode.
        inputs: Calibration inputs: a tensor [n, ...], a tuple of tensors that are the model's
            arguments, or an iterable of batches that gives the same ones in every pass. A batch
            is one tensor or such a tuple.
        kind: ``"kl"`` for logits with the classes in dimension 1: KL(dense ‖ w) of the
            distributions, averaged over a sample's other dimensions. ``"squared"`` for values: the
            mean squared difference.
        temperature: T > 0 by which logits of both networks are divided. Above 1, classes that the
            dense network finds unlikely count for more. ``"kl"`` only.
        labelled: Whether every batch ends with labels, which are left out.
        parameters: Which parameters make up w, as for ``Objective``.
        batch_size: Cuts tensors into batches. Default: one batch.

    Raises:
        ValueError: If ``kind`` is not known, there is no input, or anything that ``Objective``
            refuses.
        TypeError: If the model returns anything but one tensor, or ``inputs`` cannot be iterated
            more than once.
        NonDeterministicError: If outputs would change between two passes.
        NonFiniteError: If the dense network's outputs are not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> distance = DenseDistance(model, torch.eye(2), kind="squared")
        >>> w = distance.weights()
        >>> distance.loss(w), round(distance.loss(w + 1.0), 3)
        (0.0, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        kind: Kind = "kl",
        temperature: float = 1.0,
        labelled: bool = False,
        parameters: Selection = None,
        batch_size: int | None = None,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"`kind` must be one of {get_args(Kind)}, got {kind!r}.")
        if not 0.0 < temperature < math.inf or (kind != "kl" and temperature != 1.0):
            raise ValueError(
                '`temperature` must be positive and finite, and 1 unless `kind` is "kl", got '
                f"{temperature} for {kind!r}."
            )
        self.kind: Kind = kind
        self.temperature = temperature
        model = unwrapped(model)
        require_fixed_modules(model)
        pairs = _WithOutputs(model, _batches_of(inputs, labelled, batch_size))
        criterion: Criterion = squared_difference
        if kind == "kl":
            criterion = partial(kl_divergence, temperature=temperature)
        super().__init__(model, criterion, pairs, parameters=parameters)

    def drawn_slopes(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Return u with mean 0 and E u uᵀ = ∇²_z of the batch's summed distances, like z.

        From random signs: S ε with S Sᵀ the Hessian. For ``"kl"`` the outer products are on
        average those of gradients for labels drawn from the network.
        """
        bits = torch.randint(0, 2, z.shape, generator=generator, device="cpu", dtype=torch.int8)
        signs: Tensor = (2 * bits - 1).to(z)
        per_sample = int(z[0].numel())
        if self.kind == "squared":
            return math.sqrt(2.0 / per_sample) * signs
        p = (z.detach() / self.temperature).softmax(dim=1)
        root = p.sqrt() * signs
        slopes: Tensor = root - p * root.sum(dim=1, keepdim=True)
        scale = math.sqrt(z.shape[1] / per_sample) / self.temperature
        return scale * slopes


def kl_divergence(z: Tensor, dense: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(dense / T) ‖ softmax(z / T)) for every sample; classes in dimension 1."""
    target = (dense / temperature).log_softmax(dim=1)
    losses = (target.exp() * (target - (z / temperature).log_softmax(dim=1))).sum(dim=1)
    return losses.reshape(len(losses), -1).mean(dim=1)


def squared_difference(z: Tensor, dense: Tensor) -> Tensor:
    """Return the mean squared difference for every sample."""
    return (z - dense).square().reshape(len(z), -1).mean(dim=1)


def _batches_of(inputs: Any, labelled: bool, batch_size: int | None) -> Iterable[Any]:
    """Return something that gives tuples of the model's arguments again and again."""
    whole: Any = (inputs,) if isinstance(inputs, Tensor) else inputs
    if isinstance(whole, tuple) and all(isinstance(part, Tensor) for part in whole):
        lengths = {len(part) for part in whole}
        if len(lengths) != 1:
            raise ValueError(f"`inputs` must be tensors of one length, got {sorted(lengths)}.")
        return _Arguments(TensorBatches(whole, batch_size), labelled)
    if isinstance(inputs, list):  # two tensors are two batches here, and would be (X, y) there
        inputs = [(batch,) if isinstance(batch, Tensor) else batch for batch in inputs]
    return _Arguments(as_batches(inputs, batch_size), labelled)


class _Arguments:
    """Batches as tuples of the model's arguments, without labels."""

    def __init__(self, batches: Iterable[Any], labelled: bool) -> None:
        self._batches, self._labelled = batches, labelled

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        batches: Iterator[Any] = one_pass(self._batches)
        for batch in batches:
            if isinstance(batch, Mapping):
                raise TypeError(
                    "`inputs` must give tensors or tuples of the model's arguments, got a mapping. "
                    "Wrap the model so that it takes tensors."
                )
            arguments = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            yield arguments[:-1] if self._labelled else arguments


class _WithOutputs:
    """Batches of inputs with the dense outputs as their targets, in the same order each pass."""

    def __init__(self, model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> None:
        device = next(iter(model.parameters())).device
        self._batches = batches
        self._outputs: list[Tensor] = []
        with torch.no_grad():
            for batch in one_pass(batches):
                arguments = tuple(to_device(batch, device))
                z = functional_call(model, {}, arguments)
                if not isinstance(z, Tensor) or z.ndim < 2:
                    what = f"shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                    raise TypeError(
                        "`model` must return one tensor of shape [samples, outputs, ...], got "
                        f"{what}. Wrap the model so that it returns its logits."
                    )
                if not all_finite(z):
                    raise NonFiniteError(
                        "The dense network's outputs hold a NaN or an infinity, from "
                        f"{_first_not_finite(model, arguments)} on. Look at its "
                        "weights and at the inputs."
                    )
                # Clones, because a model may return a view of what it goes on using.
                self._outputs.append(z.clone())

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch, z in zip(one_pass(self._batches), self._outputs, strict=True):
            yield (*batch, z)

    def __len__(self) -> int:
        return len(self._outputs)


def _first_not_finite(model: nn.Module, arguments: tuple[Any, ...]) -> str:
    """Name what in a forward pass first holds a NaN or an infinity."""
    if not all(all_finite(t) for t in arguments if isinstance(t, Tensor)):
        return "its inputs"
    names: list[str] = []

    def look(name: str, out: Any) -> None:
        if not names and isinstance(out, Tensor) and not all_finite(out):
            names.append(f"`{name}`" if name else "the model itself")

    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: look(name, out))
        for name, module in model.named_modules()
    ]
    try:
        model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else "the model itself"
