"""Models, data and criteria of the user's own, named as ``package.module:factory``; weights."""

import importlib
import inspect
import random
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

import flatvalley
import hessian
import pruning

NUM_NAMED = 5
"""Keys that a message names of each kind."""
_OURS = tuple(Path(module.__file__ or "").parent for module in (flatvalley, hessian, pruning))
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_CONVERT = (
    "import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in "
    "torch.load(open('{path}', 'rb'), weights_only=True).items()}}, '{path}.safetensors')"
)


@contextmanager
def importable_from(folder: Path) -> Iterator[None]:
    """Let modules in ``folder`` be imported inside the block, as ``python -m`` does."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def build(spec: str, option: str, *, seed: int = 0) -> Any:
    """Return what the factory named ``package.module:factory`` returns.

    Called without arguments, with the random states of torch, NumPy and Python at ``seed``, so
    that two calls build the same; they are put back.

    Args:
        spec: Where the factory is.
        option: Name of the option it was given with, for messages.
        seed: Seed of the global generators during import and call.

    Raises:
        ValueError: If the module cannot be imported, has no such factory, the factory needs
            arguments or raises; the message names the option, the place and the cause.

    Example:
        >>> build("torch.nn:CrossEntropyLoss", "criterion")
        CrossEntropyLoss()
    """
    module_name, separator, path = spec.partition(":")
    if not (separator and module_name and path):
        raise ValueError(
            f'`{option}` must be "package.module:factory", got "{spec}". The factory is a function '
            "without arguments."
        )
    with _seeded(seed):
        factory = _find(module_name, path, option)
        try:
            inspect.signature(factory).bind()
        except TypeError:
            raise ValueError(
                f"`{option}` {spec} must be callable without arguments, but takes "
                f"{inspect.signature(factory)}. Wrap it in a function that fills them in."
            ) from None
        except ValueError:
            pass  # a builtin without a signature
        try:
            return factory()
        except Exception as error:
            raise ValueError(f"`{option}` {spec} raised {describe(error)}.") from error


def _find(module_name: str, path: str, option: str) -> Callable[[], Any]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"`{option}` names the module {module_name}, but there is no module "
                f"{error.name} in {Path.cwd()} or among the installed packages."
            ) from error
        raise ValueError(
            f"`{option}` module {module_name} could not be imported: {describe(error)}."
        ) from error
    except Exception as error:
        raise ValueError(
            f"`{option}` module {module_name} could not be imported: {describe(error)}."
        ) from error
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(
                f"`{option}` names {path} in {module_name}, which has no `{name}`. It has "
                f"{_offer(found)}."
            )
        found = getattr(found, name)
    # A module can be called as well, but that runs it.
    if not callable(found) or isinstance(found, nn.Module):
        raise ValueError(
            f"`{option}` {module_name}:{path} must be a function without arguments, got an object "
            f"of type {type(found).__name__}. Write `def factory(): return {path}` and name that."
        )
    return found  # type: ignore[no-any-return]


def _offer(holder: Any) -> str:
    own = [
        name
        for name, value in vars(holder).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == getattr(holder, "__name__", None)
    ]
    return ", ".join(own) or "no function"


def describe(error: BaseException) -> str:
    """Return type, message and place of an exception in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    own = [frame for frame in frames if _is_users(frame.filename)]
    if own:
        text += f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    return text.rstrip(".")


def is_refusal(error: Exception) -> bool:
    """Whether the package itself refused a value, with a message written for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError | TypeError) and any(
        folder in Path(frames[-1].filename).parents for folder in _OURS
    )


def _is_users(filename: str) -> bool:
    path = Path(filename)
    installed = {"site-packages", "dist-packages", "importlib"}
    return (
        path.suffix == ".py"
        and not installed & set(path.parts)
        and path.parent not in _OURS
        and path.parent.parent not in _OURS
    )


def build_model(spec: str, *, seed: int = 0) -> nn.Module:
    """Return the model that a factory makes.

    Raises:
        ValueError: As ``build``, or if the factory returns something else than a module.
    """
    model = build(spec, "model", seed=seed)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model` {spec} must return a torch.nn.Module, got a {type(model).__name__}."
        )
    return model


def load_weights_(model: nn.Module, path: Path) -> None:
    """Write the weights of a safetensors file into the model, buffers included.

    Nothing is unpickled. Weights are converted to the model's type; of tied ones one is enough.

    Raises:
        ValueError: If the file is not there, no safetensors file, or does not fit the model; the
            message names the keys that are missing, unexpected or of another shape.
    """
    if not path.is_file():
        raise ValueError(f"`weights` must be a safetensors file, but there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        pickled = path.suffix in PICKLES or _starts(path) in (b"PK", b"\x80\x02")
        cure = (
            "A pickle can run any code, so none is read here. Where you trust it, convert it: "
            f'python -c "{_CONVERT.format(path=path)}"'
            if pickled
            else "Write it anew with safetensors.torch.save_file."
        )
        raise ValueError(
            f"`weights` must be a safetensors file, and {path} is none ({error}). {cure}"
        ) from error
    problems = _misfits(model, shapes)
    if problems:
        raise ValueError(f"`weights` {path} does not fit the model: {'; '.join(problems)}.")
    model.load_state_dict(load_file(path), strict=False)


def _misfits(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    state = model.state_dict(keep_vars=True)
    twins: dict[int, set[str]] = defaultdict(set)
    for name, tensor in state.items():
        twins[id(tensor)].add(name)
    missing = [name for name, t in state.items() if not twins[id(t)] & shapes.keys()]
    unexpected = [name for name in shapes if name not in state]
    other = [
        f"{name} is {list(shape)} in the file and {list(state[name].shape)} in the model"
        for name, shape in shapes.items()
        if name in state and shape != tuple(state[name].shape)
    ]
    kinds = {
        "missing in the file": missing,
        "not in the model": unexpected,
        "of other shape": other,
    }
    return [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _some(names: list[str]) -> str:
    rest = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _starts(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)
