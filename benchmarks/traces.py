"""The spread of trace estimates at an equal number of products, by method, beside the peers.

The matrix is the Hessian of a 64-20-10 tanh net on scikit-learn's digits, d = 1510, in float64,
once dense: the truth is its trace, and products with it are those of the network. Every method
gets the same number of products, repeatedly with other seeds. Deflated runs get ten eigenpairs that
were paid for before; XTrace and Hutch++ cost two and one and a half products a probe.

`spread` is the standard deviation of the value over the first 40 repetitions, `rms error` the
distance from the truth over all 200: 40 repetitions know a spread to 11 %, 200 to 5 %. `reported`
is the mean standard error that the method gives, and `covered` how often its 95 % interval holds
the truth.
PyHessian gives samples and no error; its interval is made from them as one would. curvlinops gives
a value only. PyHessian runs on the network itself, with its stopping rule off.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import t
from timing import report
from torch import Tensor, nn

from hessian import Operator, hessian_operator, leading_eigenspace, trace
from tests.cases import digits_network

PRODUCTS, FIRST, REPEATS, PAIRS = 50, 40, 200, 10

Run = Callable[[int], tuple[float, float, float]]
"""Maps a seed to value, standard error and half of the 95 % interval; NaN where there is none."""


def ours(A: Operator, **options: Any) -> Run:
    """Run ``trace``."""

    def run(seed: int) -> tuple[float, float, float]:
        found = trace(A, seed=seed, **options)
        assert found.num_products <= PRODUCTS
        return found.value, found.standard_error, found.interval()[1] - found.value

    return run


def curvlinops(estimate: Callable[..., Tensor], A: Tensor, products: int) -> Run:
    """Run one of curvlinops' estimators, which draw from the global state."""

    def run(seed: int) -> tuple[float, float, float]:
        torch.manual_seed(seed)
        return float(estimate(A, products)), math.nan, math.nan

    return run


def pyhessian() -> Run:
    """Run PyHessian's trace on the network with its stopping rule switched off."""
    from pyhessian import hessian

    case = digits_network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = hessian(case.model, nn.CrossEntropyLoss(), data=case.data, cuda=False)

    def run(seed: int) -> tuple[float, float, float]:
        torch.manual_seed(seed)
        samples = torch.tensor(peer.trace(maxIter=PRODUCTS, tol=-math.inf), dtype=torch.float64)
        assert len(samples) == PRODUCTS
        error = float(samples.std()) / math.sqrt(PRODUCTS)
        return float(samples.mean()), error, float(t.ppf(0.975, PRODUCTS - 1)) * error

    return run


def main() -> None:
    """Print and keep the table."""
    from curvlinops import hutchinson_trace, hutchpp_trace, xtrace

    torch.set_num_threads(1)
    H = hessian_operator(digits_network().objective([400]))
    space = leading_eigenspace(H, k=PAIRS, tol=1e-3)
    dense = H @ torch.eye(H.size, dtype=H.dtype)
    dense = (dense + dense.T) / 2
    A, exact = Operator.from_matrix(dense), float(dense.trace())
    pairs = {"eigenspace": space}
    runs = {
        "Hutchinson": ours(A, num_probes=50),
        "Hutch++": ours(A, method="hutch++", num_probes=33),
        "XTrace": ours(A, method="xtrace", num_probes=25),
        "Hutchinson, deflated": ours(A, num_probes=50, **pairs),
        "Hutch++, deflated": ours(A, method="hutch++", num_probes=33, **pairs),
        "XTrace, deflated": ours(A, method="xtrace", num_probes=25, **pairs),
        "PyHessian": pyhessian(),
        "curvlinops Hutchinson": curvlinops(hutchinson_trace, dense, 50),
        "curvlinops Hutch++": curvlinops(hutchpp_trace, dense, 48),
        "curvlinops XTrace": curvlinops(xtrace, dense, 50),
    }
    lines = [
        f"Trace {exact:.4f} of the digits Hessian, d = {H.size}; {PRODUCTS} products a run (48 for",
        f"curvlinops' Hutch++, 49 for ours). Spread over {FIRST} repetitions, and as a ratio to",
        f"plain Hutchinson's; the rest over {REPEATS}. The {PAIRS} pairs cost "
        f"{space.num_products} products, once.",
        "",
        f"{'':24}{'spread':>9}{'ratio':>8}{'rms error':>11}{'reported':>10}{'covered':>9}",
    ]
    plain = math.nan
    for name, run in runs.items():
        found = torch.tensor([run(seed) for seed in range(REPEATS)], dtype=torch.float64)
        spread = float(found[:FIRST, 0].std())
        off = float((found[:, 0] - exact).square().mean().sqrt())
        plain = spread if math.isnan(plain) else plain
        error = float(found[:, 1].mean())
        covered = float(((found[:, 0] - exact).abs() <= found[:, 2]).double().mean())
        given = f"{error:10.4f}{covered:9.1%}" if math.isfinite(error) else f"{'none':>10}{'':9}"
        lines.append(f"{name:24}{spread:9.4f}{spread / plain:8.2f}{off:11.4f}{given}")
        print(lines[-1], flush=True)
    report("traces", lines)


if __name__ == "__main__":
    main()
