"""The processes of ``torchrun``, and the sums they share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

PATIENCE = timedelta(days=30)
"""For processes that wait while another one works; ``torchrun`` ends them if that one dies."""


@contextmanager
def process_group(device: str, *, timeout: timedelta | None = None) -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did, for the time of the block.

    Args:
        device: ``"cpu"`` for gloo; ``"cuda"`` for NCCL, which takes one GPU for each process.
        timeout: How long one waits for another. Default: torch's, some minutes.

    Raises:
        ValueError: If a GPU is named by its number under ``torchrun``.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f'`device` must be cpu or cuda under torchrun, got "{device}".')
    if device == "cuda":
        torch.cuda.set_device(own_device(device))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
    try:
        yield
        dist.barrier()  # nobody leaves while another still needs the group
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """Return the device of this process: of several on a machine, each has a GPU of its own."""
    several = world()[1] > 1 or dist.is_torchelastic_launched()
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if several and device == "cuda" else device


def require_device(device: str) -> None:
    """See that there is such a device.

    Raises:
        ValueError: If there is none; the message has torch's reason.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f'`device` must be one that is here, got "{device}" ({str(error).splitlines()[0]}).'
        ) from error


def world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; 0 and 1 without a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_ranks() -> dist.ProcessGroup | None:
    """Return the group of all processes; None if there is one only."""
    return dist.group.WORLD if world()[1] > 1 else None


def wait_for_all() -> None:
    """Return when every process is here."""
    if world()[1] > 1:
        dist.barrier()


def from_first(tensor: Tensor) -> Tensor:
    """Return the first process's tensor on all, which give one of its shape and type."""
    if world()[1] == 1:
        return tensor
    found = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True).contiguous()
    dist.broadcast(found, src=0)
    return found.to(tensor.device)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add a tensor up over the processes, in place, and return it."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor
