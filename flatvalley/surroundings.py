"""Torch's global state around a training: set for it, put back after it, drawn from by the step."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flatvalley.train_config import TrainConfig

OWN_PACKAGES = ("pruning", "hessian", "flatvalley")


@contextmanager
def everything_put_back(config: TrainConfig, threads: int) -> Iterator[None]:
    """Set threads and precision for the block; they and the random state are put back."""
    cuda = config.device.startswith("cuda")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    with torch.random.fork_rng(devices=[config.device] if cuda else []):
        try:
            torch.set_num_threads(threads)
            matmul.allow_tf32 = cudnn.allow_tf32 = config.precision in ("tf32", "bf16")
            cudnn.benchmark = True
            yield
        finally:
            torch.set_num_threads(before[0])
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before[1:]


def seed_noise(config: TrainConfig, step: int, rank: int) -> None:
    """Let dropout draw what belongs to this step and process, whoever drew before."""
    mixed = ((config.seed * 1_000_003 + step) * 1_009 + rank) % 2**63
    torch.default_generator.manual_seed(mixed)
    if config.device.startswith("cuda"):
        with torch.cuda.device(config.device):
            torch.cuda.manual_seed(mixed)


@contextmanager
def warnings_noted(note: Callable[[str], None]) -> Iterator[None]:
    """Hand on what our own packages warn of; it is shown as always, too."""
    shown = warnings.showwarning

    def noting(message: Any, category: type[Warning], *rest: Any) -> None:
        if category.__module__.partition(".")[0] in OWN_PACKAGES:
            note(str(message))
        shown(message, category, *rest)

    warnings.showwarning = noting  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown
