import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from hessian import ConvergenceWarning, NonDeterministicError, NonFiniteError
from pruning import CalibrationWarning, Masks, net_trim, net_trim_layer
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_ones(X):
    return torch.cat([X, torch.ones(len(X), 1).to(X)], dim=1)


def rows_of(layer):
    rows = layer.weight.detach().flatten(1)
    return rows if layer.bias is None else torch.cat([rows, layer.bias.detach()[:, None]], dim=1)


def trimmed_rows(trim, name):
    """The weights that a result holds for a layer, as a matrix with the bias last."""
    parts = trim.parameters()
    rows = parts[f"{name}.weight"].flatten(1)
    bias = parts.get(f"{name}.bias")
    return rows if bias is None else torch.cat([rows, bias[:, None]], dim=1)


def mlp():
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
        )
    )


def written(model, trim):
    """A copy of a model with the result in it."""
    other = copy.deepcopy(model)
    trim.write_(other)
    return other


def test_parallel_layers_are_those_of_net_trim_layer_on_gathered_inputs():
    model, x = mlp(), normal(60, 6)
    trim = net_trim(model, x, epsilon=0.1, batch_size=17)
    inputs = [x, model[:2](x).detach(), model[:4](x).detach()]
    for place, X, kind in zip((0, 2, 4), inputs, ("relu", "relu", "linear"), strict=True):
        W, X = rows_of(model[place]), with_ones(X)
        Y = X @ W.T
        Y = Y.relu() if kind == "relu" else Y
        own = net_trim_layer(W, X, epsilon=0.1 * float(Y.norm()), kind=kind)
        layer = trim.layers[place // 2]
        assert (layer.weight, layer.kind, layer.converged) == (f"{place}.weight", kind, True)
        assert layer.epsilon == pytest.approx(own.epsilon, rel=1e-12)
        assert_close(trimmed_rows(trim, place), own.weights, atol=1e-9, rtol=0)
        assert torch.equal(trimmed_rows(trim, place) != 0, own.weights != 0)
        assert layer.discrepancy == pytest.approx(own.discrepancy, rel=1e-6)


@pytest.mark.parametrize("ball", ["joint", "split"])
def test_cascaded_layers_have_dense_outputs_as_their_goal_on_pruned_inputs(ball):
    model, x = mlp(), normal(60, 6)
    trim = net_trim(
        model, x, epsilon=0.2, mode="cascade", gamma=1.3, ball=ball, max_iterations=20_000
    )
    X, dense = with_ones(x), with_ones(x)
    for number, place in enumerate((0, 2, 4)):
        W, kind = rows_of(model[place]), "linear" if place == 4 else "relu"
        Z, Y = X @ W.T, dense @ W.T
        Y = Y.relu() if kind == "relu" else Y
        on = torch.ones_like(Y) if kind == "linear" else (Y > 0).to(Y)
        drift = float(((Z - Y) * on).norm())
        if ball == "joint":
            drift = math.hypot(drift, float((Z.relu() * (1 - on)).norm()))
        epsilon = math.sqrt(1.3) * drift if place else 0.2 * float(Y.norm())
        bound = Z.relu() if ball == "split" and kind == "relu" and place else None
        own = net_trim_layer(
            W, X, Y, epsilon=epsilon, kind=kind, bound=bound, ball=ball, max_iterations=20_000
        )
        layer = trim.layers[number]
        assert layer.epsilon == pytest.approx(epsilon, rel=1e-9)
        assert layer.drift == pytest.approx(drift if place else 0.0, rel=1e-9)
        assert layer.converged
        assert_close(trimmed_rows(trim, place), own.weights, atol=1e-6, rtol=0)
        X, dense = (with_ones(t.relu()) for t in (X @ trimmed_rows(trim, place).T, dense @ W.T))


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("refit", [False, True])
def test_every_layer_keeps_its_ball_and_every_silent_output_its_bound(digits_mlp, mode, refit):
    model, x = digits_mlp
    trim = net_trim(model, x, epsilon=0.2, mode=mode, refit=refit, tol=1e-3)
    assert trim.converged
    now = dense = x
    for layer, place in zip(trim.layers, (0, 2, 4), strict=True):
        W, U = rows_of(model[place]), trimmed_rows(trim, place)
        X, Y = with_ones(now), with_ones(dense) @ W.T
        on = Y > 0 if place < 4 else torch.ones_like(Y, dtype=torch.bool)
        Z, goal = X @ U.T, Y.relu() if place < 4 else Y
        assert float(((Z - goal) * on).norm()) <= layer.epsilon * (1 + 1e-3)
        # Silent outputs may be where dense weights bring them on these inputs, but not above.
        above = float((Z - (X @ W.T).relu()).masked_fill(on, 0.0).max())
        scale = float((goal * on).norm()) / float(on.sum()) ** 0.5
        assert layer.violation == pytest.approx(above / scale, abs=1e-5)
        assert above <= 1e-3 * scale
        now, dense = (Z.relu() if mode == "cascade" else goal), goal


def test_layers_do_not_depend_on_each_other_in_parallel():
    model, x = mlp(), normal(60, 6)
    whole = net_trim(model, x, epsilon=0.1).parameters()
    for place in (0, 2, 4):
        others = [f"{other}.*" for other in (0, 2, 4) if other != place]
        alone = net_trim(model, x, epsilon=0.1, exclude=others)
        for name, part in alone.parameters().items():
            dense = model.get_parameter(name)
            assert torch.equal(part, whole[name] if name[0] == str(place) else dense)
        assert alone.skipped == {f"{o[0]}.weight": "it is excluded" for o in others}


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("refit", [False, True])
def test_the_chained_bound_holds_on_digits(digits_mlp, mode, refit):
    model, x = digits_mlp
    for epsilon in (0.03, 0.2):
        trim = net_trim(model, x, epsilon=epsilon, mode=mode, refit=refit)
        z, dense = written(model, trim)(x).detach(), model(x).detach()
        assert trim.discrepancy == pytest.approx(float((z - dense).norm()), rel=1e-9)
        assert trim.output_norm == pytest.approx(float(dense.norm()), rel=1e-9)
        assert trim.converged and trim.discrepancy <= trim.bound * (1 + 1e-9)
        assert trim.sparsity > 0.3
    if mode == "parallel":
        r = [layer.output_discrepancy for layer in trim.layers]
        norms = [
            float(torch.linalg.matrix_norm(trim.parameters()[f"{i}.weight"], 2)) for i in (2, 4)
        ]
        by_hand = r[2] + norms[1] * (r[1] + norms[0] * r[0])
        assert trim.bound == pytest.approx(by_hand, rel=1e-9)
    else:
        assert trim.bound == pytest.approx(trim.discrepancy, rel=1e-6)


def test_a_cascade_is_nearer_than_parallel_layers_at_equal_sparsity(digits_mlp):
    model, x = digits_mlp
    for parallel, cascade in ((0.05, 0.06), (0.1, 0.11)):
        apart = net_trim(model, x, epsilon=parallel)
        chained = net_trim(model, x, epsilon=cascade, mode="cascade")
        assert chained.sparsity >= apart.sparsity
        assert chained.discrepancy < 0.9 * apart.discrepancy


def test_a_refit_is_nearer_on_the_same_support(digits_mlp):
    model, x = digits_mlp
    plain, fitted = (net_trim(model, x, epsilon=0.1, refit=refit) for refit in (False, True))
    assert torch.all(plain.mask | ~fitted.mask)
    for before, after in zip(plain.layers, fitted.layers, strict=True):
        assert after.output_discrepancy < before.output_discrepancy
    assert fitted.discrepancy < plain.discrepancy


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(2, 4, 3),
    "strides": lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "same": lambda: nn.Conv2d(2, 4, 3, padding="same", bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2),
    "depthwise": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "reflected": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("follows", ["relu", "linear"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_keep_their_own_outputs(name, follows):
    layer = seeded(CONVOLUTIONS[name])
    after = F.relu if follows == "relu" else (lambda z: z)
    model = nn.Sequential(layer, nn.ReLU() if follows == "relu" else nn.Identity())
    x = normal(12, layer.in_channels, 7, 6)
    trim = net_trim(model, x, epsilon=0.15, batch_size=5)
    (found,) = trim.layers
    assert (found.kind, found.converged) == (follows, True)
    before, now = (after(m[0](x)).detach() for m in (model, written(model, trim)))
    off = float((now - before).norm())
    assert found.epsilon == pytest.approx(0.15 * float(before.norm()), rel=1e-9)
    assert found.output_discrepancy == pytest.approx(off, rel=1e-9)
    assert trim.discrepancy == pytest.approx(off, rel=1e-9)
    assert 0.9 * found.epsilon < found.discrepancy <= found.epsilon * (1 + 1e-3)
    assert len(found.trims) == layer.groups
    assert trim.sparsity > 0


def test_each_group_of_a_convolution_is_a_program_of_unfolded_patches():
    layer = seeded(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2))
    x = normal(10, 4, 8, 7)
    trim = net_trim(nn.Sequential(layer, nn.ReLU()), x, epsilon=0.1)
    for group, part in enumerate(x.chunk(2, dim=1)):
        patches = F.unfold(part, 3, stride=2, padding=1, dilation=2)
        X = with_ones(patches.transpose(1, 2).flatten(0, 1))
        W = rows_of(layer).chunk(2)[group]
        own = net_trim_layer(W, X, epsilon=0.1 * float((X @ W.T).relu().norm()))
        assert_close(trimmed_rows(trim, 0).chunk(2)[group], own.weights, atol=1e-9, rtol=0)
        assert trim.layers[0].trims[group].epsilon == pytest.approx(own.epsilon, rel=1e-12)


class Runs(nn.Module):
    """Two linear layers, and what a function does with them."""

    def __init__(self, run, last=3):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, last)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


FLOWS = {
    "function": (lambda m, x: m.b(F.relu(m.a(x))), "relu", ""),
    "method": (lambda m, x: m.b(m.a(x).relu()), "relu", ""),
    "in place": (lambda m, x: m.b(m.a(x).relu_()), "relu", ""),
    "view": (lambda m, x: m.b(F.relu(m.a(x).view(len(x), -1))), "relu", ""),
    "pool": (lambda m, x: m.b(F.max_pool1d(m.a(x), 3, 1, 1).relu()), "relu", ""),
    "dropout that is off": (
        lambda m, x: m.b(F.dropout(m.a(x), 0.5, training=False).relu()),
        "relu",
        "",
    ),
    "shape": (lambda m, x: m.b((z := m.a(x)).relu().reshape(z.shape)), "relu", ""),
    "twice": (lambda m, x: m.b((z := m.a(x)).relu() + z.relu()), "relu", ""),
    "tanh": (lambda m, x: m.b(m.a(x).tanh()), "linear", "it goes into `tanh`"),
    "skip": (lambda m, x: m.b((z := m.a(x)).relu() + z), "linear", "it goes into `add`"),
    "skip inside of a list": (
        lambda m, x: m.b(torch.stack([z := m.a(x), z.relu()]).sum(0)),
        "linear",
        "it goes into `stack`",
    ),
    "seen behind a view": (
        lambda m, x: m.b((z := m.a(x)).relu() + z.view(len(x), -1)),
        "linear",
        "it goes into `add`",
    ),
    "next layer": (lambda m, x: m.b(m.a(x)), "linear", "it goes into `linear`"),
    "two calls": (
        lambda m, x: m.b(F.relu(m.a(F.tanh(m.a(x))))),
        "linear",
        "it goes into `tanh`",
    ),
    "returned": (
        lambda m, x: torch.cat([F.relu(m.a(x)), m.b(x)], 1),
        "relu",
        "",
    ),
    "not used": (
        lambda m, x: m.b(x) + 0 * (m.a(x) is None),
        "linear",
        "what comes out of it is not seen to be used",
    ),
}


@pytest.mark.filterwarnings("ignore:The use of `F.tanh`")
@pytest.mark.parametrize("name", FLOWS)
def test_a_relu_counts_where_nothing_else_sees_the_outputs(name):
    run, kind, reason = FLOWS[name]
    trim = net_trim(seeded(lambda: Runs(run)), normal(30, 4), epsilon=0.1)
    (layer,) = [layer for layer in trim.layers if layer.weight == "a.weight"]
    assert (layer.kind, layer.reason) == (kind, reason)


def test_a_result_that_is_also_put_through_a_relu_is_linear():
    def run(m, x):
        z = m.b(x)
        F.relu(z)
        return z

    trim = net_trim(seeded(lambda: Runs(run)), normal(30, 4), epsilon=0.1)
    assert [(e.weight, e.reason) for e in trim.layers] == [
        ("b.weight", "it comes out of the network")
    ]
    assert trim.skipped == {"a.weight": "it is not called on the calibration inputs"}


def test_a_result_from_the_middle_has_no_bound():
    def run(m, x):
        z = F.relu(m.a(x))
        m.b(z)
        return z

    assert net_trim(seeded(lambda: Runs(run)), normal(30, 4), epsilon=0.1).bound is None


def test_projections_of_attention_are_linear():
    words = torch.randint(0, 5, (40, 6), generator=torch.Generator().manual_seed(0))
    trim = net_trim(seeded(Attentive), words, epsilon=0.1)
    inside = "its outputs stay inside of a larger function"
    assert [(e.weight, e.kind, e.reason) for e in trim.layers[:2]] == [
        ("attention.in_proj_weight", "linear", inside),
        ("attention.out_proj.weight", "linear", inside),
    ]


CHAINS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6, 5),
    ),
    "overlapping windows": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(98, 5)
    ),
    "steep": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(100, 6), nn.LeakyReLU(2.0), nn.Linear(6, 5)
    ),
    "softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 6), nn.LogSoftmax(1)),
}


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("name", CHAINS)
def test_there_is_a_bound_for_chains_alone(name, mode):
    model = seeded(CHAINS[name])
    trim = net_trim(model, normal(120, 1, 10, 10), epsilon=0.1, mode=mode)
    assert (trim.bound is not None) == (name == "convolutions")
    if trim.bound is not None:
        assert trim.discrepancy <= trim.bound * (1 + 1e-9)


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (2, 2), (1, 3), (3, 2)])
def test_the_bound_of_a_convolution_is_above_the_norm_of_its_matrix(stride, dilation):
    # All is kept of the second one, so that the bound is the first one's discrepancy times a norm.
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv1d(1, 1, 1), nn.Conv1d(1, 2, 3, stride=stride, dilation=dilation, padding=2)
        )
    )
    x = normal(40, 1, 9)
    trim = net_trim(model, x, epsilon=0.3, exclude=["1.*"])
    eye = torch.eye(9).double()[:, None]
    matrix = F.conv1d(eye, model[1].weight, None, stride, 2, dilation).flatten(1).detach()
    factor = trim.bound / trim.layers[0].output_discrepancy
    assert factor >= float(torch.linalg.matrix_norm(matrix, 2)) * (1 - 1e-12)
    meets = F.conv1d(eye, torch.ones(1, 1, 3).double(), None, stride, 2, dilation)
    most = float(meets.flatten(1).sum(1).max())
    own = float(torch.linalg.matrix_norm(model[1].weight.detach().flatten(1), 2))
    assert factor == pytest.approx(own * math.sqrt(most), rel=1e-9)


def test_biases_may_stay():
    model, x = mlp(), normal(60, 6)
    model[2].bias.requires_grad_(False)
    trim = net_trim(model, x, epsilon=0.2, exclude=["0.bias"])
    parts = trim.parameters()
    assert torch.equal(parts["0.bias"], model[0].bias) and "2.bias" not in parts
    for place, X in ((0, x), (2, model[:2](x).detach())):
        W, b = model[place].weight.detach(), model[place].bias.detach()
        own = net_trim_layer(W, X, epsilon=0.2 * float((X @ W.T + b).relu().norm()), offset=b)
        assert_close(parts[f"{place}.weight"], own.weights, atol=1e-9, rtol=0)
    after = (x @ parts["0.weight"].T + model[0].bias).relu()
    off = float((after - model[:2](x)).detach().norm())
    assert trim.layers[0].output_discrepancy == pytest.approx(off, rel=1e-9)
    free = net_trim(model, x, epsilon=0.2, penalise_bias=False)
    assert torch.all(free.parameters()["0.bias"] != 0)
    assert free.layers[0].trims[0].lower_bound == -math.inf


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_linear_layer_with_a_bias_that_stays_keeps_its_outputs(mode):
    model, x = mlp(), normal(60, 6)
    trim = net_trim(model, x, epsilon=0.2, mode=mode, exclude=["4.bias"])
    inputs = model[:4] if mode == "parallel" else written(model, trim)[:4]
    z = F.linear(inputs(x), trim.parameters()["4.weight"], model[4].bias)
    last, off = trim.layers[-1], float((z - model(x)).detach().norm())
    assert last.discrepancy == pytest.approx(off, rel=1e-8)
    if mode == "parallel":
        assert last.epsilon == pytest.approx(0.2 * float(model(x).detach().norm()), rel=1e-9)


def test_shares_go_by_the_first_pattern_that_fits():
    model, x = mlp(), normal(60, 6)
    trim = net_trim(model, x, epsilon={"2.*": 0.5, "*.weight": 0.2, "4.weight": 0.9})
    sizes = [model[:2](x).norm(), model[:4](x).norm(), model(x).norm()]
    for layer, size, share in zip(trim.layers, sizes, (0.2, 0.5, 0.2), strict=True):
        assert layer.epsilon == pytest.approx(share * float(size.detach()), rel=1e-9)


def test_larger_shares_give_smaller_weights(digits_mlp):
    model, x = digits_mlp
    sums = [
        float(net_trim(model, x, epsilon=epsilon).weights.abs().sum())
        for epsilon in (0.05, 0.2, 0.5)
    ]
    assert all(small <= large * (1 + 1e-3) for large, small in pairwise(sums))
    assert not bool(net_trim(model, x, epsilon=1.0).mask.any())


class Attentive(nn.Module):
    """Everything that has weights of two dimensions and is no layer of ours, and attention."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(4, 4, 2)
        self.memory = nn.GRU(4, 4, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.idle, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2)

    def forward(self, words):
        x = self.table(words)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.up(x.mT).mT
        return self.last(self.norm(self.frozen(self.memory(x)[0]))[:, -1])


def test_what_is_skipped_is_listed_with_the_reason():
    words = torch.randint(0, 5, (40, 6), generator=torch.Generator().manual_seed(0))
    trim = net_trim(seeded(Attentive), words, epsilon=0.1, exclude=["attention.out*"])
    assert [layer.weight for layer in trim.layers] == ["attention.in_proj_weight", "last.weight"]
    assert [len(layer.trims) for layer in trim.layers] == [3, 1]
    other = "is no linear, convolution or attention layer"
    assert trim.skipped == {
        "table.weight": "it is a table of embeddings",
        "attention.out_proj.weight": "it is excluded",
        "frozen.weight": "it is not among the parameters",
        "idle.weight": "it is not called on the calibration inputs",
        "up.weight": f"ConvTranspose1d {other}",
        "memory.weight_ih_l0": f"GRU {other}",
        "memory.weight_hh_l0": f"GRU {other}",
    }
    assert trim.bound is None
    dense = dict(seeded(Attentive).named_parameters())
    changed = {n for n, p in trim.parameters().items() if not torch.equal(p, dense[n].detach())}
    assert changed == {
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "last.weight",
        "last.bias",
    }


def snapshot(model):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return state, model.training, torch.get_rng_state(), warnings.filters[:]


def assert_untouched(model, before):
    state, training, generator, filters = before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.training == training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator) and warnings.filters == filters
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_the_model_is_untouched_also_after_an_exception(mode):
    model, x = mlp(), normal(40, 6)
    before = snapshot(model)
    net_trim(model, x, epsilon=0.2, mode=mode)
    assert_untouched(model, before)

    def stop(done, total):
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        net_trim(model, x, epsilon=0.2, mode=mode, progress=stop)
    assert_untouched(model, before)


def test_a_result_is_written_whole_or_not_at_all(monkeypatch):
    model = mlp()
    trim = net_trim(model, normal(40, 6), epsilon=0.2)
    other = nn.Sequential(*model[:4], nn.Linear(7, 4).double())
    with pytest.raises(ValueError, match="`model` must have the pruned parameters in their order"):
        trim.write_(other)
    with pytest.raises(ValueError, match=r"got none named 2\.weight"):
        trim.write_(model[:2])
    with pytest.raises(ValueError, match=r"in torch\.float64 on cpu, got torch\.float32"):
        trim.write_(mlp().float())
    before, copies = snapshot(model), []

    def fails(self, part):
        copies.append(part)
        if len(copies) == 3:
            raise RuntimeError("no")
        return torch.Tensor.copy_(self, part)

    monkeypatch.setattr(nn.Parameter, "copy_", fails)
    with pytest.raises(RuntimeError, match="no"):
        trim.write_(model)
    assert len(copies) > 3
    assert_untouched(model, before)
    monkeypatch.undo()
    trim.write_(model)
    parts = trim.parameters()
    assert all(torch.equal(p, parts[name]) for name, p in model.named_parameters())
    assert Masks.of(model).sparsity == pytest.approx(trim.sparsity)
    assert trim.sparsity == 1 - int(trim.mask.sum()) / len(trim.mask)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": -0.1}, "`epsilon` must be a finite share .* got -0.1"),
        ({"epsilon": math.nan}, "`epsilon` must be a finite share .* got nan"),
        ({"epsilon": {"*": -1.0}}, "`epsilon` must be a finite share .* got -1.0"),
        ({"epsilon": {"0.*": 0.1}}, "pattern for every layer, got none for `2.weight`"),
        ({"epsilon": {"*": 0.1, "conv*": 0.1}}, '`epsilon` pattern "conv\\*" matches none'),
        ({"mode": "serial"}, "`mode` must be one of"),
        ({"gamma": 0.9}, "`gamma` must be finite and at least 1"),
        ({"gamma": math.nan}, "`gamma` must be finite and at least 1"),
        ({"ball": "round"}, "`ball` must be"),
        ({"precision": "half"}, "`precision` must be"),
        ({"rho": 0.0}, "`rho` must be positive"),
        ({"tol": 0.0}, "`tol` must be positive"),
        ({"max_iterations": 0}, "`max_iterations` must be at least 1"),
        ({"exclude": "conv*"}, '`exclude` pattern "conv\\*" matches none'),
        ({"exclude": "*"}, "must call a linear, .* got none. `0.weight`: it is excluded"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        net_trim(mlp(), normal(20, 6), **{"epsilon": 0.1, **options})


def test_networks_that_cannot_be_pruned_are_refused():
    with pytest.raises(ValueError, match=r"got none\. `0\.weight`: ConvTranspose1d is no linear"):
        net_trim(
            seeded(lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 2))), normal(4, 2, 5), epsilon=0.1
        )
    with pytest.raises(NonDeterministicError, match="Dropout must be off"):
        net_trim(nn.Sequential(*mlp(), nn.Dropout()), normal(20, 6), epsilon=0.1)
    x = normal(20, 6)
    x[3, 2] = math.nan
    with pytest.raises(NonFiniteError):
        net_trim(mlp(), x, epsilon=0.1)


@pytest.mark.parametrize("layer", [2, 4])
def test_an_overflow_that_reaches_the_output_names_where_it_began(layer):
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
        )
    ).float()
    model[0].weight.data *= 1e6
    model[layer].weight.data *= 1e38
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=f"from `{layer}` on"):
        net_trim(model, normal(20, 6).float(), epsilon=0.1)
    assert_untouched(model, before)
    with pytest.raises(NonFiniteError, match="from its inputs on"):
        net_trim(model, normal(20, 6).float() / 0.0, epsilon=0.1)


class Masked(Runs):
    """Activations that are not finite where no output sees them."""

    def __init__(self, value):
        super().__init__(lambda m, x: m.b(m.a(x * value).relu().nan_to_num(0.0, 0.0, 0.0)))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_activations_that_are_not_finite_are_an_error_that_names_the_layer(value, mode):
    model, x = seeded(lambda: Masked(value)), normal(30, 4)
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"Layer of `a\.weight`"):
        net_trim(model, x, epsilon=0.1, mode=mode)
    assert_untouched(model, before)


def test_too_few_samples_and_budgets_are_told():
    with pytest.warns(
        CalibrationWarning, match="2 of 3 layers have fewer .* worst `2.weight` with"
    ):
        net_trim(mlp(), normal(7, 6), epsilon=0.1)
    with pytest.warns(ConvergenceWarning, match="Net-Trim did not converge in 2 it") as told:
        trim = net_trim(mlp(), normal(60, 6), epsilon=0.1, max_iterations=2)
    assert not trim.converged
    assert {str(w.message).split("`")[1] for w in told} == {
        layer.weight for layer in trim.layers if not layer.converged
    }


def test_precision_of_the_model_is_kept():
    model, x = mlp().float(), normal(60, 6).float()
    for mode in ("parallel", "cascade"):
        trim = net_trim(model, x, epsilon=0.1, mode=mode, precision="mixed")
        assert trim.converged and trim.weights.dtype == torch.float32
        double = net_trim(mlp().float().double(), x.double(), epsilon=0.1, mode=mode)
        assert_close(trim.weights.double(), double.weights, atol=3e-3, rtol=0)
        assert trim.discrepancy == pytest.approx(double.discrepancy, rel=0.01)
