import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hessian import NonFiniteError
from pruning import GRDA, GradualMagnitude, magnitude_prune
from pruning.gradual_magnitude import smallest

F64 = torch.float64


def parameter(*values, dtype=F64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).to(F64)


def train(model, optimizer, pruner, steps, first=0, watch=lambda: None):
    for step in range(first, first + steps):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step), dtype=F64)
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
        pruner.step()
        watch()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


# --- the schedule -------------------------------------------------------------------------------


def test_the_share_of_zeros_follows_the_cubic_schedule_and_ends_exact():
    model = network()
    optimizer = sgd(model, momentum=0.9)
    pruner = GradualMagnitude(optimizer, 0.85, begin=12, end=47, every=5)
    size, seen = 147, [0.0]
    train(model, optimizer, pruner, 60, watch=lambda: seen.append(pruner.sparsity()))
    for n, share in enumerate(seen):
        last = 47 if n >= 47 else max(12, n - (n - 12) % 5)
        expected = 0.85 * (1 - (1 - (last - 12) / 35) ** 3)
        assert round(share * size) == round(expected * size), n
    assert seen[16] == 0.0 < seen[17] < seen[30] < seen[47] == round(0.85 * size) / size
    assert int((weights(model) == 0).sum()) == round(0.85 * size)


@pytest.mark.parametrize(("step", "share"), [(0, 0), (4, 0), (6, 0.7 * 7 / 8), (8, 0.7), (99, 0.7)])
def test_the_schedule_can_be_read(step, share):
    pruner = GradualMagnitude(sgd(network()), 0.7, begin=4, end=8, every=3)
    assert pruner.scheduled(step) == pytest.approx(share, abs=1e-15)


def test_one_decision_without_training_is_magnitude_pruning():
    model = network()
    dense = weights(model)
    pruner = GradualMagnitude(sgd(model), 0.6, begin=0, end=1)
    pruner.step()
    assert torch.equal(weights(model), magnitude_prune(dense, 88 / 147).weights)
    assert round(0.6 * 147) == 88


def test_masks_are_nested():
    model = network()
    optimizer = sgd(model)
    pruner = GradualMagnitude(optimizer, 0.9, begin=0, end=40, every=4)
    alive = [torch.ones(147, dtype=torch.bool)]

    def watch():
        now = weights(model) != 0
        assert not torch.any(now & ~alive[-1])
        alive.append(now)

    train(model, optimizer, pruner, 45, watch=watch)
    assert int(alive[-1].sum()) == 147 - round(0.9 * 147)


# --- which weights ------------------------------------------------------------------------------


def two_tensors():
    return nn.Parameter(torch.linspace(1, 2, 10, dtype=F64)), nn.Parameter(
        torch.linspace(3, 4, 30, dtype=F64).view(5, 6)
    )


def test_one_ranking_goes_over_all_tensors():
    small, large = two_tensors()
    GradualMagnitude(torch.optim.SGD([small, large], lr=0.1), 0.5, begin=0, end=1).step()
    assert torch.all(small == 0)
    assert torch.equal(large.detach().flatten() == 0, torch.arange(30) < 10)


def test_per_layer_gives_every_tensor_its_share():
    small, large = two_tensors()
    optimizer = torch.optim.SGD([small, large], lr=0.1)
    GradualMagnitude(optimizer, 0.5, begin=0, end=1, per_layer=True).step()
    assert torch.equal(small.detach() == 0, torch.arange(10) < 5)
    assert torch.equal(large.detach().flatten() == 0, torch.arange(30) < 15)


def test_signs_do_not_matter_and_of_equal_magnitudes_the_first_go():
    p, q = parameter(3.0, -1.0, 1.0, -2.0), parameter(1.0, -1.0)
    GradualMagnitude(torch.optim.SGD([p, q], lr=0.1), 0.5, begin=0, end=1).step()
    assert p.tolist() == [3.0, 0.0, 0.0, -2.0] and q.tolist() == [0.0, -1.0]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0, 1))
def test_smallest_is_a_stable_sort_cut_off(values, share):
    v = torch.tensor(values, dtype=F64)
    count = round(share * len(v))
    expected = torch.zeros(len(v), dtype=torch.bool)
    expected[v.argsort(stable=True)[:count]] = True
    assert torch.equal(smallest(v, count), expected)


def test_excluded_parameters_train_on_densely():
    model = network()
    layers = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "prune": False}]
    optimizer = torch.optim.SGD(layers, lr=0.1, momentum=0.9)
    pruner = GradualMagnitude(
        optimizer, 0.75, begin=0, end=20, every=5, exclude=lambda p: p.ndim < 2
    )
    train(model, optimizer, pruner, 30)
    assert [int((p == 0).sum()) for p in model.parameters()] == [60, 0, 0, 0]
    assert pruner.sparsity() == 0.75
    for p in (model[0].bias, *model[2].parameters()):
        assert torch.all(optimizer.state[p]["momentum_buffer"] != 0)


def test_zeros_and_infinite_weights_at_the_ends_of_the_range():
    p = parameter(1.0, 2.0)
    GradualMagnitude(torch.optim.SGD([p], lr=0.1), 0.0, begin=0, end=1).step()
    assert p.tolist() == [1.0, 2.0]
    GradualMagnitude(torch.optim.SGD([p], lr=0.1), 1.0, begin=0, end=1).step()
    assert p.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_precisions_alone_and_mixed(dtype):
    p, q = parameter(1.0, 2.0, 3.0, 4.0, dtype=dtype), parameter(2.0001, 1.9999)
    GradualMagnitude(torch.optim.SGD([p], lr=0.1), 0.25, begin=0, end=1).step()
    assert p.tolist() == [0, 2, 3, 4]
    # In the narrow type both of the others would be 2, and the first of equals.
    GradualMagnitude(torch.optim.SGD([p, q], lr=0.1), 0.5, begin=0, end=1).step()
    assert p.tolist() == [0, 0, 3, 4] and q.tolist() == [2.0001, 0.0]


# --- nothing pushes a pruned weight back --------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
        lambda params: torch.optim.Adam(params, lr=0.01),
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, amsgrad=True),
        lambda params: GRDA(params, 0.1, c=0.0),
    ],
    ids=["sgd", "adam", "adamw", "grda"],
)
def test_pruned_weights_and_their_momentum_stay_zero(build):
    model = network()
    optimizer = build(model.parameters())
    pruner = GradualMagnitude(optimizer, 0.5, begin=0, end=4, every=1)
    train(model, optimizer, pruner, 4)
    gone = weights(model) == 0
    assert int(gone.sum()) == round(0.5 * 147)

    def watch():
        assert torch.equal(weights(model) == 0, gone)
        for p in model.parameters():
            for value in optimizer.state[p].values():
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    assert torch.all(value[p == 0] == 0)

    before = weights(model)
    train(model, optimizer, pruner, 20, first=4, watch=watch)
    assert int((weights(model) != before).sum()) > 30


def test_a_pruned_weight_is_ranked_below_all_others_even_when_just_pushed_far():
    p = parameter(0.1, 1.0, 2.0, 3.0)
    optimizer = torch.optim.SGD([p], lr=1.0)
    pruner = GradualMagnitude(optimizer, 0.5, begin=0, end=3, every=1)
    for expected in ([0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 2.0, 3.0]):
        p.grad = torch.tensor([-9.0, 0.0, 0.0, 0.0], dtype=F64) if pruner.num_steps else p * 0
        optimizer.step()
        pruner.step()
        assert p.tolist() == expected


def test_what_is_left_trains_as_if_the_pruned_weights_had_never_been():
    """With w₂ = 0 held, momentum SGD on ½(w₁ + w₂ − 1)² is that on ½(w₁ − 1)²."""
    p, alone = parameter(0.5, 0.01), parameter(0.5)
    optimizers = [torch.optim.SGD([x], lr=0.1, momentum=0.9) for x in (p, alone)]
    pruner = GradualMagnitude(optimizers[0], 0.5, begin=0, end=1)
    pruner.step()
    for _ in range(30):
        for x, optimizer in zip((p, alone), optimizers, strict=True):
            optimizer.zero_grad()
            (0.5 * (x.sum() - 1) ** 2).backward()
            optimizer.step()
        pruner.step()
        assert p[0].item() == alone.item() and p[1].item() == 0.0
    assert p[0].item() != 0.5


# --- stopping and going on ----------------------------------------------------------------------


@pytest.mark.parametrize("cut", [7, 20, 33, 45])
def test_a_resumed_run_is_the_uninterrupted_one(cut):
    def begin(seed):
        model = network(seed)
        optimizer = sgd(model, momentum=0.9)
        return model, optimizer, GradualMagnitude(optimizer, 0.8, begin=10, end=40, every=7)

    straight, optimizer, pruner = begin(0)
    train(straight, optimizer, pruner, 50)

    parts = begin(0)
    train(*parts, cut)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    resumed = begin(9)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, 50 - cut, first=cut)
    assert torch.equal(weights(resumed[0]), weights(straight))
    assert resumed[2].num_steps == 50


def test_a_state_is_a_copy():
    p = parameter(1.0, 2.0)
    pruner = GradualMagnitude(torch.optim.SGD([p], lr=0.1), 0.5, begin=0, end=1)
    state = pruner.state_dict()
    pruner.step()
    assert not state["pruned"][0].any() and state["step"] == 0


def test_a_state_of_another_run_is_refused():
    pruner = GradualMagnitude(sgd(network()), 0.5, begin=0, end=9)
    state = pruner.state_dict()
    other = GradualMagnitude(sgd(network()), 0.5, begin=0, end=8)
    with pytest.raises(ValueError, match=r"`state` must be of the same sparsity.*\(0.5, 0, 8"):
        other.load_state_dict(state)
    fewer = GradualMagnitude(sgd(network()), 0.5, begin=0, end=9, exclude=lambda p: p.ndim < 2)
    with pytest.raises(ValueError, match=r"of shapes \[\[16, 5\], \[3, 16\]\], got .*\[16\]"):
        fewer.load_state_dict(state)
    assert other.num_steps == fewer.num_steps == 0


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": -0.1}, r"`sparsity` must be in \[0, 1\].*got -0.1"),
        ({"sparsity": 1.5}, r"`sparsity` must be in \[0, 1\].*got 1.5"),
        ({"sparsity": math.nan}, r"`sparsity` must be in \[0, 1\].*got nan"),
        ({"begin": -1}, "`begin` and `end` must be steps.*got -1 and 9"),
        ({"end": 0}, "`begin` and `end` must be steps.*got 0 and 0"),
        ({"every": 0}, "`every` must be at least 1 step, got 0"),
        ({"exclude": lambda p: True}, "`optimizer` must hold parameters to prune"),
    ],
)
def test_bad_settings_are_named(options, message):
    good = {"sparsity": 0.5, "begin": 0, "end": 9, "every": 2}
    with pytest.raises(ValueError, match=message):
        GradualMagnitude(sgd(network()), **(good | options))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_ranking_of_weights_that_are_not_finite_is_refused(bad):
    p = parameter(1.0, bad, 2.0)
    pruner = GradualMagnitude(torch.optim.SGD([p], lr=0.1), 0.5, begin=0, end=2)
    pruner.step()
    with pytest.raises(NonFiniteError, match="NaN or infinite at step 2"):
        pruner.step()
    assert p[0].item() == 1.0


def test_sharded_parameters_are_refused():
    class Sharded(nn.Parameter):
        def full_tensor(self):
            return self

    p = Sharded(torch.ones(3))
    with pytest.raises(TypeError, match="sharded"):
        GradualMagnitude(torch.optim.SGD([p], lr=0.1), 0.5, begin=0, end=2)


def test_a_deep_copy_of_all_parts_goes_its_own_way():
    model = network()
    optimizer = sgd(model)
    pruner = GradualMagnitude(optimizer, 0.8, begin=0, end=20, every=5)
    train(model, optimizer, pruner, 8)
    twin = copy.deepcopy((model, optimizer, pruner))
    train(*twin, 12, first=8)
    assert pruner.num_steps == 8 and not torch.equal(weights(twin[0]), weights(model))
    assert int((weights(twin[0]) == 0).sum()) == round(0.8 * 147)
    train(model, optimizer, pruner, 12, first=8)
    assert torch.equal(weights(twin[0]), weights(model))
