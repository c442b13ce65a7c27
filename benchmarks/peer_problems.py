"""The trained networks of the peer benchmark, and their derivatives in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flatvalley.data import load_dataset
from flatvalley.models import lenet_300_100, resnet20
from flatvalley.run import read_tensors, write_tensors

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """A network, its data, and how it is trained."""

    title: str
    data: str
    make_model: Callable[..., nn.Module]
    samples: int
    """Images in the loss whose Hessian is taken: the first ones of the training images."""
    batch_sizes: tuple[int, ...]
    """Candidates; every library gets the one at which it is fastest."""
    training_samples: int
    epochs: int
    rate: float
    training_batch: int


SETTINGS = {
    "mlp": Setting(
        "LeNet-300-100 on MNIST",
        "mnist",
        lenet_300_100,
        samples=10_000,
        batch_sizes=(250, 1000, 2500, 10_000),
        training_samples=10_000,
        epochs=2,
        rate=0.02,
        training_batch=100,
    ),
    "cnn": Setting(
        "ResNet-20 on CIFAR-10 (JPEG), batch norm in evaluation mode",
        "cifar10",
        resnet20,
        samples=2048,
        batch_sizes=(16, 32, 64, 128),
        training_samples=10_240,
        epochs=5,
        rate=0.05,
        training_batch=128,
    ),
}


@dataclass(frozen=True)
class Problem:
    """A trained model in evaluation mode, with the images of its loss."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    training_loss: float
    training_accuracy: float
    test_accuracy: float

    criterion = nn.CrossEntropyLoss()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights, in the order of every library."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """The number of weights d."""
        return sum(p.numel() for p in self.parameters)

    def batches(self, size: int) -> Batches:
        """Return the data cut into batches."""
        return list(zip(self.inputs.split(size), self.labels.split(size), strict=True))

    def first(self, samples: int) -> "Problem":
        """Return the problem with fewer images."""
        return replace(self, inputs=self.inputs[:samples], labels=self.labels[:samples])

    def split(self, v: Tensor) -> list[Tensor]:
        """Return views of a flat vector in the shapes of the parameters."""
        parts = v.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]


def prepare(name: str, folder: Path) -> Path:
    """Train once, and keep weights and images in a file; return its path."""
    setting, path = SETTINGS[name], folder / f"{name}.safetensors"
    if path.exists():
        return path
    data = load_dataset(setting.data)
    kept = slice(0, setting.training_samples)
    model = setting.make_model(seed=0)
    train(model, data.train_inputs[kept], data.train_labels[kept], setting)
    inputs, labels = data.train_inputs[: setting.samples], data.train_labels[: setting.samples]
    loss, accuracy = evaluate(model, inputs, labels)
    test_accuracy = evaluate(model, data.test_inputs[:2000], data.test_labels[:2000])[1]
    metadata = {
        "training_loss": loss,
        "training_accuracy": accuracy,
        "test_accuracy": test_accuracy,
    }
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    return write_tensors(path, tensors | {"inputs": inputs, "labels": labels}, metadata)


def train(model: nn.Module, inputs: Tensor, labels: Tensor, setting: Setting) -> None:
    """Train with SGD and momentum, the learning rate falling to zero; not to a loss near zero."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate, momentum=0.9)
    steps = setting.epochs * (len(inputs) // setting.training_batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(setting.epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for rows in order.split(setting.training_batch):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in inputs.split(128)])
    loss = nn.functional.cross_entropy(outputs, labels)
    return float(loss), float((outputs.argmax(dim=1) == labels).double().mean())


def load(path: Path, samples: int | None = None, device: torch.device | str = "cpu") -> Problem:
    """Read a prepared problem; every library sees the same weights and the first images."""
    tensors, metadata = read_tensors(path)
    model = SETTINGS[path.stem].make_model(seed=0)
    weights = {key[6:]: value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights)
    inputs, labels = tensors["inputs"].to(device), tensors["labels"].to(device)
    whole = Problem(path.stem, model.to(device).eval(), inputs, labels, **metadata)
    return whole.first(samples or len(inputs))


def plain_gradient(problem: Problem, batch_size: int) -> Callable[[], None]:
    """One pass of the data forward and backward into ``.grad``, as in any training loop."""
    batches = problem.batches(batch_size)

    def gradient() -> None:
        problem.model.zero_grad()
        for x, y in batches:
            share = len(x) / len(problem.inputs)
            (problem.criterion(problem.model(x), y) * share).backward()

    return gradient


def plain_columns(problem: Problem, V: Tensor, batch_size: int) -> Tensor:
    """Return H V for V of shape [d, k] by double backward, in plain torch and nobody's library."""
    out = torch.zeros_like(V, dtype=torch.float64)
    for x, y in problem.batches(batch_size):
        loss = problem.criterion(problem.model(x), y)
        gradient = torch.autograd.grad(loss, problem.parameters, create_graph=True)
        for i, v in enumerate(V.T.contiguous()):
            parts = torch.autograd.grad(
                gradient, problem.parameters, problem.split(v), retain_graph=True
            )
            flat = torch.cat([part.reshape(-1) for part in parts])
            out[:, i] += flat.double() * (len(x) / len(problem.inputs))
    return out


def plain_product(problem: Problem, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Reverse over reverse as anybody would write it, everything computed anew."""

    def product(v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for x, y in problem.batches(batch_size):
            loss = problem.criterion(problem.model(x), y)
            gradient = torch.autograd.grad(loss, problem.parameters, create_graph=True)
            parts = torch.autograd.grad(gradient, problem.parameters, problem.split(v))
            out += torch.cat([part.reshape(-1) for part in parts]) * (len(x) / len(problem.inputs))
        return out

    return product


def floors(problem: Problem) -> dict[str, float]:
    """Costs in gradients of the products' matrix multiplications and convolutions alone.

    A layer's own cost is that of its forward pass, m. The gradient costs 3 m: forward, towards the
    weights, towards the inputs. Going back through the graph of the gradient costs 6 m: each of
    the two products of the backward pass has two derivatives, the forward pass too. The Gauss-
    Newton matrix takes 2 m for the tangents of the outputs (by weights and by inputs) and 2 m back.
    The first layer needs no derivative by its inputs, which are data: gradient 2 m, through the
    graph 2 m (its weights' tangent at the backward pass, and the derivative by its weights), Gauss-
    Newton 2 m. So a network with most of its work in the first layer has lower floors.
    """
    costs: list[float] = []

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            positions = output[0].numel() / layer.weight.shape[0]
            costs.append(positions * layer.weight.numel())

    handles = [module.register_forward_hook(note) for module in problem.model.modules()]
    with torch.no_grad():
        problem.model(problem.inputs[:1])
    for handle in handles:
        handle.remove()
    first, rest = costs[0], sum(costs[1:])
    gradient = 2 * first + 3 * rest
    kept, gauss_newton = 2 * first + 6 * rest, 2 * first + 4 * rest
    return {
        "graph kept": kept / gradient,
        "computed anew": 1 + kept / gradient,
        "Gauss-Newton, graph kept": gauss_newton / gradient,
        "Gauss-Newton, computed anew": (gauss_newton + first + rest) / gradient,
        "share of the first layer": first / (first + rest),
    }
