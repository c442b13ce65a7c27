"""Gradients of single samples' losses as rows, a few at a time."""

from collections.abc import Iterator
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hessian import Objective
from hessian.batches import Batch, batch_length, map_tensors
from hessian.determinism import require_fixed_modules
from hessian.fisher import Kind
from hessian.likelihoods import factor, likelihood_of, smoothing, target_of
from hessian.torch_settings import eager, float32_products, math_attention
from pruning.dense_distance import DenseDistance

ROW_BYTES = 1 << 24
"""Bytes of rows that are made at a time: few enough for memory that is used again and again."""


def fisher_rows(
    objective: Objective,
    w: Float[Tensor, " d"],
    *,
    kind: Kind,
    num_samples: int | None = None,
    samples_per_row: int = 1,
    seed: int = 0,
) -> Iterator[Float[Tensor, "rows d"]]:
    """Yield rows g of which Σ g gᵀ is a Fisher matrix at w, a few at a time.

    With ``kind="empirical"`` of the losses as they are; all samples together give the matrix of
    ``fisher_operator(objective, w)``. With ``"monte_carlo"`` one whose mean over seeds is the
    Gauss-Newton matrix, from random targets of the network's own prediction or, for a
    ``DenseDistance``, from its slopes.

    A row costs a backward pass of its samples. All rows of a piece are made at once where
    ``torch.vmap`` can do so with the model, else one by one, which is slow.

    Args:
        objective: The loss; its regulariser is no part of a Fisher matrix.
        w: Where the gradients are taken, shape [d].
        kind: Whose targets the gradients belong to.
        num_samples: Samples that are taken, evenly spread over the data. Default: all.
        samples_per_row: Samples of a batch whose gradients are added up in a row. Where gradients
            have mean 0, as drawn ones do, the mean of Σ g gᵀ stays the same.
        seed: Seed of the draws, made on the CPU; the global random state is not used.

    Raises:
        ValueError: If w does not fit, a number is out of range, the objective is shared by
            several processes, or the empirical Fisher of a ``DenseDistance`` is asked for.
        TypeError: If the model's output is not one tensor, or targets are to be drawn for a
            criterion that is no likelihood we know.
    """
    number = require_samples(objective, w, kind, num_samples, samples_per_row)
    generator = torch.Generator().manual_seed(seed)
    scale = (objective.num_samples / (number * objective.normalizer)) ** 0.5
    limit = max(1, ROW_BYTES // (w.itemsize * len(w)))
    rows = _Rows(objective, w.detach())
    seen = 0
    for batch in objective.batches():
        length = batch_length(batch)
        # Sample i is taken where i · number / N passes a whole number.
        reach = torch.arange(seen, seen + length + 1, device="cpu") * number
        places = (reach.div(objective.num_samples, rounding_mode="floor").diff() > 0).nonzero()
        seen += length
        if not len(places):
            continue
        taken = _at(batch, places[:, 0].to(objective.device), length)
        u = scale * _slopes(objective, w.detach(), taken, kind, generator)
        for part in _pieces(len(u), samples_per_row, limit):
            yield rows.made(taken, u, part.to(u.device))


def require_samples(
    objective: Objective,
    w: Tensor,
    kind: Kind,
    num_samples: int | None,
    samples_per_row: int = 1,
) -> int:
    """Return how many samples ``fisher_rows`` takes, after a look at what it is asked for."""
    objective.require_vector(w, "w")
    require_fixed_modules(objective.model)
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` must be one of {get_args(Kind)}, got {kind!r}.")
    if kind == "empirical" and isinstance(objective, DenseDistance):
        raise ValueError(
            '`kind` must be "monte_carlo" for a DenseDistance, got "empirical": its gradients '
            "vanish at the dense weights."
        )
    if samples_per_row < 1:
        raise ValueError(f"`samples_per_row` must be at least 1, got {samples_per_row}.")
    if objective.ranks.size > 1:
        raise ValueError(
            "`objective` must belong to one process to give gradients of single samples, got one "
            f"of {objective.ranks.size}. Build it without `group`."
        )
    if num_samples is None:
        return objective.num_samples
    if not 1 <= num_samples <= objective.num_samples:
        raise ValueError(
            f"`num_samples` must be from 1 to {objective.num_samples}, the samples that "
            f"`objective` has, got {num_samples}."
        )
    return num_samples


class _Rows:
    """Jᵀ u of single samples, by one vectorised backward pass where the model allows it."""

    def __init__(self, objective: Objective, w: Tensor) -> None:
        self._objective, self._w = objective, w
        self._vectorised = True

    def made(self, batch: Batch, u: Tensor, places: Int[Tensor, "rows samples"]) -> Tensor:
        """Return one row for every row of places in the batch."""
        with torch.enable_grad(), eager(), math_attention(), float32_products(tf32=False):
            if self._vectorised:
                try:
                    return torch.vmap(lambda i: self._row(batch, u, i))(places).detach()
                except Exception:
                    # A model that looks at numbers, or a layer without a rule for batches. What is
                    # wrong with the model itself is raised below.
                    self._vectorised = False
            return torch.stack([self._row(batch, u, i) for i in places]).detach()

    def _row(self, batch: Batch, u: Tensor, places: Tensor) -> Tensor:
        part = _at(batch, places, len(u))
        pull: Any = torch.func.vjp(lambda w: self._objective.output(w, part), self._w)[1]
        found: Tensor = pull(u[places])[0]
        return found


def _slopes(
    objective: Objective, w: Tensor, batch: Batch, kind: Kind, generator: torch.Generator
) -> Tensor:
    """Return the gradient in the output of the batch's summed losses."""
    with torch.no_grad():
        z: Any = objective.output(w, batch)
    if not isinstance(z, Tensor):
        raise TypeError(
            "Gradients of single samples need a model that returns one tensor, got "
            f"{type(z).__name__}. Wrap the model so that it returns its logits."
        )
    if isinstance(objective, DenseDistance):
        return objective.drawn_slopes(z, generator)
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        if kind == "empirical":
            loss = objective.total_from_output(leaf, batch)
        else:
            loss = _drawn_loss(objective, leaf, batch, generator)
        slope: Tensor = torch.autograd.grad(loss, leaf, materialize_grads=True)[0]
    return slope


def _drawn_loss(
    objective: Objective, z: Tensor, batch: Batch, generator: torch.Generator
) -> Tensor:
    likelihood, y, fixed = likelihood_of(objective), target_of(batch), z.detach()
    if likelihood is None or smoothing(objective) or not likelihood.fits(fixed, y):
        raise TypeError(
            "Targets can be drawn for cross-entropy, binary cross-entropy and squared error "
            "without weights or smoothing, as nn modules or functions, of batches `(*inputs, "
            'target)`. Take `kind="empirical"`, or a `DenseDistance` as `objective`.'
        )
    drawn = likelihood.draw(fixed, y, generator)
    return factor(likelihood, objective, fixed, batch) * likelihood.unit_losses(z, drawn).sum()


def _pieces(length: int, each: int, limit: int) -> Iterator[Tensor]:
    """Yield places of samples, shape [rows, samples of a row], by ``limit`` rows or fewer."""
    whole = length - length % each
    places = torch.arange(length, device="cpu")
    yield from torch.split(places[:whole].reshape(-1, each), limit)
    if whole < length:
        yield places[None, whole:]


def _at(batch: Batch, places: Tensor, length: int) -> Batch:
    """Return the samples of a batch at some places."""
    found: Batch = map_tensors(batch, lambda t: t[places] if t.ndim and len(t) == length else t)
    return found
