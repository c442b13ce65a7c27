"""Several processes that work on one objective: sums over ranks, errors shared, rows sharded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist

from hessian.errors import RankError

MESSAGE_BYTES = 512
"""How much of an error's message is sent to the other ranks."""


class RowShards:
    """Long vectors cut by rows over the ranks of a group, as even as whole rows allow.

    Every rank but the last ones holds ⌈size / ranks⌉ rows. A method is called by all ranks
    together.

    Args:
        size: Rows of a full tensor.
        group: The ranks, e.g. ``torch.distributed.group.WORLD``.

    Raises:
        ValueError: If ``size`` is not positive.

    Example:
        ``leading_eigenspace(H, k=10, shards=RowShards(H.size, torch.distributed.group.WORLD))``
    """

    def __init__(self, size: int, group: dist.ProcessGroup) -> None:
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.size, self.group = size, group
        self._ranks = dist.get_world_size(group)
        self._most = -(-size // self._ranks)
        start = min(dist.get_rank(group) * self._most, size)
        self.rows = slice(start, min(start + self._most, size))
        """The rows of this rank."""

    def local(self, v: Tensor) -> Tensor:
        """Return a copy of this rank's rows of a full tensor of shape [n] or [n, k].

        Raises:
            ValueError: If the tensor has another number of rows.
        """
        if v.ndim == 0 or len(v) != self.size:
            raise ValueError(
                f"`v` must be a full tensor of {self.size} rows, got shape {list(v.shape)}."
            )
        return v[self.rows].clone()  # a view would keep the full tensor alive

    def full(self, part: Tensor) -> Tensor:
        """Return the full tensor of which every rank gives its rows; the same on every rank.

        Raises:
            ValueError: If the part has another number of rows than this rank holds.
        """
        count = self.rows.stop - self.rows.start
        if part.ndim == 0 or len(part) != count:
            raise ValueError(
                f"`part` must have this rank's {count} rows, got shape {list(part.shape)}."
            )
        # Gloo gathers equal parts only. All padding is in the end, and cut off there.
        padded = part.new_zeros(self._most, *part.shape[1:])
        padded[:count] = part
        parts = part.new_empty(self._ranks, self._most, *part.shape[1:])
        dist.all_gather(list(parts.unbind()), padded, group=self.group)
        return parts.flatten(0, 1)[: self.size]

    def sum(self, t: Tensor) -> Tensor:
        """Return the sum of a small tensor over the ranks; the same on every rank."""
        total = t.clone()
        dist.all_reduce(total, group=self.group)
        return total


class Ranks:
    """The processes that share an objective; without a group, this process alone.

    Args:
        group: The processes, or None.
        device: Where the objective's vectors live.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        gloo = group is not None and dist.get_backend(group) == "gloo"
        self._device = torch.device("cpu") if gloo else device

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place, and return it."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, numbers: Sequence[float]) -> Tensor:
        """Return the numbers of every rank, shape [ranks, len(numbers)], float64 on the CPU."""
        table = torch.zeros(self.size, len(numbers), dtype=torch.float64, device="cpu")
        table[self.rank] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return self.sum_(table.to(self._device)).cpu()

    def exchange(self, data: bytes) -> list[bytes]:
        """Return the bytes of every rank, in order; memory for as many times the longest."""
        sizes = [int(size) for size in self.gather([float(len(data))])[:, 0]]
        table = torch.zeros(self.size, max(1, *sizes), dtype=torch.uint8, device="cpu")
        table[self.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        table = self.sum_(table.to(self._device)).cpu()
        return [row[:size].numpy().tobytes() for row, size in zip(table, sizes, strict=True)]

    @contextmanager
    def in_step(self, *vectors: Tensor) -> Iterator[None]:
        """Do one rank's share of some work, and let all ranks succeed or fail together.

        The block must not communicate. Costs one exchange of three numbers.

        Args:
            vectors: Must be the same on every rank.

        Raises:
            RankError: If the block raised on another rank, but not here.
            ValueError: If the vectors differ between ranks.
        """
        if self._group is None:
            yield
            return
        try:
            yield
            marks = _marks(vectors)
        except Exception as error:
            self.gather([1.0, 0.0, 0.0])
            self._tell(f"{type(error).__name__}: {error}")
            raise
        table = self.gather([0.0, *marks])
        failed = [rank for rank, flag in enumerate(table[:, 0].tolist()) if flag]
        if failed:
            message = self._tell("")[failed[0]]
            raise RankError(f"Rank {failed[0]} of {self.size} failed with {message}")
        slack = 1e-9 * float(table[:, 2].nan_to_num().max())
        if not torch.allclose(table, table[:1].expand_as(table), 0.0, slack, equal_nan=True):
            raise ValueError(
                "Every rank must be given the same weights and vectors, got different ones, of "
                f"checksums {table[:, 1].tolist()}. Load the same weights and draw with the same "
                "seed on every rank."
            )

    def _tell(self, message: str) -> list[str]:
        """Exchange messages between all ranks."""
        sent = message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
        table = self.gather(list(sent)).to(torch.uint8)
        return [bytes(row.tolist()).decode(errors="replace").strip() for row in table]


def _marks(vectors: Sequence[Tensor]) -> tuple[float, float]:
    """Two checksums, of the sums and of the norms; a vector's place counts, an entry's does not."""
    total = norm = 0.0
    for place, v in enumerate(vectors, start=1):
        v = torch.view_as_real(v.detach()) if v.is_complex() else v.detach()
        v = v if v.is_floating_point() else v.to(torch.float64)
        total += place * float(v.sum(dtype=torch.float64))
        norm += place * float(torch.linalg.vector_norm(v, dtype=torch.float64))
    return total, norm
