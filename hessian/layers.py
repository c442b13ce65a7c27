"""Trace and sharpest curvature of every layer, in one table."""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.blocks import layer_slices
from hessian.eigensolvers import leading_eigenspace
from hessian.objective import Objective
from hessian.operators import Operator
from hessian.probes import CountedProducts, SignProbes, column_dots
from hessian.products import hessian_operator
from hessian.progress import ProgressOption, report_progress
from hessian.storage import require_pandas

TYPICAL_PRODUCTS = 20
"""Products for one layer's eigenvalue, guessed for the progress bar until some are known."""


@dataclass(frozen=True)
class LayerRow:
    """What the diagonal block of the Hessian that belongs to one layer is like."""

    name: str
    size: int
    """Number of weights."""
    trace: float
    standard_error: float
    """Standard error of the trace, with one degree of freedom a probe less one."""
    share: float
    """Part of the trace of the whole Hessian."""
    top_eigenvalue: float
    """The block's eigenvalue of largest magnitude."""
    residual: float
    """Largest ‖H_ll v − λ v‖₂ of the eigenpairs found, from real products, in units of H."""
    num_products: int
    """Products spent on this layer's eigenvalues; the traces share theirs."""
    converged: bool
    """Whether the residual is at most the tolerance asked for."""


@dataclass(frozen=True)
class LayerTable:
    """One row a layer, in the model's order."""

    rows: tuple[LayerRow, ...]
    trace: float
    """Trace of the whole Hessian: the sum over layers."""
    standard_error: float
    """Its standard error; layers share their probes, so theirs do not add up to it."""
    eigenvalues: dict[str, tuple[float, ...]]
    """The leading eigenvalues of every layer's block, by magnitude."""
    num_products: int
    """Products in all, with the Hessian or a block of it."""

    def to_pandas(self) -> Any:
        """Return a DataFrame with one row a layer.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        return require_pandas().DataFrame([vars(row) for row in self.rows]).set_index("name")

    def __str__(self) -> str:
        """Return the table as aligned text."""
        width = max(len("layer"), len("all"), *(len(row.name) for row in self.rows))
        head = f"{'layer':<{width}} {'weights':>11} {'trace':>11} {'± SE':>9} {'share':>7}"
        lines = [f"{head} {'top λ':>11} {'residual':>9} {'products':>9}"]
        lines += [
            f"{row.name:<{width}} {row.size:>11,} {row.trace:>11.4g} "
            f"{row.standard_error:>9.2g} {row.share:>7.1%} {row.top_eigenvalue:>11.4g} "
            f"{row.residual:>9.1e} {row.num_products:>9,}" + ("" if row.converged else " *")
            for row in self.rows
        ]
        total = sum(row.size for row in self.rows)
        lines.append(
            f"{'all':<{width}} {total:>11,} {self.trace:>11.4g} {self.standard_error:>9.2g} "
            f"{'':>7} {'':>11} {'':>9} {self.num_products:>9,}"
        )
        if not all(row.converged for row in self.rows):
            lines.append("* the budget ended before the tolerance was reached")
        return "\n".join(lines)


def layer_table(
    objective: Objective,
    w: Float[Tensor, " d"] | None = None,
    *,
    num_probes: int = 30,
    k: int = 1,
    tol: float = 1e-3,
    max_products: int = 200,
    memory_budget: int | None = None,
    seed: int = 0,
    progress: ProgressOption = False,
) -> LayerTable:
    """Measure the trace and the leading eigenvalues of the Hessian's block for every layer.

    A layer is a module with weights of its own, as ``layer_slices`` cuts them. One set of probes
    serves the traces of all layers: for random signs v, E v_lᵀ (H v)_l = tr H_ll, since signs of
    different layers are independent. The part of H v that comes from other layers adds
    ‖H_l,rest‖²_F to the variance.
    Eigenvalues are those of the block, as if all other layers were frozen; the largest of them
    is at most the largest of the Hessian. Their products differentiate in that layer's weights
    only, which costs less than a product with the Hessian, the less the nearer to the output.

    Args:
        objective: The training loss.
        w: Where the Hessian is taken, shape [d]. Default: the model's current weights.
        num_probes: Probes for the traces, one product each for all layers together.
        k: Eigenvalues a layer, fewer where it has fewer weights.
        tol: Stop the eigenvalues of a layer once ‖H_ll v − λ v‖₂ ≤ tol · max |λ|.
        max_products: Budget of products for the eigenvalues of one layer.
        memory_budget: As for ``hessian_operator``.
        seed: Seed of all random vectors, drawn on the CPU; the global state is not used.
        progress: A bar, or a function called with a ``Step``.

    Returns:
        The table. A layer whose budget ended has ``converged=False``, with a
        ``ConvergenceWarning``.

    Raises:
        ValueError: If there are fewer than two probes, w does not fit the objective, or k, tol or
            max_products cannot be met.
        NonFiniteError: If a product is not finite.
        NonDeterministicError: If the loss changes between products.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> table = layer_table(Objective(model, torch.nn.MSELoss(), data))
        >>> [(row.name, round(row.trace, 4), round(row.top_eigenvalue, 4)) for row in table.rows]
        [('0', 5.0, 4.0)]

    References:
        Dong, Yao, Cai, Arfeen, Gholami, Mahoney, Keutzer (2020), HAWQ-V2, on layers by trace.
    """
    if num_probes < 2:
        raise ValueError(
            f"`num_probes` must be at least 2 to give a standard error, got {num_probes}."
        )
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if not tol > 0:
        raise ValueError(f"`tol` must be positive, got {tol}.")
    if max_products < 2 * k:
        raise ValueError(
            f"`max_products` must be at least {2 * k}, to span and measure `k`={k} pairs, got "
            f"{max_products}."
        )
    w = objective.weights() if w is None else w.detach().clone()
    layers = layer_slices(objective)
    with report_progress(progress, "layers") as update:
        H = hessian_operator(objective, w, memory_budget=memory_budget)
        A = CountedProducts(H, update, num_probes + TYPICAL_PRODUCTS * len(layers))
        samples = _trace_samples(A, SignProbes(H, seed), list(layers.values()), num_probes)
        spent = A.spent
        del H, A  # and with them the graph of the whole gradient
        spaces = {}
        expected = num_probes + TYPICAL_PRODUCTS * len(layers)
        for done, (name, part) in enumerate(layers.items(), start=1):
            layer = _LayerObjective(objective, w, part)
            block = hessian_operator(layer, memory_budget=memory_budget)
            counted = CountedProducts(block, update, expected, spent=spent)
            spaces[name] = leading_eigenspace(
                _through(counted),
                k=min(k, block.size),
                tol=tol,
                max_products=max_products,
                seed=seed,
            )
            spent = counted.spent
            expected = num_probes + round((spent - num_probes) / done * len(layers))
    traces, errors = samples.mean(dim=1), samples.std(dim=1) / math.sqrt(num_probes)
    whole = samples.sum(dim=0)
    total = float(whole.mean())
    rows = [
        LayerRow(
            name=name,
            size=part.stop - part.start,
            trace=float(traces[i]),
            standard_error=float(errors[i]),
            share=float(traces[i]) / total if total else math.nan,
            top_eigenvalue=float(spaces[name].values[0]),
            residual=float(spaces[name].residuals.max()),
            num_products=spaces[name].num_products,
            converged=spaces[name].converged,
        )
        for i, (name, part) in enumerate(layers.items())
    ]
    return LayerTable(
        tuple(rows),
        total,
        float(whole.std()) / math.sqrt(num_probes),
        {name: tuple(space.values.tolist()) for name, space in spaces.items()},
        spent,
    )


class _LayerObjective(Objective):
    """The loss as a function of the weights in ``part``, all others fixed at w.

    Shares the data, the criterion and the ranks of the objective it is made from.
    """

    def __init__(self, whole: Objective, w: Tensor, part: slice) -> None:
        self.__dict__.update(vars(whole))
        self._fixed = whole.unflatten(w)
        ends = accumulate(shape.numel() for shape in whole.shapes.values())
        inside = [part.start < end <= part.stop for end in ends]
        self.shapes = {
            name: shape
            for (name, shape), own in zip(whole.shapes.items(), inside, strict=True)
            if own
        }
        self._lengths = [shape.numel() for shape in self.shapes.values()]
        self.size = sum(self._lengths)
        self._own = w[part].clone()

    def weights(self) -> Float[Tensor, " d"]:
        return self._own.clone()

    def unflatten(self, w: Float[Tensor, " d"]) -> dict[str, Tensor]:
        return self._fixed | super().unflatten(w)


def _trace_samples(
    A: CountedProducts, probes: SignProbes, parts: list[slice], count: int
) -> Tensor:
    """Return v_lᵀ (A v)_l for every layer and probe, shape [layers, probes], in float64."""
    columns = []
    for size in A.chunks(count):
        X = probes.draw(size)
        AX = A @ X
        columns.append(torch.stack([column_dots(X[part], AX[part]) for part in parts]))
    return torch.cat(columns, dim=1)


def _through(A: CountedProducts) -> Operator:
    """Return A as an operator whose products are counted and reported."""
    H = A.operator

    def product(v: Tensor) -> Tensor:
        return (A @ v[:, None])[:, 0] if v.ndim == 1 else A @ v

    by_columns = None if H.columns is None else product
    return Operator(product, H.size, H.dtype, H.device, by_columns, H.method)
