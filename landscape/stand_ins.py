"""Other functions in place of modules' own, for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

Function: TypeAlias = Callable[..., Any]
Forwards: TypeAlias = Mapping[nn.Module, Function]
"""What stands in for which module."""


def is_patched(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` that is not its class's."""
    return "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else runs before or after a module's ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def standing_in(forwards: Forwards) -> Iterator[None]:
    """Let modules run these functions as their ``forward``."""
    before = {m: vars(m)["forward"] for m in forwards if "forward" in vars(m)}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
        for module, forward in before.items():
            module.forward = forward
