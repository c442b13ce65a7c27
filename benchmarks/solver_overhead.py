"""Share of the eigensolver's time that is not spent in products: ten pairs, ten million weights.

The model is a tanh network 784-2800-2400-440-10 on inputs like those of MNIST, its Hessian the
one that ``hessian_operator`` makes, with the gradient's graph kept. CPU time of one thread; the
solver's share is what is left of the whole after the products. The bytes are those that the
reorthogonalisation must read and write: every vector of the basis four times in a step. The
share falls as one over the number of samples, because only products grow with it.
"""

import argparse
import math
import time
from itertools import pairwise

import torch
from timing import report
from torch import Tensor, nn

from hessian import Objective, Operator, hessian_operator, leading_eigenspace

K, TOL = 10, 1e-3
WIDTHS = [784, 2800, 2400, 440, 10]


def problem(num_samples: int) -> Objective:
    """Clusters in ten classes, and a network that has seen nothing of them yet."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_samples) % WIDTHS[-1]
    centres = torch.randn(WIDTHS[-1], WIDTHS[0], generator=generator)
    inputs = centres[labels] + torch.randn(num_samples, WIDTHS[0], generator=generator)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(WIDTHS):
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(fan_out, fan_in, generator=generator))
            layer.weight.div_(math.sqrt(fan_in))
            layer.bias.zero_()
        layers += [layer, nn.Tanh()]
    return Objective(nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), (inputs, labels))


def main() -> None:
    """Print and keep the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    num_samples = parser.parse_args().samples
    torch.set_num_threads(1)
    H = hessian_operator(problem(num_samples))
    spent: list[float] = []

    def product(v: Tensor) -> Tensor:
        began = time.process_time()
        out = H.product(v)
        spent.append(time.process_time() - began)
        return out

    timed = Operator(product, H.size, H.dtype, H.device)
    began = time.process_time()
    space = leading_eigenspace(timed, k=K, tol=TOL)
    total = time.process_time() - began
    m = space.num_products - K
    moved = sum(4 * (j + 1) * 4 * H.size for j in range(m))
    outside = total - sum(spent)
    # The first product builds the graphs.
    each = sum(spent[1:]) / (len(spent) - 1)
    at_10k = outside / (outside + space.num_products * each * 10_000 / num_samples)
    report(
        "solver_overhead",
        [
            f"{K} pairs to a residual of {TOL:g}, d = {H.size:,} in float32, N = {num_samples:,}",
            f"products             {space.num_products} ({m} for the basis, {K} for the residuals)",
            f"converged            {space.converged}, chance of a missed one {space.missed:.0e}",
            f"time of a product    {each:.2f} s, of one thread",
            f"outside of products  {outside:.1f} s of {total:.1f} s: {outside / total:.1%}",
            f"reorthogonalisation  {moved / 1e9:.0f} GB moved, all of it in {outside:.1f} s "
            f"would be {moved / 1e9 / outside:.1f} GB/s",
            f"at N = 10,000        {at_10k:.1%}, the time of a product taken in proportion",
        ],
    )


if __name__ == "__main__":
    main()
