import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatvalley.data import load_dataset
from hessian import ConvergenceWarning
from pruning import LayerProgram, net_trim, net_trim_to_sparsities, net_trim_to_sparsity
from pruning.net_trim_shares import next_share
from tests.cases import seeded

SHARES = [0.4, 0.5, 0.65]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OPTIONS = {"ball": "joint", "tol": 1e-3, "within": 0.02}


def mlp():
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 8), nn.Tanh()
        )
    )


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_every_sparsity_is_exact_and_is_net_trims_for_its_share(mode):
    model, x = mlp(), normal(60, 6)
    found = list(net_trim_to_sparsities(model, x, SHARES, mode=mode, **OPTIONS))
    assert len(found) == len(SHARES)
    for share, one in zip(SHARES, found, strict=True):
        d = len(one.weights)
        assert int((one.weights == 0).sum()) == math.ceil(share * d)
        assert one.num_cut == math.ceil(share * d) - int((~one.trim.mask).sum())
        assert 0 <= one.num_cut <= 0.02 * d
        assert torch.equal(one.weights[one.mask], one.trim.weights[one.mask])
        cold = net_trim(model, x, epsilon=one.epsilon, mode=mode, ball="joint")
        torch.testing.assert_close(one.trim.weights, cold.weights, atol=1e-2, rtol=0)
        with torch.no_grad():
            dense = model(x)
            other = mlp()
            torch.nn.utils.vector_to_parameters(one.weights, other.parameters())
            assert one.discrepancy == pytest.approx(float((other(x) - dense).norm()), rel=1e-9)
    assert [one.epsilon for one in found] == sorted(one.epsilon for one in found)


@pytest.mark.parametrize("mode, times", [("parallel", 1), ("cascade", None)])
def test_what_was_tried_serves_the_sparsities_that_come(monkeypatch, mode, times):
    built, tries = [], []

    def counted(program, W, *rest):
        built.append(tuple(W.shape))
        set_up(program, W, *rest)

    set_up = LayerProgram._set_up
    monkeypatch.setattr(LayerProgram, "_set_up", counted)
    options = {"mode": mode} | OPTIONS
    together = list(
        net_trim_to_sparsities(mlp(), normal(60, 6), SHARES, on_try=tries.append, **options)
    )
    assert sum(one.num_solved for one in together) == len(tries)
    assert all(any(one.trim is trim for trim in tries) for one in together)
    assert built == [(12, 7), (8, 13)] * (times or len(tries))
    alone = sum(
        net_trim_to_sparsity(mlp(), normal(60, 6), share, **options).num_solved for share in SHARES
    )
    assert len(tries) < 0.8 * alone


def test_the_smallest_weights_of_layers_are_cut_and_no_biases():
    model = mlp()
    (found,) = net_trim_to_sparsities(model, normal(60, 6), [0.75], max_tries=1, **OPTIONS)
    went = found.trim.mask & ~found.mask
    assert int(went.sum()) == found.num_cut > 10
    weights = torch.cat([torch.full((p.numel(),), p.ndim == 2) for p in model.parameters()])
    assert torch.all(weights[went])
    size = found.trim.weights.abs()
    assert float(size[went].max()) <= float(size[found.mask & weights].min())
    # Biases would have gone first, were they counted.
    assert float(size[found.mask & ~weights].min()) < float(size[went].max())


def test_a_sparsity_that_an_earlier_try_gave_takes_none():
    tries = []
    first = next(
        net_trim_to_sparsities(mlp(), normal(60, 6), [0.6], on_try=tries.append, **OPTIONS)
    )
    seen = sorted(int((~trim.mask).sum()) for trim in tries)
    later = next(zeros for zeros in seen if zeros > int((~first.trim.mask).sum()))
    d = len(first.weights)
    found = list(net_trim_to_sparsities(mlp(), normal(60, 6), [0.6, later / d], **OPTIONS))
    assert found[1].num_solved == 0 and found[1].num_cut == 0
    assert int((~found[1].mask).sum()) == later


def test_only_tries_that_are_taken_are_warned_of():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = list(net_trim_to_sparsities(mlp(), normal(60, 6), [0.3, 0.6], max_iterations=20))
    assert sum(one.num_solved for one in found) > 2
    open_layers = [layer for one in found for layer in one.trim.layers if not layer.converged]
    assert 0 < len(open_layers) == len(told)
    assert all(issubclass(warning.category, ConvergenceWarning) for warning in told)


def test_inputs_that_are_never_active_may_give_more_zeros_than_wanted():
    model, x = mlp(), normal(60, 6)
    x[:, :3] = 0.0
    few, more = net_trim_to_sparsities(model, x, [0.05, 0.6], max_tries=4, **OPTIONS)
    assert few.num_cut == 0 and few.sparsity >= 36 / len(few.weights) > 0.05
    assert int((more.weights == 0).sum()) == math.ceil(0.6 * len(more.weights))


def test_a_cascade_stays_nearer_than_parallel_layers_at_equal_zeros_on_digits():
    data = load_dataset("digits", dtype=torch.float64)
    x, y = data.train_inputs[:500].flatten(1), data.train_labels[:500]
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    shares = [0.5, 0.7, 0.85]
    parallel, cascade, fitted = (
        list(net_trim_to_sparsities(model, x[:250], shares, **OPTIONS, **mode))
        for mode in ({}, {"mode": "cascade"}, {"mode": "cascade", "refit": True})
    )
    for share, apart, along, best in zip(shares, parallel, cascade, fitted, strict=True):
        assert apart.sparsity == along.sparsity == best.sparsity >= share
        assert best.discrepancy < along.discrepancy < 0.8 * apart.discrepancy
        for one in (apart, along, best):
            assert one.trim.converged
            assert one.trim.discrepancy <= one.trim.bound * (1 + 1e-9)


@pytest.mark.parametrize(
    "zeros, wanted, aim, expected",
    [
        ({}, 50, 50.0, math.sqrt(1e-3)),
        ({0.01: 0, 0.16: 100}, 50, 25.0, 0.02),
        ({0.01: 0, 0.16: 100}, 50, None, 0.04),
        ({0.01: 0, 0.16: 100}, 50, -5.0, 0.01 * 16**0.1),
        ({0.01: 0, 0.16: 51}, 50, 50.0, 0.01 * 16**0.9),
        ({0.04: 50}, 50, 49.0, math.sqrt(0.04)),
        ({0.1: 51}, 50, 49.0, math.sqrt(1e-3 * 0.1)),
        # Zeros that fall in between: the first share with too many ends the interval.
        ({0.01: 0, 0.1: 60, 0.3: 40}, 50, None, math.sqrt(1e-3)),
    ],
)
def test_the_next_share_lies_between_those_with_fewer_and_more_zeros(zeros, wanted, aim, expected):
    assert next_share(zeros, wanted, aim) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsities": [0.5, 0.5]}, r"`sparsities` must increase, got \[0\.5, 0\.5\]"),
        ({"sparsities": [0.5, 0.9]}, r"`sparsity` must be at most 0\.8490566038, .* got 0\.9"),
        ({"sparsities": [0.5, 1.2]}, r"`sparsity` must be in \[0, 1\]"),
        ({"within": -0.1}, "`within` must be at least 0"),
        ({"max_tries": 0}, "`max_tries` must be at least 1"),
        ({"mode": "serial"}, "`mode` must be one of"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_reached_is_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        net_trim_to_sparsities(mlp(), normal(60, 6), **{"sparsities": [0.5], **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer_sparsity": 0.5}, "`epsilon` and `layer_sparsity` are no options here"),
        ({"epsilon": 0.5}, "Use `net_trim` for zeros by layer"),
        ({"workers": 2}, "`workers` is no option here. Choose from ball, "),
    ],
)
def test_options_of_other_functions_are_named(options, message):
    with pytest.raises(TypeError) as error:
        net_trim_to_sparsity(nn.Linear(3, 2), torch.randn(9, 3), 0.5, **options)
    assert message in str(error.value)
