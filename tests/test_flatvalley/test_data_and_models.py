import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import flatvalley.data
from flatvalley.data import CIFAR10_DEVIATION, CIFAR10_MEAN, load_dataset
from flatvalley.models import lenet_300_100, resnet20, resnet50, tanh_mlp
from flatvalley.run import DamagedFileError

REAL = flatvalley.data._root(None)


def test_digits_are_split_without_overlap_and_class_by_class():
    data = load_dataset("digits", dtype=torch.float64)
    assert len(data.train_inputs) + len(data.test_inputs) == 1797
    assert data.train_inputs.dtype == torch.float64
    assert float(data.train_inputs.min()) == 0.0
    assert float(data.train_inputs.max()) == 1.0
    shares = torch.bincount(data.test_labels, minlength=10) / torch.bincount(data.train_labels)
    assert torch.all((shares > 0.22) & (shares < 0.28))
    rows = {tuple(row) for row in data.train_inputs.tolist()}
    assert not rows & {tuple(row) for row in data.test_inputs.tolist()}


def test_the_split_is_the_same_every_time():
    first, second = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(first.train_inputs, second.train_inputs)
    assert torch.equal(first.test_labels, second.test_labels)


def test_unknown_data_name_lists_the_known_ones():
    with pytest.raises(ValueError, match='must be one of cifar10, digits, mnist, got "nope"'):
        load_dataset("nope")


def idx(array: np.ndarray) -> bytes:
    """The IDX format as its description has it, written independently of the reader."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_files(tmp_path) -> Path:
    """Tiny files in MNIST's layout; every pixel and label tells its place."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count in (("train", 5), ("t10k", 3)):
        images = np.arange(count * 784).reshape(count, 28, 28) % 251
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", range(count))):
            (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(idx(np.asarray(array))))
    return tmp_path


def test_mnist_files_are_read_pixel_by_pixel(mnist_files):
    data = load_dataset("mnist", root=mnist_files, dtype=torch.float64)
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((5, 1, 28, 28), (3, 1, 28, 28))
    for inputs in (data.train_inputs, data.test_inputs):
        pixels = ((inputs * 0.3081 + 0.1307) * 255).round().reshape(-1)
        assert pixels.tolist() == [i % 251 for i in range(inputs.numel())]
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert data.test_labels.tolist() == [0, 1, 2]
    assert (data.name, data.num_classes, data.train_labels.dtype) == ("mnist", 10, torch.int64)


def test_the_folder_can_be_named_by_the_environment(mnist_files, monkeypatch):
    monkeypatch.setenv("FLATVALLEY_DATA", str(mnist_files))
    assert len(load_dataset("mnist").train_inputs) == 5


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"not gzip", "is no gzip file, or cut short"),
        (IMAGES, gzip.compress(idx(np.zeros((5, 28, 28))))[:-12], "is no gzip file, or cut short"),
        (IMAGES, gzip.compress(idx(np.zeros((5, 28, 28)))[:-1]), "3,920 bytes .* got 3,919"),
        (IMAGES, gzip.compress(idx(np.zeros((5, 28, 28))) + b"0"), "3,920 bytes .* got 3,921"),
        (IMAGES, gzip.compress(idx(np.zeros((5, 32, 32)))), r"3 dimensions \(any, 28, 28\), but"),
        (IMAGES, gzip.compress(idx(np.zeros(5))), r"3 dimensions \(any, 28, 28\), but"),
        (IMAGES, gzip.compress(b"\0\0\x0d\3" + idx(np.zeros((5, 28, 28)))[4:]), "unsigned bytes"),
        (IMAGES, gzip.compress(b""), "its header is "),
        (IMAGES, gzip.compress(idx(np.zeros((4, 28, 28)))), "4 train images and 5 labels"),
        (LABELS, gzip.compress(idx(np.full(5, 10))), r"labels from 0 to 9, got \[10\]"),
    ],
    ids=[
        "another format",
        "half a file",
        "one byte less",
        "one byte more",
        "larger images",
        "one dimension",
        "floating point",
        "nothing",
        "an image less",
        "eleventh class",
    ],
)
def test_a_damaged_mnist_file_is_named(mnist_files, name, content, message):
    (mnist_files / "mnist" / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=message):
        load_dataset("mnist", root=mnist_files)


def picture(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def write_parquet(path: Path, pixels: np.ndarray, labels: list[int]) -> None:
    images = [{"bytes": picture(image), "path": f"{i}.png"} for i, image in enumerate(pixels)]
    pq.write_table(pa.table({"img": images, "label": pa.array(labels, pa.int64())}), path)


@pytest.fixture
def cifar_files(tmp_path) -> Path:
    """Tiny Parquet files in the layout of the hub; the training split in two shards."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3))
    write_parquet(folder / "train-00001-of-00002.parquet", pixels[2:3], [7])
    write_parquet(folder / "train-00000-of-00002.parquet", pixels[:2], [3, 9])
    write_parquet(folder / "test.parquet", pixels[3:], [0, 1, 2])
    return tmp_path


def test_cifar10_files_are_read_channel_by_channel(cifar_files):
    data = load_dataset("cifar10", root=cifar_files, dtype=torch.float64)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3))
    inputs = torch.cat([data.train_inputs, data.test_inputs])
    for channel in range(3):
        scaled = inputs[:, channel] * CIFAR10_DEVIATION[channel] + CIFAR10_MEAN[channel]
        assert np.array_equal((scaled * 255).round().numpy(), pixels[..., channel])
    assert data.train_labels.tolist() == [3, 9, 7]
    assert data.test_labels.tolist() == [0, 1, 2]
    assert data.train_inputs.is_contiguous()


def test_a_grey_picture_becomes_three_equal_channels(cifar_files):
    write_parquet(cifar_files / "cifar10" / "test.parquet", np.full((1, 32, 32), 128), [4])
    (image,) = load_dataset("cifar10", root=cifar_files, dtype=torch.float64).test_inputs
    expected = (128 / 255 - torch.tensor(CIFAR10_MEAN)) / torch.tensor(CIFAR10_DEVIATION)
    torch.testing.assert_close(image[:, 5, 5].float(), expected)


def test_damaged_cifar10_files_are_named(cifar_files):
    test = cifar_files / "cifar10" / "test.parquet"
    for pixels, labels, message in (
        (np.zeros((1, 28, 28, 3)), [4], "image files of 32x32 pixels"),
        (np.zeros((1, 32, 32, 3)), [10], r"labels from 0 to 9, got \[10\]"),
    ):
        write_parquet(test, pixels, labels)
        with pytest.raises(DamagedFileError, match=message):
            load_dataset("cifar10", root=cifar_files)
    for content in (b"", b"PAR1 and nothing else"):
        test.write_bytes(content)
        with pytest.raises(DamagedFileError, match="must be a Parquet file"):
            load_dataset("cifar10", root=cifar_files)


def test_cifar10_without_its_readers_says_what_to_install(cifar_files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'flatvalley\[data\]'"):
        load_dataset("cifar10", root=cifar_files)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_files_say_where_to_put_them(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not there\. Put the file there, or name"):
        load_dataset(name, root=tmp_path)


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason=f"MNIST is not in {REAL}")
def test_mnist_itself_is_complete_and_normalised():
    data = load_dataset("mnist")
    assert (len(data.train_inputs), len(data.test_inputs)) == (60_000, 10_000)
    # Published counts of the ten classes, whatever the order of the images.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(data.train_labels).tolist() == counts
    # The constants have four digits.
    assert float(data.train_inputs.mean()) == pytest.approx(0.0, abs=3e-4)
    assert float(data.train_inputs.std()) == pytest.approx(1.0, abs=3e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason=f"CIFAR-10 (JPEG) is not in {REAL}")
def test_cifar10_jpeg_itself_is_complete_and_nearly_normalised():
    data = load_dataset("cifar10")
    assert (len(data.train_inputs), len(data.test_inputs)) == (50_000, 10_000)
    assert torch.bincount(data.train_labels).tolist() == [5000] * 10
    # The constants are those of the original images; compression smooths by less than 1 %.
    assert torch.all(data.train_inputs.mean(dim=(0, 2, 3)).abs() < 1e-3)
    assert torch.all((data.train_inputs.std(dim=(0, 2, 3)) - 1).abs() < 1e-2)


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
