"""Net-Trim of one layer: ours beside general solvers, the plain iteration, and the flops it needs.

    OMP_NUM_THREADS=1 python benchmarks/net_trim_layer.py

All in one process, in turn, with CPU time of one thread. The plain iteration is written from the
formulas of Aghasi, Abdi & Romberg, in numpy and float64, at a fixed ρ and without relaxation.
"""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import scipy.linalg
import torch
from timing import interleaved, report, say
from torch import Tensor, nn

from flatvalley.data import load_dataset
from hessian import ConvergenceWarning
from pruning import LayerProgram, LayerTrim, net_trim_layer
from pruning.net_trim_program import ANCHOR, CHECK
from pruning.net_trim_setup import SplitOptions, splitting_of

SHARE = 0.1
"""ε over ‖Y‖_F."""

PLAIN_RHO = 10.0
"""ρ of the plain iteration, in our units: the better end of the authors' 1 to 100."""

PLAIN_UNIT = 0.3
"""Of its c₀, as the authors have it."""

MOST_PLAIN = 1000
"""Iterations after which the plain one is given up."""

PLAIN_SHARE = 6
"""One iteration of it is timed where so many of ours are: they are all alike."""

PRODUCT = 2048
"""Size of the matrices whose product's rate is the floor's."""

REPEATS = 5

SOLVER_REPEATS = 1
"""After a warm-up: they take long."""


def gaussian_layer(n: int, m: int, p: int) -> tuple[Tensor, Tensor]:
    """Return weights with a bias, and inputs with ones, in float64."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(p, n, generator=generator, dtype=torch.float64)
    X[:, -1] = 1.0
    W = torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    return W, X


def trained_layer(m: int, p: int) -> tuple[Tensor, Tensor]:
    """Return the first layer of a network after an epoch on MNIST, and its inputs."""
    data = load_dataset("mnist")
    x, y = data.train_inputs[:p].flatten(1), data.train_labels[:p]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, m), nn.ReLU(), nn.Linear(m, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for index in torch.randperm(p).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    W = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach().double()
    return W, torch.cat([x, torch.ones(p, 1)], dim=1).double()


def general(W: Tensor, X: Tensor, epsilon: float, solver: str) -> float:
    """Return the least objective, by a general solver for cones."""
    A, Y = X.numpy(), (X @ W.T).relu().numpy()
    on = (Y > 0).astype(float)
    U = cp.Variable(tuple(W.shape))
    Z = A @ U.T - Y
    limits = [cp.norm(cp.multiply(on, Z), "fro") <= epsilon, cp.multiply(1 - on, Z) <= 0]
    return float(cp.Problem(cp.Minimize(cp.sum(cp.abs(U))), limits).solve(solver=solver))


class Plain:
    """The iteration as it is printed, with arrays made as they are needed."""

    def __init__(self, W: Tensor, X: Tensor, epsilon: float) -> None:
        self.c0 = PLAIN_UNIT * math.sqrt(float((X.T @ X).max()))
        self.X = np.ascontiguousarray(X.numpy().T) / self.c0
        self.Y = np.ascontiguousarray((X @ W.T).relu().numpy().T) / self.c0
        self.on = self.Y > 0
        self.epsilon = epsilon / self.c0
        self.threshold = float(W.abs().mean()) / PLAIN_RHO
        self.factor = scipy.linalg.cho_factor(self.X @ self.X.T + np.eye(len(self.X)))
        self.W3 = np.zeros((len(self.X), len(self.Y)))
        self.Q = self.W3.T @ self.X
        self.U1, self.U2 = np.zeros_like(self.Y), np.zeros_like(self.W3)

    def step(self) -> None:
        """Do one iteration; the product with X that two formulas share is made once."""
        Z = self.Q - self.U1
        W1 = np.minimum(Z, 0.0)
        off = Z[self.on] - self.Y[self.on]
        W1[self.on] = self.Y[self.on] + min(1.0, self.epsilon / np.linalg.norm(off)) * off
        V = self.W3 - self.U2
        W2 = np.sign(V) * np.maximum(np.abs(V) - self.threshold, 0.0)
        self.W3 = scipy.linalg.cho_solve(self.factor, self.X @ (W1 + self.U1).T + W2 + self.U2)
        self.Q = self.W3.T @ self.X
        self.U1 = self.U1 + W1 - self.Q
        self.U2 = self.U2 + W2 - self.W3


def plain_iterations(W: Tensor, X: Tensor, epsilon: float) -> LayerTrim:
    """Return where the plain iteration passes our own stopping test.

    It is run by our code, which makes the same iterates (a test holds it to that) in less time.
    """
    layer = LayerProgram(W, X, precision="mixed")
    work = layer._splitting = splitting_of(
        W,
        layer._targets,
        layer._G,
        layer._penalty,
        SplitOptions(False, PLAIN_RHO, 1.0, "mixed"),
        c0=PLAIN_UNIT * math.sqrt(float((X.T @ X).max())),
    )
    work.balance = lambda measures: False  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return layer.solve(epsilon, max_iterations=MOST_PLAIN)


def against_solvers() -> list[str]:
    """Compare with general solvers."""
    n, m, p = 101, 40, 600
    say(f"{n} x {m} x {p}: Clarabel and SCS")
    W, X = gaussian_layer(n, m, p)
    epsilon = SHARE * float((X @ W.T).relu().norm())
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = net_trim_layer(W, X, epsilon=epsilon).objective

    def by(name: str) -> Callable[[], None]:
        return lambda: found.update({name: general(W, X, epsilon, name)})

    seconds = interleaved(
        {"ours": ours, "CLARABEL": by("CLARABEL"), "SCS": by("SCS")}, SOLVER_REPEATS
    )
    lines = [
        f"{n} inputs, {m} outputs, {p} samples, Gaussian, ε = {SHARE:g} |Y|",
        "",
        f"  {'':24}{'seconds':>10}{'x ours':>9}{'objective':>14}  against Clarabel",
    ]
    for name, title in (("ours", "ours"), ("CLARABEL", "cvxpy + Clarabel"), ("SCS", "cvxpy + SCS")):
        off = abs(found[name] / found["CLARABEL"] - 1)
        lines.append(
            f"  {title:24}{seconds[name]:10.3f}{seconds[name] / seconds['ours']:9.0f}"
            f"{found[name]:14.5f}  {off:.1e}"
        )
    least = min(seconds["CLARABEL"], seconds["SCS"]) / seconds["ours"]
    agrees = abs(found["ours"] / found["CLARABEL"] - 1) <= 1e-4
    lines += [
        "",
        f"  Objective within 1e-4 of Clarabel's: {'yes' if agrees else 'no'}. At least 100 times "
        f"faster: {'yes' if least >= 100 else 'no'} ({least:.0f}).",
        "",
    ]
    return lines


def large_product(dtype: torch.dtype) -> Callable[[], object]:
    """Return what makes a product whose rate the floor is at."""
    a = torch.ones(PRODUCT, PRODUCT, dtype=dtype)
    return lambda: a @ a


def against_plain() -> list[str]:
    """Compare with the plain iteration, and with the flops an iteration cannot do without."""
    m, p = 300, 10_000
    W, X = trained_layer(m, p)
    n = W.shape[1]
    say(f"{n} x {m} x {p}: iterations")
    epsilon = SHARE * float((X @ W.T).relu().norm())
    plain = Plain(W, X, epsilon)
    programs = {kind: LayerProgram(W, X, precision=kind) for kind in ("full", "mixed")}
    works = {kind: program.split() for kind, program in programs.items()}

    def iterate(kind: str) -> Callable[[], None]:
        work = works[kind]

        def run() -> None:
            for k in range(1, ANCHOR + 1):
                if k % CHECK:
                    work.step(epsilon / work.c0)
                else:
                    work.measured_step(epsilon / work.c0)
            work.anchor()

        return run

    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: [plain.step() for _ in range(ANCHOR // PLAIN_SHARE)],
        "full": iterate("full"),
        "mixed": iterate("mixed"),
        "float64": large_product(torch.float64),
        "float32": large_product(torch.float32),
    }
    seconds = interleaved(ways, REPEATS)
    each = {name: value / ANCHOR for name, value in seconds.items()}
    each["plain"] *= PLAIN_SHARE
    floor = 4.0 * n * m * p + 2.0 * n * n * m
    once = 2.0 * PRODUCT**3
    rates = {"full": once / seconds["float64"], "mixed": once / seconds["float32"]}
    shares = {kind: floor / rate / each[kind] for kind, rate in rates.items()}
    lines = [
        f"{n} inputs, {m} outputs, {p:,} samples, first layer on MNIST, ε = {SHARE:g} |Y|",
        "",
        f"  {'':24}{'ms an iteration':>17}{'plain over it':>15}{'share of the floor':>20}",
    ]
    titles = {"plain": "plain, numpy, float64", "full": "ours, full", "mixed": "ours, mixed"}
    for name, title in titles.items():
        share = f"{shares[name]:20.0%}" if name in shares else f"{'':20}"
        lines.append(
            f"  {title:24}{1e3 * each[name]:17.1f}{each['plain'] / each[name]:15.1f}{share}"
        )
    say("to the stopping test")
    works.clear()
    began = time.process_time()
    trim = programs["mixed"].solve(epsilon)
    ours = time.process_time() - began
    say(f"ours: {trim.iterations} iterations")
    slow = plain_iterations(W, X, epsilon)
    more = "" if slow.converged else "more than "
    ratio = slow.iterations * each["plain"] / ours
    lines += [
        "",
        "  Looks at the residuals and anchors in float64 are in these; the floor is 4 N M P +",
        f"  2 N² M flops at the rate of a large product, {1e-9 * rates['full']:.0f} and "
        f"{1e-9 * rates['mixed']:.0f} GFlop/s.",
        "",
        "  To the same test (residuals, feasible to 1e-3): ours, mixed, "
        f"{trim.iterations} iterations, {ours:.1f} s with all around them;",
        f"  plain {more}{slow.iterations} iterations, {slow.iterations * each['plain']:.0f} s: "
        f"{more}{ratio:.0f} times as long.",
        f"  Then: discrepancy {trim.ratio:.5f} of ε, violation {trim.violation:.1e}, gap "
        f"{trim.gap:.1e}, density {trim.density:.3f};",
        f"  plain: {slow.ratio:.5f}, {slow.violation:.1e}, {slow.gap:.1e}, {slow.density:.3f}.",
        "",
        f"  At least 3 times faster than plain, by iteration: "
        f"{'yes' if each['plain'] / each['mixed'] >= 3 else 'no'}; to the same test: "
        f"{'yes' if ratio >= 3 else 'no'}. At least 60 % of the floor: "
        f"{'yes' if min(shares.values()) >= 0.6 else 'no'}.",
    ]
    return lines


def main() -> None:
    """Print and keep the tables."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        sys.exit("Set OMP_NUM_THREADS=1: numpy's products take all cores otherwise.")
    torch.set_num_threads(1)
    report(
        "net_trim_layer",
        against_solvers() + against_plain(),
        ["numpy", "scipy", "cvxpy", "clarabel", "scs"],
    )


if __name__ == "__main__":
    main()
