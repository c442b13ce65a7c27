"""What theorems, torch's convolutions and an interior-point solver say of Net-Trim's results."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from pruning import Masks, keep_zeros, net_trim, net_trim_layer
from pruning.layer_calls import LayerCalls
from pruning.net_trim_admm import Measures
from pruning.net_trim_program import LayerProgram
from tests.cases import seeded
from tests.test_pruning import net_trim_reference as reference

SLACK = 1 + 1e-3
"""By what a discrepancy of a converged layer may exceed its ε."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(layer):
    rows = layer.weight.detach().flatten(1)
    return rows if layer.bias is None else torch.cat([rows, layer.bias.detach()[:, None]], dim=1)


def with_ones(X):
    return torch.cat([X, torch.ones(len(X), 1).to(X)], dim=1)


def written(model, trim):
    """A copy of a model with the result in it."""
    other = copy.deepcopy(model)
    trim.write_(other)
    return other


# --- Theorems 1 and 2 on networks whose layers have an entrywise l1 norm of 1 --------------------


def link_normalised(widths, seed=0, *, on_path=0.0):
    """A ReLU network without biases, the last layer linear, with ‖W‖₁ = 1 for every layer.

    Of each ‖W‖₁ a share is one weight, from the first input to the first output: the larger it is,
    the nearer are norms to the ones of the theorems.
    """

    def build():
        layers = [nn.Linear(n, m, bias=False) for n, m in pairwise(widths)]
        return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]

    model = seeded(build, seed)
    with torch.no_grad():
        for layer in model[::2]:
            W = layer.weight
            W += 0.3 * W.abs().max()  # so that enough of the next layer is active
            W *= (1 - on_path) / W.abs().sum()
            W[0, 0] += on_path
            W /= W.abs().sum()
    return model


def outputs_by_layer(model, x):
    """What comes out of every layer, after its ReLU if it has one."""
    places = [*range(2, len(model), 2), len(model)]
    return [model[:place](x).detach() for place in places]


def discrepancies(model, trim, x):
    pairs = zip(outputs_by_layer(written(model, trim), x), outputs_by_layer(model, x), strict=True)
    return [float((now - before).norm()) for now, before in pairs]


WIDTHS = [(6, 8, 7, 5, 3), (4, 2, 2, 2, 2), (12, 5, 9, 4)]
ON_PATH = [0.0, 0.9]


@pytest.mark.parametrize("on_path", ON_PATH)
@pytest.mark.parametrize("widths", WIDTHS)
def test_discrepancies_of_parallel_layers_add_up_at_most(widths, on_path):
    model, x = link_normalised(widths, on_path=on_path), normal(80, widths[0])
    dense = outputs_by_layer(model, x)
    # Shares for which every layer has the same ε, so that none of them hides the others.
    epsilon = 0.2 * float(dense[-1].norm())
    shares = {f"{2 * i}.*": epsilon / float(Y.norm()) for i, Y in enumerate(dense)}
    trim = net_trim(model, x, epsilon=shares, max_iterations=20_000)
    assert trim.converged and 0.0 < trim.sparsity < 1.0
    for i, off in enumerate(discrepancies(model, trim, x)):
        assert 0.0 < off <= (i + 1) * epsilon * SLACK
        assert trim.parameters()[f"{2 * i}.weight"].abs().sum() <= SLACK  # the proof needs it


@pytest.mark.parametrize("ball", ["joint", "split"])
@pytest.mark.parametrize("gamma", [1.0, 1.1, 2.0])
@pytest.mark.parametrize("on_path", ON_PATH)
@pytest.mark.parametrize("widths", WIDTHS)
def test_the_discrepancy_of_a_cascade_grows_by_the_root_of_gamma_at_most(
    widths, on_path, gamma, ball
):
    model, x = link_normalised(widths, on_path=on_path), normal(80, widths[0])
    trim = net_trim(
        model, x, epsilon=0.1, mode="cascade", gamma=gamma, ball=ball, max_iterations=20_000
    )
    assert trim.converged
    first = 0.1 * float(outputs_by_layer(model, x)[0].norm())
    for i, off in enumerate(discrepancies(model, trim, x)):
        assert 0.0 < off <= first * gamma ** (i / 2) * SLACK ** (i + 1)


def path(depth):
    """Layers of one weight, which is 1: what comes out of each is what goes into the first."""
    return link_normalised((1,) * (depth + 1), on_path=1.0), normal(50, 1).abs()


def test_the_bound_of_parallel_layers_is_attained_but_for_products():
    model, x = path(4)
    shares = (0.01, 0.02, 0.005, 0.03)
    trim = net_trim(model, x, epsilon={f"{2 * i}.*": g for i, g in enumerate(shares)}, tol=1e-9)
    left, size = 1.0, float(x.norm())
    for i, off in enumerate(discrepancies(model, trim, x)):
        left *= 1 - shares[i]
        assert off == pytest.approx((1 - left) * size, rel=1e-6)
        bound = sum(shares[: i + 1]) * size
        assert 0.96 * bound < off <= bound * (1 + 1e-6)


@pytest.mark.parametrize("ball", ["joint", "split"])
@pytest.mark.parametrize("gamma", [1.0, 1.1, 2.0])
def test_the_bound_of_a_cascade_is_attained(gamma, ball):
    model, x = path(4)
    trim = net_trim(model, x, epsilon=0.02, mode="cascade", gamma=gamma, ball=ball, tol=1e-9)
    for i, off in enumerate(discrepancies(model, trim, x)):
        assert off == pytest.approx(0.02 * float(x.norm()) * gamma ** (i / 2), rel=1e-6)


@pytest.mark.parametrize("ball", ["joint", "split"])
@pytest.mark.parametrize("gamma", [1.0, 1.1])
def test_dense_weights_are_feasible_in_every_program_of_a_cascade(gamma, ball, monkeypatch):
    dense, sparse = [], LayerProgram.sparse

    def noting(program, epsilon, **options):
        dense.append(program._trim(program._W, epsilon, Measures(0.0, 0.0), 0, 0.0))
        return sparse(program, epsilon, **options)

    monkeypatch.setattr(LayerProgram, "sparse", noting)
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
        )
    )
    x = normal(80, 6)
    trim = net_trim(
        model, x, epsilon=0.2, mode="cascade", gamma=gamma, ball=ball, max_iterations=20_000
    )
    pruned, goals = written(model, trim), outputs_by_layer(model, x)
    for i in (1, 2):
        X, W = with_ones(pruned[: 2 * i](x).detach()), rows_of(model[2 * i])
        Z, Y = X @ W.T, goals[i]
        active = Y > 0 if i == 1 else torch.ones_like(Y, dtype=torch.bool)
        # Where the ball is split, W is at the bound of silent outputs itself.
        above = Z.relu() if ball == "joint" else torch.zeros_like(Z)
        drift = float(torch.where(active, Z - Y, above).norm())
        assert torch.equal(dense[i].weights, W)
        assert dense[i].discrepancy == pytest.approx(drift, rel=1e-9)
        assert dense[i].ratio == pytest.approx(gamma**-0.5, rel=1e-9)
        assert dense[i].violation < 1e-12 or ball == "joint"
        (own,) = trim.layers[i].trims
        assert own.converged and own.objective <= dense[i].objective * SLACK


# --- convolutions as operators on their kernels --------------------------------------------------

CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(2, 4, 3), (2, 6, 5)),
    "strides": (lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), padding=(1, 0)), (2, 7, 5)),
    "dilation": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), dilation=(2, 1)), (2, 6, 5)),
    "same": (lambda: nn.Conv2d(2, 3, (3, 4), padding="same", dilation=(2, 1)), (2, 5, 6)),
    "valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid", bias=False), (2, 5, 4)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, 2, padding=1, dilation=2, groups=2), (4, 8, 7)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3), (3, 5, 5)),
    "circular": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 8)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "cubes": (lambda: nn.Conv3d(2, 2, 2, stride=2, padding=1), (2, 4, 3, 4)),
}
EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def convolution(name, samples):
    build, shape = CONVOLUTIONS[name]
    return seeded(build), normal(samples, *shape, seed=1)


def convolved(layer, x, kernels):
    """A x convolved with other kernels by torch: [groups, samples and positions, outputs]."""
    out = layer._conv_forward(x, kernels, None)
    parts = out.movedim(1, -1).flatten(0, -2).chunk(layer.groups, dim=1)
    return torch.stack(parts)


def kernel_matrix(layer, x):
    """The convolution as a matrix of each group: column j is what comes of the j-th unit kernel."""
    size = layer.weight[0].numel()
    units = torch.eye(size, dtype=x.dtype).view(size, *layer.weight.shape[1:])
    return convolved(layer, x, torch.cat([units] * layer.groups))


def unfolded(layer, x):
    """What Net-Trim multiplies the kernels by: [groups, samples and positions, inputs]."""
    calls = []
    with torch.no_grad(), LayerCalls({"weight": layer.weight}, calls.append):
        layer(x)
    (call,) = calls
    assert call.groups == layer.groups
    return torch.cat(list(call.parts(None)), dim=1)


@EVEN
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_unfolded_inputs_are_the_convolution_as_an_operator_on_kernels(name):
    layer, x = convolution(name, 5)
    X = unfolded(layer, x)
    assert_close(X, kernel_matrix(layer, x), rtol=0, atol=0)
    u = normal(*layer.weight.shape, seed=2).requires_grad_()
    forward = convolved(layer, x, u)
    by_group = u.detach().flatten(1).view(layer.groups, -1, X.shape[2])
    assert_close(X @ by_group.mT, forward.detach(), rtol=1e-12, atol=1e-12)
    # torch's gradient of the weights is the adjoint.
    v = normal(*forward.shape, seed=3)
    (adjoint,) = torch.autograd.grad(forward, u, v)
    by_outputs = float((forward * v).sum().detach())
    assert by_outputs == pytest.approx(float((u.detach() * adjoint).sum()), rel=1e-12)
    assert_close((v.mT @ X).flatten(0, 1), adjoint.flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "strides", "dilation", "groups", "depthwise"])
def test_unfolded_inputs_have_the_transposed_convolution_for_their_adjoint(name):
    """⟨conv(x, u), v⟩ is linear in x as well: there torch's adjoint is the transposed one."""
    layer, x = convolution(name, 5)
    u = layer.weight.detach()
    v = normal(*layer(x).shape, seed=3)
    options = (layer.stride, layer.padding)
    sizes = zip(x.shape[2:], v.shape[2:], layer.kernel_size, *options, layer.dilation, strict=True)
    rest = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
    transpose = (F.conv_transpose1d, F.conv_transpose2d)[x.ndim - 3]
    back = transpose(v, u, None, *options, rest, layer.groups, layer.dilation)
    by_group = u.flatten(1).view(layer.groups, -1, u[0].numel())
    out = torch.cat(list(unfolded(layer, x) @ by_group.mT), dim=1)
    rows = v.movedim(1, -1).flatten(0, -2)
    assert float((out * rows).sum()) == pytest.approx(float((x * back).sum()), rel=1e-12)


@EVEN
@pytest.mark.parametrize("kind", ["relu", "linear"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_solved_as_the_operator_that_torch_makes_of_it(name, kind):
    layer, x = convolution(name, 8)
    after = nn.ReLU() if kind == "relu" else nn.Identity()
    trim = net_trim(nn.Sequential(layer, after), x, epsilon=0.15, batch_size=3, tol=1e-7)
    (found,) = trim.layers
    assert (found.kind, found.converged, len(found.trims)) == (kind, True, layer.groups)
    W = rows_of(layer).chunk(layer.groups)
    for own, rows, X in zip(found.trims, W, kernel_matrix(layer, x), strict=True):
        X = X if layer.bias is None else with_ones(X)
        Y = X @ rows.T
        Y = Y.relu() if kind == "relu" else Y
        epsilon = 0.15 * float(Y.norm())
        # The linear one by all samples; net_trim takes moments there.
        alone = net_trim_layer(rows, X, epsilon=epsilon, kind=kind, tol=1e-7)
        assert own.epsilon == pytest.approx(epsilon, rel=1e-12)
        assert own.objective == pytest.approx(alone.objective, rel=1e-6)
        assert_close(own.weights, alone.weights, rtol=0, atol=1e-5)
        off = X @ own.weights.T
        off = (off.relu() if kind == "relu" else off) - Y
        assert own.output_discrepancy == pytest.approx(float(off.norm()), rel=1e-9)
        assert float(off.norm()) <= epsilon * SLACK


@pytest.mark.oracle
@EVEN
@pytest.mark.parametrize("kind", ["relu", "linear"])
@pytest.mark.parametrize("name", ["strides", "dilation", "same", "groups", "reflected"])
def test_no_other_kernels_of_a_convolution_cost_less(name, kind):
    pytest.importorskip("cvxpy")
    layer, x = convolution(name, 3)
    after = nn.ReLU() if kind == "relu" else nn.Identity()
    trim = net_trim(nn.Sequential(layer, after), x, epsilon=0.15, tol=1e-6)
    (found,) = trim.layers
    W = rows_of(layer).chunk(layer.groups)
    for own, rows, X in zip(found.trims, W, kernel_matrix(layer, x), strict=True):
        X = X if layer.bias is None else with_ones(X)
        Z = X @ rows.T
        active = Z > 0 if kind == "relu" else torch.ones_like(Z, dtype=torch.bool)
        T = torch.where(active, Z, 0.0)
        least, _ = reference.solved(X, T, active, 0.15 * float(T.norm()))
        assert own.converged and own.objective == pytest.approx(least, rel=1e-4)


# --- weights in more than one place --------------------------------------------------------------


class Shared(nn.Module):
    """Two layers before the last one, of one weight each way they can be."""

    def __init__(self, how):
        super().__init__()
        bias = how in ("twice with bias", "both parameters", "two biases")
        self.first = nn.Linear(5, 5, bias=bias)
        self.second = self.first if "twice" in how else nn.Linear(5, 5, bias=bias)
        self.second.weight = self.first.weight
        if how == "both parameters":
            self.second.bias = self.first.bias
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


def is_tied(model):
    return model.first.weight is model.second.weight


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("how", ["twice", "twice with bias", "one weight", "both parameters"])
def test_a_weight_in_two_calls_is_one_layer_with_the_inputs_of_both(how, mode):
    model, x = seeded(lambda: Shared(how)), normal(60, 5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trim = net_trim(model, x, epsilon=0.15, mode=mode)
    assert [layer.weight for layer in trim.layers] == ["first.weight", "last.weight"]
    assert not trim.skipped and trim.converged
    assert set(trim.parameters()) == {name for name, _ in model.named_parameters()}
    X = torch.cat([x, model.first(x).relu().detach()])
    W, X = rows_of(model.first), X if model.first.bias is None else with_ones(X)
    Y = (X @ W.T).relu()
    own = net_trim_layer(W, X, epsilon=0.15 * float(Y.norm()))
    pruned = written(model, trim)
    assert_close(rows_of(pruned.first), own.weights, rtol=0, atol=1e-9)
    assert trim.layers[0].output_discrepancy == pytest.approx(own.output_discrepancy, rel=1e-9)
    # Pruned in both places or in none, and tied as before.
    assert is_tied(model) and is_tied(pruned) and is_tied(copy.deepcopy(pruned))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(pruned.second.weight, trim.parameters()["first.weight"])
    assert not torch.equal(pruned.second.weight, model.second.weight)
    off = float((pruned(x) - model(x)).detach().norm())
    assert trim.discrepancy == pytest.approx(off, rel=1e-9)
    # In a cascade the second call was seen on inputs before the first one had changed.
    assert (trim.bound is None) == (mode == "cascade")
    assert trim.bound is None or off <= trim.bound * (1 + 1e-9)
    kept = Masks.of(pruned)
    assert "second.weight" not in kept.keep
    assert kept.sparsity == pytest.approx(trim.sparsity)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_weight_with_two_biases_is_skipped_in_both_places(mode):
    model, x = seeded(lambda: Shared("two biases")), normal(60, 5)
    trim = net_trim(model, x, epsilon=0.15, mode=mode)
    assert [layer.weight for layer in trim.layers] == ["last.weight"]
    assert trim.skipped == {"first.weight": "it is called with more than one bias"}
    pruned = written(model, trim)
    assert is_tied(pruned)
    for name, p in model.named_parameters():
        assert name.startswith("last") or torch.equal(p, pruned.get_parameter(name))


def test_a_shared_weight_goes_by_its_first_name():
    model, x = seeded(lambda: Shared("one weight")), normal(60, 5)
    with pytest.raises(ValueError, match=r'pattern "second\.\*" matches none of first\.weight'):
        net_trim(model, x, epsilon=0.15, exclude="second.*")
    with pytest.raises(ValueError, match=r'pattern "second\.\*" matches none of first\.weight'):
        net_trim(model, x, epsilon={"second.*": 0.1, "*": 0.2})
    trim = net_trim(model, x, epsilon=0.15, exclude="first.*")
    assert trim.skipped == {"first.weight": "it is excluded"}
    assert torch.equal(written(model, trim).second.weight, model.second.weight)


class Tied(nn.Module):
    """Words in, logits of words out, by one table."""

    def __init__(self):
        super().__init__()
        self.table, self.between = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, words):
        return self.out(self.between(self.table(words)))


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_layer_that_is_also_a_table_of_embeddings_is_skipped(mode):
    words = torch.arange(60).reshape(20, 3) % 7
    model = seeded(Tied)
    trim = net_trim(model, words, epsilon=0.1, mode=mode)
    assert trim.skipped == {"table.weight": "it is a table of embeddings"}
    assert [layer.weight for layer in trim.layers] == ["between.weight"]
    pruned = written(model, trim)
    assert pruned.out.weight is pruned.table.weight
    assert torch.equal(pruned.out.weight, model.out.weight)


# --- what follows pruning ------------------------------------------------------------------------


def small_cnn():
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )
    )


def trained(model, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_zeros_of_a_trim_survive_momentum_averages_copies_and_a_plain_model(mode):
    model, x = small_cnn(), normal(70, 1, 6, 6)
    y = torch.randint(0, 5, (70,), generator=torch.Generator().manual_seed(1))
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    trained(model, optimizer, x, y, 3)  # so that momentum knows of all weights
    trim = net_trim(model.eval(), x, epsilon=0.3, mode=mode)
    assert not trim.skipped and 0.2 < trim.sparsity < 0.9
    trim.write_(model)
    gone = {name: part == 0 for name, part in trim.parameters().items()}
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    model.train()
    with keep_zeros(model, optimizer) as kept:
        assert kept.masks.keep.keys() == gone.keys()
        for _ in range(5):
            trained(model, optimizer, x, y, 1)
            average.update_parameters(model)
    model.eval()
    twin, ema = copy.deepcopy(model), average.module
    for name, zero in gone.items():
        p = model.get_parameter(name)
        assert torch.equal(~kept.masks.keep[name], zero) and torch.equal(p == 0, zero)
        assert torch.all(p[~zero] != trim.parameters()[name][~zero])  # the others train
        assert torch.equal(ema.get_parameter(name) == 0, zero)
        assert torch.equal(twin.get_parameter(name) == 0, zero)
        assert torch.all(optimizer.state[p]["momentum_buffer"][zero] == 0)
    plain = small_cnn().eval()
    assert list(model.state_dict()) == keys
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), model(x))
    assert Masks.of(plain).sparsity == pytest.approx(trim.sparsity)


def test_a_result_is_copied_and_written_into_another_model():
    model, x = small_cnn().eval(), normal(70, 1, 6, 6)
    trim = net_trim(model, x, epsilon=0.3)
    twin = copy.deepcopy(trim)
    assert torch.equal(twin.weights, trim.weights) and torch.equal(twin.mask, trim.mask)
    assert twin.weights.data_ptr() != trim.weights.data_ptr()
    twin.weights.zero_()
    assert trim.weights.any()
    pruned, plain = written(model, trim), small_cnn().eval()
    plain.load_state_dict(pruned.state_dict(), strict=True)
    by_parts = small_cnn().eval()
    by_parts.load_state_dict(trim.parameters(), strict=False)
    for other in (plain, by_parts):
        assert torch.equal(other(x), pruned(x))
    assert float((plain(x) - model(x)).detach().norm()) == pytest.approx(trim.discrepancy)


class SquareAndTransposed(nn.Module):
    """A square weight that is used again as its transpose, which lies in the same place."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return nn.functional.linear(self.a(x).relu(), self.a.weight.T)


def test_a_transpose_is_not_taken_for_the_weight_itself():
    model = seeded(SquareAndTransposed, 36)
    x = normal(40, 3)
    trim = net_trim(model, x, epsilon=0.3)
    (layer,) = trim.layers
    assert layer.kind == "relu"  # of the one direct use
    assert trim.bound is None


class OneKernelTwoGroups(nn.Module):
    """One kernel of shape [4, 2, 1], for two channels whole and for four in two groups."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(2, 4, 1, bias=False)
        self.b = nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(F.conv1d(h, self.a.weight, groups=2).relu().mean(dim=2))


def test_a_kernel_with_different_groups_is_skipped_with_the_reason():
    trim = net_trim(seeded(OneKernelTwoGroups), normal(30, 2, 5), epsilon=0.2)
    assert trim.skipped["a.weight"] == "it is called with different numbers of groups"
    assert [layer.weight for layer in trim.layers] == ["b.weight"]
