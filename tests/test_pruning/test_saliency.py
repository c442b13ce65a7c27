import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from hessian import NonDeterministicError, NonFiniteError, gauss_newton_operator, hessian_operator
from pruning import DenseDistance
from pruning.saliency import kronecker_factors, kronecker_saliency
from tests.cases import seeded


def dense(operator):
    return operator @ torch.eye(operator.size, dtype=operator.dtype)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(activation=None):
    middle = activation or nn.Tanh()
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), middle, nn.Linear(5, 3)))


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_distance_and_gradient_vanish_at_the_dense_network_and_its_hessian_is_gauss_newton(kind):
    distance = DenseDistance(mlp(), normal(12, 4), kind=kind)
    w = distance.weights()
    loss, gradient = distance.loss_and_gradient(w)
    assert abs(loss) < 1e-15 and float(gradient.abs().max()) < 1e-15
    H, G = dense(hessian_operator(distance, w)), dense(gauss_newton_operator(distance, w))
    assert_close(H, G, atol=1e-12, rtol=0)
    assert distance.loss(w + 0.3) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distance_is_the_divergence_of_the_two_distributions(temperature):
    model, x = mlp(), normal(12, 4)
    distance = DenseDistance(model, x, temperature=temperature, batch_size=5)
    w = distance.weights() + 0.2
    with torch.no_grad():
        logits = [torch.func.functional_call(model, distance.unflatten(w), x), model(x)]
    pruned, target = ((z / temperature).log_softmax(dim=1) for z in logits)
    expected = F.kl_div(pruned, target, log_target=True, reduction="batchmean")
    assert distance.loss(w) == pytest.approx(float(expected), rel=1e-12)


def test_divergence_of_tokens_is_a_mean_over_their_places():
    model = seeded(lambda: nn.Conv1d(2, 3, 1))
    x = normal(6, 2, 5)
    distance = DenseDistance(model, x)
    w = distance.weights() * 0.5
    flat = DenseDistance(seeded(lambda: nn.Linear(2, 3)), x.movedim(1, 2).reshape(30, 2))
    flat.write_(distance.weights())
    again = DenseDistance(flat.model, x.movedim(1, 2).reshape(30, 2))
    assert distance.loss(w) == pytest.approx(again.loss(w), rel=1e-12)


@pytest.mark.parametrize(("kind", "temperature"), [("kl", 1.0), ("kl", 3.0), ("squared", 1.0)])
def test_drawn_slopes_have_the_hessian_as_their_covariance(kind, temperature):
    model = nn.Identity()
    model.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    z = normal(1, 3)
    distance = DenseDistance(model, z, kind=kind, temperature=temperature)
    target = z.clone()

    def loss(v):
        return distance.total_from_output(v[None], (z, target))

    expected = torch.autograd.functional.hessian(loss, z[0])
    u = distance.drawn_slopes(z.expand(40_000, 3), torch.Generator().manual_seed(0))
    found = u.T @ u / len(u)
    # Fourth moments are a few times the variances: 5 standard errors.
    assert_close(found, expected, atol=0.04 * float(expected.max()), rtol=0)
    assert float(u.mean(dim=0).abs().max()) < 0.02


def test_inputs_of_every_shape_are_the_same_calibration():
    model, x = mlp(), normal(12, 4)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.zeros(12)), batch_size=5
    )
    ways = [
        DenseDistance(model, x),
        DenseDistance(model, (x,), batch_size=7),
        DenseDistance(model, [x[:6], x[6:]]),
        DenseDistance(model, (x, torch.zeros(12)), labelled=True),
        DenseDistance(model, loader, labelled=True),
    ]
    w = ways[0].weights() + 0.1
    losses = [way.loss(w) for way in ways]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)


def test_bad_calibration_is_refused(unchecked_shapes):
    model, x = mlp(), normal(12, 4)
    with pytest.raises(ValueError, match="`kind` must be one of"):
        DenseDistance(model, x, kind="cosine")
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        DenseDistance(model, x, temperature=0.0)
    with pytest.raises(ValueError, match='1 unless `kind` is "kl"'):
        DenseDistance(model, x, kind="squared", temperature=2.0)
    with pytest.raises(NonFiniteError, match="dense network's outputs"):
        DenseDistance(model, x / 0.0)
    with pytest.raises(TypeError, match="got a mapping"):
        DenseDistance(model, [{"x": x}])
    with pytest.raises(TypeError, match="must return one tensor"):
        DenseDistance(nn.LSTM(4, 3).double(), x[:, None])
    with pytest.raises(ValueError, match="tensors of one length"):
        DenseDistance(model, (x, x[1:]))
    with pytest.raises(NonDeterministicError, match="training mode"):
        DenseDistance(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(), x)


def test_saliency_of_a_linear_model_is_the_dense_optimal_brain_surgeon():
    model = seeded(lambda: nn.Linear(4, 3))
    x = normal(20, 4)
    distance = DenseDistance(model, x, kind="squared", batch_size=8)
    w = distance.weights()
    G = dense(gauss_newton_operator(distance, w))
    found = kronecker_saliency(w, kronecker_factors(distance, w), distance, damping=1e-12)
    assert_close(found, w.square() / torch.linalg.inv(G).diagonal(), rtol=1e-8, atol=0)


def test_damping_is_a_share_of_the_mean_second_moment():
    distance = DenseDistance(seeded(lambda: nn.Linear(4, 3, bias=False)), normal(20, 4))
    w = distance.weights()
    factors = kronecker_factors(distance, w)
    (layer,) = factors.layers
    assert layer.bias is None
    found = kronecker_saliency(w, factors, distance, damping=0.1).view(3, 4)
    A = layer.inputs + 0.1 * layer.inputs.diagonal().mean() * torch.eye(4).double()
    expected = torch.outer(layer.slopes, 1 / torch.linalg.inv(A).diagonal())
    assert_close(found, w.view(3, 4).square() * expected)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(2, 3, 3),
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
        lambda: nn.Conv2d(2, 3, (3, 5), padding="same", bias=False),
        lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv3d(2, 2, 2, stride=2),
    ],
)
def test_convolutions_are_layers_of_patches(layer):
    model = seeded(layer)
    sizes = {nn.Conv1d: (6,), nn.Conv2d: (6, 7), nn.Conv3d: (4, 4, 4)}[type(model)]
    distance = DenseDistance(model, normal(5, 2, *sizes), kind="squared", batch_size=3)
    w = distance.weights()
    factors = kronecker_factors(distance, w)
    assert len(factors.layers) == 1
    assert_close(factors.diagonal, dense(gauss_newton_operator(distance, w)).diagonal())


def test_grouped_convolutions_have_a_diagonal_alone():
    distance = DenseDistance(seeded(lambda: nn.Conv1d(4, 6, 3, groups=2)), normal(12, 4, 7))
    w = distance.weights()
    factors = kronecker_factors(distance, w)
    assert factors.layers == ()
    assert_close(kronecker_saliency(w, factors, distance), factors.diagonal * w.square())


def test_hidden_moments_are_those_of_the_activations():
    model, x = mlp(), normal(12, 4)
    distance = DenseDistance(model, x, batch_size=5)
    factors = kronecker_factors(distance, distance.weights(), num_draws=3)
    assert [(f.weight, f.bias) for f in factors.layers] == [
        ("0.weight", "0.bias"),
        ("2.weight", "2.bias"),
    ]
    for f, a in zip(factors.layers, (x, model[:2](x).detach()), strict=True):
        a = torch.cat([a, torch.ones(12, 1).double()], dim=1)
        assert_close(f.inputs, a.T @ a / 12)


def test_slopes_of_a_hidden_layer_average_to_the_curvature_at_its_outputs():
    model, x = mlp(), normal(12, 4)
    distance = DenseDistance(model, x.repeat(1000, 1))
    found = kronecker_factors(distance, distance.weights(), num_draws=4).layers[0].slopes
    s, expected = model[0](x).detach(), torch.zeros(5).double()
    for row in s:
        J = torch.autograd.functional.jacobian(lambda v: model[2](v.tanh()), row)
        p = model[2](row.tanh()).detach().softmax(dim=0)
        expected += (J.T @ (torch.diag(p) - torch.outer(p, p)) @ J).diagonal() / 12
    # 4000 draws of 12 samples: a relative standard error below 1 %.
    assert_close(found, expected, rtol=0.04, atol=0)


def test_activations_in_place_change_nothing():
    x = normal(12, 4)
    ways = [mlp(nn.ReLU(inplace=inplace)) for inplace in (False, True)]
    found = [kronecker_factors(d, d.weights()) for d in (DenseDistance(m, x) for m in ways)]
    assert_close(found[0].diagonal, found[1].diagonal)


def test_other_layers_have_an_unbiased_diagonal():
    model = seeded(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    )
    distance = DenseDistance(model, normal(30, 4), batch_size=1)
    w = distance.weights()
    norm = slice(25, 35)
    found = kronecker_factors(distance, w, num_draws=30).diagonal[norm]
    expected = dense(gauss_newton_operator(distance, w)).diagonal()[norm]
    # 900 squares, of slopes that differ by sample: a relative standard error near 6 %.
    assert_close(found, expected, rtol=0.25, atol=0)
    saliency = kronecker_saliency(w, kronecker_factors(distance, w), distance)
    assert torch.all(saliency >= 0) and torch.isfinite(saliency).all()


def test_attention_and_embeddings_have_saliencies():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.head(self.attention(x, x, x)[0].mean(dim=1))

    tokens = torch.arange(24).reshape(6, 4) % 6
    distance = DenseDistance(seeded(Attentive).eval(), tokens)
    w = distance.weights()
    factors = kronecker_factors(distance, w)
    assert [f.weight for f in factors.layers] == ["head.weight"]
    saliency = distance.unflatten(kronecker_saliency(w, factors, distance))
    assert torch.all(saliency["embedding.weight"][:6] > 0)
    assert torch.all(saliency["attention.in_proj_weight"][8:] > 0)  # what becomes the values
    assert not saliency["embedding.weight"][6].any()  # a token that never comes


def test_draws_are_repeatable_and_leave_the_global_state():
    distance = DenseDistance(mlp(), normal(12, 4))
    w, state = distance.weights(), torch.get_rng_state()
    first, again, other = (kronecker_factors(distance, w, seed=s).diagonal for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="`num_draws` must be at least 1"):
        kronecker_factors(distance, w, num_draws=0)
    with pytest.raises(ValueError, match="`damping` must be positive"):
        kronecker_saliency(w, kronecker_factors(distance, w), distance, damping=0.0)
