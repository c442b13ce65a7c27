"""Gradual magnitude pruning: the smallest weights go, a few at a time, while training runs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim import Optimizer

from hessian import NonFiniteError
from pruning.keep_zeros import zero_weights_


class GradualMagnitude:
    """Prune the smallest weights step by step beside any optimizer, along a cubic schedule.

    Call ``step()`` after every step of the optimizer. After n of them a share

        s_n = s (1 − (1 − (n − begin) / (end − begin))³),    begin ≤ n ≤ end,

    of the d weights is zero: many go early, while there are too many, and few late. Which ones is
    decided every ``every`` steps and at ``end``: those of smallest magnitude at that time. A
    weight that is gone stays gone: weight and optimizer state (momentum, averages) are set to
    zero after every step, so that nothing pushes it back.

    At ``end`` exactly round(s · d) weights are pruned. Of equal magnitudes the first in order go
    first, so the same run prunes the same weights, on every rank of a data-parallel run too. A
    weight that is zero by itself, as a bias often is at the start, goes first of all: exclude
    those that should live.

    Costs one byte a weight for the masks, and writing zeros through them in every step. A
    decision is one selection among d magnitudes; nothing else waits for the device.

    Args:
        optimizer: The one that trains. All its present parameters are pruned, except those in
            groups with ``"prune": False`` and those that ``exclude`` names.
        sparsity: Share s of zeros at the end, in [0, 1], among the parameters that are pruned.
        begin: Steps without pruning at the start.
        end: Step of the last decision. Leave time to train afterwards: a fourth of all steps.
        every: Steps between two decisions.
        per_layer: Whether every tensor gets the same share of zeros. Default: one ranking over
            all of them, which is better unless it empties one.
        exclude: Tells which parameters stay dense, such as ``lambda p: p.ndim < 2`` for biases
            and normalisation layers.

    Raises:
        ValueError: If sparsity is outside [0, 1], the steps are not 0 ≤ begin < end and every ≥ 1,
            or no parameter is left to prune.
        TypeError: If a parameter is sharded (DTensor), so that no process sees all magnitudes.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -0.1, 0.2, 2.0]))
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> pruner = GradualMagnitude(optimizer, 0.5, begin=0, end=2, every=1)
        >>> for _ in range(2):
        ...     w.grad = torch.ones_like(w)
        ...     optimizer.step()
        ...     pruner.step()
        >>> w.data, pruner.sparsity()
        (tensor([2.8000, 0.0000, 0.0000, 1.8000]), 0.5)

    References:
        Zhu & Gupta (2017), To prune, or not to prune: exploring the efficacy of pruning for model
        compression. Gale, Elsen, Hooker (2019), The state of sparsity in deep neural networks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sparsity: float,
        *,
        begin: int,
        end: int,
        every: int = 100,
        per_layer: bool = False,
        exclude: Callable[[Tensor], bool] | None = None,
    ) -> None:
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"`sparsity` must be in [0, 1], the share of zeros, got {sparsity}.")
        if not 0 <= begin < end:
            raise ValueError(
                f"`begin` and `end` must be steps with 0 <= begin < end, got {begin} and {end}."
            )
        if every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {every}.")
        self._optimizer, self._settings = optimizer, (sparsity, begin, end, every, per_layer)
        self._params: list[Tensor] = [
            p
            for group in optimizer.param_groups
            if group.get("prune", True)
            for p in group["params"]
            if exclude is None or not exclude(p)
        ]
        if not sum(p.numel() for p in self._params):
            raise ValueError(
                "`optimizer` must hold parameters to prune, got none but those in groups with "
                '"prune": False and those that `exclude` names.'
            )
        if any(hasattr(p, "full_tensor") for p in self._params):
            raise TypeError(
                "`optimizer` must hold whole parameters, got a sharded one (DTensor). Train with "
                "DistributedDataParallel, or with GRDA, which ranks nothing."
            )
        self._pruned = [torch.zeros_like(p, dtype=torch.bool) for p in self._params]
        self.num_steps = 0
        """Calls of ``step()`` so far."""

    def scheduled(self, step: int) -> float:
        """Return s_n, the share of zeros that the schedule asks for after n = ``step`` steps."""
        sparsity, begin, end, _, _ = self._settings
        left = 1.0 - min(max((step - begin) / (end - begin), 0.0), 1.0)
        return float(sparsity * (1.0 - left**3))

    def sparsity(self) -> float:
        """Return the share of zeros among the parameters that are pruned. Waits for the device."""
        zeros = torch.stack([(p == 0).sum() for p in self._params]).sum()
        return int(zeros) / sum(p.numel() for p in self._params)

    @torch.no_grad()
    def step(self) -> None:
        """Hold the pruned weights at zero, and prune more where the schedule says so.

        Raises:
            NonFiniteError: If a weight is NaN or infinite when weights are to be ranked.
        """
        _, begin, end, every, per_layer = self._settings
        self.num_steps += 1
        n = self.num_steps
        if n == end or (begin < n < end and (n - begin) % every == 0):
            everything = list(range(len(self._params)))
            for indices in [[i] for i in everything] if per_layer else [everything]:
                self._prune(indices, self.scheduled(n))
        zero_weights_(self._optimizer, self._params, self._pruned)

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to go on: the count of steps and the masks."""
        return {
            "settings": list(self._settings),
            "step": self.num_steps,
            "pruned": [pruned.clone() for pruned in self._pruned],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; weights and optimizer are loaded on their own.

        Raises:
            ValueError: If the state is of another schedule or of other parameters.
        """
        if tuple(state["settings"]) != self._settings:
            raise ValueError(
                "`state` must be of the same sparsity, begin, end, every and per_layer, "
                f"{self._settings}, got {tuple(state['settings'])}."
            )
        shapes = [list(p.shape) for p in self._params]
        found = [list(pruned.shape) for pruned in state["pruned"]]
        if shapes != found:
            raise ValueError(
                f"`state` must be of the parameters that are pruned, of shapes {shapes}, got "
                f"{found}. Exclude the same ones."
            )
        for pruned, saved in zip(self._pruned, state["pruned"], strict=True):
            pruned.copy_(saved)
        self.num_steps = int(state["step"])

    def _prune(self, indices: list[int], share: float) -> None:
        """Prune the smallest of some parameters together, those pruned before included."""
        params, masks = ([values[i] for i in indices] for values in (self._params, self._pruned))
        magnitudes = torch.cat([p.abs().flatten().to(params[0].device) for p in params])
        if not torch.isfinite(magnitudes).all():
            raise NonFiniteError(
                f"A weight is NaN or infinite at step {self.num_steps}, so none can be ranked. "
                "Lower the learning rate."
            )
        # Below every magnitude, so that what is pruned comes first.
        gone = torch.cat([mask.flatten().to(magnitudes.device) for mask in masks])
        magnitudes.masked_fill_(gone, -1.0)
        chosen = smallest(magnitudes, round(share * len(magnitudes)))
        parts = torch.split(chosen, [mask.numel() for mask in masks])
        for mask, part in zip(masks, parts, strict=True):
            mask.copy_(part.view_as(mask))


def smallest(values: Float[Tensor, " d"], count: int) -> Bool[Tensor, " d"]:
    """Mark the ``count`` smallest values; of equal ones, the first in order."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    # A selection, as sorting 25 million weights takes seven times as long.
    last = values.kthvalue(count).values
    below, equal = values < last, values == last
    return below | (equal & (equal.cumsum(0) <= count - below.sum()))
