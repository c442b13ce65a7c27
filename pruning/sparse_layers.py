"""Models whose linear layers skip their zeros, for inference, and back."""

import copy
import warnings
from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from hessian.parameters import unwrapped
from hessian.unsharded import HOOKS
from pruning.sparse_linear import SparseLinear

Layout: TypeAlias = Literal["csr", "bsr", "2:4"]
"""How the weights that are not zero are laid out; see ``to_sparse``."""

# Shares of zeros, of weights or of blocks, from which on layers with a million weights were faster
# than dense at every batch in benchmarks/sparse_latency.py; not measured for "2:4".
_WORTH_IT = {"csr": 0.9, "bsr": 0.9, "2:4": 0.5}


def to_sparse(
    model: nn.Module,
    layout: Layout = "csr",
    *,
    blocksize: int | None = None,
    min_sparsity: float | None = None,
) -> nn.Module:
    """Return a copy of a model, in evaluation mode, whose linear layers skip their zeros.

    Outputs are those of the model, to rounding. Whether they come sooner depends on shapes, batch
    and machine: measure, or see the table in the how-to page. In memory, CSR has four bytes more
    for every weight that is left, and BSR for every block.

    =========  =======================================  ======================================
    layout     stores                                   runs
    =========  =======================================  ======================================
    ``"csr"``  every weight that is not zero            float32 and float64 on the CPU; CUDA
    ``"bsr"``  every square block with such a weight    float32 and float64 on the CPU; CUDA
    ``"2:4"``  two weights of every four in a row       float16 and bfloat16 on CUDA, sparse
                                                        tensor cores (Ampere and later)
    =========  =======================================  ======================================

    A layer is converted if it is an ``nn.Linear`` itself, no subclass, has enough zeros, and its
    shape fits. All others stay as they are, convolutions too: as a sparse product they would have
    to copy their input once for every weight of the kernel's window. ``nn.MultiheadAttention``
    reads its weights itself and stays dense. ``nn.TransformerEncoderLayer`` reads those of its
    linear layers in its fast path and then multiplies densely, unless
    ``torch.backends.mha.set_fastpath_enabled(False)``.

    Args:
        model: Only read; data-parallel and ``torch.compile`` wrappers are taken off.
        layout: See the table.
        blocksize: Side of the blocks of ``"bsr"``; rows and columns must be multiples of it.
        min_sparsity: Share of zero weights (for ``"bsr"``: of zero blocks) from which on a layer
            is converted. Default: 0.5 for ``"2:4"``, else 0.9.

    Raises:
        ValueError: If the layout is unknown or lacks its blocksize, the share is outside [0, 1],
            no layer can be converted (the message says why for each), one has hooks, or torch has
            no such product for its type on its device.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.0, 0, 3, 0], [0, 0, 0, 0]]))
        >>> sparse = to_sparse(model, min_sparsity=0.8)
        >>> sparse
        SparseLinear(in_features=4, out_features=2, bias=False, layout=csr, stored=0.1250)
        >>> sparse(torch.ones(1, 4))
        tensor([[3., 0.]])
    """
    if layout not in _WORTH_IT:
        raise ValueError(f'`layout` must be "csr", "bsr" or "2:4", got {layout!r}.')
    if (layout == "bsr") != (blocksize is not None) or (blocksize is not None and blocksize < 1):
        raise ValueError(
            '`blocksize` must be given for `layout="bsr"` and for no other, a positive number '
            f"such as 16, got {blocksize} for {layout!r}."
        )
    least = _WORTH_IT[layout] if min_sparsity is None else min_sparsity
    if not 0.0 <= least <= 1.0:
        raise ValueError(f"`min_sparsity` must be in [0, 1], the share of zeros, got {least}.")
    twin = copy.deepcopy(unwrapped(model)).eval()
    done: dict[nn.Module, nn.Module] = {}
    reasons: list[str] = []
    for name, linear in _linears(twin):
        reason = _reason_against(linear, layout, blocksize, least)
        if reason:
            reasons.append(f"`{name}` {reason}")
            continue
        if any(getattr(linear, hooks) for hooks in HOOKS):
            raise ValueError(
                f"`model` must have no hooks on layers to convert, but `{name}` has some, which "
                "would be lost. Remove them, and `torch.nn.utils.prune` by its `remove`."
            )
        _require_product(layout, linear.weight, name)
        done[linear] = _converted(linear, layout, blocksize)
    if not done:
        raise ValueError(
            f"`model` must have an `nn.Linear` worth converting to {layout!r}, got none: "
            f"{'; '.join(reasons) or 'no such layer'}. Prune more, or lower `min_sparsity`."
        )
    return _with_replaced(twin, done)


def to_dense(model: nn.Module) -> nn.Module:
    """Return a dense copy of a model that ``to_sparse`` made.

    Every weight comes back as it was, but for the sign of a zero; weights that were tied are
    copies of each other.
    """
    twin = copy.deepcopy(model)
    done: dict[nn.Module, nn.Module] = {}
    for module in twin.modules():
        if isinstance(module, SparseLinear):
            done[module] = _dense_linear(module.weight, module.bias)
        elif type(module) is nn.Linear and _is_semi_structured(module.weight):
            done[module] = _dense_linear(module.weight.detach().to_dense(), module.bias)
    return _with_replaced(twin, done)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not _is_semi_structured(module.weight):
            yield name or "model", module


def _reason_against(
    linear: nn.Linear, layout: Layout, blocksize: int | None, least: float
) -> str | None:
    """Return why a layer stays dense, or None."""
    W = linear.weight.detach()
    shape = list(W.shape)
    if blocksize is not None:
        if shape[0] % blocksize or shape[1] % blocksize:
            return f"{shape} is no multiple of the blocksize {blocksize}"
        zero = (W == 0).reshape(shape[0] // blocksize, blocksize, -1, blocksize)
        share, what = float(zero.all(3).all(1).double().mean()), "blocks"
    else:
        share, what = float((W == 0).double().mean()), "weights"
    if share < least:
        return f"has {share:.4f} of its {what} zero, less than {least}"
    if layout == "2:4":
        if shape[0] % 32 or shape[1] % 64:  # what torch takes for both its libraries
            return f"{shape} is no multiple of [32, 64]"
        if bool(((W != 0).reshape(-1, 4).sum(1) > 2).any()):
            return "has more than two weights that are not zero in a group of 4"
    return None


def _require_product(layout: Layout, weight: Tensor, name: str) -> None:
    """Refuse what torch cannot multiply, found out by trying."""
    kind = f"{weight.dtype} on {weight.device.type}"
    if layout == "2:4":
        if not weight.is_cuda or weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                '`layout` "2:4" must have float16 or bfloat16 weights on CUDA, got '
                f'{kind} for `{name}`. Say `model.cuda().half()`, or take "csr".'
            )
        return
    try:
        # Two rows, then one: these are different functions underneath.
        for rows in (2, 1):
            x = torch.ones(rows, 2, dtype=weight.dtype, device=weight.device)
            probe = _dense_linear(torch.eye(2).to(weight), torch.zeros(2).to(weight))
            SparseLinear(probe, 2 if layout == "bsr" else None)(x)
    except RuntimeError as error:
        raise ValueError(
            f"`layout` {layout!r} must be one that torch multiplies for {kind}, the weights of "
            f"`{name}`, but it says: {error}. On the CPU convert with `model.float()`."
        ) from error


def _converted(linear: nn.Linear, layout: Layout, blocksize: int | None) -> nn.Module:
    if layout != "2:4":
        return SparseLinear(linear, blocksize)
    twin = copy.deepcopy(linear)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*prototype stage", UserWarning)
        packed = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
    twin.weight = nn.Parameter(packed, requires_grad=False)
    return twin


def _is_semi_structured(weight: Tensor) -> bool:
    return isinstance(weight, torch.sparse.SparseSemiStructuredTensor)


def _dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of these, drawing no random numbers."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear.eval()


def _with_replaced(model: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in the places of some; a module in two places is replaced in both."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in done:
                module._modules[name] = done[child]
    return done.get(model, model)
