"""What a layer is given and what it must give: inputs, targets and which outputs are active."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hessian.errors import NonFiniteError
from hessian.finiteness import all_finite

Kind: TypeAlias = Literal["relu", "linear"]

Mode: TypeAlias = Literal["parallel", "cascade"]

CHUNK_ENTRIES = 1 << 22
"""Entries of inputs or outputs in float64 that are held at a time, by default: 32 MiB."""


@dataclass(frozen=True)
class LayerTargets:
    """Inputs of a layer, what should come out, and how far outputs that are off may go.

    In the constraints of Net-Trim, active outputs are near their target and inactive ones at most
    their bound; both are entries of one matrix T here.
    """

    X: Float[Tensor, "p n"]
    Y: Float[Tensor, "p m"]
    """What comes out, after the ReLU if there is one."""
    kind: Kind
    bound: Float[Tensor, "p m"] | None = None
    offset: Float[Tensor, "p m"] | Float[Tensor, " m"] | None = None
    hidden: float = 0.0
    """Squared distance of the targets from all that the inputs can give, in no entry of Y."""
    chunk: int | None = None

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Yield rows, and for them X and T in float64 and which outputs are active.

        None stands for: all are active.
        """
        widest = max(self.X.shape[1], self.Y.shape[1], 1)
        step = self.chunk or max(1, CHUNK_ENTRIES // widest)
        for start in range(0, len(self.X), step):
            rows = slice(start, start + step)
            T, active = self.goal(rows)
            yield rows, self.X[rows].double(), T, active

    def goal(self, rows: slice) -> tuple[Float[Tensor, "r m"], Bool[Tensor, "r m"] | None]:
        """Return T for some samples, less what is added to the products, and what is active."""
        T, active = self.Y[rows].to(torch.float64, copy=True), None
        if self.kind == "relu":
            active = T > 0
            T = T.masked_fill(~active, 0.0)
            if self.bound is not None:
                T += self.bound[rows].double().masked_fill(active, 0.0)
        if self.offset is not None:
            T = T - (self.offset if self.offset.ndim == 1 else self.offset[rows]).double()
        return T, active


def outputs(
    W: Float[Tensor, "m n"],
    X: Float[Tensor, "p n"],
    kind: Kind,
    offset: Tensor | None,
) -> Float[Tensor, "p m"]:
    """Return what a layer gives, in the precision of its inputs.

    Raises:
        NonFiniteError: If that overflows.
    """
    Y = X @ W.to(X.dtype).T
    if offset is not None:
        Y += offset.to(X.dtype)
    if not all_finite(Y):
        raise NonFiniteError(
            "What comes out of the layer overflows: `W` times `X` is not finite. Look at the "
            f"calibration inputs{'' if X.dtype == torch.float64 else ', or pass them in float64'}."
        )
    return Y.relu_() if kind == "relu" else Y


def second_moments(targets: LayerTargets) -> Float[Tensor, "n n"]:
    """Return Xᵀ X in float64, summed a chunk at a time.

    Raises:
        NonFiniteError: If that overflows.
    """
    n = targets.X.shape[1]
    G = torch.zeros(n, n, dtype=torch.float64, device=targets.X.device)
    step = max(1, targets.chunk or CHUNK_ENTRIES // max(n, 1))
    for X in torch.split(targets.X, step):
        X = X.double()
        G.addmm_(X.T, X)
    if not all_finite(G):
        raise NonFiniteError(
            "What goes into the layer overflows when squared. Look at the calibration inputs."
        )
    return G


def from_moments(
    W: Float[Tensor, "m n"],
    gram: Float[Tensor, "n n"],
    cross: Float[Tensor, "m n"] | None,
    square: float | None,
) -> LayerTargets:
    """Return a linear layer of at most n samples whose discrepancies are those of the moments.

    ‖X Uᵀ − Y‖² = ‖R Uᵀ − Z‖² + hidden for Rᵀ R = Xᵀ X and Z = R⁻ᵀ Xᵀ Y, so that the number of
    samples drops out.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    if float(values[0]) < -1e-4 * float(values[-1].abs()):
        raise ValueError(
            "`gram` must have no negative eigenvalue, as a sum of squares has none, got "
            f"{float(values[0]):.4g}. Pass Xᵀ X."
        )
    # What is left of directions that no sample has is rounding.
    seen = values > values[-1:].clamp(min=0.0) * len(gram) * torch.finfo(torch.float64).eps
    roots = values[seen].sqrt()
    R = roots[:, None] * vectors.T[seen]
    if cross is None or square is None:
        return LayerTargets(R, R @ W.double().T, "linear")
    Z = (vectors.T[seen] / roots[:, None]) @ cross.double().T
    left = square - float(Z.square().sum())
    if left < -1e-6 * square:
        raise ValueError(
            "`square` must be the squared norm of the targets whose products with the inputs are "
            f"`cross`, so at least {float(Z.square().sum()):.6g}, got {square}."
        )
    # A difference of two sums: below their rounding it is none.
    return LayerTargets(R, Z, "linear", hidden=left if left > 1e-13 * square else 0.0)


def reduced(targets: LayerTargets, W: Tensor, gram: Tensor, *, own: bool) -> LayerTargets:
    """Return a linear layer's targets by its moments alone; ``own`` where they are W's outputs."""
    if own:
        return from_moments(W, gram, None, None)
    cross, square = torch.zeros_like(W, dtype=torch.float64), 0.0
    for _, X, T, _ in targets.chunks():
        cross.addmm_(T.T, X)
        square += float(T.square().sum())
    return from_moments(W, gram, cross, square)


class TargetSize(NamedTuple):
    """How large the targets of a layer are."""

    norm: float
    """‖T_Ω‖_F, with what is hidden."""
    scale: float
    """Root mean square of T_Ω, or of all of T where nothing is active."""
    zero_fits: bool
    """Whether weights of zero leave all inactive outputs at most at their bounds."""


def target_size(targets: LayerTargets) -> TargetSize:
    """Return how large the targets of a layer are."""
    total, whole, count, fits = 0.0, 0.0, 0, True
    for _, _, T, active in targets.chunks():
        near = T if active is None else T * active
        total += float(near.square().sum())
        whole += float(T.square().sum())
        count += T.numel() if active is None else int(active.sum())
        fits = fits and (active is None or bool(((T >= 0) | active).all()))
    mean = total / count if count else whole / max(targets.Y.numel(), 1)
    return TargetSize(math.sqrt(total + targets.hidden), math.sqrt(mean), fits)
