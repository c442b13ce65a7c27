"""The Fisher information: outer products of the gradients of single losses, by products only."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.batches import Batch, batch_length
from hessian.jacobian_products import JacobianProducts, Middle
from hessian.likelihoods import factor, likelihood_of, smoothing, target_of, with_target
from hessian.objective import Objective
from hessian.operators import Operator

Kind = Literal["empirical", "monte_carlo"]
DrawTargets = Callable[[Tensor, torch.Generator], Tensor]
"""Called with the model's output and a generator of the CPU: targets drawn from the model."""


def fisher_operator(
    objective: Objective,
    w: Float[Tensor, " d"] | None = None,
    *,
    kind: Kind = "empirical",
    num_draws: int = 1,
    seed: int = 0,
    draw_targets: DrawTargets | None = None,
    memory_budget: int | None = None,
) -> Operator:
    """Return the Fisher information matrix F = Σ g gᵀ / N at w, g the gradients of single losses.

    ``"empirical"`` takes the gradients of the samples' losses with the targets of the data. It is
    no approximation of the Hessian away from a good fit. ``"monte_carlo"`` draws the targets from
    the model's own prediction, once, so that the operator is one matrix: categorical labels for
    cross-entropy, coins for binary cross-entropy, Gaussian targets for squared error. Its mean
    over seeds is the Gauss-Newton matrix. There, every label that is drawn by itself (a token's, a
    pixel's) has an outer product of its own, which has the same mean as one a sample and less
    variance.

    Gradients of single samples are never formed: a product is one with the Jacobian of the losses
    and one with its transpose, at the price of a Gauss-Newton product, and nothing of size batch
    times d is stored. A regulariser is no part of F; add its Hessian with ``+``.

    Args:
        objective: The training loss.
        w: Where the matrix is taken, shape [d]. Default: the model's current weights.
        kind: Whose targets the gradients belong to.
        num_draws: Draws of all targets for ``"monte_carlo"``; the variance falls with their
            number, the price of what is between two Jacobians grows with it.
        seed: Seed of the draws, made on the CPU; the global random state is not used.
        draw_targets: Draws targets for any other criterion, which must give one loss per sample.
        memory_budget: Bytes for graphs that are kept between products; 0 keeps none. Default: a
            quarter of what is free at the first product.

    Returns:
        The operator of shape [d, d], positive semidefinite. Its products raise ``ValueError`` if
        the criterion gives no losses of single samples, ``NonDeterministicError`` if the model or
        the data changed since the first one, and ``NonFiniteError`` if they are not finite.

    Raises:
        ValueError: If w does not fit the objective, the kind is not known, or a number is out of
            range.
        TypeError: If targets are to be drawn for a criterion that is no likelihood we know; the
            message says what to pass.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> data = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> F = fisher_operator(Objective(model, torch.nn.MSELoss(), data))
        >>> F @ torch.ones(1)  # gradients 2 and 8, squares 4 and 64
        tensor([34.])

    References:
        Kunstner, Balles, Hennig (2019), Limitations of the empirical Fisher approximation for
        natural gradient descent.
        Martens (2020), New insights and perspectives on the natural gradient method.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` must be one of {get_args(Kind)}, got {kind!r}.")
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1, got {num_draws}.")
    if kind == "empirical" and (num_draws > 1 or draw_targets is not None):
        raise ValueError(
            '`num_draws` and `draw_targets` are for `kind="monte_carlo"`; the empirical Fisher '
            "takes the targets of the data."
        )
    w = objective.weights() if w is None else w.detach().clone()
    objective.require_vector(w, "w")
    if kind == "empirical":
        return JacobianProducts(
            objective,
            w,
            lambda i, batch, leaf: (_sample_losses(objective, leaf, batch), _identity),
            memory_budget,
            regularized=False,
        ).operator("empirical Fisher by reverse mode")
    draws = _Draws(objective, num_draws, seed, draw_targets)
    products = JacobianProducts(objective, w, draws.part, memory_budget, regularized=False)
    return products.operator(f"Monte Carlo Fisher of {num_draws} draws by reverse mode")


class _Draws:
    """Losses of labels that are drawn in a batch's first visit, and remembered."""

    def __init__(
        self, objective: Objective, num_draws: int, seed: int, draw_targets: DrawTargets | None
    ) -> None:
        self._objective, self._num = objective, num_draws
        self._draw_targets = draw_targets
        self._likelihood = None if draw_targets is not None else likelihood_of(objective)
        if draw_targets is None and (self._likelihood is None or smoothing(objective)):
            raise TypeError(
                "Targets can be drawn for cross-entropy, binary cross-entropy and squared error "
                "without weights or smoothing, as nn modules or functions, got "
                f"{_name(objective.criterion)}. Pass `draw_targets=`, a function of the model's "
                "output and a torch.Generator that returns targets as the criterion takes them."
            )
        self._seed = seed
        self._targets: dict[tuple[int, int], list[Tensor]] = {}

    def part(self, i: int, batch: Batch, w: Tensor) -> tuple[Tensor, Middle]:
        """Return the losses of all draws for one batch, and what their gradients weigh."""
        z = self._objective.output(w, batch)
        y = target_of(batch)
        if not isinstance(z, Tensor) or y is None:
            raise TypeError(
                "Targets can be drawn for batches `(*inputs, target)` and models that return one "
                f"tensor, got a {type(batch).__name__} and {type(z).__name__}. Wrap the model."
            )
        key = i, batch_length(batch)  # graphs are measured on a part of a batch
        if key not in self._targets:
            self._targets[key] = self._drawn(i, z.detach(), y)
        targets = self._targets[key]
        likelihood = self._likelihood
        if likelihood is None:
            losses = [
                self._objective.sample_losses_from_output(z, with_target(batch, target))
                for target in targets
            ]
            return torch.cat(losses), lambda u: u / self._num
        losses = [likelihood.unit_losses(z, target).reshape(-1) for target in targets]
        scale = factor(likelihood, self._objective, z, batch) / self._num
        return torch.cat(losses), lambda u: scale * u

    def _drawn(self, i: int, z: Tensor, y: Tensor) -> list[Tensor]:
        # A batch has the same draws on whichever rank it is.
        place = self._objective.places[i]
        seeds = torch.Generator().manual_seed(self._seed)
        seed = int(torch.randint(1 << 62, (place + 1,), generator=seeds, device="cpu")[place])
        generator = torch.Generator().manual_seed(seed)
        if self._likelihood is None:
            assert self._draw_targets is not None
            return [self._draw_targets(z, generator).to(z.device) for _ in range(self._num)]
        if not self._likelihood.fits(z, y):
            raise TypeError(
                "Targets can be drawn where their shape is that of the output (without classes, "
                f"for cross-entropy), got output {list(z.shape)} and {y.dtype} targets "
                f"{list(y.shape)}. Pass `draw_targets=`."
            )
        return [self._likelihood.draw(z, y, generator) for _ in range(self._num)]


def _sample_losses(objective: Objective, w: Tensor, batch: Batch) -> Tensor:
    return objective.sample_losses_from_output(objective.output(w, batch), batch)


def _identity(u: Tensor) -> Tensor:
    return u


def _name(criterion: object) -> str:
    return str(getattr(criterion, "__name__", None) or type(criterion).__name__)
