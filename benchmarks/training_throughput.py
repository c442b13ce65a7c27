"""Images per second of a training loop on resident batches, against a plain DataLoader loop.

The plain loop is what most scripts do: a dataset that makes an image of PIL out of an array,
crops, mirrors, converts and normalises it, one by one, and a shuffling DataLoader. Ours is
`ResidentBatches` with the same recipe for the whole batch, and `prepare_model`. Both train the
same network with batches of 128 and torch's SGD.

CPU time counts the loading processes too and says what the work costs, whatever else the machine
does. Wall time lets them work at the same time; on a busy machine only its order of size means
something. Peak memory is of a process of its own, with the data.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timing import report, say
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from flatvalley.augmentation import CropAndFlip
from flatvalley.batches import ResidentBatches
from flatvalley.data import load_dataset
from flatvalley.models import build_named_model, prepare_model

BATCH = 128
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A network, its data, and the samples of one timed pass."""

    model: str
    data: str
    samples: int


PROBLEMS = {
    "LeNet-5, MNIST": Problem("lenet-5", "mnist", 20 * BATCH),
    "ResNet-20, CIFAR-10 (JPEG), crop and flip": Problem("resnet20", "cifar10", 4 * BATCH),
}
PLAIN = {f"plain loop, num_workers={number}": number for number in (0, 1, 2)}
OURS = {
    "resident batches, model as it is": {"channels_last": False},
    "resident batches": {},
    "resident batches, bfloat16": {},
    "resident batches, compiled": {"compile": True},
}


class OneByOne(TorchDataset[tuple[Tensor, int]]):
    """The data image by image, as an ordinary script has them."""

    def __init__(self, images: Tensor, labels: Tensor, problem: Problem) -> None:
        """Keep images as arrays [n, height, width(, 3)], as image files are."""
        self.images = np.ascontiguousarray(images.permute(0, 2, 3, 1).squeeze(-1).numpy())
        self.labels = labels.tolist()
        self.augment = problem.data == "cifar10"
        mean, deviation = load_moments(problem)
        self.mean = torch.tensor(mean)[:, None, None]
        self.deviation = torch.tensor(deviation)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index])
        if self.augment:
            image = ImageOps.expand(image, 4)
            left, top = (int(torch.randint(0, 9, (1,))) for _ in range(2))
            image = image.crop((left, top, left + 32, top + 32))
            if torch.rand(1) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels.permute(2, 0, 1).contiguous() if pixels.ndim == 3 else pixels[None]
        x = pixels.to(torch.float32).div(255)
        return x.sub_(self.mean).div_(self.deviation), self.labels[index]


def load_moments(problem: Problem) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation by channel."""
    from flatvalley import data

    if problem.data == "mnist":
        return (data.MNIST_MEAN,), (data.MNIST_DEVIATION,)
    return data.CIFAR10_MEAN, data.CIFAR10_DEVIATION


def trainer(problem: Problem, name: str, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """Return a function that trains for one pass and returns its mean loss."""
    model = build_named_model(problem.model, seed=0)
    if name in OURS:
        prepare_model(model, **OURS[name])
        batches = ResidentBatches(
            images,
            labels,
            BATCH,
            seed=0,
            augment=CropAndFlip() if problem.data == "cifar10" else None,
            normalise=load_moments(problem),
        )
        passes = iter(range(10**6))

        def load() -> Batches:
            first = next(passes) * len(batches)
            return (batches.batch(step) for step in range(first, first + len(batches)))
    else:
        loader = DataLoader(
            OneByOne(images, labels, problem), BATCH, shuffle=True, num_workers=PLAIN[name]
        )

        def load() -> Batches:
            return iter(loader)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_function = nn.CrossEntropyLoss()

    def train() -> float:
        losses = []
        for x, y in load():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in name):
                loss = loss_function(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    return train


def seconds() -> tuple[float, float]:
    """CPU time of this process and of those it has waited for, and the time of day."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return cpu, time.perf_counter()


def measure(problem: Problem, names: list[str], repeats: int) -> list[str]:
    """Return the lines of one problem."""
    images, labels = load(problem)
    trainers = {name: trainer(problem, name, images, labels) for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, train in trainers.items():
            before = seconds()
            losses[name] = train()
            spent = [b - a for a, b in zip(before, seconds(), strict=True)]
            say(f"{name}: {spent[0]:.2f} s of CPU, {spent[1]:.2f} s")
            if repeat:  # the first pass warms up
                cpu[name].append(spent[0])
                wall[name].append(spent[1])
    lines = []
    for title, found in (("CPU time", cpu), ("wall time", wall)):
        lines += [
            "",
            f"  {title:36}{'ms an image':>12}{'images/s':>10}{'':4}vs the best plain loop",
        ]
        each = {name: statistics.median(found[name]) / problem.samples for name in names}
        best = min(each[name] for name in names if name in PLAIN)
        for name, value in each.items():
            lines.append(f"  {name:36}{1e3 * value:12.3f}{1 / value:10.0f}{best / value:8.2f}x")
    lines += ["", "  Mean loss of the last pass, and peak memory of the process:"]
    for name in names:
        lines.append(f"  {name:36}{losses[name]:12.4f}{peak_memory(problem, name):10.0f} MB")
    return lines


def load(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return images as bytes, and labels, for one pass."""
    data = load_dataset(problem.data, dtype=torch.uint8)
    return data.train_inputs[: problem.samples].clone(), data.train_labels[: problem.samples]


def peak_memory(problem: Problem, name: str) -> float:
    """Peak resident memory in MB of one pass in a process of its own."""
    command = [sys.executable, __file__, "--peak", problem.model, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(model: str, name: str) -> None:
    """Print the peak memory of this process in MB, after one pass on random images."""
    torch.set_num_threads(1)
    (problem,) = (problem for problem in PROBLEMS.values() if problem.model == model)
    shape = (1, 28, 28) if problem.data == "mnist" else (3, 32, 32)
    images = torch.randint(0, 256, (problem.samples, *shape), dtype=torch.uint8)
    trainer(problem, name, images, torch.randint(0, 10, (problem.samples,)))()
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def main() -> None:
    """Print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--only", choices=[problem.model for problem in PROBLEMS.values()])
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "LOOP"))
    options = parser.parse_args()
    if options.peak:
        return print_peak(*options.peak)
    torch.set_num_threads(options.threads)
    for title, problem in PROBLEMS.items():
        if options.only in (None, problem.model):
            lines = [
                f"{title}: batches of {BATCH}; medians of {options.repeats} passes over "
                f"{problem.samples} images, all loops in turn."
            ]
            lines += measure(problem, [*PLAIN, *OURS], options.repeats)
            report(f"training_throughput_{problem.model}", lines, ["numpy", "pillow"])
    return None


if __name__ == "__main__":
    main()
