"""Batch norm and sums between a layer and its ReLU."""

import copy
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning import net_trim
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_statistics(norm):
    """A batch norm that has seen data, with scales of both signs and one of zero."""
    n = norm.num_features
    with torch.no_grad():
        norm.running_mean.copy_(0.3 * normal(n, seed=1))
        norm.running_var.copy_(0.5 + normal(n, seed=2).square())
        norm.weight.copy_(1.0 + 0.3 * normal(n, seed=3))
        norm.weight[0] *= -1.0
        norm.weight[1] = 0.0
        norm.bias.copy_(0.3 * normal(n, seed=4))
    return norm.eval()


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them."""

    def __init__(self, inside, out, stride=1, in_place=False):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = with_statistics(nn.BatchNorm2d(out))
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = with_statistics(nn.BatchNorm2d(out))
        self.relu1, self.relu2 = nn.ReLU(in_place), nn.ReLU(in_place)
        self.short = nn.Identity()
        if stride > 1:
            self.short = nn.Sequential(
                nn.Conv2d(inside, out, 1, stride), with_statistics(nn.BatchNorm2d(out))
            )
        self.in_place = in_place

    def forward(self, x):
        z = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.in_place:
            z += self.short(x)
            return self.relu2(z)
        return self.relu2(self.short(x) + z)


def residual(in_place=False):
    return seeded(
        lambda: nn.Sequential(
            Block(3, 3, in_place=in_place),
            Block(3, 4, 2, in_place),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    ).eval()


def seen_at(model, place, x):
    """What comes out of a module while a model runs."""
    out = []
    hook = model.get_submodule(place).register_forward_hook(
        lambda module, args, result: out.append(result.detach().clone())
    )
    with torch.no_grad():
        model(x)
    hook.remove()
    return out[0]


def with_some(model, trim, names):
    """A copy of a model with some of the pruned weights, its batch norms as they were."""
    other = copy.deepcopy(model)
    parts = trim.parameters()
    with torch.no_grad():
        for name in names:
            other.get_parameter(name).copy_(parts[name])
    return other


AFTER = {
    "0.conv1.weight": "0.relu1",
    "0.conv2.weight": "0.relu2",
    "1.conv1.weight": "1.relu1",
    "1.conv2.weight": "1.relu2",
    "1.short.0.weight": "1.relu2",
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_residual_blocks_keep_what_comes_out_of_their_relus(mode, in_place):
    model, x = residual(in_place), normal(12, 3, 6, 6)
    trim = net_trim(
        model, x.clone(), epsilon=0.15, mode=mode, batch_size=5, refit=mode == "cascade"
    )
    layers = {layer.weight: layer for layer in trim.layers}
    assert [*AFTER, "4.weight"] == list(layers)
    assert trim.bound is None and trim.converged and trim.sparsity > 0.1
    done = []
    for name, place in AFTER.items():
        layer = layers[name]
        done = [name, *([layer.bias] if layer.bias else []), *(done if mode == "cascade" else [])]
        if name == "1.short.0.weight" and mode == "parallel":
            assert (layer.kind, layer.between) == ("linear", ())
            assert (
                layer.reason == "it is added to what comes out of `1.conv2.weight`, which is larger"
            )
            continue
        between = ("batch norm", "sum") if place.endswith("2") else ("batch norm",)
        assert (layer.kind, layer.reason, layer.between) == ("relu", "", between)
        dense, now = (seen_at(m, place, x.clone()) for m in (model, with_some(model, trim, done)))
        off = float((now - dense).norm())
        assert layer.output_discrepancy == pytest.approx(off, rel=1e-8)
        if mode == "parallel" or name == "0.conv1.weight":
            assert layer.epsilon == pytest.approx(0.15 * float(dense.norm()), rel=1e-9)
        assert off <= layer.epsilon * (1 + 1e-3)
        assert layer.density < 0.95
    parts = trim.parameters()
    for name, p in model.named_parameters():
        if "bn" in name or "short.1" in name:
            assert torch.equal(parts[name], p.detach())


def least(W, X, scale, shift, added, epsilon, penalty):
    """The least Σ λ |U| of the program in the layer's own weights, by a general solver."""
    Y = (scale * (X @ W.T) + shift + added).clamp(min=0.0).numpy()
    on = (Y > 0).astype(float)
    U = cp.Variable(tuple(W.shape))
    Z = cp.multiply(X.numpy() @ U.T, np.tile(scale.numpy(), (len(X), 1))) + (shift + added).numpy()
    limits = [
        cp.norm(cp.multiply(on, Z - Y), "fro") <= epsilon,
        cp.multiply(1 - on, Z) <= 0,
    ]
    goal = cp.Minimize(cp.sum(cp.multiply(penalty.numpy(), cp.abs(U))))
    return float(cp.Problem(goal, limits).solve(solver="CLARABEL"))


class Normed(nn.Module):
    """relu(bn(layer(x)) + r(x)), then a linear layer."""

    def __init__(self, bias, sum_of=None):
        super().__init__()
        self.layer, self.bn = nn.Linear(6, 8, bias=bias), with_statistics(nn.BatchNorm1d(8))
        self.last, self.sum_of = nn.Linear(8, 2), sum_of

    def forward(self, x):
        z = self.bn(self.layer(x))
        return self.last((z if self.sum_of is None else z + self.sum_of(x)).relu())


def skip(x):
    return F.pad(x, (1, 1)).cos()


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("added", [None, skip])
def test_the_objective_is_the_least_one_in_the_layers_own_weights(added, bias, free):
    if free and not bias:
        pytest.skip("there is no bias to leave free")
    model, x = seeded(lambda: Normed(bias, added)).eval(), normal(60, 6)
    trim = net_trim(model, x, epsilon=0.1, penalise_bias=not free, exclude="last.*", tol=1e-5)
    (layer,) = trim.layers
    W, X = model.layer.weight.detach(), x
    if bias:
        W, X = torch.cat([W, model.layer.bias.detach()[:, None]], 1), F.pad(x, (0, 1), value=1.0)
    scale = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
    shift = model.bn.bias - scale * model.bn.running_mean
    penalty = torch.ones_like(W)
    if free:
        penalty[:, -1] = 0.0
    r = torch.zeros(60, 8) if added is None else added(x)
    objective = least(W, X, scale.detach(), shift.detach(), r, layer.epsilon, penalty)
    U = layer.trims[0].weights
    own = float((penalty * U.abs()).sum())
    assert layer.converged and own == pytest.approx(objective, rel=1e-3)
    assert layer.trims[0].objective == pytest.approx(own, rel=1e-9)
    # A scale of zero: nothing of the output depends on the row.
    assert not bool(U[1, :6].any()) and bool(U[0].any())


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-5, 1e-2])
def test_channels_that_are_nearly_off_do_not_spoil_the_others(size):
    model, x = seeded(lambda: Normed(False)).eval(), normal(60, 6)
    with torch.no_grad():
        model.bn.weight[1] = size
    trim = net_trim(model, x, epsilon=0.1, exclude="last.*").layers[0].trims[0]
    # With penalties of 1e12 and 1, a dual residual relative to both is small at once.
    assert trim.converged and trim.gap < 0.01 and trim.iterations < 300
    assert not bool(trim.weights[1].any())


def test_float32_weights_are_unfolded_in_their_own_type():
    model, x = seeded(lambda: Normed(True)).eval().float(), normal(60, 6).float()
    trim = net_trim(model, x, epsilon=0.1)
    other = with_some(model, trim, ["layer.weight", "layer.bias"])
    off = (other.bn(other.layer(x)).relu() - model.bn(model.layer(x)).relu()).detach().norm()
    layer = trim.layers[0]
    assert trim.weights.dtype == layer.trims[0].weights.dtype == torch.float32
    assert layer.converged
    assert layer.output_discrepancy == pytest.approx(float(off), rel=1e-4)


def test_fixed_biases_and_groups_are_folded_as_well():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, groups=2), with_statistics(nn.BatchNorm1d(6)), nn.ReLU()
        )
    ).eval()
    x = normal(20, 4, 7)
    trim = net_trim(model, x, epsilon=0.15, exclude="0.bias")
    (layer,) = trim.layers
    assert len(layer.trims) == 2 and layer.bias is None and layer.between == ("batch norm",)
    dense, now = (m(x).detach() for m in (model, with_some(model, trim, ["0.weight"])))
    for part, (a, b) in zip(
        layer.trims, zip(dense.chunk(2, 1), now.chunk(2, 1), strict=True), strict=True
    ):
        assert part.output_discrepancy == pytest.approx(float((a - b).norm()), rel=1e-9)
        assert part.output_discrepancy <= part.epsilon * (1 + 1e-3)
        assert part.epsilon == pytest.approx(0.15 * float(a.norm()), rel=1e-9)


class Runs(nn.Module):
    """Linear layers and batch norms, and what a function does with them."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.bn, self.bn2 = (with_statistics(nn.BatchNorm1d(4)) for _ in range(2))
        self.bn2.weight.data += 1.0
        self.bn3 = copy.deepcopy(self.bn)
        self.bn3.bias.data += 1.0
        self.run = run

    def forward(self, x):
        return self.c(self.run(self, x))


BOTH = ("batch norm", "sum")
NORM = "it goes into `batch_norm`"
FLOWS = {
    "norm": (lambda m, x: m.bn(m.a(x)).relu(), ("batch norm",), ""),
    "sum": (lambda m, x: (m.a(x) + x).relu(), ("sum",), ""),
    "sum, swapped": (lambda m, x: (x + m.a(x)).relu(), ("sum",), ""),
    "sum by name": (lambda m, x: torch.add(input=x, other=m.a(x)).relu(), ("sum",), ""),
    "sum in place": (lambda m, x: m.a(x).add_(x).relu_(), ("sum",), ""),
    "sum in place of the other": (
        lambda m, x: (x.tanh().add_(m.a(x))).relu(),
        ("sum",),
        "",
    ),
    "sum with a row": (lambda m, x: (m.a(x) + x[0]).relu(), ("sum",), ""),
    "sum with a number": (lambda m, x: (1.5 + m.a(x)).relu(), ("sum",), ""),
    "sum with a parameter": (lambda m, x: (m.a(x) + m.bn.bias).relu(), ("sum",), ""),
    "two sums": (lambda m, x: (m.a(x) + x + x.cos()).relu(), ("sum",), ""),
    "norm and sum": (lambda m, x: (m.bn(m.a(x)) + x).relu(), BOTH, ""),
    "dropout that is off": (
        lambda m, x: (F.dropout(m.bn(m.a(x)), 0.5, False) + x).relu(),
        BOTH,
        "",
    ),
    "view after": (lambda m, x: F.relu((m.bn(m.a(x)) + x).view(-1, 4)), BOTH, ""),
    "pool after": (lambda m, x: F.max_pool1d(m.bn(m.a(x)) + x, 3, 1, 1).relu(), BOTH, ""),
    "two calls": (lambda m, x: m.bn(m.a(m.bn(m.a(x)).relu())).relu(), ("batch norm",), ""),
    "one call of two with a sum": (lambda m, x: m.a((m.a(x) + x).relu()).relu(), ("sum",), ""),
    "changed after": (
        lambda m, x: ((m.a(x) + (r := x.cos())).relu(), r.zero_())[0],
        ("sum",),
        "",
    ),
    "norm twice": (lambda m, x: m.bn(m.bn(m.a(x))).relu(), (), NORM),
    "norm after a sum": (lambda m, x: m.bn(m.a(x) + x).relu(), (), NORM),
    "norm of another dimension": (
        lambda m, x: m.bn(m.a(x.view(-1, 4, 4))).relu().view(-1, 4),
        (),
        NORM,
    ),
    "norm behind a pool": (lambda m, x: m.bn(F.max_pool1d(m.a(x), 3, 1, 1)).relu(), (), NORM),
    "sum behind a view": (
        lambda m, x: (m.a(x).view(-1, 2, 2) + x.view(-1, 2, 2)).relu().view(-1, 4),
        (),
        "it goes into `add`",
    ),
    "norm and elsewhere": (
        lambda m, x: m.bn(z := m.a(x)).relu() + z.relu(),
        (),
        "it goes into `relu`",
    ),
    "elsewhere and norm": (lambda m, x: (z := m.a(x)).relu() + m.bn(z).relu(), (), NORM),
    "sum and elsewhere": (
        lambda m, x: ((z := m.a(x)) + x).relu() + z.relu(),
        (),
        "it goes into `relu`",
    ),
    "two norms": (
        lambda m, x: m.bn(z := m.a(x)).relu() + m.bn2(z).relu(),
        (),
        NORM,
    ),
    "norms that differ": (
        lambda m, x: m.bn2(m.a(m.bn(m.a(x)).relu())).relu(),
        (),
        "its calls have different batch norms after them",
    ),
    "norms that differ in shift": (
        lambda m, x: m.bn3(m.a(m.bn(m.a(x)).relu())).relu(),
        (),
        "its calls have different batch norms after them",
    ),
    "one call without a norm": (
        lambda m, x: m.a(m.bn(m.a(x)).relu()).relu(),
        (),
        "its calls have different batch norms after them",
    ),
    "multiple": (lambda m, x: torch.add(m.a(x), x, alpha=2.0).relu(), (), "it goes into `add`"),
    "as a multiple": (
        lambda m, x: torch.add(x, m.a(x), alpha=2.0).relu(),
        (),
        "it goes into `add`",
    ),
    "with itself": (lambda m, x: ((z := m.a(x)) + z).relu(), (), "it goes into `add`"),
    "with its own other call": (
        lambda m, x: (m.a(x) + m.a(x.cos())).relu(),
        (),
        "it goes into `add`",
    ),
    "wider than it": (
        lambda m, x: (m.a(x) + x[:, None]).relu()[:, 0],
        (),
        "it goes into `add`",
    ),
    "of another kind": (
        lambda m, x: (m.a(x.float().double()) + 1j).real.relu(),
        (),
        "it goes into `add`",
    ),
    "no relu": (lambda m, x: (m.bn(m.a(x)) + x).tanh(), (), "it goes into `tanh`"),
}


@pytest.mark.parametrize("name", FLOWS)
def test_what_is_known_between_a_layer_and_its_relu_counts(name):
    run, between, reason = FLOWS[name]
    model, x = seeded(lambda: Runs(run)).eval(), normal(40, 4)
    trim = net_trim(model, x, epsilon=0.1, batch_size=16, exclude=["c.*"])
    (layer,) = trim.layers
    assert (layer.between, layer.reason) == (between, reason)
    assert layer.kind == ("linear" if reason else "relu")
    if between and "two calls" not in name and "one call" not in name:
        dense, now = (
            model.run(m, x).detach()
            for m in (model, with_some(model, trim, ["a.weight", "a.bias"]))
        )
        factor = math.sqrt(3.0) if name == "pool after" else 1.0
        assert float((now - dense).norm()) <= layer.epsilon * factor * (1 + 1e-3)
        if name not in ("pool after", "sum with a row"):
            off = float((now - dense).norm())
            assert layer.output_discrepancy == pytest.approx(off, rel=1e-8)


ADDED = {
    "the larger one": (lambda m, x: (m.a(x) + m.b(x[:, :2])).relu(), {"a"}),
    "the larger one, swapped": (lambda m, x: (m.b(x[:, :2]) + m.a(x)).relu(), {"a"}),
    "the last one": (lambda m, x: (m.d(x) + m.a(x)).relu(), {"a"}),
    "not where one is seen elsewhere": (
        lambda m, x: ((z := m.a(x)) + m.b(x[:, :2])).relu() + z.tanh(),
        {"b"},
    ),
    "one of three": (lambda m, x: (m.d(x) + m.b(x[:, :2]) + m.a(x)).relu(), {"a"}),
    "not added to each other": (
        lambda m, x: m.a((m.d(x) + x).relu()).relu(),
        {"a", "d"},
    ),
}


class Added(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.b, self.d, self.a = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c, self.run = nn.Linear(4, 3), run

    def forward(self, x):
        return self.c(self.run(self, x))


@pytest.mark.parametrize("name", ADDED)
def test_one_of_the_layers_that_are_added_counts_in_parallel(name):
    run, count = ADDED[name]
    model, x = seeded(lambda: Added(run)), normal(40, 4)
    for mode in ("parallel", "cascade"):
        trim = net_trim(model, x, epsilon=0.1, mode=mode, exclude=["c.*"])
        kinds = {layer.weight[0]: layer.kind for layer in trim.layers}
        if mode == "parallel":
            assert {key for key, kind in kinds.items() if kind == "relu"} == count
        elif "elsewhere" not in name:
            assert set(kinds.values()) == {"relu"}
    # One that stays as it is leaves the other one to count.
    if "swapped" in name:
        (layer,) = net_trim(model, x, epsilon=0.1, exclude=["c.*", "a.*"]).layers
        assert (layer.kind, layer.weight) == ("relu", "b.weight")


def test_terms_that_are_pruned_apart_stay_near_together():
    # Both may come up to zero by all that the other leaves, if both count as having a ReLU.
    model, x = seeded(lambda: Added(lambda m, x: (m.d(x) + m.a(x) - 2.0).relu())), normal(80, 4)
    model.run = lambda m, x: (m.d(x) + m.a(x) + -2.0).relu()
    trim = net_trim(model, x, epsilon=0.3, exclude=["c.*"])
    names = ["d.weight", "d.bias", "a.weight", "a.bias"]
    other = with_some(model, trim, names)
    off = float((model.run(other, x) - model.run(model, x)).detach().norm())
    assert off <= sum(layer.output_discrepancy for layer in trim.layers) * (1 + 1e-9)


def normed_chain(after):
    return seeded(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2),
            with_statistics(nn.BatchNorm1d(4)),
            after(),
            nn.Flatten(),
            nn.Linear(12, 6),
            with_statistics(nn.BatchNorm1d(6)),
            after(),
            nn.Linear(6, 3),
        )
    ).eval()


@pytest.mark.parametrize("after", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_the_chained_bound_goes_through_batch_norms(mode, after):
    model, x = normed_chain(after), normal(60, 2, 8)
    trim = net_trim(model, x, epsilon=0.2, mode=mode)
    assert trim.bound is not None and trim.discrepancy <= trim.bound * (1 + 1e-9)
    r, parts = [layer.output_discrepancy for layer in trim.layers], trim.parameters()
    scales = [model[i].weight / (model[i].running_var + model[i].eps).sqrt() for i in (1, 5)]
    most = [1.0 if after is nn.ReLU else float(s.detach().abs().max()) for s in scales]
    if mode == "cascade":
        assert trim.bound == pytest.approx(r[2], rel=1e-9)
        return
    matrices = [scales[1].detach()[:, None] * parts["4.weight"], parts["7.weight"]]
    norms = [float(torch.linalg.matrix_norm(A, 2)) for A in matrices]
    by_hand = r[2] + norms[1] * (most[1] * r[1] + norms[0] * most[0] * r[0])
    assert trim.bound == pytest.approx(by_hand, rel=1e-9)


def test_a_batch_norm_that_no_layer_is_before_ends_the_chain():
    model = seeded(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    ).eval()
    assert net_trim(model, normal(40, 4), epsilon=0.1).bound is None


class ZeroInitialised(nn.Module):
    """A residual block whose batch norm lets nothing of six channels through."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bn = nn.BatchNorm1d(8)
        self.bn.weight.data[:6] = 0.0
        self.bn.bias.data.fill_(0.5)

    def forward(self, x):
        h = self.a(x).relu()
        return self.c((self.bn(self.b(h)) + h).relu())


@pytest.mark.parametrize("ball", ["split", "joint"])
@pytest.mark.parametrize("penalise_bias", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_what_a_scale_of_zero_lets_come_is_counted_and_not_claimed_away(ball, penalise_bias, refit):
    model, x = seeded(ZeroInitialised).eval(), normal(200, 6)
    options = {"ball": ball, "penalise_bias": penalise_bias, "refit": refit, "gamma": 1.0}
    trim = net_trim(model, x, epsilon=0.3, mode="cascade", max_iterations=20_000, **options)
    other = copy.deepcopy(model)
    trim.write_(other)

    def before_relu(net):
        h = net.a(x).relu()
        return (net.bn(net.b(h)) + h).detach()

    now, goal = before_relu(other), before_relu(model).relu()
    layer = trim.layers[1]
    assert layer.weight == "b.weight" and layer.converged
    off = torch.where(goal > 0, now - goal, now.relu() if ball == "joint" else 0.0)
    # A channel that is out of the weights' hands counts by what comes out of it.
    off[:, :6] = now[:, :6].relu() - goal[:, :6]
    assert layer.discrepancy == pytest.approx(float(off.norm()), rel=1e-6)
    assert layer.discrepancy <= layer.epsilon * (1 + 1e-3)
    assert layer.output_discrepancy == pytest.approx(float((now.relu() - goal).norm()), rel=1e-6)
    assert not trim.parameters()["b.weight"][:6].any()
