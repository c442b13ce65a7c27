"""Global settings of torch that products change: by one thread at a time, and put back."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_ONE_AT_A_TIME = threading.RLock()
"""Held while a setting is changed: of two threads, one would put back what the other had set."""


@contextmanager
def math_attention() -> Iterator[None]:
    """Run attention inside the block by plain matrix products; other threads wait to do so."""
    with _ONE_AT_A_TIME, sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Run what ``torch.compile`` wrapped as it was written: its graphs have one derivative only."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        yield
        return
    with _ONE_AT_A_TIME, torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def without_fused_recurrence(*, mkldnn: bool) -> Iterator[None]:
    """Run recurrent layers inside the block without cuDNN, and without mkldnn if asked."""
    # Not `cudnn.flags` and `mkldnn.flags`, which set TF32 as well, and warn or fail in doing so.
    libraries = [torch.backends.cudnn, *([torch.backends.mkldnn] if mkldnn else [])]
    with _set([(library, "enabled") for library in libraries], False):
        yield


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Multiply float32 matrices inside the block with all their bits, or on a GPU in TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    parts: list[Any] = []
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9
        backends: Any = torch.backends
        mkldnn = backends.mkldnn
        parts = [matmul, backends.cudnn.conv, backends.cudnn.rnn]
        parts += [] if tf32 else [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    with _ONE_AT_A_TIME:
        exact = [part.fp32_precision for part in parts]
        try:
            before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, matmul.allow_tf32
        except RuntimeError:  # torch refuses the older names where the newer ones were used
            before = None
        try:
            if before is None:
                for part in parts:
                    part.fp32_precision = "tf32" if tf32 else "ieee"
            else:  # models may ask for these, as `torch.backends.cudnn.flags` does
                torch.set_float32_matmul_precision("high" if tf32 else "highest")
                cudnn.allow_tf32 = tf32
            yield
        finally:
            if before is not None:
                torch.set_float32_matmul_precision(before[0])
                cudnn.allow_tf32 = before[1]
            for part, old in zip(parts, exact, strict=True):
                part.fp32_precision = old


@contextmanager
def _set(names: list[tuple[Any, str]], value: Any) -> Iterator[None]:
    """Set attributes for the block."""
    with _ONE_AT_A_TIME:
        before = [getattr(owner, name) for owner, name in names]
        try:
            for owner, name in names:
                setattr(owner, name, value)
            yield
        finally:
            for (owner, name), old in zip(names, before, strict=True):
                setattr(owner, name, old)
