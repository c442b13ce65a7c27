import gzip
import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flatvalley.batches import ResidentBatches
from flatvalley.data import (
    CIFAR10_DEVIATION,
    CIFAR10_MEAN,
    default_root,
    load_dataset,
    split_off_validation,
)
from hessian import DamagedFileError

REAL = default_root()


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


def test_cifar10_images_are_decoded_once_a_process_unless_a_file_changes(cifar_files, monkeypatch):
    opened, really = [], Image.open
    monkeypatch.setattr("PIL.Image.open", lambda *args: opened.append(args) or really(*args))
    first = load_dataset("cifar10", root=cifar_files, dtype=torch.uint8)
    assert len(opened) == 6
    expected = first.train_inputs.clone(), first.train_labels.clone()
    first.train_inputs.zero_()
    first.train_labels.zero_()
    again = load_dataset("cifar10", root=cifar_files, dtype=torch.uint8)
    assert len(opened) == 6
    assert torch.equal(again.train_inputs, expected[0])
    assert torch.equal(again.train_labels, expected[1])
    write_parquet(cifar_files / "cifar10" / "test.parquet", np.full((2, 32, 32, 3), 9), [4, 5])
    changed = load_dataset("cifar10", root=cifar_files, dtype=torch.uint8)
    assert len(opened) == 8
    assert torch.equal(changed.test_inputs, torch.full((2, 3, 32, 32), 9, dtype=torch.uint8))


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


def test_unpacked_mnist_files_are_read_too(mnist_files):
    packed = load_dataset("mnist", root=mnist_files)
    for path in (mnist_files / "mnist").glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert torch.equal(load_dataset("mnist", root=mnist_files).train_inputs, packed.train_inputs)


def write_pickles(folder: Path, *, per_file: int = 2) -> np.ndarray:
    """Tiny files with the names and the layout of the original archive; return their images."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (6 * per_file, 3, 32, 32), dtype=np.uint8)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        rows = slice(number * per_file, (number + 1) * per_file)
        table = {
            b"batch_label": name.encode(),
            b"labels": [(3 * number + i) % 10 for i in range(per_file)],
            b"data": pixels[rows].reshape(per_file, 3072),
            b"filenames": [b"a.png"] * per_file,
        }
        (folder / name).write_bytes(pickle.dumps(table, protocol=2))
    return pixels


@pytest.mark.parametrize("place", ["cifar10/cifar-10-batches-py", "cifar-10-batches-py"])
def test_cifar10_pickles_are_read_channel_by_channel(tmp_path, place):
    pixels = write_pickles(tmp_path / place)
    data = load_dataset("cifar10", root=tmp_path, dtype=torch.uint8)
    assert np.array_equal(torch.cat([data.train_inputs, data.test_inputs]).numpy(), pixels)
    assert data.train_labels.tolist() == [0, 1, 3, 4, 6, 7, 9, 0, 2, 3]
    assert data.test_labels.tolist() == [5, 6]


def test_the_original_pickles_come_before_parquet_files(cifar_files):
    assert len(load_dataset("cifar10", root=cifar_files).train_inputs) == 3
    write_pickles(cifar_files / "cifar10" / "cifar-10-batches-py")
    assert len(load_dataset("cifar10", root=cifar_files).train_inputs) == 10


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"data": np.zeros((2, 3072), np.uint8)}, r"but holds data with data of shape \[2, 3072\]"),
        ({"data": np.zeros((2, 30), np.uint8), "labels": [1, 2]}, r"with data of shape \[2, 30\]"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [1, 2]}, r"shape \[1, 3072\]"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "n whole numbers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, r"from 0 to 9, got .*10\]"),
        ([1, 2], "but holds no dictionary"),
        ({"data": os.system}, "which could run code, and was not run"),
    ],
)
def test_a_damaged_cifar10_pickle_is_named(tmp_path, table, message):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    write_pickles(folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps(table, protocol=2))
    with pytest.raises(DamagedFileError, match=message):
        load_dataset("cifar10", root=tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3 is not there\. Put the file there"):
        load_dataset("cifar10", root=tmp_path)


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_bytes_normalised_by_the_batch_are_the_inputs_normalised(name, mnist_files, cifar_files):
    numbers = load_dataset(name, root=mnist_files, dtype=torch.float64)
    raw = load_dataset(name, root=mnist_files, dtype=torch.uint8)
    assert (raw.train_inputs.dtype, numbers.normalise) == (torch.uint8, None)
    batches = ResidentBatches(
        raw.train_inputs,
        raw.train_labels,
        5000,
        seed=0,
        normalise=raw.normalise,
        dtype=torch.float64,
        shuffle=False,
    )
    # Two roundings of numbers below 3.
    torch.testing.assert_close(batches.batch(0)[0], numbers.train_inputs, rtol=0, atol=1e-14)


def test_a_validation_split_is_stratified_and_leaves_the_test_set_out():
    data = load_dataset("digits")
    split = split_off_validation(data, 143, seed=3)
    assert (len(split.train_labels), len(split.test_labels)) == (1437 - 143, 143)
    together = torch.cat([split.train_inputs, split.test_inputs])
    assert torch.equal(together.unique(dim=0), data.train_inputs.unique(dim=0))
    counts = torch.bincount(data.train_labels, minlength=10) * 143 / 1437
    assert torch.all((torch.bincount(split.test_labels, minlength=10) - counts).abs() < 1)
    # What stays keeps its order, and labels stay with their inputs.
    rows = {tuple(row): i for i, row in enumerate(data.train_inputs.tolist())}
    places = [rows[tuple(row)] for row in split.train_inputs.tolist()]
    assert places == sorted(places)
    assert torch.equal(data.train_labels[places], split.train_labels)


def test_a_validation_split_follows_its_seed_alone():
    data, state = load_dataset("digits"), torch.get_rng_state()
    first, second, other = (split_off_validation(data, 0.25, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.test_inputs, second.test_inputs)
    assert not torch.equal(first.test_inputs, other.test_inputs)
    assert len(first.test_labels) == round(1437 / 4)


@pytest.mark.parametrize("size", [0, 1437, 0.0, 1e-6, 1.0, 1.5, -3])
def test_a_validation_split_without_samples_on_both_sides_is_refused(size):
    with pytest.raises(ValueError, match="`size` must be from 1 to 1436 samples, or a share in"):
        split_off_validation(load_dataset("digits"), size, seed=0)


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
