"""One step of GRDA against torch's SGD and against a loop over tensors.

The floor in memory traffic, counted in parameter-sized reads and writes: SGD reads w and the
gradient and writes w (3). gRDA must read v and the gradient and write v and w (4), so no
implementation costs less than 4/3 of SGD where memory is the limit. Tensor by tensor, ours reads v
once more (5); all together it makes several passes for the threshold (14), which pays only where
launches cost more than memory.
"""

import torch
from timing import interleaved, report
from torch import Tensor, nn

from pruning import GRDA

# Shapes of the parameters of ResNet-50 (161 tensors, 25.6 million weights).
BLOCKS = ((64, 3), (128, 4), (256, 6), (512, 3))


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50's parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, depth in BLOCKS:
        for block in range(depth):
            for a, b, kernel in ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)):
                shapes += [(b, a, kernel, kernel), (b,), (b,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Return random parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for shape in shapes:
        p = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
        p.grad = 1e-3 * torch.randn(shape, generator=generator)
        found.append(p)
    return found


def main() -> None:
    """Print and keep the table."""
    torch.set_num_threads(1)
    lines = [
        "Median CPU time of a step as a ratio to torch.optim.SGD(foreach=True), all in turn.",
        "Floor of gRDA where memory is the limit: 1.33.",
        "",
    ]
    settings = {
        "ResNet-50 shapes": resnet50_shapes(),
        "small MLP (4 tensors, 1,510 weights)": [(20, 64), (20,), (10, 20), (10,)],
    }
    for title, shapes in settings.items():
        optimizers = {
            "SGD, foreach": torch.optim.SGD(parameters(shapes), lr=1e-3, foreach=True),
            "SGD, tensor by tensor": torch.optim.SGD(parameters(shapes), lr=1e-3, foreach=False),
            "GRDA, foreach": GRDA(parameters(shapes), 1e-3, c=1e-3, mu=0.6, foreach=True),
            "GRDA, tensor by tensor": GRDA(parameters(shapes), 1e-3, c=1e-3, mu=0.6, foreach=False),
        }
        small = sum(p.numel() for p in optimizers["SGD, foreach"].param_groups[0]["params"]) < 1e5
        inner = 200 if small else 1

        def steps(optimizer: torch.optim.Optimizer, inner: int = inner) -> None:
            for _ in range(inner):
                optimizer.step()

        times = interleaved(
            {name: (lambda o=o: steps(o)) for name, o in optimizers.items()}, repeats=15
        )
        base = times["SGD, foreach"]
        lines.append(f"{title}: {len(shapes)} tensors")
        lines += [f"  {name:26}{seconds / base:6.2f}x" for name, seconds in times.items()]
        lines.append("")
    report("grda_step", lines)


if __name__ == "__main__":
    main()
