"""Time per point of a loss surface: ours beside other libraries and the usual loop.

All in one process, in turn, with CPU time of one thread. Every way evaluates as many points, on its
own grid where it brings one; each loss of every way is then compared with ours at the same weights.
The peers are installed without their dependencies by `make bench-peers`; a peer that cannot be
imported is named in the table with the reason. ``landscape_peers.py cnn`` runs one network.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch
from timing import interleaved, report, say
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatvalley.data import load_dataset
from flatvalley.models import lenet_5, lenet_300_100
from hessian import Objective
from landscape import Plan, Plane, evaluate, grid, random_directions
from landscape.shards import CHUNK

AGREE = 1e-5
REPEATS = 3
BATCH = 128


@dataclass(frozen=True)
class Setting:
    """A network, its images, and how many points are timed."""

    title: str
    data: str
    model: Callable[[], nn.Module]
    samples: int
    side: int
    epochs: int
    target: float


def lenet_300_100_cifar10() -> nn.Module:
    """Return 3072-300-100-10 with ReLU."""
    torch.manual_seed(0)
    sizes = (3072, 300, 100, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet_300_100_mnist() -> nn.Module:
    """Return 784-300-100-10 with ReLU."""
    return lenet_300_100(seed=0)


def lenet_5_mnist() -> nn.Module:
    """Return LeNet-5."""
    return lenet_5(seed=0)


SETTINGS = {
    "mlp": Setting("LeNet-300-100, MNIST", "mnist", lenet_300_100_mnist, 2_000, 17, 3, 10.0),
    "mlp-cifar10": Setting(
        "LeNet-300-100, CIFAR-10", "cifar10", lenet_300_100_cifar10, 2_000, 21, 3, 10.0
    ),
    "cnn": Setting("LeNet-5, MNIST", "mnist", lenet_5_mnist, 500, 20, 1, 3.0),
}


class Case:
    """A trained network and a plane around it."""

    def __init__(self, setting: Setting) -> None:
        data = load_dataset(setting.data)
        x, y = data.train_inputs, data.train_labels
        self.model = setting.model()
        train(self.model, x[:6_000], y[:6_000], setting.epochs)
        self.x, self.y = x[: setting.samples].clone(), y[: setting.samples].clone()
        self.criterion = nn.CrossEntropyLoss()
        self.objective = Objective(self.model, self.criterion, (self.x, self.y), batch_size=BATCH)
        self.start = self.objective.weights()
        self.plane = Plane.along(self.start, random_directions(self.objective))
        axis = torch.linspace(-1, 1, setting.side).double()
        self.points = grid(axis, axis).reshape(-1, 2)
        self.side = setting.side


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train with momentum; not to a loss near zero."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    model.eval()


def loop(case: Case) -> list[float]:
    """Run what most people write: a state dict a point, and a loader."""
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=BATCH)
    names = list(dict(case.model.named_parameters()))
    losses = []
    with torch.no_grad():
        for point in case.points:
            w = case.plane(point)
            parts = case.objective.unflatten(w)
            case.model.load_state_dict({name: parts[name] for name in names})
            total = 0.0
            for inputs, labels in loader:
                total += float(case.criterion(case.model(inputs), labels)) * len(inputs)
            losses.append(total / len(case.x))
    case.objective.write_(case.start)
    return losses


def loss_landscapes(case: Case, note: Callable[[], None] = lambda: None) -> list[float]:
    """Run ``random_plane`` of loss-landscapes, which draws its own directions."""
    import loss_landscapes as library
    from loss_landscapes.metrics import Loss

    class Noted(Loss):
        def __call__(self, wrapper: object) -> float:
            note()
            with torch.no_grad():
                return super().__call__(wrapper)

    torch.manual_seed(0)
    try:
        found = library.random_plane(
            case.model, Noted(case.criterion, case.x, case.y), distance=1, steps=case.side
        )
    finally:
        case.objective.write_(case.start)
        case.model.requires_grad_()
    rows = [row if i % 2 == 0 else row[::-1] for i, row in enumerate(found.tolist())]
    return [value for row in rows for value in row]  # in the order of evaluation


def landscaper(case: Case, note: Callable[[], None] = lambda: None) -> list[float]:
    """Run ``LossLandscape.compute`` of Landscaper on our directions."""
    from landscaper import LossLandscape

    losses: list[float] = []  # what it returns has noise in its largest cells

    def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        note()
        losses.append(float(case.criterion(model(data[0]), data[1])))
        return losses[-1]

    parts = [case.objective.unflatten(v) for v in (case.plane.u, case.plane.v)]
    directions = [[p.clone() for p in part.values()] for part in parts]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        LossLandscape.compute(
            case.model,
            (case.x, case.y),
            directions,
            loss,
            steps=case.side,
            distance=0.5,
            dim=2,
            device="cpu",
        )
    case.objective.write_(case.start)
    return losses


PEERS = {"loss-landscapes": loss_landscapes, "landscaper": landscaper}


def visited(case: Case, peer: Callable[..., list[float]]) -> tuple[list[Tensor], list[float]]:
    """The weights at which a peer evaluates, and its losses there."""
    seen: list[Tensor] = []
    losses = peer(case, lambda: seen.append(case.objective.weights()))
    return seen, losses


def deviation(case: Case, peer: Callable[..., list[float]], plan: Plan) -> float:
    """Largest relative difference from our engine at the peer's own points."""
    seen, losses = visited(case, peer)
    plane = Plane.through(seen[0], seen[1], seen[-1])
    coordinates = [plane.coordinates(w) for w in seen]
    off = max(r for *_, r in coordinates) / float(case.start.norm())
    ours = evaluate(case.objective, plane, [c[:2] for c in coordinates], speed=plan).mean
    worst = float((ours / torch.tensor(losses).double() - 1).abs().max())
    say(
        f"the peer's points lie in a plane to {off:.1e} of the weights; losses agree to {worst:.1e}"
    )
    return worst


def floor(case: Case, plan: Plan) -> tuple[float, float]:
    """Seconds that the matrix products of a point take at the rate of a large one; and the rate.

    That of the faster of torch's BLAS and oneDNN.
    """
    macs = 0
    shapes: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        shapes.append(output[0].numel() // weight.shape[0] * weight.numel())

    hooks = [
        module.register_forward_hook(count)
        for module in case.model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        case.model(case.x[:1])
    for hook in hooks:
        hook.remove()
    macs = sum(shapes[1:] if plan.reuse_first_layer else shapes) * len(case.x)
    a = torch.ones(1024, 1024)
    rates = []
    for x in 5 * (a, a.to_mkldnn()):
        began = time.process_time()
        nn.functional.linear(x, a)
        rates.append(1024**3 / (time.process_time() - began))
    return macs / max(rates), max(rates)


def compare(name: str) -> list[str]:
    """Time one point of every way."""
    setting = SETTINGS[name]
    say(setting.title)
    case = Case(setting)
    began = time.process_time()
    plan = chosen_plan(case)
    choosing = time.process_time() - began
    say(f"{plan}, chosen in {choosing:.1f} s")
    reasons, deviations = {}, {}
    for title, peer in PEERS.items():
        try:
            deviations[title] = deviation(case, peer, plan)
        except ImportError as error:
            reasons[title] = f"cannot be imported: {error}"
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: evaluate(case.objective, case.plane, case.points, speed=plan),
        "ours, the plain way": lambda: evaluate(
            case.objective, case.plane, case.points, speed="plain"
        ),
        "load_state_dict + DataLoader": lambda: loop(case),
    } | {title: (lambda peer=PEERS[title]: peer(case)) for title in deviations}
    ours = evaluate(case.objective, case.plane, case.points, speed=plan).mean
    slow = torch.tensor(loop(case)).double()
    deviations["load_state_dict + DataLoader"] = float((ours / slow - 1).abs().max())
    plain = evaluate(case.objective, case.plane, case.points, speed="plain").mean
    deviations["ours, the plain way"] = float((ours / plain - 1).abs().max())
    say("timing")
    seconds = interleaved(ways, REPEATS)
    number = len(case.points)
    least, rate = floor(case, plan)
    lines = [
        f"{setting.title}: {len(case.start):,} weights, {setting.samples:,} images, "
        f"{number} points",
        "",
        f"  {'':30}{'ms a point':>11}{'x ours':>8}  largest relative difference in loss",
    ]
    for title, value in seconds.items():
        off = f"{deviations[title]:.1e}" if title in deviations else ""
        lines.append(
            f"  {title:30}{1e3 * value / number:11.2f}{value / seconds['ours']:8.1f}  {off}"
        )
    lines += [f"  {title:30}{reason}" for title, reason in reasons.items()]
    worst = max(deviations.values())
    slowest = {t: v / seconds["ours"] for t, v in seconds.items() if not t.startswith("ours")}
    lines += [
        "",
        f"  Plan: {plan.as_json()}, chosen in {choosing:.1f} s of CPU time.",
        f"  Matrix products left at the rate of a large one ({2e-9 * rate:.0f} GFlop/s): "
        f"{1e3 * least:.2f} ms a point; ours takes {seconds['ours'] / number / least:.1f} times.",
        f"  Losses agree to {AGREE:g}: {'yes' if worst <= AGREE else 'no'} ({worst:.1e}). At least "
        f"{setting.target:g} times faster than each: "
        f"{'yes' if min(slowest.values()) >= setting.target else 'no'}.",
    ]
    return lines


def chosen_plan(case: Case) -> Plan:
    """Return the plan that a 51 x 51 surface is evaluated by, without evaluating it."""
    axis = torch.linspace(-1, 1, 51).double()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(_EnoughError):
            evaluate(case.objective, case.plane, grid(axis, axis), folder=folder, progress=_stop)
        return Plan.from_json(json.loads((Path(folder) / "sweep.json").read_text())["plan"])


class _EnoughError(Exception):
    """Ends an evaluation."""


def _stop(done: int, total: int) -> None:
    if done > CHUNK:  # with the first points the plan is kept
        raise _EnoughError


def versions() -> list[str]:
    """Names of the peers that are installed."""
    found = []
    for name in PEERS:
        with contextlib.suppress(PackageNotFoundError):
            version(name)
            found.append(name)
    return found


def main() -> None:
    """Print and keep the table."""
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(SETTINGS)
    for name in names:
        report(f"landscape_peers-{name}", compare(name), versions())


if __name__ == "__main__":
    main()
