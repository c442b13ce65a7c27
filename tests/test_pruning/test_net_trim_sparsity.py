import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pruning import net_trim, net_trim_search, net_trim_solved, net_trim_to_sparsity
from pruning.net_trim_problem import group_problems
from pruning.pruned import as_pruned
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp():
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 8), nn.Tanh()
        )
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_the_number_of_zeros_is_exact_and_few_were_cut(mode, sparsity):
    model, x = mlp(), normal(60, 6)
    found = net_trim_to_sparsity(model, x, sparsity, mode=mode, within=0.03)
    d = len(found.weights)
    assert int((found.weights == 0).sum()) == math.ceil(sparsity * d)
    assert 0 <= found.num_cut <= 0.03 * d
    assert found.num_cut == math.ceil(sparsity * d) - int((~found.trim.mask).sum())
    assert 1 <= found.num_solved < 12
    # What is left is Net-Trim's, the weights that went are the smallest of its layers', no biases.
    went = found.trim.mask & ~found.mask
    assert torch.equal(found.weights[found.mask], found.trim.weights[found.mask])
    names = torch.cat([torch.full((p.numel(),), p.ndim == 2) for p in model.parameters()])
    assert torch.all(names[went])
    if found.num_cut:
        kept = found.weights[found.mask & names].abs()
        assert float(found.trim.weights[went].abs().max()) <= float(kept.min())
    cold = net_trim(model, x, epsilon=found.epsilon, mode=mode)
    torch.testing.assert_close(found.trim.weights, cold.weights, atol=3e-3, rtol=0)
    with torch.no_grad():
        dense = model(x)
        for p, part in zip(
            model.parameters(),
            found.weights.split([p.numel() for p in model.parameters()]),
            strict=True,
        ):
            p.copy_(part.view_as(p))
        off = float((model(x) - dense).norm())
    assert found.discrepancy == pytest.approx(off, rel=1e-9)


@pytest.mark.parametrize("mode, times", [("parallel", 1), ("cascade", 3)])
def test_tries_share_the_programs_of_parallel_layers(monkeypatch, mode, times):
    built = []

    def counted(objective, layer, *args, **options):
        built.append(layer.weight)
        return group_problems(objective, layer, *args, **options)

    monkeypatch.setattr(net_trim_solved, "group_problems", counted)
    found = net_trim_to_sparsity(mlp(), normal(60, 6), 0.6, mode=mode, within=0.0, max_tries=3)
    assert found.num_solved == 3
    assert built == ["0.weight", "3.weight"] * times


def test_the_nearest_try_from_below_is_cut_to_the_number(monkeypatch):
    model, x = mlp(), normal(60, 6)
    whole = net_trim(model, x, epsilon=0.1)
    shares = []

    def some_zeros(objective, w, options, **others):
        weights = w.clone()
        weights[: (20, 72, 52)[len(shares)]] = 0.0
        shares.append(options.epsilon)
        return replace(whole, **vars(as_pruned(weights)))

    monkeypatch.setattr(net_trim_search, "trim_network", some_zeros)
    d, biases = 212, 12  # those of the layer norm are zero from the start
    found = net_trim_to_sparsity(model, x, (50 + biases) / d, within=0.0, max_tries=3)
    # Halves of what is left between .001 and 1, as logarithms: below, above and above.
    assert shares == pytest.approx([10**-1.5, 10**-0.75, 10**-1.125], rel=1e-12)
    assert (found.num_solved, found.num_cut) == (3, 30)
    assert found.epsilon == shares[0]
    assert int((found.weights == 0).sum()) == 50 + biases
    assert int((found.trim.weights == 0).sum()) == 20 + biases


def test_a_budget_of_one_try_leaves_the_rest_to_the_cut():
    model, x = mlp(), normal(60, 6)
    found = net_trim_to_sparsity(model, x, 0.7, max_tries=1)
    assert found.num_solved == 1 and found.num_cut > 10
    assert found.sparsity == pytest.approx(0.7, abs=1 / len(found.weights))


def test_inputs_that_are_never_active_may_give_more_zeros_than_wanted():
    model, x = mlp(), normal(60, 6)
    x[:, :3] = 0.0
    found = net_trim_to_sparsity(model, x, 0.05, max_tries=2)
    assert found.num_cut == 0 and found.sparsity >= 36 / len(found.weights) > 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsity": 1.2}, r"`sparsity` must be in \[0, 1\]"),
        ({"sparsity": 0.9}, r"`sparsity` must be at most 0\.8490566038, .* got 0\.9"),
        ({"sparsity": 0.5, "exclude": "3.*"}, r"`sparsity` must be at most 0\.3962264151"),
        ({"within": -0.1}, "`within` must be at least 0"),
        ({"max_tries": 0}, "`max_tries` must be at least 1"),
        ({"mode": "serial"}, "`mode` must be one of"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_reached_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        net_trim_to_sparsity(mlp(), normal(60, 6), **{"sparsity": 0.5, **options})
