"""A linear layer that stores and multiplies only its weights that are not zero."""

import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SparseLinear(nn.Module):
    """A linear layer for inference, with its weight in compressed rows (CSR) or blocks (BSR).

    The weight is three plain buffers, so that copies, conversions of type, ``state_dict`` and
    ``torch.export`` work as with any module. ``weight`` gives it dense, made anew at each call.
    Under autocast it computes in its own type. An infinite input meets no zero weight and gives
    no NaN, as it would in the dense layer.

    Args:
        linear: Is copied.
        blocksize: Side of the square blocks of BSR. Default: CSR.

    Raises:
        RuntimeError: If torch cannot convert the weight, as when blocks do not divide it.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, blocksize: int | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        _hush_beta_warning()
        packed = (
            weight.to_sparse_csr()
            if blocksize is None
            else weight.to_sparse_bsr((blocksize, blocksize))
        )
        # Four bytes an index: MKL would convert eight at every product. And copies, since
        # `torch.export` takes no views of sparse tensors.
        self.register_buffer("crow_indices", packed.crow_indices().to(torch.int32, copy=True))
        self.register_buffer("col_indices", packed.col_indices().to(torch.int32, copy=True))
        self.register_buffer("values", packed.values().clone())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("bias", bias)
        self.train(linear.training)

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The dense weight, made anew at each call."""
        size = self.out_features, self.in_features
        return _assembled(self.crow_indices, self.col_indices, self.values, size).to_dense()

    @property
    def blocksize(self) -> int | None:
        """Side of the blocks; None for CSR."""
        return None if self.values.ndim == 1 else self.values.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, for x of shape [..., inputs].

        Raises:
            ValueError: If the last dimension of x is not the number of inputs.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"`x` must have {self.in_features} inputs in its last dimension, got shape "
                f"{list(x.shape)}."
            )
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._product(x.to(self.values.dtype))
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        # The operator of its own is for graphs only: calling it costs as much as a small product.
        product = _sparse_linear if torch.compiler.is_compiling() else sparse_linear
        y: Tensor = product(
            self.crow_indices, self.col_indices, self.values, self.bias, x, self.out_features
        )
        return y

    def extra_repr(self) -> str:
        """Return what stands in brackets when the model is printed."""
        layout = "csr" if self.blocksize is None else f"bsr, blocksize={self.blocksize}"
        stored = self.values.numel() / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, layout={layout}, stored={stored:.4f}"
        )


def sparse_linear(
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    x: Tensor,
    out_features: int,
) -> Tensor:
    """Return x Wᵀ + b for W in compressed rows or blocks."""
    size = out_features, x.shape[-1]
    W = _assembled(crow_indices, col_indices, values, size)
    rows = x.reshape(-1, size[1])
    if len(rows) == 1:
        y = W @ rows[0] if bias is None else torch.addmv(bias, W, rows[0])
    else:
        # With W on the left, which takes a third of the time of `nn.functional.linear`.
        y = (W @ rows.t() if bias is None else torch.addmm(bias[:, None], W, rows.t())).t()
    return y.reshape(*x.shape[:-1], out_features).contiguous()


# torch cannot build sparse tensors in the graphs of `torch.export` and `torch.compile`,
# pytorch/pytorch#123345, so that they get the whole product as one operator.
_sparse_linear = torch.library.custom_op(
    "flatvalley::sparse_linear",
    sparse_linear,
    mutates_args=(),
    schema="(Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias, Tensor x, "
    "SymInt out_features) -> Tensor",
)


@_sparse_linear.register_fake
def _sparse_linear_shape(
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    x: Tensor,
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _assembled(crow: Tensor, col: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    _hush_beta_warning()
    build = torch.sparse_csr_tensor if values.ndim == 1 else torch.sparse_bsr_tensor
    return build(crow, col, values, size=size, check_invariants=False)


@cache
def _hush_beta_warning() -> None:
    """Make torch say once, unheard, that compressed sparse tensors are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*support is in beta state", UserWarning)
        torch.eye(1).to_sparse_csr()
