"""SGD and gRDA trained side by side: the same start, the same batches."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from flatvalley.run import read_tensors, write_tensors
from hessian import NonFiniteError, Objective
from pruning import GRDA, Transport

# Beyond this a run takes years; the number is a typing mistake.
MAX_STEPS = 10**10

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True)
class CoupledConfig:
    """Settings of one coupled run.

    Raises:
        ValueError: If one is out of range.
    """

    gamma: float
    """Constant learning rate."""
    time: float = 200.0
    """Training time t = steps · gamma."""
    c: float = 0.02
    mu: float = 0.6
    batch_size: int = 64
    seed: int = 0
    """Seed of the batch order."""
    num_snapshots: int = 50
    """How many points of the trajectories are kept, evenly spaced in steps."""
    transport_interval: float = 0.1
    """Training time that one product with the Hessian of the whole training loss stands for.

    A pass over the data for every step of a small learning rate would cost more than training.
    """

    def __post_init__(self) -> None:
        for name in ("gamma", "time", "c", "transport_interval"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        if not 0.5 < self.mu < 1:
            raise ValueError(
                "`mu` must be between 1/2 and 1, where gRDA is known to perform directional "
                f"pruning, got {self.mu}. Choose one such as 0.6."
            )
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        try:
            finite = self.c * self.gamma**0.5 * self.time**self.mu < float("inf")
        except OverflowError:
            finite = False
        if not finite or self.time / self.gamma > MAX_STEPS:
            raise ValueError(
                f"`gamma` and `time` must give a finite threshold and at most {MAX_STEPS:,} steps, "
                f"got gamma={self.gamma:g}, time={self.time:g}."
            )
        if self.num_steps < 2:
            raise ValueError(
                f"`gamma` must leave room for two steps or more in time {self.time:g}, got "
                f"{self.gamma:g}. Lower it or raise `time`."
            )

    @property
    def num_steps(self) -> int:
        """Steps of training: t / gamma, rounded."""
        return round(self.time / self.gamma)

    @property
    def steps_per_product(self) -> int:
        """Steps of training for one product with the Hessian of the training loss."""
        return max(1, round(self.transport_interval / self.gamma))


@dataclass(frozen=True)
class CoupledResult:
    """Where the coupled optimizers ended, and what was seen on the way."""

    start: Float[Tensor, " d"]
    sgd: Float[Tensor, " d"]
    grda: Float[Tensor, " d"]
    second_sgd: Float[Tensor, " d"]
    """SGD from the same start with another order of the batches: what noise alone does."""
    clipped: Bool[Tensor, " d"]
    """Weights that gRDA held at zero after at least one step."""
    threshold: float
    """gRDA's threshold at the end: λ of the directional pruning that it should equal."""
    transport: Transport
    """First-order theory with the Hessian of the training loss, one product an interval."""
    batch_transport: Transport
    """The same with the Hessian of the step's minibatch, one product a step."""
    times: Float[Tensor, " s"]
    sgd_path: Float[Tensor, "s d"]
    grda_path: Float[Tensor, "s d"]


def train_coupled(
    make_model: Callable[[], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    config: CoupledConfig,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 10.0,
    progress: Progress | None = None,
) -> CoupledResult:
    """Train SGD, gRDA and a second SGD run from one start, with the first-order theory beside.

    The order of the batches depends on the seed and the epoch only, so a run that was cut off
    goes on from its checkpoint and ends with the same numbers.

    Args:
        make_model: Returns the same freshly initialised model at every call.
        inputs: Training inputs, shape [n, ...].
        labels: Class labels, shape [n].
        config: Settings.
        checkpoint: Where the state is kept while training; removed by nobody. Default: nowhere.
        checkpoint_seconds: Time between two checkpoints.
        progress: Called after every step.

    Returns:
        End points, trajectories and both transports.

    Raises:
        NonFiniteError: If a loss is not finite; the message names step and optimizer.
        ValueError: If the checkpoint is damaged or belongs to another run.
    """
    training = _CoupledTraining(make_model, inputs, labels, config)
    if checkpoint is not None and checkpoint.exists():
        training.restore(checkpoint)
    saved = monotonic()
    while training.step < config.num_steps:
        training.advance()
        if progress is not None:
            progress(training.step, config.num_steps)
        if checkpoint is not None and monotonic() - saved > checkpoint_seconds:
            training.save(checkpoint)
            saved = monotonic()
    return training.result()


class _CoupledTraining:
    """The state of a coupled run between two steps."""

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        inputs: Tensor,
        labels: Tensor,
        config: CoupledConfig,
    ) -> None:
        self.config, self.inputs, self.labels = config, inputs, labels
        self.models = {name: make_model() for name in ("sgd", "grda", "second_sgd")}
        self.optimizers = {
            "sgd": torch.optim.SGD(self.models["sgd"].parameters(), lr=config.gamma),
            "grda": GRDA(self.models["grda"].parameters(), config.gamma, c=config.c, mu=config.mu),
            "second_sgd": torch.optim.SGD(self.models["second_sgd"].parameters(), lr=config.gamma),
        }
        self.criterion = nn.CrossEntropyLoss()
        self.objective = Objective(make_model(), self.criterion, (inputs, labels))
        self.start = self.interval_start = self.weights("sgd")
        self.transport, self.batch_transport = Transport(self.start), Transport(self.start)
        self.clipped = torch.zeros_like(self.start, dtype=torch.bool)
        self.step = 0
        self.snapshots: list[tuple[float, Tensor, Tensor]] = [(0.0, self.start, self.start)]
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def weights(self, name: str) -> Tensor:
        return parameters_to_vector(self.models[name].parameters()).detach().clone()

    def advance(self) -> None:
        """Make one step of everything."""
        config, w = self.config, self.weights("sgd")
        rows = self.rows(config.seed)
        batch = self.inputs[rows], self.labels[rows]
        position = self.step % config.steps_per_product
        if position == 0:
            self.interval_start = w
        self.train("grda", rows)
        threshold = float(self.optimizers["grda"].param_groups[0]["threshold"])
        self.batch_transport.step(
            lambda v: self.objective.batch_hessian_product(w, v, batch),
            w,
            lr=config.gamma,
            threshold=threshold,
        )
        if position + 1 == config.steps_per_product or self.step + 1 == config.num_steps:
            self.transport.step(
                lambda v: self.objective.hessian_product(self.interval_start, v),
                self.interval_start,
                lr=(position + 1) * config.gamma,
                threshold=threshold,
            )
        self.train("sgd", rows)
        self.train("second_sgd", self.rows(config.seed + 500_000))
        self.step += 1
        grda = self.weights("grda")
        self.clipped |= grda == 0
        every = max(1, config.num_steps // config.num_snapshots)
        if self.step % every == 0 or self.step == config.num_steps:
            self.snapshots.append((self.step * config.gamma, self.weights("sgd"), grda))

    def train(self, name: str, rows: Tensor) -> None:
        loss = self.criterion(self.models[name](self.inputs[rows]), self.labels[rows])
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The loss of {name} is {loss.item()} in step {self.step + 1} at learning rate "
                f"{self.config.gamma:g}. Lower `gamma` or `c`."
            )
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    def rows(self, seed: int) -> Tensor:
        """Samples of the current step: epochs in random order, the last batch of one shorter."""
        size = self.config.batch_size
        per_epoch = -(-len(self.inputs) // size)
        epoch, index = divmod(self.step, per_epoch)
        if self._orders.get(seed, (-1,))[0] != epoch:
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            order = torch.randperm(len(self.inputs), generator=generator)
            self._orders[seed] = (epoch, order)
        return self._orders[seed][1][index * size : (index + 1) * size]

    def result(self) -> CoupledResult:
        times, sgd_path, grda_path = zip(*self.snapshots, strict=True)
        return CoupledResult(
            self.start,
            self.weights("sgd"),
            self.weights("grda"),
            self.weights("second_sgd"),
            self.clipped,
            self.transport.threshold,
            self.transport,
            self.batch_transport,
            torch.tensor(times, dtype=torch.float64),
            torch.stack(sgd_path),
            torch.stack(grda_path),
        )

    def save(self, path: Path) -> None:
        grda = self.optimizers["grda"]
        times, sgd_path, grda_path = zip(*self.snapshots, strict=True)
        tensors = {name: self.weights(name) for name in self.models}
        transports = {"transport": self.transport, "batch_transport": self.batch_transport}
        tensors |= {name: transport.offset for name, transport in transports.items()}
        tensors |= {
            "start": self.start,
            "dual": parameters_to_vector([state["dual"] for state in grda.state.values()]),
            "interval_start": self.interval_start,
            "clipped": self.clipped,
            "times": torch.tensor(times, dtype=torch.float64),
            "sgd_path": torch.stack(sgd_path),
            "grda_path": torch.stack(grda_path),
        }
        write_tensors(
            path,
            tensors,
            {
                "config": vars(self.config),
                "step": self.step,
                "threshold": grda.param_groups[0]["threshold"],
                "transports": {
                    name: [t.threshold, t.num_steps, t.num_products]
                    for name, t in transports.items()
                },
            },
        )

    def restore(self, path: Path) -> None:
        tensors, metadata = read_tensors(path)
        if metadata.get("config") != vars(self.config) or not torch.equal(
            tensors["start"], self.start
        ):
            raise ValueError(
                f"The checkpoint {path} belongs to a run with other settings or another start. "
                "Remove it to train anew."
            )
        self.step = int(metadata["step"])
        for name, model in self.models.items():
            vector_to_parameters(tensors[name], model.parameters())
        grda = self.optimizers["grda"]
        group = grda.param_groups[0]
        group["step"], group["threshold"] = self.step, float(metadata["threshold"])
        lengths = [p.numel() for p in group["params"]]
        for p, dual in zip(group["params"], torch.split(tensors["dual"], lengths), strict=True):
            grda.state[p]["dual"] = dual.view_as(p).clone()
        for name, (threshold, num_steps, num_products) in metadata["transports"].items():
            transport = getattr(self, name)
            transport.offset, transport.threshold = tensors[name], threshold
            transport.num_steps, transport.num_products = num_steps, num_products
        self.interval_start = tensors["interval_start"]
        self.clipped = tensors["clipped"]
        paths = tensors["sgd_path"], tensors["grda_path"]
        self.snapshots = list(zip(tensors["times"].tolist(), *paths, strict=True))
