"""The closed loop that sets c from a wanted sparsity."""

import pytest
import torch
from torch import nn

from pruning import GRDA


def digits_run(target, horizon, *, steps=None, rate=lambda n: 0.1, seed=0, groups=None):
    """A tanh net on a fixed nonlinear problem, full of noise; returns model and optimizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 10))
    optimizer = GRDA(
        model.parameters() if groups is None else groups(model),
        lr=0.1,
        target_sparsity=target,
        horizon=horizon,
    )
    generator = torch.Generator().manual_seed(seed)
    for n in range(steps or horizon):
        for group in optimizer.param_groups:
            group["lr"] = rate(n)
        x = torch.randn(32, 20, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("target", [0.5, 0.9, 0.98])
def test_the_target_is_there_at_the_horizon(target):
    model, optimizer = digits_run(target, 600)
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    size = sum(p.numel() for p in model.parameters())
    assert optimizer.sparsity() == zeros / size
    assert zeros / size == pytest.approx(target, abs=0.01)
