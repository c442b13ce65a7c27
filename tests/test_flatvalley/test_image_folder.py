import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flatvalley.data.image_folder
from flatvalley.data import ImageBatches, ImageFolder, load_image_folder
from flatvalley.data.image_folder import IMAGENET_DEVIATION, IMAGENET_MEAN, crop_box
from hessian import DamagedFileError

SIZES = [(20, 30), (31, 17), (16, 16), (40, 12)]


def write_images(folder: Path, num: int, first: int = 0) -> list[Image.Image]:
    """Images of different sizes with different pixels."""
    folder.mkdir(parents=True)
    images = []
    for number in range(num):
        width, height = SIZES[number % len(SIZES)]
        pixels = np.random.default_rng(first + number).integers(0, 256, (height, width, 3))
        images.append(Image.fromarray(pixels.astype(np.uint8)))
        images[-1].save(folder / f"{number:02}.png")
    return images


def middle(path: Path, size: int, shorter: int) -> np.ndarray:
    """The middle of an image whose shorter side was scaled, [3, size, size]."""
    with Image.open(path) as image:
        scale = shorter / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    left, top = (width - size) // 2, (height - size) // 2
    return pixels[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.fixture
def root(tmp_path) -> Path:
    write_images(tmp_path / "train" / "cat", 5)
    write_images(tmp_path / "train" / "dog" / "deeper", 4, first=10)
    write_images(tmp_path / "val" / "cat", 2, first=20)
    write_images(tmp_path / "val" / "dog", 1, first=30)
    (tmp_path / "train" / "dog" / "readme.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_scanned_class_by_class(root):
    folder = ImageFolder.scan(root / "train")
    assert folder.classes == ("cat", "dog")
    assert folder.labels.tolist() == [0] * 5 + [1] * 4
    assert [path.name for path in folder.paths[:2]] == ["00.png", "01.png"]
    assert len(folder) == 9


def test_images_in_memory_are_scaled_by_the_shorter_side_and_cut_in_the_middle(root):
    data = load_image_folder(root, size=16, threads=2)
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((9, 3, 16, 16), (3, 3, 16, 16))
    assert (data.train_inputs.dtype, data.num_classes, data.name) == (torch.uint8, 2, root.name)
    assert data.train_labels.tolist() == [0] * 5 + [1] * 4
    for path, inputs in zip(ImageFolder.scan(root / "train").paths, data.train_inputs, strict=True):
        assert np.array_equal(inputs.numpy(), middle(path, 16, 16))


def test_images_in_memory_can_be_normalised_numbers(root):
    raw = load_image_folder(root, size=8)
    numbers = load_image_folder(root, size=8, dtype=torch.float64)
    mean, deviation = (torch.tensor(x).double()[:, None, None] for x in raw.normalise)
    torch.testing.assert_close(
        numbers.test_inputs, (raw.test_inputs.double() / 255 - mean) / deviation
    )
    assert (raw.normalise, numbers.normalise) == ((IMAGENET_MEAN, IMAGENET_DEVIATION), None)


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_read(root, monkeypatch):
    monkeypatch.setattr(flatvalley.data.image_folder, "_free_memory", lambda: 12 * 3 * 16**2)
    assert len(load_image_folder(root, size=16).train_inputs) == 9
    with pytest.raises(ValueError, match=r"12 images of 0\.0 GB, and .* `ImageBatches`, which"):
        load_image_folder(root, size=17)
    with pytest.raises(ValueError, match="of memory are free"):
        load_image_folder(root, size=16, dtype=torch.float32)


def batches_of(root: Path, **options) -> ImageBatches:
    settings = {"seed": 3, "size": 8, "threads": 2} | options
    return ImageBatches(ImageFolder.scan(root / "train"), 4, **settings)


def test_a_step_of_files_is_known_without_the_steps_before_it(root):
    with batches_of(root) as forth, batches_of(root, threads=1, ahead=0) as back:
        found = [forth.batch(step) for step in range(7)]
        for step in (5, 0, 6, 2):
            x, y = back.batch(step)
            assert torch.equal(x, found[step][0])
            assert torch.equal(y, found[step][1])
    assert [len(y) for _, y in found] == [4, 4, 1, 4, 4, 1, 4]
    assert torch.bincount(torch.cat([y for _, y in found[:3]])).tolist() == [5, 4]
    assert not torch.equal(found[0][0], found[3][0])


def test_batches_are_the_images_in_memory_where_nothing_is_random(root):
    mean, deviation = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    options = {"augment": False, "shuffle": False, "dtype": torch.float64}
    with batches_of(root, size=8, normalise=(mean, deviation), **options) as batches:
        x, y = batches.batch(1)
    paths = ImageFolder.scan(root / "train").paths[4:8]
    for image, path in zip(x, paths, strict=True):
        pixels = middle(path, 8, 9)
        for channel in range(3):
            expected = (pixels[channel] / 255 - mean[channel]) / deviation[channel]
            torch.testing.assert_close(image[channel], torch.from_numpy(expected))
    assert y.tolist() == [0, 1, 1, 1]


def test_ranks_together_see_the_files_of_one_process(root):
    options = {"drop_last": True}
    with batches_of(root, **options) as whole:
        expected = [whole.batch(step) for step in range(3)]
    for rank in range(2):
        with batches_of(root, rank=rank, world_size=2, **options) as batches:
            for step, (x, y) in enumerate(expected):
                part, labels = batches.batch(step)
                assert torch.equal(part, x[rank::2])
                assert torch.equal(labels, y[rank::2])


def test_crops_have_the_areas_and_ratios_of_the_recipe():
    generator = np.random.default_rng(0)
    boxes = np.array([crop_box(500, 400, generator.random(22).tolist()) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 500 and bottom.max() <= 400
    shares = (right - left) * (bottom - top) / (500 * 400)
    ratios = (right - left) / (bottom - top)
    # A side is rounded to a pixel of the 110 or more that it has.
    assert 0.079 <= shares.min() < 0.1 and shares.max() <= 1
    assert 0.74 <= ratios.min() < 0.77 and 1.3 < ratios.max() <= 1.35
    # Small crops are uniform by area, as all of them fit: from .08 to .24 and to .4 as many.
    counts = np.histogram(shares, bins=[0.08, 0.24, 0.4])[0]
    assert counts[0] == pytest.approx(counts[1], rel=0.12)
    # And by the logarithm of the ratio, around one, and anywhere in the image.
    small = shares < 0.4
    assert abs(np.log(ratios[small]).mean()) < 0.02
    assert (left / (500 - (right - left) + 1))[small].mean() == pytest.approx(0.5, abs=0.03)
    assert (top / (400 - (bottom - top) + 1))[small].mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1)])
def test_very_long_images_are_cut_in_the_middle(width, height):
    box = crop_box(width, height, [0.999] * 22)
    expected = {(1000, 10): (493, 0, 506, 10), (10, 1000): (0, 493, 10, 506)}
    assert box == expected.get((width, height), (0, 0, 1, 1))


def test_half_of_the_images_are_mirrored(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(200):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    folder = ImageFolder.scan(tmp_path)
    with ImageBatches(folder, 400, seed=0, size=4, normalise=((0.0,), (1.0,)), ahead=0) as batches:
        x, _ = batches.batch(0)
    # Where a crop holds both halves, the bright one is on the side that the mirror says.
    left, right = x[..., 0].mean(dim=(1, 2)), x[..., -1].mean(dim=(1, 2))
    seen = left != right
    share = float((left > right)[seen].double().mean())
    assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(int(seen.sum())))


def test_the_next_batches_are_decoded_meanwhile(root):
    with batches_of(root, ahead=1) as batches:
        batches.batch(0)
        deadline = time.monotonic() + 20
        while not all(job.done() for job in batches._pending[1]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(job.done() for job in batches._pending[1])
        batches.batch(7)
        assert set(batches._pending) == {8}


def test_damaged_folders_and_files_are_named(root):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        ImageFolder.scan(root / "nowhere")
    with pytest.raises(DamagedFileError, match="it holds no folder"):
        ImageFolder.scan(root / "val" / "cat")
    (root / "train" / "cat" / "00.png").write_bytes(b"\x89PNG and nothing else")
    with pytest.raises(DamagedFileError, match=r"00\.png must be an image file"):
        load_image_folder(root, size=8)
    with batches_of(root, shuffle=False) as batches:
        with pytest.raises(DamagedFileError, match=r"00\.png must be an image file"):
            batches.batch(0)
        assert len(batches.batch(1)[1]) == 4
    (root / "val" / "eel").mkdir()
    with pytest.raises(DamagedFileError, match="eel holds none"):
        load_image_folder(root, size=8)
    write_images(root / "val" / "fox", 1)
    (root / "val" / "eel").rmdir()
    with pytest.raises(DamagedFileError, match="the class fox in only one of train and val"):
        load_image_folder(root, size=8)


def test_settings_that_cannot_be_are_refused(root, monkeypatch):
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        load_image_folder(root, size=0)
    with pytest.raises(ValueError, match="`ahead` at least 0, got 8 and -1"):
        batches_of(root, ahead=-1)
    with pytest.raises(ValueError, match="share evenly among 3 ranks"):
        batches_of(root, world_size=3)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for read in (lambda: load_image_folder(root, size=8), lambda: batches_of(root)):
        with pytest.raises(ImportError, match=r"pip install 'flatvalley\[data\]'"):
            read()


def test_the_random_state_stays_as_it_is(root):
    state = torch.get_rng_state()
    with batches_of(root) as batches:
        batches.batch(0)
    assert torch.equal(torch.get_rng_state(), state)
