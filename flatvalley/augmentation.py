"""Random changes of a whole batch of images, on the device where the batch is."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CropAndFlip:
    """A random crop out of the padded image, then a mirror image for every second one.

    Each image is padded on its four sides and cut back to its size at a place drawn uniformly;
    then it is mirrored with probability one half. Each image has its own draws.

    Args:
        padding: Pixels added on each side.
        flip: Whether to mirror.
        fill: Value of the added pixels, the same in all channels or one for each. The usual
            recipe adds black before it normalises; bytes get that with 0, and images normalised
            already get it with −mean/deviation of each channel.

    Raises:
        ValueError: If ``padding`` is negative.

    Example:
        >>> import torch
        >>> augment = CropAndFlip(padding=4)
        >>> augment(torch.ones(2, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])

    References:
        He, Zhang, Ren, Sun (2016), Deep residual learning for image recognition, section 4.2.
    """

    padding: int = 4
    flip: bool = True
    fill: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"`padding` must be at least 0, got {self.padding}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the changed images as a new tensor.

        Args:
            images: Of shape [n, channels, height, width], of any type.
            generator: On the CPU, so that every device sees the same changes.

        Raises:
            ValueError: If the images have other than four dimensions, or ``fill`` has a value for
                each of another number of channels or cannot be a byte where the images are bytes.
        """
        return self.apply(images, self.draw(len(images), generator))

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Return what is drawn for ``num`` images, [num, 3]: row, column, and 1 for a mirror.

        Price: three numbers an image, on the CPU.
        """
        numbers = torch.rand((num, 3), generator=generator, dtype=torch.float64)
        places = 2 * self.padding + 1
        # A number below 1 times a small whole one stays below it after rounding.
        return (numbers * torch.tensor([places, places, 2.0 if self.flip else 1.0])).long()

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the images changed as ``draws`` say, [n, channels, height, width].

        Raises:
            ValueError: As when called.
        """
        if images.ndim != 4:
            raise ValueError(
                "`images` must have the shape [n, channels, height, width], got "
                f"{list(images.shape)}."
            )
        n, channels, height, width = images.shape
        pad = self.padding
        padded = images.new_empty((n, channels, height + 2 * pad, width + 2 * pad))
        self._fill_(padded)
        padded[:, :, pad : pad + height, pad : pad + width] = images
        if draws.device != images.device:
            if images.is_cuda:
                draws = draws.pin_memory()  # copied without waiting
            draws = draws.to(images.device, non_blocking=True)
        row, column, mirrored = draws[:, :, None].unbind(1)
        across = torch.arange(width, device=images.device)
        rows = row + torch.arange(height, device=images.device)
        columns = column + torch.where(mirrored == 1, width - 1 - across, across)
        # Offsets into the flat pixels of an image: one gather for the whole batch.
        offsets = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
        index = offsets.reshape(n, 1, height * width).expand(-1, channels, -1)
        return padded.flatten(2).gather(2, index).reshape(images.shape)

    def _fill_(self, padded: Tensor) -> None:
        """Number by number, as a tensor of them would have to be sent to the device."""
        channels = padded.shape[1]
        values = self.fill if isinstance(self.fill, tuple) else (self.fill,) * channels
        if len(values) != channels:
            raise ValueError(
                f"`fill` must be one value, or one for each of {channels} channels, got "
                f"{len(values)}."
            )
        if padded.dtype == torch.uint8 and not all(0 <= value <= 255 for value in values):
            raise ValueError(f"`fill` must be from 0 to 255 for bytes, got {self.fill}.")
        for channel, value in enumerate(values):
            padded[:, channel].fill_(value)
