"""What a criterion says about one batch: the sum of its losses, and what the batch counts for."""

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from hessian.batches import Batch, batch_length, map_tensors

_ENTROPIES = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)
SHORT_ROW, MANY_ROWS = 16, 128
"""Classes, and samples, with which torch's cross-entropy on a CPU is faster by columns."""

Criterion = Callable[..., Tensor]
Count = Callable[[Batch], Any]
"""What a batch counts for in the mean over the data, e.g. its number of tokens; one number."""


class BatchCriterion:
    """The losses of a batch as a sum, from a criterion that means, adds or lists them.

    The loss over the data is the sum of ``total`` over the batches, divided by the sum of
    ``weight``. A cross-entropy that means over its targets is added up instead, with the class
    weights and without the ignored targets, and a batch counts for the weights of its targets.

    Args:
        criterion: Called as ``criterion(output, target)``, with the whole batch as target if that
            is a mapping.
        reduction: What the criterion returns, ``"mean"`` or ``"sum"``. Default: what its own
            ``reduction`` says, else the mean. Losses that are not reduced explain themselves.
        count: What a batch counts for. Default: its samples, or the weights of its targets.
    """

    def __init__(
        self, criterion: Criterion, reduction: str | None = None, count: Count | None = None
    ) -> None:
        own = _own_reduction(criterion)
        reduction = reduction or own
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'`reduction` must be "mean" or "sum", got "{reduction}".')
        self._unreduced = _with_reduction(criterion, "none")
        targets = _target_count(criterion)
        self._is_entropy = targets is not None
        if count is None and targets is not None and reduction == own != "sum":
            count = targets
            criterion, reduction = _with_reduction(criterion, "sum") or criterion, "sum"
        self._criterion, self._count = criterion, count
        self._is_sum = reduction == "sum"

    def weight(self, batch: Batch) -> float:
        """Return what a batch counts for.

        Raises:
            TypeError: If ``count`` gave anything but one number.
            ValueError: If that number is negative or not finite.
        """
        if self._count is None:
            return float(batch_length(batch))
        found = self._count(batch)
        try:
            number = float(found)
        except (TypeError, ValueError, RuntimeError):
            shape = f" of shape {list(found.shape)}" if isinstance(found, Tensor) else ""
            raise TypeError(
                f"`count` must return one number for a batch, got a {type(found).__name__}{shape}."
            ) from None
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"`count` must be at least 0 for every batch, got {number}.")
        return number

    def total(self, output: Any, batch: Batch) -> Tensor:
        """Return the weighted sum of the losses of one batch, from the model's output on it."""
        loss = self._criterion(output, _target(batch))
        if loss.ndim > 0:
            return self._rows(loss, batch_length(batch)).sum()
        if self._is_sum:
            return loss
        weight = self.weight(batch)
        if weight == 0:  # the mean over nothing is NaN, and so would be 0 times it
            return (
                output.reshape(-1)[:0].sum() if isinstance(output, Tensor) else loss.new_zeros(())
            )
        return loss * weight

    def samples(self, output: Any, batch: Batch) -> Tensor:
        """Return every sample's part of ``total``, shape [n].

        Raises:
            ValueError: If the criterion cannot be taken apart by sample (mapping batches with a
                criterion that returns a scalar), or its single losses do not add up to its mean
                times ``count``.
        """
        length = batch_length(batch)
        if self._unreduced is not None:
            target = _target(batch)
            if self._is_entropy and _better_by_columns(output, target):
                losses = self._unreduced(output.T.contiguous()[None], target[None])[0]
            else:
                losses = self._rows(self._unreduced(output, target), length)
            return self._counted(losses, output, batch)
        loss = self._criterion(output, _target(batch))
        if loss.ndim > 0:
            return self._rows(loss, length)
        if isinstance(batch, Mapping) or not isinstance(output, Tensor):
            raise ValueError(
                "`criterion` must return one loss per sample to give standard errors with this "
                "kind of batch, got a scalar."
            )
        means = torch.vmap(lambda o, t: self._criterion(o[None], t[None]))(output, batch[-1])
        if self._is_sum or self._count is None:
            return means
        singles = (_cut(batch, slice(i, i + 1), length) for i in range(length))
        weights = means.new_tensor([self.weight(single) for single in singles])
        return self._counted(torch.where(weights > 0, weights * means, 0.0), output, batch)

    def _counted(self, losses: Tensor, output: Any, batch: Batch) -> Tensor:
        """Return the samples' losses; refuse a ``count`` with which they miss the batch's total."""
        if self._count is None or self._is_sum or self._means(losses, output, batch):
            return losses
        raise ValueError(
            "`count` must be the number of losses that `criterion` means over, for single "
            "samples' losses to exist: here they do not add up to the mean times `count`."
        )

    def require_additive(
        self, output: Any, batch: Batch, forward: Callable[[Batch], Any] | None = None
    ) -> None:
        """Check that a batch's total is the sum over its samples, or over two parts of it.

        That is what makes the loss the same however the data are cut. A ``count`` is trusted, and
        nothing is said where the total is not finite or the batch cannot be cut.

        Args:
            output: The model's output on the batch.
            batch: The batch.
            forward: The model's output on any batch, for outputs that cannot be cut.

        Raises:
            ValueError: If the two differ.
        """
        if self._count is not None or batch_length(batch) == 0:
            return
        total = self.total(output, batch)
        if self._unreduced is not None:
            what = "per-sample losses"
            parts = self._rows(self._unreduced(output, _target(batch)), batch_length(batch))
        else:
            what = "parts"
            parts = self._totals_of_parts(output, batch, forward)
        if not len(parts) or not torch.isfinite(total) or _agree(total, parts):
            return
        length = batch_length(batch)
        raise ValueError(
            "`criterion` must weight every sample of a batch alike, but its mean over a batch is "
            f"{float(total) / length:.6g} and the mean of its {what} "
            f"{float(parts.sum()) / length:.6g} (class weights, ignored targets, or a "
            "`reduction` that is not the criterion's own?). Build the criterion with "
            '`reduction="sum"`, or say what its mean over a batch counts for: '
            "`count=lambda batch: (batch[-1] != -100).sum()`, for instance."
        )

    def _totals_of_parts(
        self, output: Any, batch: Batch, forward: Callable[[Batch], Any] | None
    ) -> Tensor:
        """Totals of two uneven parts of a batch, shape [2]; shape [0] if it cannot be cut."""
        length, totals = batch_length(batch), []
        none = torch.zeros(0, device="cpu")
        whole = not _can_be_cut(output, length)
        if length < 2 or not _can_be_cut(batch, length) or (whole and forward is None):
            return none
        first = 2 if length > 3 else 1  # two, because some criteria squeeze a single sample away
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for rows in (slice(0, first), slice(first, length)):
                    part = _cut(batch, rows, length)
                    out = forward(part) if whole and forward else _cut(output, rows, length)
                    totals.append(self.total(out, part))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError):
            return none  # the criterion or the model takes only whole batches
        return torch.stack(totals)

    def _means(self, losses: Tensor, output: Any, batch: Batch) -> bool:
        """Whether single losses make up the total of their batch; true where it is not finite."""
        total = self.total(output, batch)
        return not torch.isfinite(total) or _agree(total, losses)

    def _rows(self, losses: Tensor, length: int) -> Tensor:
        """One loss per sample from losses with the samples in front; the rest as in the batch."""
        if length == 0:
            return losses.reshape(-1)[:0]
        if losses.numel() % length:
            raise ValueError(
                "`criterion` must return a scalar or one loss per sample, got shape "
                f"{list(losses.shape)} for a batch of {length}."
            )
        rows = losses.reshape(length, -1)
        added = self._is_sum or self._count is not None
        return rows.sum(dim=1) if added else rows.mean(dim=1)


def stand_in_output(output: Any, batch: Batch, other: Batch) -> Any:
    """Return rows of the output on ``batch`` in the number of ``other``; None if shapes differ.

    A criterion can be checked on every batch's targets with them, without running the model.
    """
    length = batch_length(batch)
    if length == 0 or not (_can_be_cut(batch, length) and _can_be_cut(output, length)):
        return None
    if _shapes(batch) != _shapes(other):
        return None
    rows = torch.arange(batch_length(other), device="cpu") % length
    return _cut(output, rows, length)


def _target(batch: Batch) -> Any:
    return batch if isinstance(batch, Mapping) else batch[-1]


def _agree(total: Tensor, parts: Tensor) -> bool:
    """Whether parts add up to a total, within the rounding of their type."""
    total, parts = total.detach(), parts.detach().double()
    slack = {torch.float64: 1e-8, torch.float32: 1e-4}.get(total.dtype, 2e-2)
    size = max(float(parts.abs().sum()), abs(float(total)))
    return abs(float(total) - float(parts.sum())) <= slack * size


def _cut(value: Any, rows: slice | Tensor, length: int) -> Any:
    return map_tensors(value, lambda t: t[rows] if t.ndim and len(t) == length else t)


def _can_be_cut(value: Any, length: int) -> bool:
    """Whether every tensor has the samples in front, so that rows of it are a part."""
    if isinstance(value, Mapping) and hasattr(value, "to_tuple"):
        return False  # a ModelOutput: a cut would lose the class and its attributes
    found = _tensors(value)
    return bool(found) and all(t.ndim > 0 and len(t) == length for t in found)


def _shapes(batch: Batch) -> list[torch.Size]:
    return [t.shape[1:] for t in _tensors(batch)]


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def _own_reduction(criterion: Criterion) -> str:
    if isinstance(criterion, partial):
        return str(criterion.keywords.get("reduction", "mean"))
    return str(getattr(criterion, "reduction", "mean"))


def _with_reduction(criterion: Criterion, reduction: str) -> Criterion | None:
    """Return the criterion with another reduction, where it offers that option."""
    if isinstance(criterion, nn.Module) and hasattr(criterion, "reduction"):
        twin = copy.copy(criterion)
        setattr(twin, "reduction", reduction)  # noqa: B010
        return twin
    try:
        has_option = "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        return None
    if not has_option:
        return None
    return lambda output, target: criterion(output, target, reduction=reduction)


def _target_count(criterion: Criterion) -> Count | None:
    """Return what torch divides its mean cross-entropy by; None for any other criterion."""
    own = getattr(type(criterion), "forward", None)
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) and own in _ENTROPIES:
        return partial(_target_weight, weight=criterion.weight, ignored=criterion.ignore_index)
    function, options = criterion, {}
    if isinstance(criterion, partial) and not criterion.args:
        function, options = criterion.func, criterion.keywords
    if function is not cross_entropy and function is not nll_loss:
        return None
    ignored = options.get("ignore_index", -100)
    return partial(_target_weight, weight=options.get("weight"), ignored=ignored)


def _better_by_columns(output: Any, target: Any) -> bool:
    """Whether scores [n, c] and classes [n] are worth reordering as [1, c, n] and [1, n]."""
    return (
        not torch.is_grad_enabled()  # derivatives keep the kernels that they are tested with
        and isinstance(output, Tensor)
        and isinstance(target, Tensor)
        and output.device.type == "cpu"
        and output.ndim == 2
        and output.shape[1] < SHORT_ROW
        and target.ndim == 1
        and len(target) == len(output) >= MANY_ROWS
        and not target.is_floating_point()
    )


def _target_weight(batch: Batch, weight: Tensor | None, ignored: int) -> Any:
    """Sum of the class weights of the targets that are not ignored."""
    target = _target(batch)
    if target.is_floating_point():  # probabilities, of shape [n, classes, ...]
        return target.numel() / target.shape[1]
    kept = target != ignored
    return kept.sum() if weight is None else weight[target[kept]].sum()
