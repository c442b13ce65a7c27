"""Moves one network's hidden units to where another's are, so that a line between them is fair."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import scipy.optimize
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from hessian.flat_weights import FlatWeights
from hessian.parameters import unwrapped
from landscape.permutations import Permutations, reorder

Weights = TypeVar("Weights", nn.Module, Tensor, dict[str, Tensor])
# An exchange must shorten the distance by more than what rounding in float64 can make up.
SMALLEST_GAIN = 1e-12


@dataclass(frozen=True)
class Alignment:
    """The order of hidden units of one network that brings it close to another."""

    orders: Mapping[str, Int64[Tensor, " n"]]
    """For each group of axes, which unit comes to which place."""
    permutations: Permutations
    """Which axes belong to which group."""
    distance_before: float
    """Distance in the weights of the two networks as they are."""
    distance: float
    """Distance after moving the units."""
    num_sweeps: int
    """Rounds over all groups, the last of which changed nothing if it converged."""
    converged: bool
    """Whether no single group can be moved to a shorter distance."""
    layout: FlatWeights
    """How flat vectors are cut into tensors."""

    def apply(self, weights: Weights) -> Weights:
        """Return weights with their units moved: the same function, in another place.

        Args:
            weights: A module, of which a copy is returned, buffers included; tensors by name; or
                a flat vector, which has no buffers: statistics of batch norm must then be computed
                anew.
        """
        if isinstance(weights, nn.Module):
            moved = copy.deepcopy(weights)
            tensors = _tensors(moved)
            with torch.no_grad():
                for name, tensor in self.apply(tensors).items():
                    tensors[name].copy_(tensor)
            return moved
        if isinstance(weights, Tensor):
            parts = self._present(self.layout.unflatten(weights)).permuted(
                self.layout.unflatten(weights), self.orders
            )
            return torch.cat([part.reshape(-1) for part in parts.values()])
        return self._present(weights).permuted(weights, self.orders)

    def _present(self, tensors: Mapping[str, Tensor]) -> Permutations:
        axes = self.permutations.axes
        return Permutations({name: axes[name] for name in axes if name in tensors})


def align(
    a: nn.Module | FlatWeights,
    b: nn.Module | Tensor,
    *,
    at: Tensor | None = None,
    permutations: Permutations | None = None,
    max_sweeps: int = 100,
    seed: int = 0,
) -> Alignment:
    """Find the order of b's hidden units that brings its weights closest to a's.

    Two trainings from different starts find the same features in another order, and the line
    between them then crosses a ridge that is no property of the two valleys. Weight matching moves
    one group of units at a time to where, with all others fixed, the distance of the weights is
    smallest (a linear assignment), until no group moves. That is a local optimum; other seeds may
    find others.

    Weights and biases count, running statistics of batch norm only follow.

    Args:
        a: The network that stays: a module, or an objective, whose flat layout vectors follow.
        b: The network whose units are moved: a module of the same architecture, or a flat vector.
            A group that reaches into weights that are not in the vector stays.
        at: Flat weights of ``a``, where they are not those of the module, shape [d].
        permutations: Which axes move together. Default: read off the model's graph by
            `Permutations.of`.
        max_sweeps: Most rounds over all groups.
        seed: Seed of the order in which groups take turns.

    Returns:
        The orders; ``apply(b)`` is the moved network.

    Raises:
        ValueError: If the networks are of different architecture, the graph cannot be traced,
            ``max_sweeps`` is not positive, or ``at`` comes with a module.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> model = model.append(torch.nn.Linear(3, 1))
        >>> moved = Permutations.of(model).permuted(
        ...     dict(model.named_parameters()), {"p0": torch.tensor([2, 0, 1])}
        ... )
        >>> flat = torch.cat([part.detach().reshape(-1) for part in moved.values()])
        >>> align(model, flat).distance
        0.0

    References:
        Ainsworth, Hayase & Srinivasa (2023), Git Re-Basin: merging models modulo permutation
        symmetries, algorithm 1.
    """
    if max_sweeps < 1:
        raise ValueError(f"`max_sweeps` must be at least 1, got {max_sweeps}.")
    layout = a if isinstance(a, FlatWeights) else FlatWeights(a)
    model = layout.model
    if isinstance(b, Tensor):
        w = layout.weights() if at is None else at.detach()
        layout.require_vector(w, "at")
        layout.require_vector(b, "b")
        mine, theirs = layout.unflatten(w), layout.unflatten(b.detach())
    elif at is not None:
        raise ValueError("`at` must come with a flat vector `b`, got a module.")
    else:
        pair = model, unwrapped(b)
        mine, theirs = ({n: p.detach() for n, p in m.named_parameters()} for m in pair)
    _require_same_shapes(mine, theirs)
    groups = permutations or Permutations.of(model)
    _require_known(groups, model)
    if isinstance(b, Tensor):
        parameters = dict(model.named_parameters())
        groups = groups.without(lambda name: name in parameters and name not in mine)
    counting = Permutations({name: groups.axes[name] for name in groups.axes if name in mine})
    sizes = counting.sizes(mine)
    orders = {name: torch.arange(size) for name, size in sizes.items()}
    before = _distance(mine, theirs)
    generator = torch.Generator().manual_seed(seed)
    names, sweep, moved = list(orders), 0, True
    while moved and sweep < max_sweeps:
        sweep, moved = sweep + 1, False
        for i in torch.randperm(len(names), generator=generator).tolist():
            moved |= _move(names[i], orders, counting, mine, theirs)
    after = _distance(mine, counting.permuted(theirs, orders))
    return Alignment(orders, groups, before, after, sweep, not moved, layout)


def _move(
    group: str,
    orders: dict[str, Tensor],
    permutations: Permutations,
    mine: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
) -> bool:
    """Give one group its best order, and say whether that is nearer than its present one."""
    axes = {name: found for name, found in permutations.axes.items() if group in found}
    touched = Permutations(axes)
    b = touched.permuted({name: theirs[name] for name in axes}, orders)
    n = len(orders[group])
    likeness = torch.zeros(n, n, dtype=torch.float64)
    for name, found in axes.items():
        for axis, other in enumerate(found):
            if other == group:
                rows = [
                    t.to(torch.float64).movedim(axis, 0).reshape(n, -1)
                    for t in (mine[name], b[name])
                ]
                likeness += (rows[0] @ rows[1].T).cpu()
    chosen = torch.from_numpy(
        scipy.optimize.linear_sum_assignment(likeness.numpy(), maximize=True)[1]
    )
    # With the group on two axes of one tensor the gain is no sum of likenesses: measure it.
    step = {name: torch.arange(len(order)) for name, order in orders.items()} | {group: chosen}
    here = {name: mine[name] for name in axes}
    old, new = _distance(here, b), _distance(here, touched.permuted(b, step))
    if not new < old * (1 - SMALLEST_GAIN):
        return False
    orders[group] = reorder(orders[group], 0, chosen)
    return True


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    squares = [(a[name].to(torch.float64) - b[name].to(torch.float64)).square().sum() for name in a]
    return float(torch.stack(squares).sum().sqrt())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _require_known(groups: Permutations, model: nn.Module) -> None:
    for name in groups.axes:
        if name not in _tensors(model):
            raise ValueError(
                f"`permutations` names `{name}`, which the model does not have. Take the names of "
                "its parameters and buffers, tied ones once."
            )


def _require_same_shapes(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name in {**mine, **theirs}:
        shapes = [list(t[name].shape) if name in t else "none" for t in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`b` must be of the same architecture as `a`, but `{name}` has shape {shapes[0]} "
                f"in `a` and {shapes[1]} in `b`."
            )
