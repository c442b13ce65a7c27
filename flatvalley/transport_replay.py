"""A training made once more, to carry along what gRDA would have done differently at every step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from flatvalley.data import Dataset
from flatvalley.schedules import schedule
from flatvalley.surroundings import seed_noise
from flatvalley.train_config import TrainConfig
from flatvalley.train_data import load_train_data
from flatvalley.trainees import Trainee
from flatvalley.training import model_factory
from flatvalley.training_loop import Training
from hessian import NonFiniteError
from hessian.double_backward import differentiable_twice, require_second_derivative
from hessian.finiteness import all_finite
from pruning import Scores, Transport, directional_scores
from pruning.grda_numbers import grow

TOLERANCE = 1e-3
"""Share of the norm of all weights by which a replay may miss those it is asked to end at.

On the machine of the training, with as many threads, it misses by nothing. Elsewhere other sums
round otherwise, and steps enlarge that; so small a difference is below what the scores can tell.
"""
OTHERS = "dp-filter and dp-projector, which look at the weights and not at their training"
"""What to prune by where a training cannot be replayed."""

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True)
class Replayed:
    """The scores that a training gives, and how well it was met."""

    scores: Scores
    num_steps: int
    """Steps of the training: a gradient each."""
    miss: float
    """‖replayed − given weights‖₂ over the norm of the given ones: 0 is bit for bit."""


@dataclass(frozen=True)
class TransportReplay:
    """A known training that can be made once more, for its transport scores.

    Everything random in a training depends on the seed and the step alone: start, batches,
    augmentation, dropout. So its path can be walked again, and at each of its points the Hessian of
    the step's own minibatch moves the difference e = v − w of gRDA's dual v and the weights w on.
    That is the exact linearisation of SGD and gRDA trained side by side, noise included, dropout
    and batch statistics as they are in training. It ends in the scores −sign(w) D / g.

    The scores do not depend on gRDA's constant c: threshold g and difference D grow with it alike.
    The threshold follows the learning rate as that of ``GRDA`` does.

    Args:
        config: Settings of the training; its only run is replayed.
        make_model: As ``train`` was given it, in place of the model that the settings name.
        data: The same for the samples.

    Example:
        >>> import torch
        >>> from flatvalley.training import train
        >>> x = torch.linspace(-1, 1, 40)[:, None] ** torch.arange(5)
        >>> samples = Dataset("cubic", x, (x[:, 3] > 0).long(), x, (x[:, 3] > 0).long(), 2)
        >>> config = TrainConfig(runs=("sgd",), epochs=20, batch_size=8, lr=0.5)
        >>> def start():
        ...     torch.manual_seed(0)  # the state outside is put back
        ...     return torch.nn.Linear(5, 2)
        >>> w = train(config, make_model=start, data=samples).runs[0].vector(start())
        >>> replayed = TransportReplay(config, start, samples).run(w)
        >>> replayed.miss, replayed.num_steps, replayed.scores.num_products
        (0.0, 100, 99)

    References:
        docs/explanation/why_grda_prunes_directionally.md, the transport equation.
    """

    config: TrainConfig
    make_model: Callable[[], nn.Module] | None = None
    data: Dataset | None = None

    def require(self) -> None:
        """See that the training is one that the theory covers: plain SGD.

        Raises:
            ValueError: If it is not.
        """
        text, spec = ", ".join(self.config.runs), self.config.specs[0]
        beyond = [
            f"{name}={spec.settings[name]:g}"
            for name in ("momentum", "weight_decay")
            if spec.settings.get(name, 0.0) != 0.0
        ]
        if len(self.config.runs) != 1 or spec.name != "sgd" or beyond:
            raise ValueError(
                "Transport scores need a network trained by plain sgd, without momentum and weight "
                f"decay, which gRDA has not; this one was trained by {text}. Use {OTHERS}, or "
                "train with sgd."
            )

    def run(
        self, w: Float[Tensor, " d"], *, mu: float = 0.6, progress: Progress | None = None
    ) -> Replayed:
        """Return the transport scores of the weights with which the training ended.

        Costs the training's gradients and a product with a Hessian for each, about four times
        the training, and four vectors of memory beside it. Where the weights were trained by
        bf16 autocast, products are made without it.

        Args:
            w: The weights, shape [d]; the replay must end at them.
            mu: gRDA's exponent μ.
            progress: Called after every step.

        Raises:
            ValueError: If the training is not by plain SGD, the replay ends at other weights than
                w, or mu is outside (1/2, 1).
            NonFiniteError: If a product or a weight is not finite.
            SecondDerivativeError: If a part of the model has no second derivative.
            DamagedFileError: If a file of the data set is damaged.
            FileNotFoundError: If one is not there.
            ImportError: If a package that reads the data is not installed.
        """
        self.require()
        require_mu(mu)
        samples = load_train_data(self.config, self.data)
        try:
            make = self.make_model or model_factory(self.config, samples.num_classes)
            training = Training(self.config, samples, make)
            with training.everything_put_back():
                transport, end = _walk(training, mu, progress)
        finally:
            samples.close()
        miss = _require_met(end, w, training)
        if not all_finite(transport.offset):
            raise NonFiniteError(
                "The transport is not finite: along the path of this training a small difference "
                "grows without bound. Train with a smaller learning rate, or use "
                f"{OTHERS}."
            )
        return Replayed(directional_scores(w, transport), training.num_steps, miss)


def require_mu(mu: float) -> None:
    """Refuse an exponent that the theory does not cover.

    Raises:
        ValueError: If it is not between 1/2 and 1.
    """
    if not 0.5 < mu < 1.0:
        raise ValueError(
            "`mu` must be between 1/2 and 1, where gRDA is known to perform directional pruning, "
            f"got {mu}. Choose one such as 0.6."
        )


def _walk(training: Training, mu: float, progress: Progress | None) -> tuple[Transport, Tensor]:
    """Make every step of the training; return what was carried along, and the end."""
    config, trainee = training.config, training.trainees[0]
    factor = schedule(
        config.schedule,
        epochs=config.epochs,
        steps_per_epoch=training.steps_per_epoch,
        warmup=config.warmup,
    )
    w = _flat(trainee)
    transport = Transport(w)
    # A group as GRDA has it, so that its threshold is GRDA's whatever the learning rate does.
    group: dict[str, Any] = {
        "step": 0,
        "threshold": 0.0,
        "c": 1.0,
        "mu": mu,
        "target_sparsity": None,
    }
    for step in range(training.num_steps):
        x, y = training.data.train.batches.batch(step)
        trainee.set_rate(factor(step))
        group["lr"] = trainee.optimizer.param_groups[0]["lr"]
        grow(group)
        # Before the step of SGD, whose forward pass moves the statistics of batch norm.
        seed_noise(config, step, training.rank)
        product = partial(_product, trainee, x, y)
        transport.step(product, w, lr=group["lr"], threshold=group["threshold"])
        seed_noise(config, step, training.rank)
        trainee.step(x, y)
        w = _flat(trainee)
        if progress is not None:
            progress(step + 1, training.num_steps)
    return transport, w


def _flat(trainee: Trainee) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainee.params.values()])


def _product(trainee: Trainee, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """The Hessian of a minibatch's loss, in the mode of training, times v; the model stays."""
    params = list(trainee.params.values())
    directions = torch.split(v, [p.numel() for p in params])
    buffers = {name: b.clone() for name, b in trainee.model.named_buffers()}
    with torch.enable_grad(), differentiable_twice():
        loss = trainee.criterion(functional_call(trainee.model, buffers, (x,)), y)
        require_second_derivative(loss)
        gradient = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        curved = [
            (g, part.view_as(g))
            for g, part in zip(gradient, directions, strict=True)
            if g.requires_grad  # others are of parts in which the loss is linear
        ]
        if not curved:
            return torch.zeros_like(v)
        outputs, against = zip(*curved, strict=True)
        require_second_derivative(*outputs)
        product = torch.autograd.grad(outputs, params, against, materialize_grads=True)
    return torch.cat([part.flatten() for part in product])


def _require_met(end: Tensor, w: Tensor, training: Training) -> float:
    """Return by how much the replay misses the weights; refuse more than the tolerance."""
    trainee = training.trainees[0]
    if w.shape != end.shape:
        raise ValueError(
            f"`w` must have {len(end):,} entries like the training, got {len(w):,}. These weights "
            "are of another network."
        )
    missed = (end - w.to(end)).norm()
    miss = float(missed / w.norm().to(missed))
    if not miss <= TOLERANCE:
        sizes = [p.numel() for p in trainee.params.values()]
        parts = [part.norm() for part in torch.split(end - w.to(end), sizes)]
        worst = list(trainee.params)[int(torch.stack(parts).argmax())]
        raise ValueError(
            f"The training of these weights must be the one that is known, but replayed to its "
            f"{training.num_steps:,}th step it ends {miss:.2g} of their norm away from them, "
            f"farthest in {worst}; up to {TOLERANCE:g} is rounding. Data, model, versions or the "
            "number of threads are not those of the training, or the weights were changed after "
            f"it. Use {OTHERS}, or train again here."
        )
    return miss
