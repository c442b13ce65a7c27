"""Image files in a folder for each class, held in memory or decoded batch by batch."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatvalley.batches import EpochOrder, affine
from flatvalley.data.dataset import Bytes, Dataset, Normalisation, finish
from flatvalley.data.files import missing, optional
from hessian import DamagedFileError

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's training images by colour channel, in [0, 1]."""
_IMAGENET = (IMAGENET_MEAN, IMAGENET_DEVIATION)

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Endings of the files that count as images, in small letters."""

# The random crop of the usual ImageNet recipe (Szegedy et al. 2015): share of the area, ratio of
# width to height, and how often a crop that does not fit is drawn again.
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


@dataclass(frozen=True)
class ImageFolder:
    """The files of a folder with one folder for each class, in alphabetical order."""

    root: Path
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: Tensor
    """Number of the class of each file, [n]."""

    @classmethod
    def scan(cls, root: str | Path) -> "ImageFolder":
        """Return the image files under ``root``, the classes in alphabetical order.

        Price: the folders are listed, no file is opened.

        Raises:
            FileNotFoundError: If there is no such folder.
            DamagedFileError: If it has no folders, or one without images, which the message names.
        """
        root = Path(root)
        if not root.is_dir():
            raise missing(root)
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
        found = [
            sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
            for folder in folders
        ]
        empty = [folder.name for folder, files in zip(folders, found, strict=True) if not files]
        if not folders or empty:
            raise DamagedFileError(
                f"{root} must hold a folder of images for each class, but "
                f"{f'{empty[0]} holds none' if empty else 'it holds no folder'}. Images are "
                f"files that end in {', '.join(sorted(ENDINGS))}."
            )
        labels = [number for number, files in enumerate(found) for _ in files]
        return cls(
            root,
            tuple(folder.name for folder in folders),
            tuple(file for files in found for file in files),
            torch.tensor(labels),
        )

    def __len__(self) -> int:
        """Images in all classes."""
        return len(self.paths)


def load_image_folder(
    root: str | Path,
    *,
    size: int,
    dtype: torch.dtype = torch.uint8,
    normalise: Normalisation = _IMAGENET,
    threads: int | None = None,
) -> Dataset:
    """Return all images below ``root/train`` and ``root/val`` (or ``test``), decoded into memory.

    The shorter side of each image is scaled to ``size``, and the middle cut out. Data that do not
    fit into memory are for ``ImageBatches``.

    Args:
        root: Folder with a folder ``train`` and one of ``val`` and ``test``, each with a folder
            of images for each class.
        size: Height and width of the images in memory.
        dtype: ``torch.uint8``, three bytes a pixel, or a floating-point type.
        normalise: Mean and deviation by channel, of images scaled to [0, 1]; used where ``dtype``
            is no byte, and handed on in the result where it is.
        threads: Files decoded at a time. Default: one for each core.

    Raises:
        ValueError: If ``size`` is not positive, or the images would take more memory than is
            free; the message tells how much.
        FileNotFoundError: If a folder is not there.
        DamagedFileError: If a class has no images or is not in both parts, or a file is no image.
        ImportError: If Pillow is not installed.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    root = Path(root)
    evaluation = "test" if not (root / "val").is_dir() and (root / "test").is_dir() else "val"
    train, test = (ImageFolder.scan(root / part) for part in ("train", evaluation))
    if train.classes != test.classes:
        (name, *_) = sorted(set(train.classes) ^ set(test.classes))
        raise DamagedFileError(
            f"{root} has the class {name} in only one of train and {evaluation}."
        )
    # Floating-point images are made from bytes, and both are there for a moment.
    bytes_each = 3 * size**2 * (1 if dtype == torch.uint8 else 1 + dtype.itemsize)
    needed, free = (len(train) + len(test)) * bytes_each, _free_memory()
    if needed > free:
        raise ValueError(
            f"`size` {size} makes {len(train) + len(test):,} images of {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free. Choose a smaller size, dtype=torch.uint8, "
            "or `ImageBatches`, which reads the files batch by batch."
        )

    def read(folder: ImageFolder) -> Tensor:
        out = np.empty((len(folder), 3, size, size), dtype=np.uint8)
        jobs = [partial(_centre, path, size, size) for path in folder.paths]
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for place, pixels in enumerate(pool.map(lambda job: job(), jobs)):
                out[place] = pixels
        return finish(out, normalise, dtype)

    return Dataset(
        root.name,
        read(train),
        train.labels,
        read(test),
        test.labels,
        len(train.classes),
        normalise if dtype == torch.uint8 else None,
    )


class ImageBatches:
    """Mini-batches of image files, each known by its step alone, decoded ahead by threads.

    For data larger than memory, as ImageNet. Addressed as ``ResidentBatches``: the samples of a
    step, and their crops, depend on the seed and the step and on nothing else, and the ranks
    together see what one process sees. Batches are sent to the device as bytes and normalised
    there.

    Args:
        folder: The files.
        batch_size: Images of a batch over all ranks.
        seed: Seed of the order and of the crops.
        size: Height and width of the images in a batch.
        augment: Whether to train: cut out a random part of the image, of 8 to 100 % of its area
            and a ratio of 3:4 to 4:3, scale it to ``size``, and mirror every second one. Else the
            shorter side is scaled to 8/7 of ``size`` and the middle cut out, as for testing.
        normalise: Mean and deviation by channel, of images scaled to [0, 1].
        dtype: Type of the batches.
        device: Where the batches are returned.
        threads: Files decoded at a time. Default: one for each core.
        ahead: Batches that are decoded ahead of the one asked for.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether to leave out the last batch of an epoch where it is smaller.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: As ``EpochOrder``, or if ``size`` is not positive or ``ahead`` negative.
        ImportError: If Pillow is not installed.

    References:
        Szegedy, Liu, Jia et al. (2015), Going deeper with convolutions: the random crop.
    """

    def __init__(
        self,
        folder: ImageFolder,
        batch_size: int,
        *,
        seed: int,
        size: int = 224,
        augment: bool = True,
        normalise: tuple[Sequence[float], Sequence[float]] = _IMAGENET,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        ahead: int = 2,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if size < 1 or ahead < 0:
            raise ValueError(
                f"`size` must be at least 1 and `ahead` at least 0, got {size} and {ahead}."
            )
        self.order = EpochOrder(
            len(folder),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        optional("PIL.Image", "Pillow")
        self.folder, self.size, self.augment, self.ahead = folder, size, augment, ahead
        self._device, self._dtype = torch.device(device), dtype
        nothing = torch.empty((0, 3, 1, 1), dtype=torch.uint8, device=self._device)
        self._affine = affine(nothing, normalise, dtype)
        self._pool = ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="images")
        self._pending: dict[int, list[Future[Bytes]]] = {}

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    def __enter__(self) -> "ImageBatches":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop decoding ahead, and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images [n, 3, size, size] and labels of a step, this rank's part.

        Waits for the files of the step, and has those of the next steps decoded meanwhile.

        Raises:
            ValueError: If ``step`` is negative.
            DamagedFileError: If a file is no image; the message names it.
        """
        mine = self.order.mine(self.order.samples(step))
        for number in [number for number in self._pending if not 0 <= number - step <= self.ahead]:
            for job in self._pending.pop(number):
                job.cancel()
        for number in range(step, step + self.ahead + 1):
            if number not in self._pending:
                self._pending[number] = self._decode(number)
        jobs = self._pending.pop(step)
        pinned = self._device.type == "cuda"
        images = torch.empty(
            (len(jobs), 3, self.size, self.size), dtype=torch.uint8, pin_memory=pinned
        )
        out = images.numpy()
        for place, job in enumerate(jobs):
            out[place] = job.result()
        x = images.to(self._device, non_blocking=True).to(self._dtype)
        if self._affine is not None:
            scale, shift = self._affine
            x = (x * scale).add_(shift)
        return x, self.folder.labels[mine].to(self._device, non_blocking=True)

    def _decode(self, step: int) -> list[Future[Bytes]]:
        chosen = self.order.samples(step)
        # Two numbers for each try of a crop, two for its place, and one for the mirror.
        draws = torch.rand(
            (len(chosen), 2 * _TRIES + 3), generator=self.order.generator(step), dtype=torch.float64
        )
        jobs = []
        for sample, numbers in zip(
            self.order.mine(chosen).tolist(), self.order.mine(draws).tolist(), strict=True
        ):
            path = self.folder.paths[sample]
            if self.augment:
                jobs.append(self._pool.submit(_random, path, self.size, numbers))
            else:
                jobs.append(self._pool.submit(_centre, path, self.size, round(self.size * 8 / 7)))
        return jobs


def crop_box(width: int, height: int, numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random crop, from uniform numbers in [0, 1).

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        numbers: Two for each of ten tries, then two for the place.
    """
    *tries, across, down = numbers
    low, high = (math.log(ratio) for ratio in _RATIO)
    for first, second in zip(tries[::2], tries[1::2], strict=True):
        area = width * height * (_AREA[0] + first * (_AREA[1] - _AREA[0]))
        ratio = math.exp(low + second * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    # None fits into an image that is very long or high: the middle, as long or high as allowed.
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _random(path: Path, size: int, numbers: Sequence[float]) -> Bytes:
    image = _open(path)
    width, height = image.size
    part = image.crop(crop_box(width, height, numbers[:-1]))
    pixels = _pixels(part.resize((size, size), _bilinear()))
    return pixels[:, :, ::-1] if numbers[-1] < 0.5 else pixels


def _centre(path: Path, size: int, shorter: int) -> Bytes:
    """Scale the shorter side and cut out the middle."""
    image = _open(path)
    width, height = image.size
    least = min(width, height)
    scaled = (max(size, round(width * shorter / least)), max(size, round(height * shorter / least)))
    image = image.resize(scaled, _bilinear())
    left, top = ((length - size) // 2 for length in scaled)
    return _pixels(image.crop((left, top, left + size, top + size)))


def _open(path: Path) -> Any:
    """Decode a file into an RGB image of Pillow."""
    pillow = optional("PIL.Image", "Pillow")
    try:
        with pillow.open(path) as image:
            return image.convert("RGB")
    # What Pillow raises on a damaged file is many things.
    except Exception as error:
        raise DamagedFileError(
            f"{path} must be an image file ({type(error).__name__}: {error}). Get it again, or "
            "take it away."
        ) from error


def _bilinear() -> Any:
    return optional("PIL.Image", "Pillow").Resampling.BILINEAR


def _pixels(image: Any) -> Bytes:
    return np.asarray(image).transpose(2, 0, 1)


def _free_memory() -> int:
    """Bytes that can be had without swapping; where the system does not tell, any number."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 2**62
