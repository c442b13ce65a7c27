import pytest
import torch

from flatvalley.models import lenet_300_100, resnet20, resnet50, tanh_mlp

MODELS = {
    "tanh_mlp": lambda seed: tanh_mlp([4, 3, 2], seed=seed, dtype=torch.float64),
    "lenet_300_100": lambda seed: lenet_300_100(seed=seed, dtype=torch.float64),
    "resnet20": lambda seed: resnet20(seed=seed, dtype=torch.float64),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_start_from_their_seed_and_leave_the_random_state_alone(name):
    state = torch.get_rng_state()
    first, second, other = (MODELS[name](seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b)
        # Batch norm starts from ones and zeros whatever the seed.
        assert not torch.equal(a, c) or (name == "resnet20" and a.ndim == 1)


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
