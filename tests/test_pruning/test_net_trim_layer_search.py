import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import ConvergenceWarning
from pruning import net_trim
from pruning.net_trim_layer_search import MAX_TRIES, _jumps
from pruning.net_trim_options import TrimOptions
from pruning.net_trim_program import LayerProgram
from pruning.net_trim_shares import LOWEST, next_share
from tests.test_pruning.test_net_trim_layer import normal
from tests.test_pruning.test_net_trim_network import seeded, trimmed_rows

WANTED = {"0.*": 0.6, "2.*": 0.7, "*": 0.6}
SIZES = (1536, 384, 160)


def zeros(trim):
    parts = trim.parameters()
    return [int((parts[layer.weight] == 0).sum()) for layer in trim.layers]


@pytest.fixture
def solves(monkeypatch):
    """The programs that are solved, one entry a solve."""
    made, sparse = [], LayerProgram.sparse

    def noting(program, *arguments, **options):
        made.append(program)
        return sparse(program, *arguments, **options)

    monkeypatch.setattr(LayerProgram, "sparse", noting)
    return made


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("refit", [False, True])
def test_every_layer_has_the_zeros_that_are_wanted_of_it(mode, refit, solves, digits_mlp):
    model, x = digits_mlp
    trim = net_trim(model, x, layer_sparsity=WANTED, mode=mode, refit=refit)
    assert trim.converged
    for found, share, size in zip(zeros(trim), WANTED.values(), SIZES, strict=True):
        assert (share - 0.01) * size <= found <= round(share * size)
    assert len(solves) <= 3 * MAX_TRIES
    assert len({id(program) for program in solves}) == 3  # one factor each


def test_a_layer_found_is_what_its_epsilon_gives(digits_mlp):
    model, x = digits_mlp
    found = net_trim(model, x, layer_sparsity=WANTED, tol=1e-5, max_iterations=20_000)
    shares = {}
    dense = x
    for layer, place in zip(found.layers, (0, 2, 4), strict=True):
        dense = model[place](dense).detach()
        dense = dense if place == 4 else dense.relu()
        shares[layer.weight] = layer.epsilon / float(dense.norm())
        assert layer.discrepancy <= layer.epsilon * (1 + 1e-3)
    given = net_trim(model, x, epsilon=shares, tol=1e-5, max_iterations=20_000)
    for place in (0, 2, 4):
        assert_close(trimmed_rows(found, place), trimmed_rows(given, place), rtol=0, atol=1e-2)
    assert len({round(share, 6) for share in shares.values()}) == 3


def test_in_a_cascade_epsilon_is_at_least_the_discrepancy_of_dense_weights(solves, digits_mlp):
    model, x = digits_mlp
    wanted = {"0.*": 0.8, "*": 0.05}
    with pytest.warns(ConvergenceWarning, match="zeros instead of"):
        trim = net_trim(model, x, layer_sparsity=wanted, mode="cascade")
    for layer in trim.layers[1:]:
        assert layer.epsilon == pytest.approx(layer.drift, rel=1e-12)
        assert layer.drift > 0.0
    assert zeros(trim)[1] > 0.05 * 384  # more than wanted, as the docstring says
    assert len(solves) <= MAX_TRIES + 2  # nothing is looked for below it


def test_all_and_nothing(digits_mlp):
    model, x = digits_mlp
    least = net_trim(model, x, epsilon=LOWEST)
    with pytest.warns(ConvergenceWarning) as told:
        assert zeros(net_trim(model, x, layer_sparsity=0.0)) == zeros(least)
    assert [str(warning.message) for warning in told] == [
        "Layer of `0.weight`: 29.0% of its weights are zeros instead of 0.0%.",
        "Layer of `2.weight`: 33.3% of its weights are zeros instead of 0.0%.",
        "Layer of `4.weight`: 19.4% of its weights are zeros instead of 0.0%.",
    ]
    whole = zeros(net_trim(model, x, layer_sparsity=1.0))
    assert whole == list(SIZES)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_outputs_that_something_is_added_to_can_lose_all_weights(batch_norm):
    model = seeded(lambda: nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU())).eval()
    with torch.no_grad():
        model[1].running_mean.fill_(1.0)
        model[1].bias.fill_(-0.5)
    options = {}
    if not batch_norm:
        model, options = model[0], {"exclude": ["bias"]}
        model.bias.data.fill_(-2.0)
    for sparsity in (0.9, 1.0):  # which takes more than ‖Y‖
        trim = net_trim(model, normal(200, 10), layer_sparsity=sparsity, **options)
        assert trim.converged
        assert sparsity - 0.01 <= zeros(trim)[0] / 120 <= sparsity


@pytest.mark.filterwarnings("ignore:.*zeros instead of")  # channels go as a whole
def test_groups_share_the_zeros_of_their_layer():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU()))
    trim = net_trim(model, normal(40, 4, 6, 6), layer_sparsity=0.7)
    assert 0.68 * 144 <= zeros(trim)[0] <= 0.7 * 144
    first, second = trim.layers[0].trims
    assert first.epsilon != second.epsilon  # the same share of different outputs


def test_fewer_zeros_than_the_slack_are_none():
    model = seeded(lambda: nn.Linear(40, 50))
    trim = net_trim(model, normal(100, 40), layer_sparsity=0.0005)  # one of 2,000; slack is two
    assert zeros(trim) == zeros(net_trim(model, normal(100, 40), epsilon=LOWEST))


def test_biases_do_not_count(digits_mlp):
    model, x = copy.deepcopy(digits_mlp[0]), digits_mlp[1]
    with torch.no_grad():
        model[0].bias.zero_()  # if they did, 24 of the 768 zeros would be theirs
    trim = net_trim(model, x, layer_sparsity=0.5)
    assert 0.49 * 1536 <= zeros(trim)[0] <= 0.5 * 1536


def test_batch_norm_between_does_not_matter():
    model = seeded(
        lambda: nn.Sequential(nn.Linear(20, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU())
    ).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.5, 2.0, 24))
    trim = net_trim(model, normal(300, 20), layer_sparsity=0.5, refit=True)
    assert trim.converged and 0.48 * 480 <= zeros(trim)[0] <= 240


def test_a_killed_search_goes_on_and_another_one_is_refused(tmp_path, solves, digits_mlp):
    model, x = digits_mlp
    options = {"layer_sparsity": WANTED, "mode": "cascade", "checkpoint": tmp_path}
    whole = net_trim(model, x, **options)
    made = len(solves)
    again = net_trim(model, x, **options)
    assert len(solves) == made and torch.equal(again.weights, whole.weights)
    with pytest.raises(ValueError, match=r"`checkpoint` must be new .* layer_sparsity"):
        net_trim(model, x, **{**options, "layer_sparsity": 0.5})


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "One of `epsilon` and `layer_sparsity` must be given, got None and None"),
        ({"epsilon": 0.1, "layer_sparsity": 0.5}, "must be given, got 0.1 and 0.5"),
        ({"layer_sparsity": -0.1}, "`layer_sparsity` must be a share of zeros from 0 to 1, got -0"),
        ({"layer_sparsity": 1.1}, "a share of zeros from 0 to 1, got 1.1"),
        ({"layer_sparsity": math.nan}, "a share of zeros from 0 to 1, got nan"),
        ({"layer_sparsity": {"9.*": 0.5}}, '`layer_sparsity` pattern "9.*" matches none of 0.wei'),
        ({"layer_sparsity": {"0.*": 0.5}}, "`layer_sparsity` must have a pattern for every layer"),
    ],
)
def test_what_is_refused(options, message, digits_mlp):
    with pytest.raises(ValueError) as error:
        net_trim(*digits_mlp, **options)
    assert message in str(error.value)


def test_shares_begin_at_the_lowest():
    assert next_share({}, 10, None, 0.04) == pytest.approx(0.2)
    assert next_share({0.04: 3, 1.0: 20}, 10, None, 0.04) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "zeros, expected",
    [
        ({0.1: 5, 0.10001: 20}, True),
        ({0.1: 5, 0.10002: 20}, False),
        ({0.1: 5, 0.2: 8}, False),  # none has more
        ({0.1: 20}, False),
        ({0.09999: 5, 0.1: 20, 0.2: 5}, True),
        ({0.1: 20, 0.2: 5, 0.20001: 30}, False),  # the interval lies below the first
    ],
)
def test_a_jump_is_one_that_residuals_cannot_tell_apart(zeros, expected):
    assert _jumps(zeros, 10, TrimOptions(epsilon=0.1, tol=1.5e-4)) == expected
