import copy

import pytest
import torch
from torch import Tensor, nn

from flatvalley.models import (
    MODELS,
    build_named_model,
    lenet_5,
    lenet_300_100,
    prepare_model,
    resnet20,
    resnet50,
    tanh_mlp,
    vgg16,
    vgg16_imagenet,
    wrn_28_10,
)
from flatvalley.models.start import convolution, seeded

STARTED = {
    "tanh_mlp": lambda seed: tanh_mlp([4, 3, 2], seed=seed, dtype=torch.float64),
    "lenet_300_100": lambda seed: lenet_300_100(seed=seed, dtype=torch.float64),
    "lenet_5": lambda seed: lenet_5(seed=seed, dtype=torch.float64),
    "resnet20": lambda seed: resnet20(seed=seed, dtype=torch.float64),
    "vgg16": lambda seed: vgg16(seed=seed, batch_norm=True, dtype=torch.float64),
}


@pytest.mark.parametrize("name", STARTED)
def test_models_start_from_their_seed_and_leave_the_random_state_alone(name):
    state = torch.get_rng_state()
    first, second, other = (STARTED[name](seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.training
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b)
        # Batch norm, and biases of convolutions, start from ones or zeros whatever the seed.
        constant = a.ndim == 1 and bool(((a == 0) | (a == 1)).all())
        assert not torch.equal(a, c) or (constant and name in ("resnet20", "vgg16"))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "expected", "image"),
    [
        ("lenet-300-100", 266_610, (1, 28, 28)),
        ("lenet-5", 431_080, (1, 28, 28)),
        ("resnet20", 269_722, (3, 32, 32)),
        ("vgg16", 15_245_130, (3, 32, 32)),
        ("vgg16-bn", 15_253_578, (3, 32, 32)),
        ("wrn-28-10", 36_479_194, (3, 32, 32)),
        ("wrn-28-10-late-stride", 36_489_290, (3, 32, 32)),
    ],
)
def test_named_models_have_the_published_sizes(name, expected, image):
    with torch.device("meta"):  # shapes without numbers
        model = build_named_model(name, seed=0)
        assert size(model) == expected
        assert model(torch.zeros(2, *image)).shape == (2, 10)


def test_imagenets_models_have_the_published_sizes():
    # Without memory: VGG16 alone takes half a gigabyte.
    with torch.device("meta"):
        assert size(vgg16_imagenet(seed=0)) == 138_357_544
        assert size(vgg16_imagenet(seed=0, batch_norm=True)) == 138_365_992
        assert size(build_named_model("resnet50", seed=0)) == 25_557_032


def test_classes_can_be_chosen_and_unknown_names_list_the_known_ones():
    with torch.device("meta"):
        for name in MODELS:
            bias = list(build_named_model(name, seed=0, num_classes=3).parameters())[-1]
            assert bias.shape == (3,)
        # The paper on directional pruning: 36,546,980 weights for CIFAR-100.
        assert size(wrn_28_10(seed=0, num_classes=100, late_stride=True)) == 36_546_980
    with pytest.raises(
        ValueError, match=r'`model` must be one of digits-mlp, lenet-300-100, .* got "alexnet"'
    ):
        build_named_model("alexnet", seed=0)
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, got 0"):
        build_named_model("lenet-5", seed=0, num_classes=0)
    assert {"lenet-300-100", "lenet-5", "resnet20", "vgg16", "wrn-28-10", "resnet50"} <= set(MODELS)


def test_mlp_weights_start_uniform_within_one_over_root_fan_in():
    weights = tanh_mlp([64, 50, 10], seed=0)[0].weight.detach()
    assert float(weights.abs().max()) <= 1 / 8
    # The standard deviation of a uniform on ±b is b / √3; 3,200 draws know it to 2 %.
    assert float(weights.std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.06)


@pytest.mark.parametrize("sizes", [[4], [4, 0, 2]])
def test_mlp_without_two_positive_widths_is_refused(sizes):
    with pytest.raises(ValueError, match="`sizes` must be two or more positive widths"):
        tanh_mlp(sizes, seed=0)


def test_lenet_300_100_is_three_layers_with_relu():
    model, x = lenet_300_100(seed=0, dtype=torch.float64), torch.rand(3, 1, 28, 28).double()
    out = x.reshape(3, 784)
    parameters = list(model.parameters())
    assert [list(p.shape) for p in parameters[::2]] == [[300, 784], [100, 300], [10, 100]]
    for i in (0, 2, 4):
        out = out @ parameters[i].T + parameters[i + 1]
        out = out.clamp(min=0) if i < 4 else out
    torch.testing.assert_close(model(x), out)


def test_resnet20_has_the_layers_of_the_paper():
    model = resnet20(seed=0).eval()
    # Table 6 of the paper, one line a stage: 1 + 6 convolutions on 32x32 maps, 6 on 16x16 and on
    # 8x8, then the linear layer; shortcuts without weights.
    sizes: list[tuple[int, int]] = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[1:3])))
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(16, 32)] * 7 + [(32, 16)] * 6 + [(64, 8)] * 6
    # 3·16·9 + 6·16²·9 + (16·32 + 5·32²)·9 + (32·64 + 5·64²)·9, batch norm, and the linear layer.
    assert sum(p.numel() for p in model.parameters()) == 267_696 + 2 * 688 + 650


def test_resnet20_shortcuts_carry_the_input_into_the_middle_channels():
    block = resnet20(seed=0, dtype=torch.float64).eval()[6]
    with torch.no_grad():
        block.bn2.weight.zero_()  # silences the convolutions: what is left is the shortcut
    x = torch.rand(2, 16, 32, 32, dtype=torch.float64)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_resnet20_weights_start_as_he_et_al_draw_them():
    weights = resnet20(seed=0)[9].conv1.weight.detach()
    assert list(weights.shape) == [64, 32, 3, 3]
    # Standard deviation √(2 / (9 · 64)), by the outputs; 18,432 draws know it to 0.5 %.
    assert float(weights.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_resnet50_has_the_published_size_and_names():
    model = resnet50(seed=0).eval()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert len(shapes) == 161
    assert shapes["layer1.0.downsample.0.weight"] == [256, 64, 1, 1]
    assert shapes["layer4.2.conv2.weight"] == [512, 512, 3, 3]
    assert shapes["fc.weight"] == [1000, 2048]
    maps: list[int] = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda _, __, out: maps.append(out.shape[-1]))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 1000)
    assert maps == [16, 8, 4, 2]


def test_lenet_5_is_the_network_of_the_pruning_literature():
    model, x = lenet_5(seed=0, dtype=torch.float64), torch.rand(3, 1, 28, 28).double()
    shapes = [list(p.shape) for p in model.parameters()]
    assert shapes[::2] == [[20, 1, 5, 5], [50, 20, 5, 5], [500, 800], [10, 500]]
    w1, b1, w2, b2, w3, b3, w4, b4 = model.parameters()

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """Convolution as a product with unfolded windows, ReLU, and the largest of each 2x2."""
        windows = x.unfold(2, 5, 1).unfold(3, 5, 1)
        out = torch.einsum("nchwij,ocij->nohw", windows, w) + b[:, None, None]
        n, c, h, _ = out.shape
        return out.clamp(min=0).reshape(n, c, h // 2, 2, h // 2, 2).amax(dim=(3, 5))

    out = layer(layer(x, w1, b1), w2, b2).reshape(3, 800)
    out = (out @ w3.T + b3).clamp(min=0) @ w4.T + b4
    torch.testing.assert_close(model(x), out)


def norm_names(prefix: str) -> list[str]:
    kept = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{prefix}.{name}" for name in kept]


def torchvision_resnet50() -> list[str]:
    """Entries of the published ``state_dict``, in their order."""
    names = ["conv1.weight", *norm_names("bn1")]
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for block in range(depth):
            for number in (1, 2, 3):
                names.append(f"layer{stage}.{block}.conv{number}.weight")
                names += norm_names(f"layer{stage}.{block}.bn{number}")
            if block == 0:
                names.append(f"layer{stage}.0.downsample.0.weight")
                names += norm_names(f"layer{stage}.0.downsample.1")
    return [*names, "fc.weight", "fc.bias"]


def torchvision_vgg16(batch_norm: bool) -> list[str]:
    """Entries of the published ``state_dict``: places of the layers in ``features``."""
    plain = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    normed = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
    names = []
    for place in normed if batch_norm else plain:
        names += [f"features.{place}.weight", f"features.{place}.bias"]
        if batch_norm:
            names += norm_names(f"features.{place + 1}")
    return names + [f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")]


def test_public_weights_fit_name_by_name():
    with torch.device("meta"):
        resnet = resnet50(seed=0).state_dict()
        vgg, vgg_bn = (vgg16_imagenet(seed=0, batch_norm=bn).state_dict() for bn in (False, True))
    assert len(torchvision_resnet50()) == 320
    assert list(resnet) == torchvision_resnet50()
    assert list(vgg) == torchvision_vgg16(False)
    assert list(vgg_bn) == torchvision_vgg16(True)
    shapes = {name: tuple(t.shape) for name, t in (resnet | vgg).items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["layer3.0.downsample.0.weight"] == (1024, 512, 1, 1)
    assert shapes["classifier.0.weight"] == (4096, 25088)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)


def test_vgg16_for_cifar_has_the_names_of_the_public_weights():
    names = [f"classifier.{i}.{kind}" for i in (1, 4, 6) for kind in ("weight", "bias")]
    for batch_norm in (False, True):
        expected = torchvision_vgg16(batch_norm)[:-6] + names
        with torch.device("meta"):
            assert list(vgg16(seed=0, batch_norm=batch_norm).state_dict()) == expected


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg16_halves_its_maps_five_times_and_drops_only_in_training(batch_norm):
    model = vgg16(seed=0, batch_norm=batch_norm)
    maps: list[int] = []
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.register_forward_hook(lambda _, __, out: maps.append(out.shape[-1]))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))
        assert not torch.equal(model.train()(x), model(x))
    assert maps[:5] == [16, 8, 4, 2, 1]


def test_vgg16_convolutions_start_as_he_et_al_draw_them_with_zero_biases():
    layer = vgg16(seed=0).requires_grad_(False).features[24]
    assert not layer.bias.any()
    # Standard deviation √(2 / (9 · 512)); 2.4 million draws know it to 0.05 %.
    assert float(layer.weight.std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.005)


@pytest.mark.parametrize("late", [False, True])
def test_a_wide_block_is_what_its_paper_says(late):
    block = wrn_28_10(seed=0, late_stride=late, dtype=torch.float64).eval()[5]
    x = torch.randn(2, 160, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    strides = (1, 2) if late else (2, 1)
    relu, conv = torch.relu, nn.functional.conv2d
    for layer in (block.bn1, block.bn2):
        layer.running_mean += 0.1
        layer.running_var *= 2
    active = relu(0.5**0.5 * (x - 0.1))
    out = conv(active, block.conv1.weight, block.conv1.bias, strides[0], 1)
    out = conv(relu(0.5**0.5 * (out - 0.1)), block.conv2.weight, block.conv2.bias, strides[1], 1)
    expected = out + conv(x if late else active, block.shortcut.weight, block.shortcut.bias, 2)
    # Batch norm adds 1e-5 to a variance of 2.
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert block(x).shape == (2, 320, 4, 4)


def test_dropout_of_the_wide_network_acts_between_convolutions_and_is_checked():
    block = wrn_28_10(seed=0, dropout=0.3)[2]
    seen: list[Tensor] = []
    block.dropout.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block(torch.rand(2, 160, 8, 8))
    # 20,480 draws know the share to 0.3 %.
    assert float((seen[0] == 0).double().mean()) == pytest.approx(0.3, abs=0.015)
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\)"):
            wrn_28_10(seed=0, dropout=dropout)


def test_seeds_are_drawn_without_touching_any_other_generator():
    torch.manual_seed(5)
    expected = convolution(3, 4, 3).weight
    torch.manual_seed(9)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), seeded(5):
        assert torch.equal(convolution(3, 4, 3).weight, expected)
        raise RuntimeError("stop")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "expected"), [("lenet-5", True), ("resnet20", True), ("lenet-300-100", False)]
)
def test_narrow_networks_are_laid_out_channels_last(name, expected):
    model = build_named_model(name, seed=0)
    weights = [p for p in prepare_model(model).parameters() if p.ndim == 4 and p.shape[1] > 1]
    last = [p.is_contiguous(memory_format=torch.channels_last) for p in weights]
    assert all(last) and bool(last) == expected
    assert list(model.state_dict()) == list(build_named_model(name, seed=0).state_dict())


def test_wide_networks_stay_as_they_are_unless_asked():
    with torch.device("meta"):
        model = vgg16(seed=0)
        assert prepare_model(model).features[2].weight.is_contiguous()
        prepare_model(model, channels_last=True)
    assert not model.features[2].weight.is_contiguous()


def test_the_layout_changes_neither_weights_nor_gradients():
    plain = resnet20(seed=0, dtype=torch.float64)
    fast = prepare_model(copy.deepcopy(plain))
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    for model in (plain, fast):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.equal(a, b)
        # Sums of up to 4,096 terms in another order.
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_computes_the_same_under_the_same_names():
    plain = lenet_5(seed=0)
    fast = prepare_model(copy.deepcopy(plain), compile=True)
    x = torch.rand(4, 1, 28, 28)
    for model in (plain, fast):
        model(x).square().sum().backward()
    for (name, a), (other, b) in zip(
        plain.named_parameters(), fast.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_a_network_is_compiled_as_one_graph_and_a_copy_of_it_is_its_own(monkeypatch):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    # Without the compiler proper, which takes seconds.
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=count))
    torch.compiler.reset()
    model = prepare_model(resnet20(seed=0), compile=True).eval()
    x = torch.rand(2, 3, 32, 32)
    z = model(x)
    assert len(graphs) == 1
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not torch.equal(other(x), z)
    assert torch.equal(model(x), z)
    torch.compiler.reset()
