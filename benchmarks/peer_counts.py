"""How many products each solver needs, at the price of as few real products as possible.

A product is linear. What lies in the span of vectors that were multiplied before needs no new
pass over the data: H (Σ cᵢ qᵢ) = Σ cᵢ H qᵢ. Only what sticks out of the span is multiplied really.
Solvers of one problem share their directions, so that five hundred products of a power iteration
become some hundred passes over the data. A remainder below ``NEGLIGIBLE`` is left out: it changes
a product by at most that share of ‖H‖, a thirtieth of the goal.
"""

import time
from pathlib import Path
from typing import Any

import torch
from peer_libraries import GOAL, SOLVERS, Product, Solver, counted
from peer_problems import Problem
from torch import Tensor

from flatvalley.run import read_tensors, write_tensors

NEGLIGIBLE = 3e-5
EVERY = 20
"""New directions between two savings."""

HINTS = {"pyhessian": 6, "eigenthings-fewest": 4}
"""Where the search for a setting begins, as a place in its list; 0 for others."""


class RememberedProducts:
    """Products with a matrix that remember every direction multiplied before.

    Args:
        product: The real product.
        size: Length of the vectors.
        device: Where the vectors live.
        path: File with the directions and their products, for the next run. Default: none.
    """

    def __init__(
        self,
        product: Product,
        size: int,
        device: torch.device | str = "cpu",
        path: Path | None = None,
    ) -> None:
        self._product, self._path = product, path
        self.directions = self.products = torch.empty(0, size, device=device)
        if path is not None and path.exists():
            tensors, _ = read_tensors(path)
            self.directions, self.products = tensors["directions"], tensors["products"]
        self._rows = len(self.directions)
        self._unsaved = 0

    def __call__(self, v: Tensor) -> Tensor:
        """Return the product with a vector, or with every column of a matrix."""
        if v.ndim == 2:
            return torch.stack([self(column) for column in v.T.contiguous()], dim=1)
        norm = v.norm()
        rest, coefficients = v / norm, v.new_zeros(self._rows)
        Q = self.directions[: self._rows]
        for _ in range(2):
            more = Q @ rest
            rest, coefficients = rest - Q.T @ more, coefficients + more
            if rest.norm() <= NEGLIGIBLE:  # the second pass is for new directions
                break
        out = self.products[: self._rows].T @ coefficients
        length = rest.norm()
        if length > NEGLIGIBLE:
            self._remember(rest / length)
            out += length * self.products[self._rows - 1]
        return out * norm

    def __len__(self) -> int:
        return self._rows

    def save(self) -> None:
        """Write what was learned."""
        if self._path is not None and self._unsaved:
            kept = {"directions": self.directions, "products": self.products}
            write_tensors(self._path, {k: t[: self._rows] for k, t in kept.items()}, {})
            self._unsaved = 0

    def _remember(self, q: Tensor) -> None:
        if self._rows == len(self.directions):
            room = q.new_empty(64, len(q))
            self.directions = torch.cat([self.directions, room])
            self.products = torch.cat([self.products, room])
        self.directions[self._rows], self.products[self._rows] = q, self._product(q)
        self._rows += 1
        self._unsaved += 1
        if self._unsaved >= EVERY:
            self.save()


def rayleigh(V: Tensor, HV: Tensor) -> tuple[float, list[float]]:
    """Largest ‖H v − (vᵀ H v) v‖ over the largest |vᵀ H v|, and these values, leading first."""
    V, HV = V.to(torch.float64), HV.to(torch.float64)
    values = (V * HV).sum(dim=0)
    residual = float((HV - V * values).norm(dim=0).max() / values.abs().max())
    return residual, sorted(values.tolist(), key=abs, reverse=True)


def orthonormal(V: Tensor) -> Tensor:
    """Return the vectors made orthonormal, so that copies of one pair are found out."""
    return torch.linalg.qr(V.to(torch.float64))[0].to(torch.float32)


def loosest_setting(
    remembered: RememberedProducts, problem: Problem, solver: str, seed: int, hints: dict[str, int]
) -> tuple[dict[str, Any], Tensor]:
    """Run a solver's own code at its settings; return the loosest that meets the goal.

    From where the last search ended, settings are loosened as long as they meet the goal, or
    tightened until one does. Of settings with one tolerance, the one with fewest products counts.

    Returns:
        Setting, products, CPU seconds outside the products, and residual; and the vectors.
    """
    solve, settings = SOLVERS[solver]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for i, setting in enumerate(settings):
        groups.setdefault(setting.get("tol", i), []).append(setting)
    levels = list(groups.values())

    def best_of(level: int) -> tuple[dict[str, Any], Tensor]:
        runs = [_run(remembered, problem, solve, setting, seed) for setting in levels[level]]
        return min(runs, key=lambda run: _rank(run[0]))

    level = hints.get(solver, 0)
    best = best_of(level)
    if best[0]["met"]:
        while level > 0 and (looser := best_of(level - 1))[0]["met"]:
            level, best = level - 1, looser
    else:
        while level + 1 < len(levels) and not best[0]["met"]:
            level, best = level + 1, best_of(level + 1)
    hints[solver] = level
    remembered.save()
    return best


def _run(
    remembered: RememberedProducts,
    problem: Problem,
    solve: Solver,
    setting: dict[str, Any],
    seed: int,
) -> tuple[dict[str, Any], Tensor]:
    with counted(remembered) as (product, spent):
        began = time.process_time()
        vectors = solve(product, problem, seed, **setting)
        outside = time.process_time() - began - spent["seconds"]
    V = orthonormal(vectors)
    residual, _ = rayleigh(V, remembered(V))
    record = {
        "setting": setting,
        "products": spent["products"],
        "in_columns": spent["in_columns"],
        "seconds_outside": outside,
        "residual_remembered": residual,
        "met": residual <= GOAL,
    }
    return record, V


def _rank(record: dict[str, Any]) -> tuple[bool, float]:
    """Those that met the goal first, by products; the others by residual."""
    met = record["met"]
    return not met, record["products"] if met else record["residual_remembered"]
