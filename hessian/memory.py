"""What memory is free, and whether a Krylov basis fits into it before the first product."""

import os
from pathlib import Path

import torch

from hessian.vector_rows import ROWS

WORK_VECTORS = 5
"""Vectors beside the basis: direction, product, remainder, and one or two inside the product."""

DEFAULT_SHARE = 0.7
"""Share of the free memory that a default basis may take: the operator needs some, too."""

SPARE = 6
"""Vectors beyond k without which a restart makes no headway."""

SMALL = 1 << 28
"""Bytes of a basis that is never worth a restart."""

LARGE = 1000
"""Vectors beyond which restarts cost less than the eigenvectors of T."""


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, as well as the system tells."""
    if device.type == "cuda":
        # What torch has taken from the device and lends to no tensor is free, too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    known = [size for size in (_free_in_system(), _free_in_container()) if size is not None]
    return min(known, default=1 << 30)


def basis_size(
    asked: int | None,
    *,
    k: int,
    size: int,
    local_size: int,
    dtype: torch.dtype,
    device: torch.device,
    columns: bool,
    free: int | None = None,
) -> int:
    """Return the most vectors that a basis may have, or refuse before any product is made.

    Args:
        asked: What the user wants, or None for a default that follows from k, the size and the
            type alone: as many as 256 MiB hold up to 1000, and no fewer than max(2 k + 20, 100).
            Only where that does not fit into 70 % of the free memory it is fewer.
        k: Number of pairs wanted.
        size: Length n of a vector.
        local_size: Length of the part of it that a basis vector holds here.
        dtype: Type of the vectors.
        device: Where they live.
        columns: Whether the operator multiplies all k vectors at once when they are measured.
        free: Bytes that may be used. Default: what is free on the device.

    Raises:
        ValueError: If fewer vectors are asked for than k pairs need.
        MemoryError: If they do not fit; the message says which number or which k would.
    """
    fewest = min(size, k + SPARE)
    if asked is not None and asked < fewest:
        raise ValueError(
            f"`max_basis` must be at least {fewest} for k={k} and n={size}, got {asked}."
        )
    row = local_size * dtype.itemsize
    vector = size * dtype.itemsize

    def needed(rows: int, pairs: int) -> int:
        rows = ROWS * -(-rows // ROWS) + 1
        measuring = 2 * pairs if columns else pairs
        return rows * row + (WORK_VECTORS + measuring) * vector

    def fitting(available: int) -> int:
        blocks = (available - needed(0, k)) // (ROWS * row)
        return min(size, max(0, ROWS * blocks))

    free = free_memory(device) if free is None else free
    if asked is None:
        usual = min(size, max(2 * k + 20, 100, min(SMALL // row, LARGE)))
        wanted = max(fewest, min(usual, fitting(int(DEFAULT_SHARE * free))))
    else:
        wanted = min(asked, size)
    if needed(wanted, k) <= free:
        return wanted
    if fitting(free) >= fewest:
        cure = f"Pass `max_basis={fitting(free)}` or less"
    else:
        most = next((j for j in range(k - 1, 0, -1) if needed(min(size, j + SPARE), j) <= free), 0)
        cure = f"Ask for `k={most}` or less" if most else "Not even one pair fits"
    raise MemoryError(
        f"{wanted} basis vectors and {k} eigenvectors of length {size:,} need "
        f"{needed(wanted, k) / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free on {device}. "
        f"{cure}, free memory, or spread the vectors over ranks with `shards`."
    )


def _free_in_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _free_in_container() -> int | None:
    """What a control group leaves, where one limits this process."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        # Cached files count as used, and are given up when memory is needed.
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        return max(0, int(limit) - used)
    except (OSError, ValueError):
        return None
