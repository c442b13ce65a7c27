"""The closed loop that sets c from a wanted sparsity."""

import pytest
import torch
from torch import nn

from pruning import GRDA, SparsityWarning
from pruning.sparsity_target import constant_for


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


@pytest.mark.parametrize("rate", [lambda n: 0.1 * (1 - n / 600), lambda n: 0.1 * 0.1 ** (n // 200)])
def test_a_decaying_rate_does_not_stall_the_threshold(rate):
    _, optimizer = digits_run(0.9, 600, rate=rate)
    assert optimizer.sparsity() == pytest.approx(0.9, abs=0.01)


def test_the_constant_is_the_quantile_of_what_each_weight_needs():
    v, w = torch.linspace(-3.0, 3.0, 1001), torch.linspace(0.0, 1.0, 500)
    for target in (0.3, 0.8, 0.95):
        found = float(constant_for(target, [([v], 0.5, 2.0), ([w], 0.1, 4.0)]))
        share = ((v.abs() <= 0.5 + 2 * found).sum() + (w <= 0.1 + 4 * found).sum()) / 1501
        assert float(share) == pytest.approx(target, abs=5e-3)
    assert float(constant_for(0.1, [([v], 0.5, 2.0)])) == 0.0  # 17 % are below the threshold


def test_groups_left_dense_do_not_count():
    def groups(model):
        return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "c": 0.0}]

    model, optimizer = digits_run(0.9, 300, groups=groups)
    zeros = sum(int((p == 0).sum()) for p in model[0].parameters())
    assert optimizer.sparsity() == zeros / 1260 == pytest.approx(0.9, abs=0.01)
    assert all((p != 0).all() for p in model[2].parameters())


def test_a_target_that_is_missed_warns_and_says_what_came():
    with pytest.warns(
        SparsityWarning, match=r"0.9 was missed: after the 5 steps .* 0\.0000 of the"
    ):
        digits_run(0.9, 5, rate=lambda n: 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `c`, or `target_sparsity` with `horizon`, got neither"),
        ({"c": 0.1, "target_sparsity": 0.5, "horizon": 9}, "got both"),
        ({"target_sparsity": 0.5}, "`target_sparsity` needs `horizon`"),
        ({"c": 0.1, "horizon": 9}, "`horizon` belongs to `target_sparsity`"),
        ({"target_sparsity": 1.0, "horizon": 9}, "between 0 and 1, got 1.0"),
        ({"target_sparsity": 0.0, "horizon": 9}, "between 0 and 1, got 0.0"),
        ({"target_sparsity": 0.5, "horizon": 0}, "at least 1 step, got 0"),
    ],
)
def test_targets_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GRDA([nn.Parameter(torch.ones(1))], lr=0.1, **options)


def test_a_group_with_a_c_or_a_target_of_its_own_is_refused():
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"may only set `c=0.0`, to stay dense, got 0.1"):
        GRDA([{"params": [p], "c": 0.1}], lr=0.1, target_sparsity=0.5, horizon=9)
    with pytest.raises(ValueError, match="hold for all groups together"):
        GRDA([{"params": [p]}, {"params": [q], "target_sparsity": 0.5}], lr=0.1, c=0.1)
