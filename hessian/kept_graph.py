"""Hessian products at one point, from graphs of the gradient that are kept between products."""

import logging
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from hessian.batches import Batch, map_tensors
from hessian.determinism import require_fixed_modules
from hessian.double_backward import differentiable_twice, require_second_derivative
from hessian.errors import NonDeterministicError
from hessian.objective import Objective

logger = logging.getLogger(__name__)

FREE_SHARE = 0.25
"""Share of the free memory that graphs may take if no budget is given."""


class KeptGraph:
    """Reverse-over-reverse products with the Hessian at w, graphs kept where memory allows.

    The graph of a batch's gradient does not depend on the vector of a product. Kept, a product is
    one backward pass through it, about half of computing it anew. Batches whose graphs do not fit
    are computed anew for every product, or once for a matrix of columns, and their loss is compared
    with the first one.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]; not changed by anybody later.
        memory_budget: Bytes for the graphs; 0 keeps none. Default: a quarter of what is free when
            the first product is made.
    """

    def __init__(self, objective: Objective, w: Tensor, memory_budget: int | None) -> None:
        self._objective, self._budget = objective, memory_budget
        self._w = w.detach().requires_grad_()
        self._gradients: list[Tensor] | None = None
        self._penalty: Tensor | None = None
        self._first_loss: float | None = None
        self.complete = False
        """Whether every batch has its graph kept."""
        self.bytes = 0
        """Estimated size of the graphs that are kept."""

    @property
    def num_kept(self) -> int:
        """Number of batches whose graphs are kept; 0 before the first product."""
        return len(self._gradients or ())

    def product(self, v: Tensor) -> Tensor:
        """Return H v for v of shape [d].

        Raises:
            NonDeterministicError: If the model or the data changed since the first product.
            NonFiniteError: If the product is not finite.
        """
        return self._rows(v[None])[0]

    def columns(self, V: Tensor) -> Tensor:
        """Return H V for V of shape [d, k]; raises what `product` does."""
        return self._rows(V.T.contiguous()).T

    def _rows(self, rows: Tensor) -> Tensor:
        """Return (H v)ᵀ for every row vᵀ."""
        require_fixed_modules(self._objective.model)
        with torch.enable_grad(), differentiable_twice():
            if self._gradients is None:
                self._gradients = self._keep_graphs()
                self._penalty = self._regularizer_gradient()
            out = torch.zeros_like(rows)
            for gradient in self._gradients:
                self._add_through(gradient, rows, out, keep=True)
            if not self.complete:
                self._add_recomputed(rows, out)
            self._objective.reduce_(out).div_(self._objective.normalizer)
            if self._penalty is not None:
                self._add_through(self._penalty, rows, out, keep=True)
        if not torch.isfinite(out).all():
            # Raises, and names what is wrong.
            self._objective.hessian_product(self._w.detach(), rows[0])
        return out

    def _keep_graphs(self) -> list[Tensor]:
        """Build the graphs of as many batches, from the first on, as the budget allows."""
        budget = self._budget
        if budget is None:
            budget = int(FREE_SHARE * free_memory(self._objective.device))
        kept: list[Tensor] = []
        bytes_per_element = 0.0
        self.complete = budget > 0
        for batch in self._objective.batches() if self.complete else ():
            elements = max(_num_elements(batch), 1)
            if not kept:
                bytes_per_element = self._measure(batch) / elements
            size = math.ceil(bytes_per_element * elements)
            if self.bytes + size > budget:
                self.complete = False
                break
            kept.append(self._gradient(batch)[1])
            self.bytes += size
        logger.info(
            "graphs of %s kept, %.2f GiB of a budget of %.2f GiB",
            "all batches" if self.complete else f"{len(kept)} batches",
            self.bytes / 2**30,
            budget / 2**30,
        )
        return kept

    def _add_recomputed(self, rows: Tensor, out: Tensor) -> None:
        """Add the part of the sum that belongs to batches without a kept graph."""
        loss = 0.0
        for i, batch in enumerate(self._objective.batches()):
            if i >= self.num_kept:
                total, gradient = self._gradient(batch)
                self._add_through(gradient, rows, out, keep=False)
                loss += total
        slack = 1e-10 if rows.dtype == torch.float64 else 1e-4
        first = self._first_loss = loss if self._first_loss is None else self._first_loss
        if not math.isclose(loss, first, rel_tol=slack, abs_tol=slack):
            n = self._objective.normalizer
            raise NonDeterministicError(
                f"The loss at the same weights was {first / n:.9g} in the first product and is "
                f"{loss / n:.9g} now, so the products belong to different matrices. Something in "
                "the data or the model changes between passes."
            )

    def _gradient(self, batch: Batch) -> tuple[float, Tensor]:
        """Sum of the batch's losses, and its gradient with the graph that made it."""
        total = self._objective.batch_total(self._w, batch)
        (gradient,) = torch.autograd.grad(total, self._w, create_graph=True, materialize_grads=True)
        require_second_derivative(gradient)
        return float(total.detach()), gradient

    def _regularizer_gradient(self) -> Tensor | None:
        penalty = self._objective.regularization(self._w)
        if not penalty.requires_grad:
            return None
        return torch.autograd.grad(penalty, self._w, create_graph=True, materialize_grads=True)[0]

    def _add_through(self, gradient: Tensor, rows: Tensor, out: Tensor, *, keep: bool) -> None:
        """Add the products that one gradient's graph gives, in place."""
        if not gradient.requires_grad:  # a loss linear in w
            return
        try:
            for i, v in enumerate(rows):
                (part,) = torch.autograd.grad(
                    gradient,
                    self._w,
                    v,
                    retain_graph=keep or i + 1 < len(rows),
                    materialize_grads=True,
                )
                out[i] += part
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise NonDeterministicError(
                "A tensor of the model or the data was changed in place since the first product, "
                "so the products would belong to different matrices. Build a new operator."
            ) from error

    def _measure(self, batch: Batch) -> int:
        """Bytes that the graph of one batch's gradient holds, from a graph that is thrown away."""
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would keep its own graph alive

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._gradient(batch)
        return sum(sizes.values())


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, as well as the system tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 30


def _num_elements(batch: Batch) -> int:
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    map_tensors(batch, count)
    return total
