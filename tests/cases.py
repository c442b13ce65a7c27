"""Small float64 networks with twelve samples, one for each thing that can go wrong."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from hessian import Objective

NUM_SAMPLES = 12


@dataclass(frozen=True)
class Case:
    """A model with data, and its loss written out by hand for one sample."""

    name: str
    model: nn.Module
    criterion: Callable[..., Tensor]
    data: Any
    """One batch of all samples: ``(*inputs, target)`` or a mapping."""
    sample_loss: Callable[[Any, Any], Tensor]
    """The loss of a batch that holds one sample: a formula, not a library criterion."""
    parameters: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the objective."""
    divisor: float | None = None
    """What the sum of the losses is divided by; None for the number of samples."""

    def batches(self, cuts: Sequence[int] = (NUM_SAMPLES,)) -> list[Any]:
        return cut(self.data, cuts)

    def objective(self, cuts: Sequence[int] = (NUM_SAMPLES,)) -> Objective:
        return Objective(
            self.model,
            self.criterion,
            self.batches(cuts),
            parameters=self.parameters,
            **self.options,
        )


def cut(data: Any, cuts: Sequence[int]) -> list[Any]:
    """Cut one batch of all samples into batches of the given lengths."""
    if isinstance(data, dict):
        parts = {key: value.split(list(cuts)) for key, value in data.items()}
        return [{key: parts[key][i] for key in parts} for i in range(len(cuts))]
    return list(zip(*(part.split(list(cuts)) for part in data), strict=True))


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Build a module or data in float64 from a seed; the global state stays as it was."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            return build()
        finally:
            torch.set_default_dtype(default)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return torch.logsumexp(output[0], 0) - output[0, target[0]]


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's own parameter, registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class ByKeyword(nn.Module):
    """Takes mapping batches, the target among them, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, *, features: Tensor, scale: Tensor, labels: Tensor) -> dict[str, Tensor]:
        del labels
        return {"logits": torch.tanh(self.layer(features)) * scale[:, None]}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a).tanh() * self.right(b).sigmoid()


class Tagger(nn.Module):
    """Token ids in, one distribution a token out, classes in the second place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).cumsum(dim=1).tanh()).transpose(1, 2)


def frozen_batch_norm_cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2, 3),
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    return model.eval()


def tanh_mlp(*, frozen: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(not frozen)
    return model


def classes(num: int = 3) -> Tensor:
    return torch.arange(NUM_SAMPLES) % num


@lru_cache
def cases() -> dict[str, Case]:
    """Return every case by name. Treat the models as read-only."""
    x4 = seeded(lambda: torch.randn(NUM_SAMPLES, 4))
    x3 = seeded(lambda: torch.randn(NUM_SAMPLES, 3), 1)
    y2 = seeded(lambda: torch.randn(NUM_SAMPLES, 2), 2)
    tokens = seeded(lambda: torch.randint(0, 5, (NUM_SAMPLES, 6)), 3)
    listed = [
        Case("linear regression", seeded(lambda: nn.Linear(3, 2)), nn.MSELoss(), (x3, y2), squares),
        Case("tanh MLP", seeded(tanh_mlp), nn.CrossEntropyLoss(), (x4, classes()), cross_entropy),
        Case(
            "functional criterion",
            seeded(tanh_mlp),
            F.cross_entropy,
            (x4, classes()),
            cross_entropy,
        ),
        Case(
            "sum over outputs",
            seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))),
            nn.MSELoss(reduction="sum"),
            (x3, y2),
            lambda output, target: ((output - target) ** 2).sum(),
        ),
        Case(
            "one loss per sample",
            seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))),
            lambda output, target: (output - target).cosh().log().sum(dim=1),
            (x3, y2),
            lambda output, target: (output - target).cosh().log().sum(),
        ),
        Case(
            "class weights, summed",
            seeded(tanh_mlp),
            nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 3.0]).double(), reduction="sum"),
            (x4, classes()),
            lambda output, target: (
                torch.tensor([0.5, 1.0, 3.0])[target[0]] * cross_entropy(output, target)
            ),
        ),
        Case(
            "CNN with frozen batch norm",
            seeded(frozen_batch_norm_cnn),
            nn.CrossEntropyLoss(label_smoothing=0.1),
            (seeded(lambda: torch.randn(NUM_SAMPLES, 1, 5, 5), 4), classes()),
            lambda output, target: (
                0.9 * cross_entropy(output, target)
                + 0.1 * (torch.logsumexp(output[0], 0) - output[0].mean())
            ),
        ),
        Case(
            "tied weights",
            seeded(TiedAutoencoder),
            nn.MSELoss(),
            (x4, x4.flip(1)),
            squares,
        ),
        Case(
            "mapping batches",
            seeded(ByKeyword),
            lambda output, batch: F.cross_entropy(output["logits"], batch["labels"]),
            {"features": x3, "scale": x4[:, 0], "labels": classes()},
            lambda output, batch: cross_entropy(output["logits"], batch["labels"]),
        ),
        Case("two inputs", seeded(TwoInputs), nn.MSELoss(), (x3, y2, y2.flip(0)), squares),
        Case(
            "frozen first layer",
            seeded(lambda: tanh_mlp(frozen=True)),
            nn.CrossEntropyLoss(),
            (x4, classes()),
            cross_entropy,
        ),
        Case(
            "one layer by pattern",
            seeded(tanh_mlp),
            nn.CrossEntropyLoss(),
            (x4, classes()),
            cross_entropy,
            parameters="2.*",
        ),
        Case(
            "token losses",
            seeded(Tagger),
            nn.CrossEntropyLoss(),
            (tokens, (tokens + 1) % 4),
            lambda output, target: torch.stack(
                [cross_entropy(output[:, :, t], target[:, t]) for t in range(target.shape[1])]
            ).mean(),
        ),
    ]
    return {case.name: case for case in listed}


def case_names() -> list[str]:
    return list(cases())


@lru_cache
def digits_network(num_samples: int = 400, steps: int = 150) -> Case:
    """Return a 64-20-10 tanh net, d = 1510, after some steps on scikit-learn's digits.

    Treat it as read-only.
    """
    images, labels = load_digits(return_X_y=True)
    X = torch.from_numpy(images[:num_samples] / 16.0)
    y = torch.from_numpy(labels[:num_samples]).long()
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Case("digits", model, nn.CrossEntropyLoss(), (X, y), cross_entropy)


class Reiterable:
    """An iterable that makes its batches anew in every pass, from a function."""

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Any:
        return iter(self.make())


def outputs(case: Case, weights: dict[str, Tensor], batch: Any) -> Any:
    """Return the model's outputs with its weights replaced."""
    if isinstance(batch, dict):
        return functional_call(case.model, weights, kwargs=batch)
    return functional_call(case.model, weights, tuple(batch[:-1]))
