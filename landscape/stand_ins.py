"""Other functions in place of modules' own, for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

Forwards: TypeAlias = Mapping[nn.Module, Callable[..., Any]]
"""What stands in for which module."""


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
