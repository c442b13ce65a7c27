"""Estimators of a trace that take more and more probes."""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from hessian.probes import CountedProducts, SignProbes, column_dots, inner
from hessian.sketches import RangeBasis, leave_one_out_error, leave_one_out_traces

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]


class Estimator(Protocol):
    """Samples of a trace that can be added to."""

    def grow(self, count: int) -> None:
        """Add samples from so many probes."""

    def outcome(self) -> tuple[Tensor, float]:
        """Return the samples so far, in float64, and the standard error of their mean."""


class _Hutchinson:
    """One sample vᵀ A v a probe, all independent."""

    def __init__(self, A: CountedProducts, probes: SignProbes, *, growing: bool) -> None:
        del growing
        self.A, self.probes = A, probes
        self.samples = torch.empty(0, dtype=torch.float64, device="cpu")

    def grow(self, count: int) -> None:
        for size in self.A.chunks(count):
            X = self.probes.draw(size)
            self.samples = torch.cat([self.samples, column_dots(X, self.A @ X)])

    def outcome(self) -> tuple[Tensor, float]:
        return self.samples, _standard_error(self.samples)


class _HutchPlusPlus:
    """The trace on the range of a sketch, exactly; samples of the rest, independent given it."""

    def __init__(self, A: CountedProducts, probes: SignProbes, *, growing: bool) -> None:
        self.A, self.probes, self.growing = A, probes, growing
        self.count = 0
        self.basis: RangeBasis | None = None
        self.captured = 0.0
        self.samples = torch.empty(0, dtype=torch.float64, device="cpu")

    def grow(self, count: int) -> None:
        sketched, self.count = self.count // 2, self.count + count
        wanted = self.count // 2
        S = self.probes.draw(wanted - sketched)
        if self.basis is None:
            self.basis = RangeBasis(S)
            self.rest, self.A_rest = S[:, :0], S[:, :0]
        gained = self.basis.add(self.A @ S)
        A_gained = self.A @ gained
        self.captured += float(column_dots(gained, A_gained).sum())
        # What is known of A on the earlier probes tells A on what the larger basis leaves of them.
        inside = inner(gained, self.rest).to(gained)
        self.rest = self.rest - gained @ inside
        self.A_rest = self.A_rest - A_gained @ inside
        self.samples = column_dots(self.rest, self.A_rest)
        for size in self.A.chunks(self.count - wanted - len(self.samples)):
            X = self.probes.draw(size)
            for _ in range(2):
                X = X - self.basis.Q @ inner(self.basis.Q, X).to(X)
            AX = self.A @ X
            self.samples = torch.cat([self.samples, column_dots(X, AX)])
            if self.growing:
                self.rest = torch.cat([self.rest, X], dim=1)
                self.A_rest = torch.cat([self.A_rest, AX], dim=1)

    def outcome(self) -> tuple[Tensor, float]:
        return self.samples + self.captured, _standard_error(self.samples)


class _XTrace:
    """Every probe samples what the range of the other probes misses."""

    def __init__(self, A: CountedProducts, probes: SignProbes, *, growing: bool) -> None:
        del growing
        self.A, self.probes = A, probes
        self.basis: RangeBasis | None = None
        self.H = torch.zeros((0, 0), dtype=torch.float64, device="cpu")
        self.forms = torch.empty(0, dtype=torch.float64, device="cpu")

    def grow(self, count: int) -> None:
        X = self.probes.draw(count)
        if self.basis is None:
            self.basis = RangeBasis(X)
            self.signs = X[:, :0].to(torch.int8)
        AX = self.A @ X
        self.forms = torch.cat([self.forms, column_dots(X, AX)])
        self.signs = torch.cat([self.signs, X.to(torch.int8)], dim=1)
        before = len(self.H)
        gained = self.basis.add(AX)
        columns = inner(self.basis.Q, self.A @ gained)
        corner = columns[before:]
        self.H = torch.cat(
            [
                torch.cat([self.H, columns[:before]], dim=1),
                torch.cat([columns[:before].T, (corner + corner.T) / 2], dim=1),
            ]
        )

    def outcome(self) -> tuple[Tensor, float]:
        assert self.basis is not None
        W = inner(self.basis.Q, self.signs)
        samples, without = leave_one_out_traces(self.H, self.basis.R, W, self.forms)
        return samples, float(leave_one_out_error(samples, without))


ESTIMATORS: dict[str, type[_Hutchinson] | type[_HutchPlusPlus] | type[_XTrace]] = {
    "hutchinson": _Hutchinson,
    "hutch++": _HutchPlusPlus,
    "xtrace": _XTrace,
}
FEWEST = {"hutchinson": 2, "hutch++": 3, "xtrace": 2}


def price_of(method: TraceMethod, num_probes: int) -> int:
    """Products that this many probes cost."""
    return num_probes + {"hutchinson": 0, "hutch++": num_probes // 2, "xtrace": num_probes}[method]


def _standard_error(samples: Tensor) -> float:
    return float(samples.std()) / math.sqrt(len(samples))
