"""Second derivatives of convolution and frozen batch norm, against finite differences and torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev

from hessian import Objective
from hessian.convolutions import convolution, frozen_batch_norm
from hessian.double_backward import differentiable_twice

GEOMETRIES = {
    "plain": {},
    "strided, padded": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "no bias": {"bias": False},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
}


def made(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, True), (True, False, False)])
@pytest.mark.parametrize(
    ("dimensions", "geometry"),
    [
        (1, ([2], [1], [1], 1)),
        (2, ([1, 1], [0, 1], [1, 1], 2)),
        (2, ([2, 1], [2, 0], [2, 1], 1)),
        (3, ([1, 2, 1], [1, 0, 0], [1, 1, 1], 1)),
    ],
)
def test_both_derivatives_of_a_convolution_are_exact(dimensions, geometry, wanted):
    x = made(2, 4, *[5] * dimensions).requires_grad_(wanted[0])
    W = made(4, 4 // geometry[3], *[2] * dimensions, seed=1).requires_grad_(wanted[1])
    bias = made(4, seed=2).requires_grad_(wanted[2])
    inputs = (x.detach().requires_grad_(wanted[0]), W, bias)

    def apply(x, W, bias):
        return convolution(x, W, bias, geometry)

    assert gradcheck(apply, inputs)
    assert gradgradcheck(apply, inputs)


def test_both_derivatives_of_a_convolution_without_bias_are_exact():
    inputs = made(2, 2, 4, 4), made(3, 2, 2, 2, seed=1)

    def apply(x, W):
        return convolution(x, W, None, ([1, 1], [1, 1], [1, 1], 1))

    assert gradcheck(apply, inputs)
    assert gradgradcheck(apply, inputs)


@pytest.mark.parametrize("shape", [(4, 3), (3, 3, 4), (2, 3, 3, 2)])
def test_both_derivatives_of_frozen_batch_norm_are_exact(shape):
    inputs = made(*shape), made(3, seed=1), made(3, seed=2)
    assert gradcheck(frozen_batch_norm, inputs)
    assert gradgradcheck(frozen_batch_norm, inputs)


def product(model, batch, *, substituted):
    """H v by plain double backward, with torch's own layers or with ours."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    vectors = [made(*p.shape, seed=7, grad=False) for p in parameters]

    def run():
        loss = F.cross_entropy(model(batch[0]), batch[1])
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return loss, torch.autograd.grad(gradients, parameters, vectors, materialize_grads=True)

    if not substituted:
        return run()
    with differentiable_twice():
        return run()


def network(*layers, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(*[layer() for layer in layers]).double().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)
                if module.affine:
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)
    return model


def head():
    return [nn.Tanh, lambda: nn.AdaptiveAvgPool2d(2), nn.Flatten, lambda: nn.LazyLinear(3)]


BATCH = made(6, 4, 6, 6, grad=False), torch.arange(6) % 3


def agrees(model):
    model(BATCH[0])  # lazy layers
    loss, ours = product(model, BATCH, substituted=True)
    expected_loss, expected = product(model, BATCH, substituted=False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("normalised", [False, True])
def test_products_through_layers_equal_torchs(options, normalised):
    norm = [lambda: nn.BatchNorm2d(8)] if normalised else []
    agrees(network(lambda: nn.Conv2d(4, 8, 3, **options), *norm, *head()))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
def test_products_through_batch_norm_in_front_equal_torchs(options):
    agrees(
        network(lambda: nn.BatchNorm2d(4, **options), nn.Tanh, lambda: nn.Conv2d(4, 8, 3), *head())
    )


class UsedTwice(nn.Module):
    """The convolution's output goes into batch norm and past it."""

    def __init__(self, *, changed=False):
        super().__init__()
        self.conv, self.norm, self.changed = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            changed,
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        y = self.conv(x)
        if self.changed:
            y.mul_(2.0)
        z = self.norm(y).tanh() + y
        return self.head(z.mean(dim=(2, 3)))


@pytest.mark.parametrize("changed", [False, True])
def test_an_output_that_is_used_or_changed_elsewhere_is_right(changed):
    agrees(network(lambda: UsedTwice(changed=changed)))


def test_an_input_changed_in_place_after_its_convolution_is_right():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
            self.conv.requires_grad_(False)

        def forward(self, x):
            x = x.clone()
            out = self.conv(x)
            x.mul_(2.0)
            return self.head(self.norm(out).tanh().mean(dim=(2, 3))) + x.mean(dim=(2, 3))[:, :3]

    agrees(network(Changed))


def test_another_batch_norm_between_leaves_the_first_convolution_alone():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            first, second = self.a(x), self.b(x)
            return self.head((self.norm(first).tanh() * second).mean(dim=(2, 3)))

    agrees(network(Crossed))


def test_unbatched_images_are_left_to_torch():
    conv = network(lambda: nn.Conv2d(4, 2, 3))
    with differentiable_twice():
        ours = conv(BATCH[0][0])
    torch.testing.assert_close(ours, conv(BATCH[0][0]))


def test_batch_statistics_are_left_to_torch():
    norm = nn.BatchNorm2d(4, track_running_stats=False).double()
    with differentiable_twice():
        ours = norm(BATCH[0])
    assert torch.equal(ours, norm(BATCH[0]))


def test_graphs_keep_no_sums_in_front_of_batch_norm():
    """The output of a convolution that batch norm follows is not saved, its normalised form is."""
    model = network(lambda: nn.Conv2d(4, 8, 3), lambda: nn.BatchNorm2d(8), *head())
    model(BATCH[0])
    conv = model[0](BATCH[0]).detach()
    for substituted in (False, True):
        saved = []

        def note(tensor, saved=saved):
            saved.append(tensor.detach().clone())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            product(model, BATCH, substituted=substituted)
        found = any(t.shape == conv.shape and torch.allclose(t, conv) for t in saved)
        assert found is not substituted


def test_the_whole_network_has_one_hessian():
    """Through the objective, against a dense Hessian by torch's own derivatives."""
    model = network(
        lambda: nn.Conv2d(4, 2, 3, stride=2), lambda: nn.BatchNorm2d(2), nn.Softplus, *head()[1:]
    )
    model(BATCH[0])
    objective = Objective(model, nn.CrossEntropyLoss(), BATCH)
    w = objective.weights()

    def loss(w):
        return F.cross_entropy(
            functional_call(model, objective.unflatten(w), (BATCH[0],)), BATCH[1]
        )

    H = jacrev(grad(loss))(w)
    for j in range(0, len(w), 5):
        e = torch.zeros_like(w)
        e[j] = 1.0
        torch.testing.assert_close(objective.hessian_product(w, e), H[:, j], rtol=1e-9, atol=1e-11)
