import pytest
import torch
from torch import Tensor

from flatvalley.augmentation import CropAndFlip


def images_of(dtype: torch.dtype, n: int = 50, height: int = 6, width: int = 5) -> Tensor:
    """Images in which no two pixels are alike, as far as the type has room."""
    return torch.arange(n * 3 * height * width).reshape(n, 3, height, width).to(dtype)


def one_by_one(images: Tensor, draws: Tensor, padding: int, fill: float) -> Tensor:
    """The recipe image by image, as its description has it."""
    _, _, height, width = images.shape
    changed = []
    for image, (row, column, mirrored) in zip(images, draws.tolist(), strict=True):
        padded = torch.nn.functional.pad(image, (padding,) * 4, value=fill)
        crop = padded[:, row : row + height, column : column + width]
        changed.append(crop.flip(-1) if mirrored else crop)
    return torch.stack(changed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
def test_the_batch_is_what_a_loop_over_images_makes(dtype, padding, flip):
    augment, images = CropAndFlip(padding, flip, fill=7.0), images_of(dtype)
    draws = augment.draw(len(images), torch.Generator().manual_seed(3))
    expected = one_by_one(images, draws, padding, 7.0)
    assert torch.equal(augment(images, torch.Generator().manual_seed(3)), expected)
    assert torch.equal(images, images_of(dtype))


def test_images_need_not_be_contiguous():
    augment, images = CropAndFlip(2), images_of(torch.float32)
    other = images.contiguous(memory_format=torch.channels_last)
    first, second = (augment(x, torch.Generator().manual_seed(0)) for x in (images, other))
    assert torch.equal(first, second)


def test_places_and_mirrors_are_drawn_evenly_and_independently():
    draws = CropAndFlip(padding=2).draw(50_000, torch.Generator().manual_seed(0))
    counts = torch.zeros(5, 5, 2)
    counts.index_put_(tuple(draws.unbind(1)), torch.ones(len(draws)), accumulate=True)
    # 1,000 of each of the 50 outcomes are expected, with a deviation of 31.
    assert torch.all((counts - 1000).abs() < 150)


def test_each_channel_has_its_own_filling():
    augment = CropAndFlip(padding=1, fill=(1.0, 2.0, 3.0))
    corner = augment.apply(torch.zeros(1, 3, 4, 4), torch.tensor([[0, 0, 0]]))[0, :, 0, 0]
    assert corner.tolist() == [1.0, 2.0, 3.0]


def test_bad_settings_and_images_are_refused():
    generator, images = torch.Generator(), images_of(torch.uint8)
    with pytest.raises(ValueError, match="`padding` must be at least 0, got -1"):
        CropAndFlip(padding=-1)
    with pytest.raises(ValueError, match=r"`images` must have the shape .* got \[3, 6, 5\]"):
        CropAndFlip()(images[0], generator)
    with pytest.raises(ValueError, match="one for each of 3 channels, got 2"):
        CropAndFlip(fill=(0.0, 1.0))(images, generator)
    with pytest.raises(ValueError, match=r"`fill` must be from 0 to 255 for bytes, got -1\.9"):
        CropAndFlip(fill=-1.9)(images, generator)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_changes():
    augment, images = CropAndFlip(4), images_of(torch.uint8)
    on_gpu = augment(images.cuda(), torch.Generator().manual_seed(1))
    assert torch.equal(on_gpu.cpu(), augment(images, torch.Generator().manual_seed(1)))
