"""Images and kernels in memory with the channels last."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hessian.batches import Batch, map_tensors

ENTRIES_AT_ONCE = 1 << 16
"""Of a kernel that is put in another order where it is."""


def with_channels_last(batch: Batch) -> Batch:
    """Return a batch whose images lie with the channels last."""
    found: Batch = map_tensors(
        batch,
        lambda t: (
            t.contiguous(memory_format=torch.channels_last)
            if t.ndim == 4 and t.is_floating_point()
            else t
        ),
    )
    return found


class ChannelsLastKernels:
    """Kernels of convolutions with the channels last, in the place of the weights or beside them.

    Args:
        views: All weights, parts of a flat vector.
        in_place: Whether the vector's own order of them may be lost.
    """

    def __init__(self, views: Mapping[str, Tensor], *, in_place: bool) -> None:
        self._views = {name: view for name, view in views.items() if view.ndim == 4}
        if in_place:
            self.kernels = {
                name: view.view(n, h, w, m).permute(0, 3, 1, 2)
                for name, view in self._views.items()
                for n, m, h, w in [view.shape]
            }
            pieces = [view[: _rows(view)].numel() for view in self._views.values()]
            self._scratch = next(iter(views.values())).new_empty(max(pieces, default=0))
        else:
            self.kernels = {
                name: torch.empty_like(view, memory_format=torch.channels_last)
                for name, view in self._views.items()
            }
        self._in_place = in_place

    def leave_out(self, names: Sequence[str]) -> None:
        """Forget some, which are not written."""
        for name in names:
            self._views.pop(name, None)

    def take_(self) -> None:
        """Take what the flat vector holds."""
        for name, view in self._views.items():
            kernel = self.kernels[name]
            if not self._in_place:
                kernel.copy_(view)
                continue
            # The output channels stay where they are.
            for piece, old in zip(
                *(torch.split(t, _rows(view)) for t in (kernel, view)), strict=True
            ):
                piece.copy_(self._scratch[: old.numel()].view_as(old).copy_(old))


def _rows(kernel: Tensor) -> int:
    """How many output channels are moved at once."""
    return max(1, ENTRIES_AT_ONCE // max(1, kernel[0].numel()))
