from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hessian.objective import Objective


class Formula(nn.Module):
    """Per-sample losses f(w, x) as a model; the criterion passes them on."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.w, x)


@pytest.fixture
def formula_objective():
    """Make an objective whose sample i has loss f(w, x_i)."""

    def make(f, w, x=None, batch_size=None):
        w = torch.as_tensor(w, dtype=torch.float64)
        x = torch.zeros(1, 1, dtype=torch.float64) if x is None else x
        return Objective(Formula(f, w), lambda out, _: out, (x, x), batch_size=batch_size)

    return make


@pytest.fixture
def permuted_nets():
    """A small tanh net on a regression task, and the same function with its hidden units moved."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    width = 8
    W = 1.5 * torch.randn(width, 2, generator=generator, dtype=torch.float64)
    b = torch.randn(width, generator=generator, dtype=torch.float64)
    a = torch.randn(1, width, generator=generator, dtype=torch.float64)
    y = torch.tanh(x @ W.T + b) @ a.T
    y = y + 0.05 * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1, bias=False)).double()
    objective = Objective(model, nn.MSELoss(), (x, y), batch_size=16)
    order = torch.arange(width).roll(3)
    start = torch.cat([W.reshape(-1), b, a.reshape(-1)])
    end = torch.cat([W[order].reshape(-1), b[order], a[:, order].reshape(-1)])
    return objective, start, end


@pytest.fixture
def batch_norm_objective():
    """An objective whose model holds one batch norm layer."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double().eval()
    x = torch.ones(4, 2, dtype=torch.float64)
    return Objective(model, nn.MSELoss(), (x, x))
