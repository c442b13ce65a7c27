"""Whole copies of models whose parameters are sharded over ranks (FSDP2)."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def unsharded(model: nn.Module) -> nn.Module:
    """Return a plain copy of a model that ``fully_shard`` has sharded, whole on every rank.

    A sharded model has gradients by ``loss.backward()`` alone: its parameters are gathered outside
    of the graph, so neither second derivatives nor other weights can be put in. The copy has all
    that an ordinary module has. All ranks call this together; the model is left as it is, and later
    training does not move the copy.

    Cost: one gather of the parameters, and on every rank the memory of all of them in the type in
    which they are stored. Modules keep what else they hold, buffers included, in common with the
    model.

    Args:
        model: A module after ``fully_shard``, or any other module.

    Returns:
        A module of the original class, with parameters of the same names that require gradients
        where the model's do; tied ones stay tied.

    Example:
        ``objective = Objective(unsharded(model), criterion, data, group=group)``
    """
    return _module_copy(model, {})


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter is a ``DTensor``, spread over ranks."""
    # Not isinstance: importing torch.distributed.tensor takes as long as torch itself.
    return hasattr(tensor, "full_tensor")


def _module_copy(module: nn.Module, done: dict[int, Any]) -> nn.Module:
    if id(module) in done:
        found: nn.Module = done[id(module)]
        return found
    kind = _plain_class(type(module))
    twin = done[id(module)] = kind.__new__(kind)  # a sharded module refuses to be copied
    twin.__dict__.update(module.__dict__)
    twin._parameters = {name: _whole(p, done) for name, p in module._parameters.items()}
    twin._buffers = dict(module._buffers)
    twin._modules = {
        name: None if child is None else _module_copy(child, done)
        for name, child in module._modules.items()
    }
    for name in HOOKS:
        hooks = getattr(module, name).items()
        kept = OrderedDict((key, hook) for key, hook in hooks if not _communicates(hook))
        setattr(twin, name, kept)
    return twin


def _whole(p: nn.Parameter | None, done: dict[int, Any]) -> nn.Parameter | None:
    """The full parameter, once for every one that is tied."""
    if p is None:
        return None
    if id(p) not in done:
        data: Any = p.detach()
        full = data.full_tensor() if is_sharded(data) else data
        done[id(p)] = nn.Parameter(full.clone(), requires_grad=p.requires_grad)
    found: nn.Parameter = done[id(p)]
    return found


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that ``fully_shard`` put its own in front of."""
    if any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        return next(base for base in kind.__bases__ if issubclass(base, nn.Module))
    return kind


def _communicates(hook: Any) -> bool:
    # A hook may be wrapped together with options of its registration.
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")
