"""The training loss as a function of one flat vector of weights, with its derivatives."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call

from hessian.batches import Batch, as_batches, one_pass, require_repeatable, to_device
from hessian.construction_checks import require_scalar, survey
from hessian.criteria import BatchCriterion, Count, Criterion
from hessian.determinism import FixedState, require_fixed_modules
from hessian.distributed import Ranks
from hessian.double_backward import (
    differentiable_twice,
    require_autograd,
    require_second_derivative,
)
from hessian.finiteness import finite_loss, finite_vector
from hessian.flat_weights import FlatWeights
from hessian.loss_statistics import LossStatistics
from hessian.parameters import Selection
from hessian.rank_data import Places, Split, rank_share

T = TypeVar("T")

Regularizer = Callable[[dict[str, Tensor]], Any]
"""A scalar tensor from the selected weights by name, in their shapes."""


class Objective(FlatWeights):
    """The mean loss L(w) over a data set, for any flat weight vector w of shape [d].

    L(w) = Σ_b n_b ℓ_b(w) / Σ_b n_b + R(w), where ℓ_b is the mean loss over batch b, n_b what the
    batch counts for and R the regulariser. By default n_b is the number of samples, so that every
    sample counts once, however the data is cut into batches; for a cross-entropy it is the weight
    of the batch's targets, so that every token counts once.

    The model is only read: weights, mode, gradients, buffers and random state stay as they are,
    also after an exception.

    Args:
        model: Any module. Dropout must be off and batch norm in evaluation mode. The wrappers
            ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` are taken off: names
            and products are those of the module inside. A model that ``fully_shard`` has sharded
            is passed as ``unsharded(model)``.
        criterion: Called as ``criterion(output, target)``, or ``criterion(output, batch)`` for
            mapping batches. Returns the mean over the batch, the sum (``reduction="sum"``), or
            one loss per sample. With a mean or a sum over samples, L is the same.
        data: A pair of tensors (X, y), a mapping of tensors, or an iterable of batches that gives
            the same batches in every pass. A batch is ``(*inputs, target)`` or a mapping passed to
            the model by keyword.
        parameters: Which parameters make up w: glob patterns of their names, or a predicate of
            (name, parameter). Default: all that require a gradient. Tied weights count once.
        batch_size: Cuts a pair or mapping of tensors into batches. Default: one batch.
        reduction: ``"mean"`` or ``"sum"``. Default: what ``criterion.reduction`` says, else mean.
        count: What the mean over a batch counts for: a function of the batch that returns one
            number, e.g. ``lambda batch: (batch["labels"][:, 1:] != -100).sum()`` for a language
            model with padding. Losses that the criterion adds up or lists are then divided by the
            sum of the counts. Default: the number of samples; for ``nn.CrossEntropyLoss``,
            ``nn.NLLLoss`` and their functions, what torch divides by: the class weights of the
            targets that are not ignored.
        regularizer: A function of the selected weights by name that returns a scalar, added to
            the mean loss, e.g. ``lambda p: 5e-5 * sum(t.square().sum() for t in p.values())``.
        group: Processes that share the work, e.g. ``torch.distributed.group.WORLD``. All of them
            build the objective from the same arguments and call the same methods together, and all
            get the same results; an error on one is an error on all.
        split: How a group shares the data. ``"batches"``: every rank is given all data and works
            on batches rank, rank + ranks, …, never on the others. ``"given"``: every rank is given
            its own part.

    Raises:
        NonDeterministicError: If the loss would change between two passes (a shuffling or
            augmenting loader, dropout, batch norm in training mode); the message names the cause.
        ValueError: If the model checkpoints activations, no parameter is selected, data are empty
            or of another type than the weights, parameters have mixed types, counts are negative
            or all zero, the
            criterion does not weight every sample once and no ``count`` says how it does, or
            ranks hold other weights or data than ``split`` asks for.
        TypeError: If data are not iterable, or only once; if ``count`` or ``regularizer`` returns
            anything but one number.
        NonFiniteError: From every method, if the loss or a derivative is not finite.
        RankError: From every method with a group, if another rank failed.

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

    num_samples: int
    """Number of samples in the data, over all ranks."""
    normalizer: float
    """What sums over all batches are divided by: what they count for together, on all ranks."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        data: Any,
        *,
        parameters: Selection = None,
        batch_size: int | None = None,
        reduction: str | None = None,
        count: Count | None = None,
        regularizer: Regularizer | None = None,
        group: dist.ProcessGroup | None = None,
        split: Split = "batches",
    ) -> None:
        super().__init__(model, parameters)
        self.criterion = criterion
        self._criterion = BatchCriterion(criterion, reduction, count)
        self._regularizer = regularizer
        self._buffers: dict[str, Tensor] = {}
        self.ranks = Ranks(group, self.device)
        with self.ranks.in_step(*self.model.parameters(), *self.model.buffers()):
            require_fixed_modules(self.model)
            if regularizer is not None:
                require_scalar(regularizer, self.unflatten(self.weights()))
        self._data = rank_share(as_batches(data, batch_size), self.ranks, split)
        with self.ranks.in_step():
            require_repeatable(self._data)
            lengths, weight = survey(self, self._criterion)
        self.normalizer = float(self.ranks.gather([weight]).sum())
        self._places = Places.among(self.ranks, lengths, split)
        self.num_samples = sum(self._places.lengths)
        if self.num_samples == 0:
            raise ValueError("`data` must hold at least one sample, got none.")
        if self.normalizer == 0:
            raise ValueError("`count` must not be 0 for all of the data.")

    @property
    def places(self) -> Sequence[int]:
        """Places in the data of the batches that this rank works on."""
        return self._places.own

    def batches(self) -> Iterator[Batch]:
        """Iterate over this rank's batches, on the model's device."""
        for batch in one_pass(self._data):
            yield to_device(batch, self.device)

    def output(self, w: Float[Tensor, " d"], batch: Batch) -> Any:
        """Return the model's output on a batch at weights w; differentiable in w."""
        return self._output_at(self.unflatten(w), batch)

    def run_at(
        self,
        weights: dict[str, Tensor],
        work: Callable[[Callable[[Batch], Any]], T],
        *,
        forward: Callable[..., Any] | None = None,
    ) -> T:
        """Return ``work(output)``, where ``output(batch)`` is the model's output at these weights.

        The weights are put in once, for however many batches: for a small network that takes
        longer than a forward pass. Or ``forward(values, *inputs)`` runs in place of the model, with
        the weights and buffers by every name.
        """
        values = self._in_all_places(weights) | self._buffers
        if forward is not None:
            return work(partial(self._output_of, partial(forward, values)))
        inside = {f"model.{name}": value for name, value in values.items()}
        found: T = functional_call(
            _Holder(self.model),
            inside,
            (lambda model: work(partial(self._output_of, model)),),
            tie_weights=False,
        )
        return found

    def with_buffers(self, buffers: Mapping[str, Tensor]) -> "Objective":
        """Return this objective with other buffers, such as running statistics that fit other w.

        Everything else is shared, and the model keeps its own. The tensors are read in every
        call, so what is written into them later counts.

        Raises:
            ValueError: If the model has no such buffer, or one of another shape or type.
        """
        own = dict(self.model.named_buffers())
        for name, buffer in buffers.items():
            kind = None if name not in own else (list(own[name].shape), own[name].dtype)
            if kind != (list(buffer.shape), buffer.dtype):
                raise ValueError(
                    "`buffers` must hold buffers of the model in their shapes and types, got "
                    f"`{name}` of shape {list(buffer.shape)} in {buffer.dtype}, where the model "
                    f"has {kind or 'none'}."
                )
        other = copy.copy(self)
        other._buffers = {**self._buffers, **buffers}
        return other

    def batch_loss(self, w: Float[Tensor, " d"], batch: Batch) -> Float[Tensor, ""]:
        """Return the mean loss over one batch, with the regulariser; differentiable in w.

        L is the mean of these, each weighted with what its batch counts for. A batch that counts
        for nothing has the regulariser alone.
        """
        return self.batch_total(w, batch) / (self.batch_weight(batch) or 1.0) + (
            self.regularization(w)
        )

    def batch_weight(self, batch: Batch) -> float:
        """Return what a batch counts for: its samples, or what ``count`` says."""
        return self._criterion.weight(batch)

    def batch_total(self, w: Float[Tensor, " d"], batch: Batch) -> Float[Tensor, ""]:
        """Return the weighted sum of one batch's losses at weights w; differentiable in w.

        The sum of these over all batches of all ranks, divided by ``normalizer``, plus
        ``regularization`` is L.
        """
        return self.batch_total_at(self.unflatten(w), batch)

    def batch_total_at(self, weights: dict[str, Tensor], batch: Batch) -> Float[Tensor, ""]:
        """Return ``batch_total`` for the weights by name; differentiable in each of them."""
        if self.batch_weight(batch) == 0:  # its mean would be NaN
            return torch.stack([part.reshape(-1)[:0].sum() for part in weights.values()]).sum()
        return self.total_from_output(self._output_at(weights, batch), batch)

    def total_from_output(self, output: Any, batch: Batch) -> Float[Tensor, ""]:
        """Return the weighted sum of one batch's losses, from the model's output on it."""
        return self._criterion.total(output, batch)

    def sample_losses_from_output(self, output: Any, batch: Batch) -> Float[Tensor, " n"]:
        """Return every sample's part of ``total_from_output``; differentiable.

        Raises:
            ValueError: If the criterion cannot be taken apart by sample.
        """
        return self._criterion.samples(output, batch)

    def regularization(self, w: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        """Return the regulariser at weights w, zero if there is none; differentiable in w."""
        if self._regularizer is None:
            return w[:0].sum()
        found: Tensor = self._regularizer(self.unflatten(w))
        return found

    def fixed_state(self) -> FixedState:
        """Return a watch on what the loss depends on beside w: other weights, and buffers."""
        return FixedState(self.constants())

    def reduce_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place, and return it; they call it together."""
        return self.ranks.sum_(tensor)

    def loss(self, w: Float[Tensor, " d"]) -> float:
        """Return L(w). Costs one forward pass over the data."""
        with self.ranks.in_step(w), torch.no_grad():
            self._begin(w)
            totals = self._places.put(
                [self.batch_total(w, batch) for batch in self.batches()], self.device
            )
        return self._mean(totals, w)

    def gradient(self, w: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return the gradient of L at w. Costs one forward and one backward pass."""
        return self.loss_and_gradient(w)[1]

    def loss_and_gradient(self, w: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """Return L(w) and its gradient. Costs one forward and one backward pass."""
        return self._with_derivative(w, (), _gradient, "gradient", nullcontext())

    def hessian_product(
        self, w: Float[Tensor, " d"], v: Float[Tensor, " d"]
    ) -> Float[Tensor, " d"]:
        """Return H(w) v for the Hessian H of L. Costs about two gradients (Pearlmutter 1994)."""
        return self.loss_and_hessian_product(w, v)[1]

    def loss_and_hessian_product(
        self, w: Float[Tensor, " d"], v: Float[Tensor, " d"]
    ) -> tuple[float, Float[Tensor, " d"]]:
        """Return L(w), which the product computes anyway, and H(w) v."""
        what, settings = "Hessian-vector product", differentiable_twice()
        return self._with_derivative(w, (v,), _curvature_product, what, settings)

    def _with_derivative(
        self,
        w: Tensor,
        vectors: tuple[Tensor, ...],
        derivative: Callable[..., Tensor],
        what: str,
        settings: AbstractContextManager[None],
    ) -> tuple[float, Tensor]:
        """L(w), and a derivative of it, added up over the batches and the regulariser."""
        with self.ranks.in_step(w, *vectors), torch.enable_grad(), settings:
            require_autograd()
            w = self._begin(w).detach().requires_grad_()
            for v in vectors:
                self.require_vector(v, "v")
            out, sums = torch.zeros_like(w), []
            for batch in self.batches():
                total = self.batch_total(w, batch)
                out += derivative(total, w, *vectors)
                sums.append(total.detach())
            totals = self._places.put(sums, self.device)
        loss = self._mean(totals, w)
        out = self.reduce_(out).div_(self.normalizer)
        if self._regularizer is not None:
            with torch.enable_grad():
                penalty = self.regularization(w)
                if penalty.requires_grad:
                    out += derivative(penalty, w, *vectors)
        return loss, finite_vector(out, what, self)

    def batch_hessian_product(
        self, w: Float[Tensor, " d"], v: Float[Tensor, " d"], batch: Batch
    ) -> Float[Tensor, " d"]:
        """Return H_b(w) v for the Hessian of ``batch_loss``, the mean over one batch.

        Concerns no other rank.
        """
        w = self._begin(w).detach().requires_grad_()
        self.require_vector(v, "v")
        with torch.enable_grad(), differentiable_twice():
            product = _curvature_product(self.batch_loss(w, batch), w, v)
        return finite_vector(product, "Hessian-vector product", self)

    def sample_losses(self, w: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
        """Return every sample's part of the loss at w, in the order of the data, in float64.

        Their mean is L(w) without the regulariser. Where samples count unevenly, as sentences with
        their tokens, a sample's part is its sum of losses over the mean count of a sample.

        Raises:
            ValueError: If the criterion cannot be taken apart by sample (mapping batches with a
                criterion that returns a scalar), or its single losses do not add up to its mean
                times ``count``.
        """
        ends = list(accumulate(self._places.lengths))
        with self.ranks.in_step(w), torch.no_grad():
            self._begin(w)
            parts = [
                self.sample_losses_from_output(self.output(w, batch), batch).to(torch.float64)
                for batch in self.batches()
            ]
            totals = self._places.put([part.sum() for part in parts], self.device)
            losses = totals.new_zeros(self.num_samples)
            for place, part in zip(self.places, parts, strict=True):
                losses[ends[place] - len(part) : ends[place]] = part
        self._mean(totals, w)
        return self.reduce_(losses) * (self.num_samples / self.normalizer)

    def statistics(self, w: Float[Tensor, " d"]) -> LossStatistics:
        """Return count, sum and sum of squares of the samples' losses, without the regulariser.

        Costs one forward pass. The standard error takes what samples count for as given.
        """
        losses = self.sample_losses(w)
        return LossStatistics(len(losses), float(losses.sum()), float(losses.square().sum()))

    def _output_of(self, model: Callable[..., Any], batch: Batch) -> Any:
        """The model's output with the weights that are in it."""
        return model(**batch) if isinstance(batch, Mapping) else model(*batch[:-1])

    def _output_at(self, weights: dict[str, Tensor], batch: Batch) -> Any:
        inputs = ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch[:-1]), None)
        # Tied weights are put in here: torch would put two in a module that is registered twice,
        # and would afterwards put back the first of them, instead of the parameter.
        values = self._in_all_places(weights) | self._buffers
        return functional_call(self.model, values, *inputs, tie_weights=False)

    def constants(self) -> dict[str, Tensor]:
        """Return what the loss depends on beside the weights: other parameters, and buffers."""
        return super().constants() | self._buffers

    def _begin(self, w: Tensor) -> Tensor:
        """Check what may have changed since the last call: the vector, the model's mode."""
        self.require_vector(w, "w")
        require_fixed_modules(self.model)
        return w

    def _mean(self, totals: Tensor, w: Tensor) -> float:
        """L from every rank's part of the totals; names what is not finite."""
        totals = self.reduce_(totals)
        with torch.no_grad():
            penalty = float(self.regularization(w))
        return finite_loss(totals, self.normalizer, penalty, self.unflatten(w.detach()))


class _Holder(nn.Module):
    """Runs any work on a model inside a forward pass, and so inside ``functional_call``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.model)


def _gradient(total: Tensor, w: Tensor) -> Tensor:
    return torch.autograd.grad(total, w, materialize_grads=True)[0]


def _curvature_product(total: Tensor, w: Tensor, v: Tensor) -> Tensor:
    require_second_derivative(total)
    if not total.requires_grad:  # a constant
        return torch.zeros_like(w)
    (gradient,) = torch.autograd.grad(total, w, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:  # a loss linear in w
        return torch.zeros_like(w)
    require_second_derivative(gradient)
    return torch.autograd.grad(gradient, w, v, materialize_grads=True)[0].detach()
