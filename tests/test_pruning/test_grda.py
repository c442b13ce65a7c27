import copy
import importlib.util
import io
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import pruning.grda
from pruning import GRDA, TheoremWarning

F64 = torch.float64


def parameter(*values, dtype=F64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def network(dtype=F64, seed=0):
    """A small net with a bias that starts at zero and a weight that is stored transposed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    nn.init.zeros_(model[2].bias)
    model[0].weight = nn.Parameter(model[0].weight.detach().T.contiguous().T)
    return model


def train(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        dtype = model[0].weight.dtype
        x = torch.randn(16, 5, generator=generator).to(dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def soft(v, g):
    return np.sign(v) * np.maximum(np.abs(v) - g, 0)


# --- the recursion ------------------------------------------------------------------------------


class Reference:
    """Section 2 of shared/THEORY.md in NumPy, one group."""

    def __init__(self, w, lr, c, mu):
        self.v, self.w, self.lr, self.c, self.mu, self.n, self.g = w.copy(), w, lr, c, mu, 0, 0.0

    def step(self, gradient):
        self.n += 1
        self.v = self.v - self.lr * gradient
        self.g += self.c * self.lr ** (self.mu + 0.5) * (self.n**self.mu - (self.n - 1) ** self.mu)
        self.w = soft(self.v, self.g)


OPTIONS = [(0.1, 0.02, 0.6), (0.05, 0.1, 0.75), (0.2, 0.005, 0.51)]


FORMS = [
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": True, "foreach": False},
    {"capturable": True},
]


def three_groups(seed=0):
    rng = np.random.default_rng(seed)
    starts = [rng.standard_normal(8) for _ in OPTIONS]
    pulls = [rng.standard_normal((8, 8)) / 4 for _ in OPTIONS]
    return starts, pulls


def gradient(w, pull, n):
    return pull.T @ (pull @ w) + 0.3 * np.sin(3 * w) + 0.2 * np.cos(n + np.arange(8.0))


def reference_run(steps=500):
    starts, pulls = three_groups()
    runs = [Reference(w, *option) for w, option in zip(starts, OPTIONS, strict=True)]
    for n in range(steps):
        if n == 250:
            runs[0].lr, runs[1].lr = 0.02, 0.11
        for run, pull in zip(runs, pulls, strict=True):
            run.step(gradient(run.w, pull, n))
    return runs


def save_with_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def save_with_safetensors(state):
    """Tensors to safetensors, everything else to JSON: nothing in the state needs a pickle."""
    tensors = {
        f"{i}.{k}": v.contiguous() for i, entry in state["state"].items() for k, v in entry.items()
    }
    blob = safetensors.torch.save(tensors)
    rest = json.loads(json.dumps(state["param_groups"], default=Tensor.item))
    loaded = {}
    for name, tensor in safetensors.torch.load(blob).items():
        index, key = name.split(".")
        loaded.setdefault(int(index), {})[key] = tensor
    return {"state": loaded, "param_groups": rest}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("save", [None, save_with_torch, save_with_safetensors])
def test_grda_is_the_published_recursion(form, save):
    starts, pulls = three_groups()

    def build(starts):
        params = [nn.Parameter(torch.from_numpy(w.copy())) for w in starts]
        groups = [
            {"params": [p], "lr": lr, "c": c, "mu": mu}
            for p, (lr, c, mu) in zip(params, OPTIONS, strict=True)
        ]
        return params, GRDA(groups, lr=9.0, c=9.0, mu=0.9, **form)

    params, optimizer = build(starts)
    for n in range(500):
        if n == 250:
            optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.02, 0.11
        if n == 333 and save is not None:
            state = save(optimizer.state_dict())
            params, optimizer = build([p.detach().numpy() for p in params])
            optimizer.load_state_dict(state)
        for p, pull in zip(params, pulls, strict=True):
            p.grad = torch.from_numpy(gradient(p.detach().numpy(), pull, n))
        optimizer.step()

    zeros = 0
    for p, group, run in zip(params, optimizer.param_groups, reference_run(), strict=True):
        assert_close(p.detach(), torch.from_numpy(run.w), rtol=0, atol=1e-12)
        assert_close(optimizer.state[p]["dual"], torch.from_numpy(run.v), rtol=0, atol=1e-12)
        assert float(group["threshold"]) == pytest.approx(run.g, rel=1e-12)
        assert group["step"] == 500
        zeros += int((p == 0).sum())
    assert zeros > 0, "the comparison must see the threshold at work"


@pytest.mark.parametrize(("lr", "c", "mu"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_threshold_at_constant_lr_is_the_power_law(lr, c, mu, dtype):
    p = parameter(1.0, dtype=dtype)
    optimizer = GRDA([p], lr=lr, c=c, mu=mu)
    for n in range(1, 2001):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        if n in (1, 2, 10, 2000):
            g = c * math.sqrt(lr) * (n * lr) ** mu
            assert optimizer.param_groups[0]["threshold"] == pytest.approx(g, rel=1e-12)
            expected = max(1.0 - g, 0.0)
            assert p.item() == pytest.approx(expected, rel=1e-6 if dtype != F64 else 1e-12)


def test_a_drop_of_the_learning_rate_does_not_take_threshold_back():
    p = parameter(10.0)
    optimizer = GRDA([p], lr=0.5, c=0.1)
    seen = [0.0]
    for n in range(40):
        optimizer.param_groups[0]["lr"] = 0.5 if n < 20 else 0.005
        p.grad = torch.zeros_like(p)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["threshold"])
    assert all(a < b for a, b in itertools.pairwise(seen))
    assert p.item() == pytest.approx(10.0 - seen[-1])


def test_a_zeroed_weight_can_return():
    p = parameter(0.05, -0.05)
    optimizer = GRDA([p], lr=0.1, c=0.5)
    seen = []
    for n in range(60):
        p.grad = torch.full_like(p, 0.0 if n < 20 else -1.0)
        optimizer.step()
        seen.append(p.detach().clone())
    assert torch.all(seen[19] == 0)
    # Nothing is lost on the way: 40 pushes of 0.1 to the untouched start, and one threshold.
    g = 0.5 * math.sqrt(0.1) * (60 * 0.1) ** 0.6
    assert_close(seen[-1], torch.tensor([4.05 - g, 3.95 - g], dtype=F64), rtol=1e-12, atol=0)


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=10),
    st.floats(1e-3, 2),
    st.sampled_from([torch.float32, F64]),
    st.booleans(),
)
def test_the_step_soft_thresholds_to_the_last_bit(values, c, dtype, foreach):
    p = parameter(*values, dtype=dtype)
    v = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer = GRDA([p], lr=1.0, c=c, foreach=foreach)
    optimizer.step()
    g = torch.tensor(optimizer.param_groups[0]["threshold"], dtype=dtype)
    assert torch.equal(p.detach(), v.sign() * (v.abs() - g).clamp(min=0))


# --- c = 0 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("foreach", [True, False, None])
def test_without_sparsity_it_is_sgd_bit_for_bit(dtype, foreach):
    ours, theirs = network(dtype), network(dtype)
    grda = GRDA(ours.parameters(), lr=0.3, c=0.0, foreach=foreach)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.3)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 60, gamma=0.3) for o in (grda, sgd)]
    start = weights(ours)
    for first in range(0, 200, 50):
        train(ours, grda, 50, first, schedules[0])
        train(theirs, sgd, 50, first, schedules[1])
        assert torch.equal(weights(ours), weights(theirs))
    assert not torch.equal(weights(ours), start)
    assert grda.param_groups[0]["threshold"] == 0.0


# --- forms of the same step ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_foreach_changes_no_bit(dtype):
    results = []
    for foreach in (True, False, None):
        model = network(dtype)
        optimizer = GRDA(model.parameters(), lr=0.2, c=0.03, foreach=foreach)
        train(model, optimizer, 100)
        results.append(weights(model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert 0 < int((results[0] == 0).sum()) < len(results[0])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_group_may_mix_precisions(form):
    params = [parameter(1.0, -0.01, dtype=d) for d in (torch.float32, F64, torch.bfloat16)]
    optimizer = GRDA(params, lr=0.1, c=0.1, **form)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    g = 0.1 * math.sqrt(0.1) * 0.1**0.6
    for p in params:
        eps = torch.finfo(p.dtype).eps
        assert p[0].item() == pytest.approx(1 - g, abs=eps)
        assert p[1].item() == pytest.approx(-0.01 + g, abs=eps)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_empty_tensors_are_stepped_over(form):
    empty, p = nn.Parameter(torch.empty(0, 3, dtype=F64)), parameter(1.0)
    optimizer = GRDA([empty, p], lr=0.1, c=0.1, **form)
    empty.grad, p.grad = torch.empty(0, 3, dtype=F64), torch.ones(1, dtype=F64)
    optimizer.step()
    assert empty.shape == (0, 3) and 0 < p.item() < 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.float16])
def test_foreach_changes_no_bit_on_a_gpu(dtype):
    results = []
    for foreach in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(n, generator=generator).to("cuda", dtype)) for n in (9, 999)
        ]
        optimizer = GRDA(params, lr=0.3, c=0.1, foreach=foreach)
        for _ in range(50):
            for p in params:
                p.grad = torch.randn(len(p), generator=generator).to("cuda", dtype)
            optimizer.step()
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*results)
    assert 0 < int((results[0] == 0).sum()) < len(results[0])


# --- stopping and going on ----------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_with_torch, save_with_safetensors])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_resumed_run_is_the_uninterrupted_one(save, dtype):
    def begin(seed):
        model = network(dtype, seed)
        groups = [
            {"params": model[0].parameters(), "mu": 0.7},
            {"params": model[2].parameters(), "lr": 0.3},
        ]
        optimizer = GRDA(groups, lr=0.2, c=0.03)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 40, gamma=0.5)

    straight, optimizer, scheduler = begin(seed=0)
    train(straight, optimizer, 150, scheduler=scheduler)

    model, optimizer, scheduler = begin(seed=0)
    train(model, optimizer, 70, scheduler=scheduler)
    state, rest = save(optimizer.state_dict()), (model.state_dict(), scheduler.state_dict())
    resumed, optimizer, scheduler = begin(seed=99)
    resumed.load_state_dict(rest[0])
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(rest[1])
    train(resumed, optimizer, 80, first=70, scheduler=scheduler)

    assert torch.equal(weights(resumed), weights(straight))
    assert int((weights(straight) == 0).sum()) > 0


def test_a_deep_copy_goes_its_own_way():
    model = network()
    optimizer = GRDA(model.parameters(), lr=0.2, c=0.03)
    train(model, optimizer, 30)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(twin, twin_optimizer, 30, first=30)
    assert not torch.equal(weights(twin), weights(model))
    assert optimizer.param_groups[0]["step"] == 30
    train(model, optimizer, 30, first=30)
    assert torch.equal(weights(twin), weights(model))


def test_group_dictionaries_can_start_a_second_run():
    p = parameter(1.0)
    groups = [{"params": [p], "mu": 0.7}]
    first = GRDA(groups, lr=0.1, c=0.1)
    p.grad = torch.zeros_like(p)
    first.step()
    second = GRDA(groups, lr=0.2, c=0.3)
    assert second.param_groups[0]["threshold"] == 0.0 and second.param_groups[0]["step"] == 0
    assert second.param_groups[0]["lr"] == 0.2 and second.param_groups[0]["mu"] == 0.7
    assert first.param_groups[0]["step"] == 1
    assert set(groups[0]) == {"params", "mu"}


# --- around the step ----------------------------------------------------------------------------


def test_warm_up_from_zero_adds_threshold_with_the_rate_of_each_step():
    p = parameter(50.0)
    optimizer = GRDA([p], lr=0.4, c=0.2, mu=0.7)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(n / 5, 1.0))
    expected = 0.0
    for n in range(1, 21):
        rate = 0.4 * min((n - 1) / 5, 1.0)
        expected += 0.2 * rate**1.2 * (n**0.7 - (n - 1) ** 0.7)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["threshold"] == pytest.approx(expected, rel=1e-12, abs=0)
        assert p.item() == pytest.approx(50.0 - expected, rel=1e-14)
    assert expected > 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_learning_rate_may_be_a_tensor():
    p = parameter(1.0)
    optimizer = GRDA([p], lr=torch.tensor(0.25), c=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() == pytest.approx(0.75 - 0.1 * 0.25**1.1, rel=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_parameter_without_gradient_is_left_alone(form):
    still, moving = parameter(0.01, -2.0), parameter(1.0)
    optimizer = GRDA([still, moving], lr=0.1, c=0.5, **form)
    for _ in range(10):
        moving.grad = torch.ones_like(moving)
        optimizer.step()
    assert torch.equal(still.detach(), torch.tensor([0.01, -2.0], dtype=F64))
    still.grad = torch.zeros_like(still)
    optimizer.step()
    g = 0.5 * math.sqrt(0.1) * (11 * 0.1) ** 0.6
    assert_close(still.detach(), torch.tensor([0.0, g - 2.0], dtype=F64))


def test_a_group_without_gradients_does_not_count_the_step():
    p, q = parameter(1.0), parameter(1.0)
    optimizer = GRDA([{"params": [p]}, {"params": [q]}], lr=0.1, c=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 0]
    assert optimizer.param_groups[1]["threshold"] == 0.0


def test_gradients_are_only_read():
    p = parameter(1.0, -1.0)
    p.grad = torch.tensor([0.3, 0.7], dtype=F64)
    GRDA([p], lr=0.1, c=0.1).step()
    assert torch.equal(p.grad, torch.tensor([0.3, 0.7], dtype=F64))


def test_a_closure_is_evaluated_with_gradients_and_its_loss_comes_back():
    p = parameter(2.0)
    optimizer = GRDA([p], lr=0.1, c=0.0)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert p.item() == pytest.approx(2.0 - 0.1 * 4.0)
    assert optimizer.step() is None


def test_a_group_added_later_starts_its_threshold_then():
    p, q = parameter(1.0), parameter(1.0)
    optimizer = GRDA([p], lr=0.1, c=0.1)
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.add_param_group({"params": [q], "c": 0.2})
    for _ in range(3):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        optimizer.step()
    scale = math.sqrt(0.1)
    old, new = (group["threshold"] for group in optimizer.param_groups)
    assert old == pytest.approx(0.1 * scale * 0.8**0.6)
    assert new == pytest.approx(0.2 * scale * 0.3**0.6)


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "`lr` must be finite and not negative, got -0.1"),
        ({"lr": math.nan}, "`lr` must be finite and not negative, got nan"),
        ({"c": -1.0}, "`c` must be finite and not negative, got -1.0"),
        ({"c": math.inf}, "`c` must be finite and not negative, got inf"),
        ({"mu": 0.0}, "`mu` must be finite and positive, got 0.0"),
        ({"mu": -0.6}, "`mu` must be finite and positive, got -0.6"),
        ({"mu": math.nan}, "`mu` must be finite and positive, got nan"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    good = {"lr": 0.1, "c": 0.1, "mu": 0.6}
    with pytest.raises(ValueError, match=message):
        GRDA([parameter(1.0)], **(good | options))
    optimizer = GRDA([parameter(1.0)], **good)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(1.0)]} | options)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("mu", [0.3, 0.5, 1.0, 1.5])
def test_a_mu_outside_the_theorem_warns(mu):
    with pytest.warns(TheoremWarning, match=rf"`mu` = {mu} is outside \(1/2, 1\).*directional"):
        GRDA([parameter(1.0)], lr=0.1, c=0.1, mu=mu)


def test_the_warning_points_to_the_line_that_chose_mu():
    # Without the shape checks of the test run, whose frames lie in between.
    spec = importlib.util.spec_from_file_location("plain_grda", pruning.grda.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    with pytest.warns(plain.TheoremWarning) as caught:
        plain.GRDA([parameter(1.0)], lr=0.1, c=0.1, mu=0.5)
    assert caught[0].filename == __file__


def test_inside_the_theorem_and_without_sparsity_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRDA([parameter(1.0)], lr=0.1, c=0.1, mu=0.501)
        GRDA([parameter(1.0)], lr=0.1, c=0.1, mu=0.999)
        GRDA([parameter(1.0)], lr=0.1, c=0.0, mu=2.0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_that_are_not_real_are_refused(dtype):
    odd = torch.ones(2, dtype=dtype)
    with pytest.raises(TypeError, match=f"real floating-point parameters, got {dtype}"):
        GRDA([odd], lr=0.1, c=0.1)
    optimizer = GRDA([parameter(1.0)], lr=0.1, c=0.1)
    with pytest.raises(TypeError, match="real floating-point"):
        optimizer.add_param_group({"params": [odd]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_before_anything_moves():
    table, p = nn.Embedding(4, 2, sparse=True), parameter(1.0)
    optimizer = GRDA([p, *table.parameters()], lr=0.1, c=0.1)
    p.grad = torch.ones_like(p)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"dense gradients.*sparse=False"):
        optimizer.step()
    assert p.item() == 1.0 and optimizer.param_groups[0]["step"] == 0
