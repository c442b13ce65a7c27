"""Which parameters of a model make up the flat weight vector."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hessian.unsharded import is_sharded

Selection = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None
"""Glob patterns of names, a predicate of (name, parameter), or None for all that train."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside data-parallel and ``torch.compile`` wrappers.

    Its parameters are the same ones, under the names that they had before. The wrappers themselves
    cannot be used: their forward passes communicate, or have no second derivative.

    Raises:
        ValueError: If the model is a ``FullyShardedDataParallel``.
    """
    while True:
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "`model` must be an ordinary module, got FullyShardedDataParallel, which hides its "
                "parameters. Load its full state dict into a plain model, or shard with "
                "`fully_shard` and pass `unsharded(model)`."
            )
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
            continue
        inside = getattr(model, "_orig_mod", None)  # torch.compile's
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def select_parameters(model: nn.Module, selection: Selection) -> dict[str, nn.Parameter]:
    """Return the selected parameters by name, in the model's order, tied ones once.

    Raises:
        ValueError: If none is selected, a pattern matches nothing, one is sharded over ranks, or
            they do not share one real floating-point type and one device.
    """
    named = dict(model.named_parameters())
    if selection is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    elif callable(selection):
        chosen = {name: p for name, p in named.items() if selection(name, p)}
    else:
        chosen = _match(named, [selection] if isinstance(selection, str) else selection)
    if not chosen:
        raise ValueError(
            "`parameters` must select at least one parameter, got none of the model's "
            f"{len(named)}"
            + (" (all are frozen; call `requires_grad_()`)." if named and not selection else ".")
        )
    for name, p in chosen.items():
        if is_sharded(p):
            raise ValueError(
                f"`model` must hold whole parameters, but `{name}` is sharded over ranks, and its "
                "gradient has no derivative. Pass a whole copy: `unsharded(model)`."
            )
        if not p.is_floating_point():
            raise ValueError(f"`parameters` must be real floating-point, `{name}` is {p.dtype}.")
    kinds = {(p.dtype, p.device) for p in chosen.values()}
    if len(kinds) > 1:
        listed = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise ValueError(
            "`parameters` must share one type and device to form one flat vector, got "
            f"{', '.join(listed)}."
        )
    return chosen


def parameter_places(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of every parameter by its first one, but one for each module's attribute.

    Tied parameters have several, a module that is registered twice has its own once.
    """
    places: dict[int, list[str]] = {}
    seen: set[tuple[int, str]] = set()
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        attribute = id(model.get_submodule(owner)), leaf
        if attribute not in seen:
            seen.add(attribute)
            places.setdefault(id(p), []).append(name)
    return {names[0]: names for names in places.values()}


def _match(named: dict[str, nn.Parameter], patterns: Iterable[str]) -> dict[str, nn.Parameter]:
    wanted: set[str] = set()
    for pattern in patterns:
        hits = {name for name in named if fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(
                f'`parameters` pattern "{pattern}" matches none of {", ".join(named) or "nothing"}.'
            )
        wanted |= hits
    return {name: p for name, p in named.items() if name in wanted}
