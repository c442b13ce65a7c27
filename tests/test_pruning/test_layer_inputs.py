import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from hessian import NonDeterministicError, NonFiniteError, Objective
from pruning import DenseDistance
from pruning.layer_inputs import input_moments
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic_form(layer, parts):
    """Σ_r Δ_rᵀ A Δ_r for the rows Δ_r of values beside the weights, group by group."""
    rows = layer.rows(parts)
    groups = layer.moments.shape[0] if layer.moments.ndim == 3 else 1
    per_group = rows.reshape(groups, -1, rows.shape[1])
    A = layer.moments if layer.moments.ndim == 3 else torch.diag(layer.moments)[None]
    return float(torch.einsum("gri,gij,grj->", per_group, A, per_group))


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "tokens": (lambda: nn.Linear(4, 3), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 2), (2, 1)), (2, 6, 7)),
    "same": (lambda: nn.Conv2d(2, 4, (3, 4), padding="same", bias=False), (2, 6, 7)),
    "valid": (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (2, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, stride=2), (2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False), (3, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_moments_give_the_squared_change_of_the_output(name):
    build, shape = LAYERS[name]
    model, x = seeded(build), normal(7, *shape)
    distance = DenseDistance(model, x, kind="squared", batch_size=3)
    (layer,) = input_moments(distance)
    w, move = distance.weights(), normal(distance.size, seed=1)
    change = distance.output(w + move, (x, x)) - distance.output(w, (x, x))
    expected = float(change.square().sum()) / len(x)
    assert quadratic_form(layer, distance.unflatten(move)) == pytest.approx(expected, rel=1e-12)
    assert layer.num_rows == change.numel() // len(model.weight)


def test_hidden_layers_have_the_moments_of_their_activations():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, labels = normal(12, 4), torch.zeros(12, dtype=torch.long)
    objective = Objective(model, nn.CrossEntropyLoss(), (x, labels), batch_size=5)
    first, second = input_moments(objective)
    assert (first.weight, first.bias) == ("0.weight", "0.bias")
    assert (second.weight, second.bias) == ("2.weight", "2.bias")
    for layer, a in ((first, x), (second, model[:2](x).detach())):
        a = torch.cat([a, torch.ones(12, 1).double()], dim=1)
        assert_close(layer.moments[0], a.T @ a / 12)
        assert_close(layer.diagonals[0], a.square().mean(dim=0))
    moved = objective.weights() + 0.5
    a = torch.func.functional_call(
        model[:2], {name: p for name, p in objective.unflatten(moved).items() if name[0] == "0"}, x
    )
    (_, second) = input_moments(objective, moved)
    assert_close(second.moments[0][:-1, :-1], a.T @ a / 12)


class Attentive(nn.Module):
    """Attention of some tokens to others, and nothing else."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x, memory):
        return self.attention(x, memory, memory, need_weights=False)[0]


@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_attention_have_the_moments_of_what_they_project(bias):
    model = seeded(lambda: Attentive(bias=bias)).eval()
    x, memory = normal(6, 5, 4), normal(6, 3, 4, seed=1)
    distance = DenseDistance(model, (x, memory), kind="squared", batch_size=4)
    joint, last = input_moments(distance)
    assert joint.weight == "attention.in_proj_weight"
    assert joint.bias == ("attention.in_proj_bias" if bias else None)
    for A, a in zip(joint.moments, (x, memory, memory), strict=True):
        a = a.reshape(-1, 4)
        a = torch.cat([a, torch.ones(len(a), int(bias)).double()], dim=1)
        assert_close(A, a.T @ a / 6)
    # The output is linear in the last projection.
    w, move = distance.weights(), torch.zeros(distance.size).double()
    parts = distance.unflatten(move)
    last.write_rows_(parts, normal(*last.rows(parts).shape, seed=2))
    change = distance.output(w + move, (x, memory, x)) - distance.output(w, (x, memory, x))
    expected = float(change.square().sum()) / 6
    assert quadratic_form(last, parts) == pytest.approx(expected, rel=1e-10)


def test_attention_with_inputs_of_different_widths_has_three_layers():
    model = seeded(lambda: Attentive(kdim=3, vdim=3)).eval()
    x, memory = normal(6, 5, 4), normal(6, 3, 3, seed=1)
    layers = input_moments(DenseDistance(model, (x, memory), kind="squared"))
    names = [layer.weight.removeprefix("attention.") for layer in layers]
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    for layer, a in zip(layers, (x, memory, memory), strict=False):
        a = a.reshape(-1, a.shape[-1])
        assert layer.bias is None
        assert_close(layer.moments[0], a.T @ a / 6)


def test_transformer_layers_are_seen_although_torch_has_a_fast_path():
    build = lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)  # noqa: E731
    distance = DenseDistance(seeded(build).eval(), normal(6, 5, 4), kind="squared")
    assert [layer.weight for layer in input_moments(distance)] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]


def test_a_table_of_embeddings_has_the_counts_of_its_rows():
    model = seeded(lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 2)))
    tokens = torch.arange(24).reshape(6, 4) % 5
    distance = DenseDistance(model, tokens, kind="squared", batch_size=4)
    table, _ = input_moments(distance)
    assert_close(table.moments, tokens.reshape(-1).bincount(minlength=7).double() / 6)
    assert table.num_rows == 24
    move = normal(7, 3)
    parts = {"0.weight": torch.zeros(7, 3).double()}
    table.write_rows_(parts, move.T)
    assert torch.equal(parts["0.weight"], move) and torch.equal(table.rows(parts), move.T)
    expected = float(move[tokens].square().sum()) / 6
    assert quadratic_form(table, parts) == pytest.approx(expected, rel=1e-12)


class Tied(nn.Module):
    """Words in, logits of words out, by one table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def forward(self, tokens):
        return F.linear(self.table(tokens).mean(dim=1), self.table.weight)


def test_a_tied_table_counts_as_the_linear_layer():
    model, tokens = seeded(Tied), torch.arange(24).reshape(6, 4) % 5
    distance = DenseDistance(model, tokens, batch_size=3)
    (layer,) = input_moments(distance)
    a = model.table(tokens).mean(dim=1).detach()
    assert_close(layer.moments[0], a.T @ a / 6)
    assert layer.num_rows == 6


class Twice(nn.Module):
    """One weight in two calls, the second without the bias."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.layer(x).tanh(), self.layer.weight)


def test_all_calls_of_a_weight_count_and_a_bias_only_in_its_own():
    model, x = seeded(Twice), normal(12, 4)
    (layer,) = input_moments(DenseDistance(model, x, batch_size=5))
    first = torch.cat([x, torch.ones(12, 1).double()], dim=1)
    second = torch.cat([model.layer(x).tanh().detach(), torch.zeros(12, 1).double()], dim=1)
    assert_close(layer.moments[0], (first.T @ first + second.T @ second) / 12)
    assert layer.num_rows == 24


def test_only_selected_weights_are_listened_for():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    distance = DenseDistance(model, normal(12, 4), parameters=["2.weight"])
    (layer,) = input_moments(distance)
    assert (layer.weight, layer.bias) == ("2.weight", None)
    assert layer.moments.shape == (1, 5, 5)


def test_half_precision_is_added_up_in_single():
    model = seeded(lambda: nn.Linear(4, 3, bias=False)).bfloat16()
    x = normal(3000, 4).bfloat16()
    (layer,) = input_moments(DenseDistance(model, x, kind="squared"))
    x = x.double()
    assert layer.moments.dtype == torch.float32
    assert_close(layer.moments[0].double(), x.T @ x / 3000, rtol=1e-5, atol=1e-6)
    table = seeded(lambda: nn.Embedding(2, 3)).bfloat16()
    tokens = (torch.arange(1001) % 7 == 0).long()
    (layer,) = input_moments(DenseDistance(table, tokens, kind="squared"))
    assert_close(1001 * layer.moments, torch.tensor([858.0, 143.0]))


def test_everything_is_left_as_found_and_bad_input_refused(unchecked_shapes):
    model, x = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout())).eval(), normal(12, 4)
    distance = DenseDistance(model, x)
    w = distance.weights()
    input_moments(distance)
    assert torch.equal(w, distance.weights()) and not model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="one entry for each of the 15"):
        input_moments(distance, w[:-1])
    with pytest.raises(ValueError, match="`w` must be finite, got 1 entries"):
        input_moments(distance, torch.cat([w[:-1], w.new_tensor([torch.nan])]))
    huge = w.clone()
    huge[0] = 1e300
    deep = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    deep_distance = DenseDistance(deep, x, kind="squared")
    with pytest.raises(NonFiniteError, match=r"goes into the layer of `1\.weight`"):
        input_moments(deep_distance, torch.cat([huge, deep_distance.weights()[15:]]))
    model.train()
    with pytest.raises(NonDeterministicError, match="Dropout must be off"):
        input_moments(distance)
    norm = DenseDistance(seeded(lambda: nn.LayerNorm(4)), x, kind="squared")
    with pytest.raises(ValueError, match=r"calls a linear, convolution.* among weight, bias, got"):
        input_moments(norm)
