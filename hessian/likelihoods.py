"""Losses that are negative log-likelihoods: recognised, drawn from, and bent in closed form.

Cross-entropy belongs to a categorical distribution, squared error to a Gaussian, binary
cross-entropy to coins. Their Hessians in the model's output have formulas, and are what outer
products of gradients give on average over labels drawn from the model.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessian.batches import Batch
from hessian.objective import Objective


class Likelihood(ABC):
    """A loss that is a sum over labels of −log p(y | z), up to a factor for a whole batch."""

    @abstractmethod
    def fits(self, z: Tensor, y: Any) -> bool:
        """Whether outputs and labels have the shapes and types of the formulas."""

    @abstractmethod
    def unit_losses(self, z: Tensor, y: Tensor) -> Tensor:
        """Return −log p(y | z) up to a constant for every label; zero where one is ignored."""

    @abstractmethod
    def bend(self, z: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """Return the Hessian in z of the unit losses' sum, times u."""

    @abstractmethod
    def draw(self, z: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return labels in the place of y, drawn from p(· | z) with random numbers of the CPU."""

    @abstractmethod
    def far(self, z: Tensor, y: Tensor) -> Tensor:
        """Return outputs at which no unit loss that counts is near zero."""


def likelihood_of(objective: Objective) -> Likelihood | None:
    """Return the likelihood that an objective's criterion is, None if it is none of ours.

    Class weights are none; a smoothed cross-entropy is, but only its Hessian is that of the labels.
    """
    criterion = objective.criterion
    if criterion is functional.cross_entropy:
        return _Categorical()
    if criterion is functional.mse_loss:
        return _Gaussian()
    if criterion is functional.binary_cross_entropy_with_logits:
        return _Bernoulli()
    if type(criterion) is nn.CrossEntropyLoss and criterion.weight is None:
        return _Categorical(criterion.ignore_index)
    if type(criterion) is nn.MSELoss:
        return _Gaussian()
    if type(criterion) is nn.BCEWithLogitsLoss and not dict(criterion.named_buffers()):
        return _Bernoulli()  # without weights
    return None


def smoothing(objective: Objective) -> float:
    """Return the share of the loss that belongs to no label."""
    return float(getattr(objective.criterion, "label_smoothing", 0.0))


def factor(likelihood: Likelihood, objective: Objective, z: Tensor, batch: Batch) -> Tensor:
    """Return what an objective multiplies the unit losses of one batch by."""
    y = target_of(batch)
    far = likelihood.far(z.detach(), y)
    units = likelihood.unit_losses(far, y).sum()
    # No unit loss counts where all labels are ignored.
    return torch.where(units > 0, objective.total_from_output(far, batch) / units, 0.0)


def target_of(batch: Batch) -> Any:
    """Return the labels of a tuple batch; a mapping has none by itself."""
    return batch[-1] if isinstance(batch, tuple | list) else None


def with_target(batch: Batch, target: Tensor) -> Batch:
    """Return a tuple batch with other labels."""
    return (*list(batch)[:-1], target)


class _Categorical(Likelihood):
    """Cross-entropy of logits z of shape [n, classes, ...] with class indices."""

    def __init__(self, ignored: int = -100) -> None:
        self.ignored = ignored

    def fits(self, z: Tensor, y: Any) -> bool:
        return (
            isinstance(y, Tensor)
            and not y.is_floating_point()
            and z.ndim >= 2
            and y.shape == z.shape[:1] + z.shape[2:]
        )

    def unit_losses(self, z: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(z, y, ignore_index=self.ignored, reduction="none")

    def bend(self, z: Tensor, y: Tensor, u: Tensor) -> Tensor:
        p = z.softmax(dim=1) * (y != self.ignored).unsqueeze(1)
        weighted = p * u
        return weighted - p * weighted.sum(dim=1, keepdim=True)

    def draw(self, z: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        levels = torch.rand(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(
            z.device
        )
        cumulated = z.to(torch.float64).softmax(dim=1).movedim(1, -1).cumsum(dim=-1)
        values = (levels * cumulated[..., -1]).unsqueeze(-1)
        drawn = torch.searchsorted(cumulated.contiguous(), values, right=True).squeeze(-1)
        drawn = drawn.clamp_max(z.shape[1] - 1)  # where logits are NaN, which the loss will tell
        return torch.where(y == self.ignored, y, drawn.to(y.dtype))

    def far(self, z: Tensor, y: Tensor) -> Tensor:
        del y
        return torch.zeros_like(z)


class _Gaussian(Likelihood):
    """Squared error of outputs z with targets of the same shape."""

    def fits(self, z: Tensor, y: Any) -> bool:
        return isinstance(y, Tensor) and y.shape == z.shape

    def unit_losses(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square()

    def bend(self, z: Tensor, y: Tensor, u: Tensor) -> Tensor:
        del z, y
        return 2 * u

    def draw(self, z: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        # exp(−(z − y)²) is a Gaussian of variance 1/2.
        noise = (
            torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu") * 0.5**0.5
        )
        drawn: Tensor = z + noise.to(z)
        return drawn

    def far(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(z).maximum(y.abs()) + y  # also where 1 is lost beside y


class _Bernoulli(Likelihood):
    """Binary cross-entropy of logits z with targets between 0 and 1, of the same shape."""

    def fits(self, z: Tensor, y: Any) -> bool:
        return isinstance(y, Tensor) and y.shape == z.shape

    def unit_losses(self, z: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(z, y, reduction="none")

    def bend(self, z: Tensor, y: Tensor, u: Tensor) -> Tensor:
        del y
        p = z.sigmoid()
        return p * (1 - p) * u

    def draw(self, z: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        levels = torch.rand(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(
            z.device
        )
        drawn: Tensor = levels < z.to(torch.float64).sigmoid()
        return drawn.to(z.dtype)

    def far(self, z: Tensor, y: Tensor) -> Tensor:
        del y
        return torch.zeros_like(z)
