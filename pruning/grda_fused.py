"""The step of gRDA in one pass over memory on the CPU, by a kernel compiled on first use."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Callable
from operator import attrgetter, is_
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

SOURCE = Path(__file__).with_suffix(".c")
STREAM_BYTES = 1 << 20
"""Size of the weights from which they are written past the cache: with dual and gradient they would
not stay in a core's own."""
THREAD_ELEMENTS = 1 << 17
"""Elements for which waking one more thread pays."""
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

_NAMES = {torch.float32: "grda_float", torch.float64: "grda_double"}
_DTYPE = attrgetter("dtype")
_Numbers: TypeAlias = "array[int]"
_Kernel = Callable[..., None]
_Three = tuple[Tensor, Tensor, Tensor]


class FusedStep:
    """The step for one list of tensors, of which it remembers which the kernel can walk."""

    def __init__(self) -> None:
        self._seen: tuple[list[Tensor], list[Tensor], _Numbers, _Numbers] | None = None
        self._sizes = array("q")
        self._dtype: torch.dtype | None = None

    def __call__(
        self,
        params: list[Tensor],
        duals: list[Tensor],
        grads: list[Tensor],
        lr: float,
        threshold: float,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Make the step where tensors fit the kernel, in place; return those that do not."""
        # No loop in Python over the tensors in the usual case: they may be many and small.
        pointers = [array("Q", map(Tensor.data_ptr, ts)) for ts in (params, duals, grads)]
        self._remember(params, duals, pointers[0], pointers[1])
        plain = all(map(Tensor.is_contiguous, grads)) and {self._dtype} == set(map(_DTYPE, grads))
        if self._dtype is not None and plain:
            _run(self._dtype, self._sizes, pointers, lr, threshold)
            increment_version([*params, *duals])
            return [], [], []
        others: list[_Three] = []
        for three in zip(params, duals, grads, strict=True):
            if fits_kernel(*three):
                each = [array("Q", [t.data_ptr()]) for t in three]
                _run(three[0].dtype, array("q", [three[0].numel()]), each, lr, threshold)
                increment_version(three[:2])
            else:
                others.append(three)
        return [p for p, _, _ in others], [v for _, v, _ in others], [grad for _, _, grad in others]

    def _remember(
        self, params: list[Tensor], duals: list[Tensor], ps: _Numbers, vs: _Numbers
    ) -> None:
        """Look at parameters and duals again, unless they are as they were in the last step."""
        if self._seen is not None:
            old_params, old_duals, old_ps, old_vs = self._seen
            if (
                ps == old_ps
                and vs == old_vs
                and all(map(is_, params, old_params))
                and all(map(is_, duals, old_duals))
            ):
                return
        self._seen = params, duals, ps, vs
        self._sizes = array("q", map(Tensor.numel, params))
        self._dtype = params[0].dtype if all(map(fits_kernel, params, duals, duals)) else None
        if not all(p.is_contiguous() and p.dtype == self._dtype for p in params):
            self._dtype = None


def fits_kernel(p: Tensor, v: Tensor, grad: Tensor) -> bool:
    """Return whether the kernel may walk these three in the order of their memory."""
    same = p.stride() == v.stride() == grad.stride() and _dense(p)
    contiguous = p.is_contiguous() and v.is_contiguous() and grad.is_contiguous()
    return (
        p.is_cpu
        and v.is_cpu
        and grad.is_cpu
        and p.dtype in _NAMES
        and p.dtype == v.dtype == grad.dtype
        and (contiguous or same)
    )


def _dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _run(
    dtype: torch.dtype, sizes: _Numbers, pointers: list[_Numbers], lr: float, threshold: float
) -> None:
    total = sum(sizes)
    compiled_kernels()[dtype](
        len(sizes),
        sizes.buffer_info()[0],
        *(column.buffer_info()[0] for column in pointers),
        lr,
        threshold,
        total * dtype.itemsize >= STREAM_BYTES,
        max(1, min(torch.get_num_threads(), total // THREAD_ELEMENTS)),
    )


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
