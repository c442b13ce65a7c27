"""Settings under which gradients can be differentiated again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Run attention by plain matrix products inside the block.

    The fused attention kernels, which torch prefers on every device, have no second derivative:
    pytorch/pytorch#116350. The global settings are put back.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield
