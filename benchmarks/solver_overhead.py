"""Share of the eigensolver's time that is not spent in products: ten pairs, ten million weights.

The model is a tanh network 784-2800-2400-440-10 after some steps of training on MNIST (on clusters
of its shape where the files are not there), its Hessian the one that ``hessian_operator`` makes.
Every run is a whole one with real products. CPU time of one thread; the solver's share is what is
left of the whole after the products. It falls as one over the number of samples, because only
products grow with it.
"""

import argparse
import math
import time
from itertools import pairwise

import torch
from timing import report, say
from torch import Tensor, nn

from flatvalley.data import load_dataset
from hessian import Objective, Operator, hessian_operator, leading_eigenspace

K, TOL, BATCH, RATE = 10, 1e-3, 128, 0.05
WIDTHS = [784, 2800, 2400, 440, 10]


def images() -> tuple[Tensor, Tensor, str]:
    """The training images of MNIST as vectors, or ten clusters of as many entries."""
    try:
        data = load_dataset("mnist")
    except FileNotFoundError:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, WIDTHS[-1], (10_000,), generator=generator)
        centres = torch.randn(WIDTHS[-1], WIDTHS[0], generator=generator)
        noise = torch.randn(len(labels), WIDTHS[0], generator=generator)
        return centres[labels] + noise, labels, "clusters (MNIST is not there)"
    return data.train_inputs.flatten(1), data.train_labels, "MNIST"


def trained(inputs: Tensor, labels: Tensor, steps: int) -> tuple[nn.Sequential, float]:
    """A network after some steps of gradient descent, and the loss of the last one."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(WIDTHS):
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(fan_out, fan_in, generator=generator))
            layer.weight.div_(math.sqrt(fan_in))
            layer.bias.zero_()
        layers += [layer, nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    criterion, loss = nn.CrossEntropyLoss(), torch.tensor(math.nan)
    for _ in range(steps):
        batch = torch.randint(0, len(labels), (BATCH,), generator=generator)
        loss = criterion(model(inputs[batch]), labels[batch])
        parameters = list(model.parameters())
        for p, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = slope
        optimizer.step()
    optimizer.zero_grad()
    return model, float(loss)


def run(H: Operator, num_samples: int, *, multiple: bool) -> list[str]:
    """One whole run, with its products timed."""
    spent: list[float] = []

    def product(v: Tensor) -> Tensor:
        began = time.process_time()
        out = H.product(v)
        spent.append(time.process_time() - began)
        return out

    began = time.process_time()
    space = leading_eigenspace(
        Operator(product, H.size, H.dtype, H.device),
        k=K,
        tol=TOL,
        multiple=multiple,
        progress=lambda step: say(f"{step.products} products, residual {step.error:.1e}"),
    )
    total = time.process_time() - began
    m = space.num_products - K
    read = 2 * m * (m + 1) / 2 * H.size * H.dtype.itemsize
    outside = total - sum(spent)
    # The first product builds the graphs.
    each = sum(spent[1:]) / (len(spent) - 1)
    at_10k = outside / (outside + space.num_products * each * 10_000 / num_samples)
    missed = "" if math.isnan(space.missed) else f", chance of a missed one {space.missed:.0e}"
    return [
        f"multiple={multiple}",
        f"  products             {space.num_products}: {m} for the basis, {K} for the residuals",
        f"  converged            {space.converged}{missed}",
        f"  values               {float(space.values[0]):.4g} to {float(space.values[-1]):.4g}",
        f"  time of a product    {each:.2f} s",
        f"  outside of products  {outside:.1f} s of {total:.1f} s: {outside / total:.1%}",
        f"  reorthogonalisation  reads {read / 1e9:.0f} GB",
        f"  at N = 10,000        {at_10k:.1%}, the time of a product taken in proportion",
        "",
    ]


def main() -> None:
    """Print and keep the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs, labels, name = images()
    say(f"{args.steps} steps of training")
    model, loss = trained(inputs, labels, args.steps)
    data = inputs[: args.samples], labels[: args.samples]
    H = hessian_operator(Objective(model, nn.CrossEntropyLoss(), data))
    lines = [
        f"{K} pairs to a residual of {TOL:g}, d = {H.size:,} in {H.dtype}, N = {args.samples:,}",
        f"{name}, {args.steps} steps of SGD (batch {BATCH}, rate {RATE}), last loss {loss:.3f}",
        "",
    ]
    for multiple in (False, True):
        lines += run(H, args.samples, multiple=multiple)
        report("solver_overhead", lines)


if __name__ == "__main__":
    main()
