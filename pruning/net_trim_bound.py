"""How far a pruned network's outputs are from the dense one's: measured, and bounded by layer."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from pruning.layer_flow import Link
from pruning.net_trim_result import Mode, TrimmedLayer


def chained_bound(
    chain: tuple[Link, ...] | None,
    layers: Mapping[str, TrimmedLayer],
    parts: Mapping[str, Tensor],
    mode: Mode,
) -> float | None:
    """Return what the discrepancies of layers prove of a chain's, or None if it is no chain.

    In parallel e_l ≤ r_l + ‖U_l‖₂ e_{l−1}, with the discrepancy r_l on dense inputs; a layer that
    stayed has none. In a cascade, a pruned layer's discrepancy on pruned inputs is e_l itself. With
    a batch norm of scales s right after it, diag(s) U_l takes the place of U_l, and r_l counts max
    |s| times unless it is that of what comes out of a ReLU after the batch norm.

    Args:
        chain: Calls of layers in order.
        layers: The pruned ones, by weight.
        parts: Weights of the pruned network.
        mode: Of pruning.
    """
    names = [] if chain is None else [link.weight for link in chain]
    # Of calls that share weights only all together are measured, on inputs before the others.
    if chain is None or (mode == "cascade" and len(set(names)) < len(names)):
        return None
    e = 0.0
    for link in chain:
        own = layers.get(link.weight)
        r, rows = 0.0, parts[link.weight].detach().double().flatten(1)
        if own is not None:
            r = own.output_discrepancy
        if link.scale is not None:
            rows = rows * rows.new_tensor(link.scale)[:, None]
            if own is not None and "batch norm" not in own.between:
                r *= max(map(abs, link.scale))
        if own is not None and mode == "cascade":
            e = r
            continue
        norm = max(float(torch.linalg.matrix_norm(U, 2)) for U in rows.chunk(link.groups))
        # An input that is in several patches counts in each.
        e = e * norm * math.sqrt(link.overlap) + r
    return e


@torch.no_grad()
def output_distance(
    objective: Objective, w: Float[Tensor, " d"], dense: Float[Tensor, " d"]
) -> tuple[float, float]:
    """Return ‖f(x; w) − f(x; dense)‖_F and ‖f(x; dense)‖_F over all calibration inputs."""
    total, size = 0.0, 0.0
    for batch in objective.batches():
        z = objective.output(dense, batch).double()
        total += float((objective.output(w, batch).double() - z).square().sum())
        size += float(z.square().sum())
    return math.sqrt(total), math.sqrt(size)
