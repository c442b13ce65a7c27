"""The training loss as a function of one flat vector of weights, with its derivatives."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from hessian.batches import (
    Batch,
    as_batches,
    batch_length,
    map_tensors,
    one_pass,
    require_repeatable,
    to_device,
)
from hessian.determinism import require_fixed_modules, require_pure_forward
from hessian.double_backward import differentiable_twice
from hessian.errors import NonFiniteError
from hessian.parameters import Selection, select_parameters

Criterion = Callable[..., Tensor]


@dataclass(frozen=True)
class LossStatistics:
    """Count, sum and sum of squares of per-sample losses at one point."""

    count: int
    total: float
    total_squares: float

    @property
    def mean(self) -> float:
        """The loss: the mean over samples."""
        return self.total / self.count

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, the samples taken as independent; NaN for one sample."""
        if self.count < 2:
            return math.nan
        spread = max(self.total_squares - self.total**2 / self.count, 0.0)
        return math.sqrt(spread / (self.count - 1) / self.count)


class Objective:
    """The mean loss L(w) over a data set, for any flat weight vector w of shape [d].

    The model is only read: weights, mode, gradients, buffers and random state stay as they are,
    also after an exception. Every sample counts once, however the data is cut into batches.

    Args:
        model: Any module. Dropout must be off and batch norm in evaluation mode.
        criterion: Called as ``criterion(output, target)``, or ``criterion(output, batch)`` for
            mapping batches. Returns the mean over the batch, the sum (``reduction="sum"``), or
            one loss per sample. With a mean or a sum over samples, L is the same.
        data: A pair of tensors (X, y), or an iterable of batches that gives the same batches in
            every pass. A batch is ``(*inputs, target)`` or a mapping passed to the model by
            keyword.
        parameters: Which parameters make up w: glob patterns of their names, or a predicate of
            (name, parameter). Default: all that require a gradient. Tied weights count once.
        batch_size: Cuts a pair of tensors into batches. Default: one batch.
        reduction: ``"mean"`` or ``"sum"``. Default: what ``criterion.reduction`` says, else mean.

    Raises:
        NonDeterministicError: If the loss would change between two passes (a shuffling or
            augmenting loader, dropout, batch norm in training mode); the message names the cause.
        ValueError: If no parameter is selected, data are empty or of another type than the
            weights, parameters have mixed types, or
            the criterion does not weight every sample once.
        TypeError: If data are not iterable, or only once.
        NonFiniteError: From every method, if the loss or a derivative is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> X, y = torch.eye(2), torch.zeros(2, 1)
        >>> objective = Objective(model, torch.nn.MSELoss(), (X, y))
        >>> objective.loss(torch.tensor([1.0, 3.0]))
        5.0
        >>> objective.gradient(torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        data: Any,
        *,
        parameters: Selection = None,
        batch_size: int | None = None,
        reduction: str | None = None,
    ) -> None:
        reduction = reduction or getattr(criterion, "reduction", "mean")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'`reduction` must be "mean" or "sum", got "{reduction}".')
        self.model, self._criterion, self._reduction = model, criterion, reduction
        self._sample_criterion = _unreduced(criterion)
        self._parameters = select_parameters(model, parameters)
        first = next(iter(self._parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.shapes = {name: p.shape for name, p in self._parameters.items()}
        self._lengths = [p.numel() for p in self._parameters.values()]
        self.size = sum(self._lengths)
        self._data = as_batches(data, batch_size)
        require_fixed_modules(model)
        require_repeatable(self._data)
        self.num_samples = sum(batch_length(batch) for batch in one_pass(self._data))
        if self.num_samples == 0:
            raise ValueError("`data` must hold at least one sample, got none.")
        self._require_sample_weights()

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

    def batches(self) -> Iterator[Batch]:
        """Iterate over the batches, on the model's device."""
        for batch in one_pass(self._data):
            yield to_device(batch, self.device)

    def output(self, w: Float[Tensor, " d"], batch: Batch) -> Any:
        """Return the model's output on a batch at weights w; differentiable in w."""
        if isinstance(batch, Mapping):
            return functional_call(self.model, self.unflatten(w), kwargs=dict(batch))
        return functional_call(self.model, self.unflatten(w), tuple(batch[:-1]))

    def batch_loss(self, w: Float[Tensor, " d"], batch: Batch) -> Float[Tensor, ""]:
        """Return the mean loss over one batch at weights w; differentiable in w."""
        return self._batch_total(w, batch) / batch_length(batch)

    def loss(self, w: Float[Tensor, " d"]) -> float:
        """Return L(w). Costs one forward pass over the data."""
        self._begin(w)
        with torch.no_grad():
            return self._mean([self._batch_total(w, batch) for batch in self.batches()], w)

    def gradient(self, w: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return the gradient of L at w. Costs one forward and one backward pass."""
        return self.loss_and_gradient(w)[1]

    def loss_and_gradient(self, w: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """Return L(w) and its gradient. Costs one forward and one backward pass."""
        w = self._begin(w).detach().requires_grad_()
        out, totals = torch.zeros_like(w), []
        with torch.enable_grad():
            for batch in self.batches():
                total = self._batch_total(w, batch)
                out += torch.autograd.grad(total, w, materialize_grads=True)[0]
                totals.append(total.detach())
        loss = self._mean(totals, w)
        return loss, self._finite(out / self.num_samples, "gradient")

    def hessian_product(
        self, w: Float[Tensor, " d"], v: Float[Tensor, " d"]
    ) -> Float[Tensor, " d"]:
        """Return H(w) v for the Hessian H of L. Costs about two gradients (Pearlmutter 1994)."""
        return self.loss_and_hessian_product(w, v)[1]

    def loss_and_hessian_product(
        self, w: Float[Tensor, " d"], v: Float[Tensor, " d"]
    ) -> tuple[float, Float[Tensor, " d"]]:
        """Return L(w), which the product computes anyway, and H(w) v."""
        w = self._begin(w).detach().requires_grad_()
        self.require_vector(v, "v")
        out, totals = torch.zeros_like(w), []
        with torch.enable_grad(), differentiable_twice():
            for batch in self.batches():
                total = self._batch_total(w, batch)
                out += _curvature_product(total, w, v)
                totals.append(total.detach())
        loss = self._mean(totals, w)
        return loss, self._finite(out / self.num_samples, "Hessian-vector product")

    def batch_hessian_product(
        self, w: Float[Tensor, " d"], v: Float[Tensor, " d"], batch: Batch
    ) -> Float[Tensor, " d"]:
        """Return H_b(w) v for the Hessian of the mean loss over one batch."""
        w = self._begin(w).detach().requires_grad_()
        self.require_vector(v, "v")
        with torch.enable_grad(), differentiable_twice():
            product = _curvature_product(self.batch_loss(w, batch), w, v)
        return self._finite(product, "Hessian-vector product")

    def sample_losses(self, w: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
        """Return every sample's loss at w, in the order of the data, in float64.

        Raises:
            ValueError: If the criterion cannot be taken apart by sample (mapping batches with a
                criterion that returns a scalar).
        """
        self._begin(w)
        with torch.no_grad():
            losses = [
                self._batch_samples(self.output(w, batch), batch).to(torch.float64)
                for batch in self.batches()
            ]
        self._mean([part.sum() for part in losses], w)
        return torch.cat(losses)

    def statistics(self, w: Float[Tensor, " d"]) -> LossStatistics:
        """Return count, sum and sum of squares of the samples' losses. Costs one forward pass."""
        losses = self.sample_losses(w)
        return LossStatistics(len(losses), float(losses.sum()), float(losses.square().sum()))

    def _begin(self, w: Tensor) -> Tensor:
        """Check what may have changed since the last call: the vector, the model's mode."""
        self.require_vector(w, "w")
        require_fixed_modules(self.model)
        return w

    def _require_length(self, v: Tensor, name: str) -> None:
        if v.shape != (self.size,):
            raise ValueError(
                f"`{name}` must be a flat vector with one entry for each of the {self.size} "
                f"selected weights, got shape {list(v.shape)}."
            )

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

    def _batch_total(self, w: Tensor, batch: Batch) -> Tensor:
        """Sum of the samples' losses over one batch at weights w."""
        return self.total_from_output(self.output(w, batch), batch)

    def total_from_output(self, output: Any, batch: Batch) -> Tensor:
        """Return the sum of the samples' losses over one batch, from the model's output on it."""
        loss = self._criterion(output, _target(batch))
        if loss.ndim > 0:
            return self._per_sample(loss, batch_length(batch)).sum()
        return loss if self._reduction == "sum" else loss * batch_length(batch)

    def _batch_samples(self, output: Any, batch: Batch) -> Tensor:
        """Losses of the samples of one batch, shape [n]."""
        length = batch_length(batch)
        if self._sample_criterion is not None:
            return self._per_sample(self._sample_criterion(output, _target(batch)), length)
        loss = self._criterion(output, _target(batch))
        if loss.ndim > 0:
            return self._per_sample(loss, length)
        if isinstance(batch, Mapping) or not isinstance(output, Tensor):
            raise ValueError(
                "`criterion` must return one loss per sample to give standard errors with this "
                "kind of batch, got a scalar."
            )
        return torch.vmap(lambda o, t: self._criterion(o[None], t[None]))(output, batch[-1])

    def _per_sample(self, losses: Tensor, length: int) -> Tensor:
        """One loss per sample from losses with the samples in front; the rest as in the batch."""
        if losses.numel() % length:
            raise ValueError(
                "`criterion` must return a scalar or one loss per sample, got shape "
                f"{list(losses.shape)} for a batch of {length}."
            )
        rows = losses.reshape(length, -1)
        return rows.sum(dim=1) if self._reduction == "sum" else rows.mean(dim=1)

    def _require_sample_weights(self) -> None:
        """Check on the first batch that the forward pass is pure and the criterion a mean."""
        batch = next(self.batches())
        w = self.weights()
        try:
            with torch.no_grad(), require_pure_forward(self.model):
                total = float(self._batch_total(w, batch))
        except RuntimeError as error:
            foreign = _floating_types(batch) - {self.dtype}
            if not foreign:
                raise
            raise ValueError(
                f"`data` holds {', '.join(map(str, foreign))}, the model's weights are "
                f"{self.dtype}, and the forward pass failed ({error}). Convert the data, or the "
                f"model with `model.to({next(iter(foreign))})`."
            ) from error
        if self._sample_criterion is None or not math.isfinite(total):
            return
        with torch.no_grad():
            expected = float(self._batch_samples(self.output(w, batch), batch).sum())
        slack = 1e-4 if torch.finfo(self.dtype).bits >= 32 else 2e-2
        if abs(total - expected) > slack * max(abs(total), abs(expected)):
            length = batch_length(batch)
            raise ValueError(
                "`criterion` must weight every sample of a batch alike, but its mean over the "
                f"first batch is {total / length:.6g} and the mean of its per-sample losses "
                f"{expected / length:.6g} (class weights, ignored targets, or a `reduction` that "
                'is not the criterion\'s own?). Build the criterion with `reduction="sum"`.'
            )

    def _mean(self, totals: list[Tensor], w: Tensor) -> float:
        """Mean loss from the batches' sums; names the batch or parameter that is not finite."""
        loss = float(torch.stack([t.to(torch.float64) for t in totals]).sum()) / self.num_samples
        if math.isfinite(loss):
            return loss
        for name, part in self.unflatten(w.detach()).items():
            if not torch.isfinite(part).all():
                raise NonFiniteError(f"The weights hold a NaN or an infinity in `{name}`.")
        bad = next((i for i, t in enumerate(totals) if not torch.isfinite(t)), None)
        where = "their sum" if bad is None else f"batch {bad}"
        raise NonFiniteError(
            f"The loss is {loss} (first in {where} of {len(totals)}) at finite weights. Look at "
            "that batch for NaN inputs or an overflow in the model."
        )

    def _finite(self, vector: Tensor, what: str) -> Tensor:
        if not torch.isfinite(vector).all():
            bad = [n for n, p in self.unflatten(vector).items() if not torch.isfinite(p).all()]
            raise NonFiniteError(f"The {what} is not finite, first in `{bad[0]}`.")
        return vector


def _curvature_product(total: Tensor, w: Tensor, v: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(total, w, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:  # a loss linear in w
        return torch.zeros_like(w)
    return torch.autograd.grad(gradient, w, v, materialize_grads=True)[0].detach()


def _floating_types(batch: Batch) -> set[torch.dtype]:
    found: set[torch.dtype] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.add(tensor.dtype)
        return tensor

    map_tensors(batch, note)
    return found


def _target(batch: Batch) -> Any:
    return batch if isinstance(batch, Mapping) else batch[-1]


def _unreduced(criterion: Criterion) -> Criterion | None:
    """Return the criterion without its mean over the batch, where it offers that."""
    if isinstance(criterion, nn.Module) and hasattr(criterion, "reduction"):
        twin = copy.copy(criterion)
        setattr(twin, "reduction", "none")  # noqa: B010
        return twin
    try:
        has_option = "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        return None
    if not has_option:
        return None
    return lambda output, target: criterion(output, target, reduction="none")
