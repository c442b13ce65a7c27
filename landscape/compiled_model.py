"""A model compiled into one graph, with its weights as inputs."""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from inspect import unwrap
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code
from torch.func import functional_call

from hessian.batches import Batch, map_tensors
from landscape.plans import UnsuitableError

MOST_FORMS = 4
"""Of batches: the model is compiled anew for every shape and type."""
OPTIONS: dict[str, Any] = {"compile_threads": 1}
"""No pool of processes stays behind."""
_ONE_AT_A_TIME = threading.Lock()
"""Held while warnings are off: of two threads, one would put back what the other had set."""


class CompiledModel:
    """Runs a model by ``torch.compile``, without gradients; compiled at the first of each form.

    Models that are not one graph are refused.

    Args:
        model: Only read.
    """

    def __init__(self, model: nn.Module) -> None:
        function = _own_copy(_run)
        weakref.finalize(self, reset_code, function.__code__)
        self._model = model
        self._known: set[str] = set()
        self._run = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)

    def __call__(self, values: Mapping[str, Tensor], *inputs: Any, **named: Any) -> Any:
        """Return the model's output with other weights and buffers, by every name.

        Raises:
            UnsuitableError: If the model cannot be compiled.
        """
        form = _form((inputs, named))
        if form in self._known:
            return self._run(self._model, dict(values), inputs, named)
        try:
            with _ONE_AT_A_TIME, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own
                found = self._run(self._model, dict(values), inputs, named)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of torch's compiler, of many types
            reason = str(error).strip().partition("\n")[0]
            raise UnsuitableError(f"torch.compile: {type(error).__name__}: {reason}") from error
        self._known.add(form)
        return found


def require_few_forms(batches: Iterable[Batch]) -> None:
    """See that compiling for every form of batch does not take too long.

    Raises:
        UnsuitableError: If there are too many.
    """
    number = len({_form(batch) for batch in batches})
    if number > MOST_FORMS:
        raise UnsuitableError(f"batches of {number} shapes, at most {MOST_FORMS} can be compiled")


def _own_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose code is an object of its own.

    Graphs are cached by code object: so they can be freed one by one, and push no others out.
    """
    plain = unwrap(function)  # of type checks at run time
    return FunctionType(plain.__code__.replace(), plain.__globals__)


def _run(model: nn.Module, values: dict[str, Tensor], inputs: Any, named: Any) -> Any:
    return functional_call(model, values, inputs, named, tie_weights=False)


def _form(batch: Any) -> str:
    found: list[Any] = []

    def note(tensor: Tensor) -> Tensor:
        found.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    map_tensors(batch, note)
    return str(found)
