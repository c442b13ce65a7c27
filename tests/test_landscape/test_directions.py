"""Directions against loops over filters, written out, and against what other tools get wrong."""

import math

import pytest
import torch
from torch import nn

from hessian import Objective, Operator, hessian_operator, leading_eigenspace
from landscape import (
    Directions,
    Plane,
    difference_directions,
    eigenvector_directions,
    evaluate,
    grid,
    orthogonalized,
    principal_components,
    random_directions,
)
from tests.cases import seeded


class Net(nn.Module):
    """One of everything that a filter can be, a buffer, and a tied weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.read = nn.Linear(6, 5)
        self.tied = nn.Linear(6, 5, bias=False)
        self.tied.weight = self.read.weight
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        return x


@pytest.fixture
def net():
    return seeded(Net).eval()


def parts(net, vector):
    """A flat vector cut up by hand, in the order of the parameters, tied ones once."""
    found, start = {}, 0
    for name, p in net.named_parameters():
        found[name] = vector[start : start + p.numel()].reshape(p.shape)
        start += p.numel()
    assert start == len(vector)
    return found


def filters(name, tensor):
    """All filters of a parameter, cut out one by one."""
    if name == "up.weight":  # [in, out of a group, k, k] in two groups
        return [tensor[2 * g : 2 * g + 2, j] for g in range(2) for j in range(3)]
    return list(tensor) if tensor.ndim > 1 else [tensor]


@pytest.mark.parametrize("with_vectors", [False, True])
def test_every_filter_of_the_direction_is_as_long_as_that_of_the_weights(net, with_vectors):
    found = random_directions(net, num=2, seed=3, with_vectors=with_vectors)
    raw = random_directions(net, num=2, seed=3, with_vectors=True, normalization="none")
    for row, drawn in zip(found.vectors, raw.vectors, strict=True):
        drawn_parts = parts(net, drawn)
        for name, d in parts(net, row).items():
            p = net.get_parameter(name).detach()
            if p.ndim <= 1 and not with_vectors:
                assert not d.any()
                continue
            groups = zip(*(filters(name, t) for t in (d, p, drawn_parts[name])), strict=True)
            for of_d, of_p, of_draw in groups:
                expected = of_draw * of_p.norm() / of_draw.norm()
                torch.testing.assert_close(of_d, expected, rtol=1e-12, atol=1e-14)


def test_layers_weights_and_model_have_their_own_scale(net):
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    drawn = random_directions(net, num=1, seed=1, normalization="none", with_vectors=True)
    (raw,) = drawn.vectors
    layer, model, weight = (
        random_directions(net, num=1, seed=1, normalization=n, with_vectors=True).vectors[0]
        for n in ("layer", "model", "weight")
    )
    for name, d in parts(net, layer).items():
        p, own = net.get_parameter(name), parts(net, raw)[name]
        torch.testing.assert_close(d, (own / own.norm() * p.norm()).detach())
    # One norm over all tensors: a loop that divides by a norm a tensor is off by several per cent.
    torch.testing.assert_close(model, raw / raw.norm() * flat.norm())
    torch.testing.assert_close(weight, raw * flat)


def test_a_direction_covers_parameters_and_no_buffer(net):
    """Running statistics in a direction make variances negative and the loss NaN."""
    directions = random_directions(net, num=1)
    assert directions.size == sum(p.numel() for p in net.parameters())
    assert not any(
        d.any() for name, d in parts(net, directions.vectors[0]).items() if "norm" in name
    )


def batch_norm_directions(objective, w):
    """Two directions of every kind around the weights of a model with batch norm."""
    operator = hessian_operator(objective, w)
    points = w + torch.randn(5, len(w), generator=torch.Generator().manual_seed(1)).double()
    yield random_directions(objective)
    yield eigenvector_directions(leading_eigenspace(operator, k=2, which="both", tol=1e-3))
    yield principal_components(points).directions
    yield difference_directions(w, {"b": points[0], "c": points[1]})


def test_a_model_with_batch_norm_has_a_finite_loss_along_every_direction():
    """Directions over buffers would give negative variances, and NaN nearly everywhere."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                              nn.Linear(12, 2)).eval()
    )  # fmt: skip
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = Objective(model, nn.CrossEntropyLoss(), (x, torch.arange(8) % 2))
    w = objective.weights()
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for directions in batch_norm_directions(objective, w):
        assert directions.size == len(w)
        found = evaluate(objective, Plane.along(w, directions), grid(axis, axis))
        assert found.num_nonfinite == 0, directions.kind


def test_the_layout_is_that_of_the_objective():
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    x = torch.ones(4, 2, dtype=torch.float64)
    objective = Objective(model, nn.MSELoss(), (x, x), parameters="2.*")
    (d,) = random_directions(objective, num=1).vectors
    assert d.shape == (8,)
    norms = objective.unflatten(d)["2.weight"].norm(dim=1)
    torch.testing.assert_close(norms, model[2].weight.detach().norm(dim=1))
    at = 5 * objective.weights()
    (scaled,) = random_directions(objective, num=1, at=at).vectors
    torch.testing.assert_close(scaled, 5 * d)


def test_random_directions_are_gaussian_and_nearly_orthogonal():
    """Uniform draws on [0, 1] would have a cosine of 0.75."""
    model = nn.Linear(400, 250, bias=False)
    found = random_directions(model, normalization="none", num=2, seed=5)
    assert abs(float(found.cosines[0, 1])) < 5 / math.sqrt(found.size)
    d = found.vectors[0].double()
    moments = [float((d**k).mean()) for k in (1, 2, 3, 4)]
    # Five standard errors, √(var(z^k) / n), of moments of 100,000 standard normal numbers.
    errors = [math.sqrt(v / 1e5) * 5 for v in (1, 2, 15, 96)]
    assert all(abs(m - e) < s for m, e, s in zip(moments, (0, 1, 0, 3), errors, strict=True))


def test_filters_of_zeros_stay_and_zeros_can_be_kept(net):
    with torch.no_grad():
        net.conv.weight[1] = 0
        net.read.weight[0, :3] = 0
    free = parts(net, random_directions(net, num=1).vectors[0])
    assert not free["conv.weight"][1].any()
    assert free["read.weight"][0].all()
    kept = parts(net, random_directions(net, num=1, keep_zeros=True).vectors[0])
    assert torch.equal(kept["read.weight"] == 0, net.read.weight == 0)
    torch.testing.assert_close(
        kept["read.weight"].norm(dim=1), net.read.weight.detach().norm(dim=1)
    )


def test_seed_number_and_what_moves_do_not_change_a_draw(net):
    a = random_directions(net, num=3, seed=2).vectors
    b = random_directions(net, num=1, seed=2).vectors
    c = random_directions(net, num=1, seed=2, with_vectors=True).vectors
    assert torch.equal(a[:1], b)
    assert torch.equal(c[b != 0], b[b != 0])
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(b, random_directions(net, num=1, seed=3).vectors)


def test_the_global_generator_and_the_model_stay(net):
    state, before = torch.get_rng_state(), [p.clone() for p in net.parameters()]
    random_directions(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 0}, "`num` must be at least 1, got 0"),
        ({"at": torch.zeros(7).double()}, r"`at` must be a flat vector .* got shape \[7\]"),
    ],
)
def test_bad_arguments_are_named(net, change, message):
    with pytest.raises(ValueError, match=message):
        random_directions(net, **change)


def test_a_model_of_biases_alone_says_what_to_do():
    model = nn.LayerNorm(3)
    with pytest.raises(ValueError, match="Pass `with_vectors=True`"):
        random_directions(model)


def test_eigenvectors_from_both_ends_are_not_rescaled():
    """A rescaling by layer would turn them: their cosine to the true ones must be one."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(-4, 9, 30, dtype=torch.float64)
    H = Q @ torch.diag(values) @ Q.T
    operator = Operator(lambda v: H @ v, 30, H.dtype, H.device)
    found = eigenvector_directions(leading_eigenspace(operator, k=2, which="both", tol=1e-10))
    for d, true in zip(found.vectors, (Q[:, -1], Q[:, 0]), strict=True):
        assert abs(float(torch.dot(d, true))) == pytest.approx(1, abs=1e-9)
        assert d[d.abs().argmax()] > 0
    assert found.norms.tolist() == pytest.approx([1, 1])
    assert found.settings["eigenvalues"] == pytest.approx([9, -4])
    assert found.names == ("eigenvector of 9", "eigenvector of -4")


def test_orthogonalized_keeps_lengths_spans_and_the_cosines_from_before():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, 20, generator=generator, dtype=torch.float64) * torch.tensor(
        [[1.0], [50.0], [1e-3]], dtype=torch.float64
    )
    raw = Directions(vectors, "mine", ("a", "b", "c"))
    found = orthogonalized(raw)
    torch.testing.assert_close(found.norms, raw.norms)
    torch.testing.assert_close(found.cosines, torch.eye(3, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(found.cosines_before, raw.cosines)
    torch.testing.assert_close(found.vectors[0], vectors[0])
    # QR with a positive diagonal is Gram-Schmidt.
    Q, R = torch.linalg.qr(vectors.T)
    expected = (Q * R.diagonal().sign()).T * raw.norms[:, None]
    torch.testing.assert_close(found.vectors, expected)


def test_dependent_directions_are_named():
    v = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ValueError, match="c lies in the span of those before it"):
        orthogonalized(Directions(torch.stack([*v, v[0] - v[1]]), "mine", ("a", "b", "c")))


def test_models_of_other_architecture_have_no_difference():
    with pytest.raises(ValueError, match=r'`others\["B"\]` must have shape \[3\]'):
        difference_directions(torch.zeros(3), {"B": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"length, got 0\.0 for to B"):
        difference_directions(torch.zeros(3), {"B": torch.zeros(3)})


def test_provenance_tells_seed_normalisation_lengths_and_cosine():
    found = random_directions(nn.Linear(30, 30), seed=8)
    words = orthogonalized(found).provenance
    assert words["directions, seed"] == "8"
    assert words["directions, normalization"] == "filter"
    assert words["directions, lengths"] == ", ".join(f"{x:.6g}" for x in found.norms.tolist())
    cosine = float(found.cosines[0, 1])
    assert words["directions, largest cosine before orthogonalisation"] == f"{cosine:.3g}"
