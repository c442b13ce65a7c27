import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hessian import Objective
from pruning import magnitude_prune, random_prune
from tests.cases import seeded

INF, NAN = math.inf, math.nan


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp_objective():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    return Objective(model, nn.MSELoss(), (normal(9, 4), normal(9, 3)))


# Few distinct values, so that zeros and ties are common.
coarse = st.sampled_from([-2.0, -0.7, -0.3, -0.1, 0.0, 0.1, 0.3, 0.7, 2.0])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 49, 266])
def test_magnitude_prune_keeps_the_promised_count(size):
    w = normal(size)
    for zeros in range(size + 1):
        pruned = magnitude_prune(w, zeros / size)
        assert int((pruned.weights == 0).sum()) == zeros
        assert pruned.sparsity == pytest.approx(zeros / size, abs=1e-15)
        kept, dropped = w[pruned.mask].abs(), w[~pruned.mask].abs()
        assert torch.equal(pruned.weights[pruned.mask], w[pruned.mask])
        if 0 < zeros < size:
            assert kept.min() >= dropped.max()


def test_magnitude_prune_rounds_the_count_up():
    assert magnitude_prune(normal(10), 0.31).sparsity == pytest.approx(0.4)


@given(
    st.lists(coarse, min_size=1, max_size=20),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_magnitude_masks_are_nested_even_with_ties(values, shares):
    few, many = (magnitude_prune(vector(*values), share) for share in shares)
    assert torch.all(few.mask[many.mask])
    assert few.sparsity <= many.sparsity


def test_magnitude_prune_counts_the_zeros_that_are_there():
    assert magnitude_prune(vector(0.0, 0.0, 0.0, 1.0), 0.25).sparsity == 0.75


@pytest.mark.parametrize("prune", [magnitude_prune, random_prune])
def test_parameters_can_have_shares_of_their_own_or_stay(prune):
    objective = mlp_objective()
    w = objective.weights()
    uniform = prune(w, 0.5, objective=objective, allocation="uniform", exclude=["*.bias"])
    shares = {name: float(part.mean()) for name, part in by_name(objective, uniform).items()}
    # 22 zeros in 20 and 15 weights: 12.57 and 9.43
    assert shares == pytest.approx(
        {"0.weight": 7 / 20, "0.bias": 1, "2.weight": 6 / 15, "2.bias": 1}
    )
    some = prune(w, 0.5, objective=objective, allocation={"2.*": 0.0})
    parts = by_name(objective, some)
    assert parts["2.weight"].all() and parts["2.bias"].all() and int((~some.mask).sum()) == 22
    assert torch.equal(some.weights[some.mask], w[some.mask])


def by_name(objective, pruned):
    return objective.unflatten(pruned.mask.double())


def test_uniform_magnitude_pruning_keeps_the_largest_of_every_parameter():
    objective = mlp_objective()
    w = objective.weights() * torch.linspace(0.1, 10.0, objective.size).double()
    pruned = magnitude_prune(w, 0.5, objective=objective, allocation="uniform")
    for values, left in zip(
        objective.unflatten(w).values(), objective.unflatten(pruned.weights).values(), strict=True
    ):
        gone = values[left == 0].abs()
        assert len(gone) in (math.floor(values.numel() / 2), math.ceil(values.numel() / 2))
        assert gone.max() <= values[left != 0].abs().min()


def test_random_pruning_draws_every_weight_alike_and_repeats_its_seed():
    w = normal(40)
    state = torch.get_rng_state()
    counts = torch.zeros(40)
    for seed in range(400):
        pruned = random_prune(w, 0.25, seed=seed)
        assert int((~pruned.mask).sum()) == 10
        counts += ~pruned.mask
    # Binomial of 400 draws with p = 1/4: standard deviation 8.7, so 4.6 of them either way.
    assert counts.min() > 60 and counts.max() < 140
    again = random_prune(w, 0.25, seed=399)
    assert torch.equal(again.weights, pruned.weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_masks_of_one_seed_are_nested():
    w = normal(40)
    few, many = (random_prune(w, share, seed=3).mask for share in (0.3, 0.6))
    assert torch.all(few[many]) and few.sum() == 28


@pytest.mark.parametrize("prune", [magnitude_prune, random_prune])
def test_arguments_are_left_alone(prune):
    w = vector(0.5, -1.0, 2.0)
    before = w.clone()
    prune(w, 0.5)
    assert torch.equal(w, before)


@pytest.mark.parametrize("prune", [magnitude_prune, random_prune])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, p: p(w, 1.2), r"`sparsity` must be in \[0, 1\].*got 1.2"),
        (lambda w, p: p(w, NAN), r"`sparsity` must be in \[0, 1\]"),
        (lambda w, p: p(w * INF, 0.5), "`w` must be finite"),
        (lambda w, p: p(w.long(), 0.5), "`w` must be a flat floating-point"),
        (lambda w, p: p(w[:0], 0.5), "`w` must hold at least one weight"),
        (lambda w, p: p(w, 0.5, exclude=["*"]), "`exclude` needs an Objective"),
        (lambda w, p: p(w, 0.5, objective=mlp_objective()), "one entry for each of the 43"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_is_named(prune, call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, dtype=torch.float64), prune)
