"""The step of gRDA in one pass over memory on the CPU, by a kernel compiled on first use."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
STREAM_BYTES = 16 << 20
"""Size of the weights above which they are written past the cache, where they would not stay."""
THREAD_ELEMENTS = 1 << 17
"""Elements for which waking one more thread pays."""
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

_NAMES = {torch.float32: "grda_float", torch.float64: "grda_double"}
_Kernel = Callable[..., None]
_Three = tuple[Tensor, Tensor, Tensor]


def fits_kernel(p: Tensor, v: Tensor, grad: Tensor) -> bool:
    """Return whether the kernel may walk these three in the order of their memory."""
    if p.device.type != "cpu" or p.dtype not in _NAMES:
        return False
    if not p.dtype == v.dtype == grad.dtype:
        return False
    if p.is_contiguous() and v.is_contiguous() and grad.is_contiguous():
        return True
    return p.stride() == v.stride() == grad.stride() and _dense(p)


def _dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def step_fused(
    params: list[Tensor],
    duals: list[Tensor],
    grads: list[Tensor],
    lr: float,
    threshold: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Make the step for the tensors that fit the kernel, in place; return the others."""
    fitting: dict[torch.dtype, list[_Three]] = {}
    others: list[_Three] = []
    for three in zip(params, duals, grads, strict=True):
        p = three[0]
        (fitting.setdefault(p.dtype, []) if fits_kernel(*three) else others).append(three)
    for dtype, threes in fitting.items():
        _run(compiled_kernels()[dtype], threes, lr, threshold)
    return [p for p, _, _ in others], [v for _, v, _ in others], [grad for _, _, grad in others]


def _run(kernel: _Kernel, threes: list[_Three], lr: float, threshold: float) -> None:
    params, duals, grads = zip(*threes, strict=True)
    sizes = array("q", [p.numel() for p in params])
    total = sum(sizes)
    columns = [array("Q", [t.data_ptr() for t in ts]) for ts in (params, duals, grads)]
    kernel(
        len(sizes),
        sizes.buffer_info()[0],
        *(column.buffer_info()[0] for column in columns),
        lr,
        threshold,
        total * params[0].element_size() >= STREAM_BYTES,
        max(1, min(torch.get_num_threads(), total // THREAD_ELEMENTS)),
    )
    # As torch does after each of its own writes: a graph that saved the old weights must notice.
    torch.autograd.graph.increment_version([*params, *duals])


@functools.cache
def compiled_kernels() -> dict[torch.dtype, _Kernel]:
    """Return the kernel of each type, compiled for this machine in about a second.

    Raises:
        RuntimeError: If there is no C compiler, or it fails.
    """
    asked = os.environ.get("CC")
    compiler = (
        shutil.which(asked) if asked else next(filter(None, map(shutil.which, COMPILERS)), None)
    )
    if compiler is None:
        raise RuntimeError(
            "`fused=True` needs a C compiler, and none of "
            f"{', '.join([asked] if asked else COMPILERS)} was found. Install one, name it in the "
            "environment variable CC, or leave `fused` out."
        )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "grda_fused.so"
        command = [compiler, *FLAGS, "-o", str(library), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"`fused=True` could not be compiled: {' '.join(command)} said\n{done.stderr}"
                "Name another compiler in the environment variable CC, or leave `fused` out."
            )
        # The file may go once it is loaded.
        loaded = ctypes.CDLL(str(library))
    kernels = {dtype: getattr(loaded, name) for dtype, name in _NAMES.items()}
    for kernel in kernels.values():
        kernel.restype = None
        kernel.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 4, *[ctypes.c_double] * 2]
        kernel.argtypes += [ctypes.c_int, ctypes.c_int]
    return kernels
