"""The step of GRDA against torch's SGD and against a loop over tensors: time, memory, the floor.

Every claim is one line that says PASS or FAIL. All times are CPU time of one thread, measured in
turn in one run; only their ratios mean anything. The floor, counted in parameter-sized reads and
writes: SGD reads w and the gradient and writes w (3). gRDA must read v and the gradient and write
v and w (4), so where memory is the limit no implementation costs less than 4/3 of SGD.
"""

import statistics
import time
from collections.abc import Callable

import torch
from timing import interleaved, report, say
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flatvalley.models import resnet20
from pruning import GRDA

Shapes = list[tuple[int, ...]]
REPEATS = 11
TRAINING_REPEATS = 7
FLOOR = 4 / 3


def resnet50_shapes() -> Shapes:
    """Return the shapes of ResNet-50's parameters (161 tensors, 25.6 million weights)."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            for a, b, kernel in ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)):
                shapes += [(b, a, kernel, kernel), (b,), (b,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def wide_resnet_shapes() -> Shapes:
    """Return the shapes of WRN-28-10's parameters for ten classes (36.5 million weights)."""
    shapes: Shapes = [(16, 3, 3, 3)]
    inputs = 16
    for width in (160, 320, 640):
        for block in range(4):
            shapes += [(inputs,), (inputs,), (width, inputs, 3, 3)]
            shapes += [(width,), (width,), (width, width, 3, 3)]
            if block == 0:
                shapes.append((width, inputs, 1, 1))
            inputs = width
    return [*shapes, (640,), (640,), (10, 640), (10,)]


def resnet20_shapes() -> Shapes:
    """Return the shapes of ResNet-20's parameters (65 tensors, 0.27 million weights)."""
    return [tuple(p.shape) for p in resnet20(seed=0).parameters()]


def parameters(shapes: Shapes) -> list[Tensor]:
    """Return random parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for shape in shapes:
        p = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
        p.grad = 1e-3 * torch.randn(shape, generator=generator)
        found.append(p)
    return found


class TensorLoop:
    """A loop over tensors that makes temporaries of sign, magnitude and maximum."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.duals = [p.detach().clone() for p in params]
        self.threshold = torch.tensor(0.0)
        self.n = 0

    @torch.no_grad()
    def step(self) -> None:
        """Make one step, with a threshold kept in a tensor."""
        lr, c, mu = 1e-3, 1e-3, 0.6
        self.n += 1
        self.threshold += c * lr ** (mu + 0.5) * (self.n**mu - (self.n - 1) ** mu)
        for p, v in zip(self.params, self.duals, strict=True):
            v.add_(p.grad, alpha=-lr)
            p.copy_(v.sign() * (v.abs() - self.threshold).clamp(min=0))


def grda(params: list[Tensor], **options: object) -> GRDA:
    """Return the optimizer, with a c of its own unless it has a target."""
    aim = {} if "target_sparsity" in options else {"c": 1e-3}
    return GRDA(params, 1e-3, **aim, **options)


def sgd(params: list[Tensor]) -> torch.optim.SGD:
    """Return what everything is compared with."""
    return torch.optim.SGD(params, lr=1e-3, foreach=True)


def interleaved_steps(shapes: Shapes, *, loop: bool) -> dict[str, float]:
    """CPU seconds of one step of each."""
    count = sum(torch.Size(shape).numel() for shape in shapes)
    inner = max(1, 10_000_000 // count)
    steppers: dict[str, Callable[[], object]] = {
        "SGD(foreach=True)": sgd(parameters(shapes)).step,
        "GRDA(fused=True)": grda(parameters(shapes), fused=True).step,
        "GRDA(), no compiler": grda(parameters(shapes)).step,
        "GRDA(foreach=False)": grda(parameters(shapes), foreach=False).step,
    }
    if loop:
        steppers["loop over tensors with temporaries"] = TensorLoop(parameters(shapes)).step
    found = interleaved(
        {
            name: (lambda step=step: [step() for _ in range(inner)])
            for name, step in steppers.items()
        },
        REPEATS,
    )
    return {name: seconds / inner for name, seconds in found.items()}


def training() -> dict[str, float]:
    """CPU seconds of ResNet-20's forward and backward pass on 128 images, and of the steps."""
    model = resnet20(seed=0)
    x = torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(128) % 10
    steppers = {
        "SGD": sgd(list(model.parameters())),
        "GRDA": grda(list(model.parameters()), fused=True),
    }

    def gradient() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    # The step comes after a gradient, as in training, when the cache holds other things.
    found: dict[str, list[float]] = {n: [] for n in ("forward and backward", *steppers)}
    for _ in range(TRAINING_REPEATS):
        for name, optimizer in steppers.items():
            began = time.process_time()
            gradient()
            between = time.process_time()
            optimizer.step()
            found["forward and backward"].append(between - began)
            found[name].append(time.process_time() - between)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measurement() -> float:
    """CPU seconds of one measurement of the closed loop, in steps of the optimizer itself."""
    optimizer = grda(parameters(resnet50_shapes()), fused=True, target_sparsity=0.9, horizon=10**9)
    optimizer.step()
    found = interleaved({"step": optimizer.step, "steer": optimizer.steer}, 11)
    return found["steer"] / found["step"]


def allocated(optimizer: GRDA) -> int:
    """Bytes that a step takes from the allocator, given back or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        optimizer.step()
    return sum(max(0, event.self_cpu_memory_usage) for event in found.events())


def main() -> None:
    """Print and keep the table."""
    torch.set_num_threads(1)
    lines = [
        "Median CPU time of a step as a multiple of torch.optim.SGD(foreach=True)'s, all in turn.",
        f"The floor where memory is the limit: {FLOOR:.2f}.",
        "",
    ]

    def verdict(passed: bool, claim: str) -> None:
        lines.append(f"{'PASS' if passed else 'FAIL'}  {claim}")

    settings = {
        "ResNet-20": resnet20_shapes(),
        "WRN-28-10": wide_resnet_shapes(),
        "ResNet-50": resnet50_shapes(),
    }
    for title, shapes in settings.items():
        say(title)
        found = interleaved_steps(shapes, loop=title == "ResNet-50")
        base = found["SGD(foreach=True)"]
        count = sum(torch.Size(shape).numel() for shape in shapes)
        lines.append(f"{title}, {len(shapes)} tensors, {count:,} weights; SGD {base * 1e3:.2f} ms")
        lines += [f"  {name:36}{seconds / base:6.2f}" for name, seconds in found.items()]
        fused = found["GRDA(fused=True)"]
        if title != "ResNet-50":
            verdict(fused <= 1.6 * base, f"fused at most 1.6 times SGD: {fused / base:.2f}")
        else:
            loop = found["loop over tensors with temporaries"]
            verdict(
                loop >= 3 * fused, f"fused at least 3 times as fast as the loop: {loop / fused:.1f}"
            )
            plain = found["GRDA(), no compiler"]
            lines.append(f"      without a compiler: {loop / plain:.1f}")
        lines.append("")

    say("training step")
    found = training()
    passes = found["forward and backward"]
    ratio = (passes + found["GRDA"]) / (passes + found["SGD"])
    lines.append("A training step of ResNet-20 on 128 images, the optimizers in turn:")
    lines += [f"  {name:36}{seconds * 1e3:9.2f} ms" for name, seconds in found.items()]
    verdict(ratio <= 1.03, f"a training step at most 1.03 times SGD's: {ratio:.4f}")
    lines.append("")

    say("measurement and memory")
    lines.append(
        "A measurement for `target_sparsity` on ResNet-50's shapes costs as much as "
        f"{measurement():.1f} fused steps; there are 500 in a run."
    )
    lines.append("")
    for options in ({"fused": True}, {}):
        params = parameters(resnet50_shapes())
        optimizer = grda(params, **options)
        optimizer.step()
        held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        copy = sum(p.nbytes for p in params)
        verdict(held == copy, f"{options} holds one parameter copy: {held / copy:.4f} ({held:,} B)")
        taken = allocated(optimizer)
        verdict(
            taken < 1e-3 * copy, f"{options} allocates nothing of that size in a step: {taken:,} B"
        )
    report("grda_step", lines)


if __name__ == "__main__":
    main()
