"""Which eigenvalues lead: their order, what they maximise, and where one more would belong."""

import numpy as np
import numpy.typing as npt

from hessian.lanczos import Array
from hessian.subspace import Which

Indices = npt.NDArray[np.intp]


def leading_order(values: Array, which: Which) -> Indices:
    """Return the indices of ascending values, leading first."""
    if which == "both":
        up = np.arange(len(values))
        turns = np.stack([up[::-1], up], axis=1).reshape(-1)
        return turns[: len(values)]
    keys = {"magnitude": -np.abs(values), "largest": -values, "smallest": values}
    return np.argsort(keys[which], kind="stable")


def merit(leading: Array, which: Which) -> float:
    """Return the sum that the leading values maximise, over all subspaces of their number."""
    if which == "magnitude":
        return float(np.abs(leading).sum())
    if which == "both":
        return float(leading[0::2].sum() - leading[1::2].sum())
    return float(leading.sum()) * (1.0 if which == "largest" else -1.0)


def outer_bounds(leading: Array, which: Which, margin: float) -> list[float]:
    """Return the points beyond which one more eigenvalue would be among the leading ones."""
    if which == "magnitude":
        edge = float(np.abs(leading).min()) + margin
        return [edge, -edge]
    if which == "largest":
        return [float(leading.min()) + margin]
    if which == "smallest":
        return [float(leading.max()) - margin]
    upper = float(leading[0::2].min()) + margin
    return [upper, float(leading[1::2].max()) - margin] if len(leading) > 1 else [upper]
