"""A model compiled into one graph, with its weights as inputs."""

import warnings
from collections.abc import Iterable, Mapping
from inspect import unwrap
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hessian.batches import Batch, map_tensors
from landscape.plans import UnsuitableError

MOST_FORMS = 4
"""Of batches: the model is compiled anew for every shape and type."""
OPTIONS: dict[str, Any] = {"compile_threads": 1}
"""No pool of processes stays behind."""


class CompiledModel:
    """Runs a model by ``torch.compile``, without gradients; compiled in the first call.

    Outputs differ from the model's own by rounding. Models that are not one graph are refused.

    Args:
        model: Only read.
    """

    def __init__(self, model: nn.Module) -> None:
        # Graphs are cached by code object: with one of its own they go with this object, and
        # nothing that somebody else compiled is pushed out.
        plain = unwrap(_run)  # of type checks at run time
        function = FunctionType(plain.__code__.replace(), plain.__globals__)
        self._model = model
        self._known: set[str] = set()
        self._run = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)

    def __call__(self, values: Mapping[str, Tensor], *inputs: Any, **named: Any) -> Any:
        """Return the model's output with other weights and buffers, by every name.

        Raises:
            UnsuitableError: If the model cannot be compiled, with the reason as its cause.
        """
        try:
            form = _form((inputs, named))
            if form in self._known:
                return self._run(self._model, dict(values), inputs, named)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own
                found = self._run(self._model, dict(values), inputs, named)
            self._known.add(form)
            return found
        except Exception as error:  # of torch's compiler, of many types
            raise UnsuitableError from error


def require_few_forms(batches: Iterable[Batch]) -> None:
    """See that compiling for every form of batch does not take too long.

    Raises:
        UnsuitableError: If there are too many.
    """
    if len({_form(batch) for batch in batches}) > MOST_FORMS:
        raise UnsuitableError


def _run(model: nn.Module, values: dict[str, Tensor], inputs: Any, named: Any) -> Any:
    return functional_call(model, values, inputs, named, tie_weights=False)


def _form(batch: Any) -> str:
    found: list[Any] = []

    def note(tensor: Tensor) -> Tensor:
        found.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    map_tensors(batch, note)
    return str(found)
