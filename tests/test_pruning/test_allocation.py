import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from hessian import Objective
from pruning.allocation import keep_mask, parameter_slices, zeros_by_parameter
from tests.cases import seeded

INF, NAN = math.inf, math.nan


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*sizes):
    """An objective with parameters 0.weight, 0.bias, 1.weight, …; its loss is never asked for."""
    model = seeded(lambda: nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]))
    return Objective(model, nn.MSELoss(), (normal(2, sizes[0]), normal(2, sizes[-1])))


def zeros_in(keep, objective):
    return {name: int((~keep[part]).sum()) for name, part in parameter_slices(objective).items()}


def test_places_are_those_of_the_flat_vector():
    objective = network(4, 3, 2)
    w = normal(objective.size)
    places = parameter_slices(objective)
    for name, values in objective.unflatten(w).items():
        assert torch.equal(w[places[name]], values.reshape(-1))


# Few distinct values, so that zeros and ties are common.
coarse = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(coarse, coarse), min_size=1, max_size=30), st.integers(0, 30))
def test_one_ranking_drops_the_lowest_scores_and_of_equal_ones_the_first(pairs, zeros):
    scores, w = (vector(*column) for column in zip(*pairs, strict=True))
    zeros = min(zeros, len(w))
    keep = keep_mask(scores, w, sparsity=zeros / len(w))
    order = sorted(range(len(w)), key=lambda j: (w[j] != 0, scores[j], j))
    gone = max(zeros, int((w == 0).sum()))
    assert sorted(order[:gone]) == [j for j in range(len(w)) if not keep[j]]


def test_infinite_scores_rank_as_numbers_do_and_zeros_go_whatever_theirs():
    w = vector(1.0, 1.0, 0.0, 1.0)
    keep = keep_mask(vector(INF, -INF, INF, 0.0), w, sparsity=0.5)
    assert keep.tolist() == [True, False, False, True]


sizes = st.lists(st.integers(1, 9), min_size=2, max_size=4)


@settings(max_examples=100, deadline=None)
@given(sizes, st.floats(0, 1), st.floats(0, 1), st.integers(0, 100))
def test_uniform_shares_differ_by_rounding_or_by_zeros_that_are_there(sizes, sparsity, dead, seed):
    objective = network(*sizes)
    w = normal(objective.size, seed=seed)
    w[torch.rand(len(w), generator=torch.Generator().manual_seed(seed)) < dead] = 0.0
    scores = normal(len(w), seed=seed + 1)
    keep = keep_mask(scores, w, sparsity=sparsity, objective=objective, allocation="uniform")
    has = zeros_in(w != 0, objective)
    found = zeros_in(keep, objective)
    wanted = math.ceil(sparsity * len(w) - 1e-9 * len(w))
    assert sum(found.values()) == max(wanted, sum(has.values()))
    assert not keep[w == 0].any()
    lengths = {name: shape.numel() for name, shape in objective.shapes.items()}
    gave = [name for name in found if found[name] > has[name]]
    # Some share fits all: no tensor is a whole weight off it, or it has more zeros by itself.
    low = max([Fraction(found[n] - 1, lengths[n]) for n in gave], default=Fraction(-1))
    high = min(Fraction(found[n] + 1, lengths[n]) for n in found)
    assert low < high
    for name, part in parameter_slices(objective).items():
        inside = scores[part][w[part] != 0].sort().values
        going = found[name] - has[name]
        assert_close(scores[part][keep[part]].sort().values, inside[going:])


def test_uniform_rounds_by_largest_remainders():
    objective = network(3, 4, 1)  # 12, 4, 4 and 1 weights
    w = normal(objective.size)
    counts = zeros_by_parameter(w, sparsity=10 / 21, objective=objective, allocation="uniform")
    # Shares 5.71, 1.90, 1.90 and 0.48: the whole numbers make 7, the largest remainders 3 more.
    assert counts == {"0.weight": 6, "0.bias": 2, "1.weight": 2, "1.bias": 0}


def test_tensors_with_more_zeros_than_their_share_leave_the_rest_to_the_others():
    objective = network(3, 4, 1)
    w = normal(objective.size)
    w[:9] = 0.0
    counts = zeros_by_parameter(w, sparsity=12 / 21, objective=objective, allocation="uniform")
    # 12 · 12 / 21 = 6.9 < 9 for the first; the other three share 12 − 9 among 4, 4 and 1.
    assert counts == {"0.weight": 9, "0.bias": 2, "1.weight": 1, "1.bias": 0}


def test_excluded_parameters_stay_and_count():
    objective = network(3, 4, 1)
    w = normal(objective.size)
    w[12] = 0.0  # in 0.bias
    for allocation in ("global", "uniform", {"1.weight": 0.5}):
        keep = keep_mask(
            w.abs(),
            w,
            sparsity=0.6,
            objective=objective,
            allocation=allocation,
            exclude=["*.bias"],
        )
        found = zeros_in(keep, objective)
        assert found["0.bias"] == 1 and found["1.bias"] == 0
        assert sum(found.values()) == math.ceil(0.6 * 21)
    again = keep_mask(w.abs(), w, sparsity=0.6, objective=objective, exclude="*.bias")
    assert zeros_in(again, objective)["0.bias"] == 1


def test_patterns_fix_their_tensors_and_the_rest_meets_the_total():
    objective = network(3, 4, 1)
    w = normal(objective.size)
    shares = {"0.b*": 0.0, "1.*": 0.5, "*": 0.9}
    counts = zeros_by_parameter(
        w, sparsity=14 / 21, objective=objective, allocation={"0.b*": 0.0, "1.*": 0.5}
    )
    assert counts == {"0.bias": 0, "1.weight": 2, "1.bias": 1}
    keep = keep_mask(
        w.abs(), w, sparsity=14 / 21, objective=objective, allocation={"0.b*": 0.0, "1.*": 0.5}
    )
    assert zeros_in(keep, objective) == counts | {"0.weight": 11}
    assert w[:12].abs().argmax() == keep[:12].nonzero()
    # The first pattern that fits counts; where all are fixed, only their total is reachable.
    found = zeros_by_parameter(w, sparsity=14 / 21, objective=objective, allocation=shares)
    assert found == counts | {"0.weight": 11}


def test_a_mapping_that_leaves_no_choice_says_which_total_it_makes():
    objective = network(7, 9, 1)
    w = normal(objective.size)
    options = {"objective": objective, "allocation": {"*": 0.31}}
    with pytest.raises(ValueError, match=r"`sparsity` must be at least 0\.32926") as least:
        zeros_by_parameter(w, sparsity=0.2, **options)
    with pytest.raises(ValueError, match=r"`sparsity` must be at most 0\.32926"):
        zeros_by_parameter(w, sparsity=0.5, **options)
    told = float(str(least.value).split()[5])
    zeros = zeros_by_parameter(w, sparsity=told, **options)
    assert sum(zeros.values()) == round(told * len(w)) == 27


def test_zeros_in_a_fixed_tensor_are_kept_if_there_are_more():
    objective = network(3, 4, 1)
    w = normal(objective.size)
    w[12:15] = 0.0
    options = {"objective": objective, "allocation": {"0.bias": 0.5}}
    assert zeros_by_parameter(w, sparsity=0.4, **options) == {"0.bias": 3}
    assert int((~keep_mask(w.abs(), w, sparsity=0.4, **options)).sum()) == 9
    with pytest.raises(ValueError, match=r"at least 0\.4285714286 with this `allocation`"):
        zeros_by_parameter(w, sparsity=0.1, objective=objective, allocation={"0.weight": 0.5})
    # More zeros than asked for, and none to choose: nothing goes.
    keep = keep_mask(w.abs(), w, sparsity=0.1, objective=objective, allocation="uniform")
    assert torch.equal(keep, w != 0)


@pytest.mark.parametrize("allocation", ["global", "uniform", {"1.*": 0.7}])
def test_stages_remove_exactly_their_number_and_end_where_one_step_does(allocation):
    objective = network(5, 7, 3)
    w = normal(objective.size)
    scores = w.abs()
    options = {"sparsity": 0.6, "objective": objective, "allocation": allocation}
    whole = keep_mask(scores, w, **options)
    wanted = int((~whole).sum())
    for goals in ([1, 2, 5, 20, wanted], range(1, wanted + 1)):
        left = w.clone()
        for goal in goals:
            gone = int((left == 0).sum())
            keep = keep_mask(scores, left, progress=(goal - gone) / (wanted - gone), **options)
            assert int((~keep).sum()) == goal
            left[~keep] = 0.0
        assert zeros_in(left != 0, objective) == zeros_in(whole, objective)


def test_arguments_are_left_alone():
    objective = network(3, 4, 1)
    w, scores = normal(objective.size), normal(objective.size, seed=1)
    before = w.clone(), scores.clone()
    for allocation in ("global", "uniform", {"0.*": 0.4}):
        keep_mask(scores, w, sparsity=0.5, objective=objective, allocation=allocation)
    assert torch.equal(w, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.1}, r"`sparsity` must be in \[0, 1\].*got 1.1"),
        ({"sparsity": NAN}, r"`sparsity` must be in \[0, 1\]"),
        ({"allocation": "layer"}, "`allocation` must be \"global\", .* got 'layer'"),
        ({"allocation": "uniform", "objective": None}, '`allocation` other than "global" needs'),
        ({"exclude": ["*.bias"], "objective": None}, "`exclude` needs an Objective"),
        ({"exclude": ["conv*"]}, '`exclude` pattern "conv\\*" matches none of 0.weight'),
        ({"allocation": {"conv": 0.1}}, '`allocation` pattern "conv" matches none of 0.weight'),
        ({"allocation": {"0.*": 1.5}}, r"`allocation` must hold sparsities in \[0, 1\], got 1.5"),
        ({"allocation": {"0.*": NAN}}, r"`allocation` must hold sparsities in \[0, 1\], got nan"),
        ({"sparsity": 0.9, "exclude": ["*.bias"]}, "at most 0.7619047619 with what `exclude` k"),
        ({"allocation": {"0.*": 0.9}, "sparsity": 0.5}, "at least 0.7142857143 with this `alloc"),
        ({"allocation": {"0.*": 0.1}, "sparsity": 0.5}, "at most 0.380952381 with this `alloca"),
        ({"scores": vector(*[NAN] * 2, *[1.0] * 19)}, "`scores` must not be NaN, got 2"),
        ({"scores": vector(1.0)}, r"`scores` must hold one score for each of the 21 weights"),
        ({"w": vector(*[INF] * 21)}, "`w` must be finite"),
        ({"w": vector(1.0, 2.0), "scores": vector(1.0, 2.0)}, "`w` must be a flat vector with on"),
    ],
)
def test_bad_input_says_what_to_change(unchecked_shapes, change, message):
    objective = network(3, 4, 1)
    w = normal(21)
    options = {"scores": w.abs(), "w": w, "sparsity": 0.5, "objective": objective} | change
    with pytest.raises(ValueError, match=message):
        keep_mask(options.pop("scores"), options.pop("w"), **options)
