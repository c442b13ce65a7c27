"""Tables of numbers out of pickle files, without unpickling: nothing is imported or called."""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hessian import DamagedFileError

_MARK = object()
_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_EMPTY_BYTES = ("__builtin__ bytes", "builtins bytes")
_NAMES = {*_RECONSTRUCT, *_EMPTY_BYTES, "numpy ndarray", "numpy dtype", "_codecs encode"}


@dataclass(frozen=True)
class _Name:
    """A name that a pickle would import; here it is only read."""

    name: str


class _ByteType:
    """NumPy's type of unsigned bytes."""


@dataclass
class _Array:
    """An array whose state follows."""

    value: np.ndarray[Any, np.dtype[np.uint8]] | None = None


class _RefusedError(Exception):
    """Something that files of plain data do not contain."""


def read_plain_pickle(path: Path) -> Any:
    """Return the plain data in a pickle file of protocol 2.

    A pickle is a program, and unpickling runs it. This interprets, on a stack of its own, the
    few instructions that lists, dictionaries, numbers, strings and NumPy arrays of bytes consist
    of, as Python 2 and Python 3 write them, and refuses every other one. Strings of Python 2 come
    back as bytes.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If the file holds anything else, which the message names, or is cut
            short.

    Example:
        >>> import os, pickle, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table"
        >>> _ = path.write_bytes(pickle.dumps({"labels": [3, 1]}, protocol=2))
        >>> read_plain_pickle(path)
        {'labels': [3, 1]}
        >>> _ = path.write_bytes(pickle.dumps(os.system, protocol=2))
        >>> read_plain_pickle(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        hessian.tensor_files.DamagedFileError: ... names posix system, ...
    """
    content = path.read_bytes()
    try:
        return _interpret(content)
    except _RefusedError as error:
        raise DamagedFileError(
            f"{path} must be a pickle of lists, dictionaries, numbers, strings and arrays of "
            f"bytes in protocol 2, but {error}, and was not run. Get the file again from where it "
            "can be trusted."
        ) from error
    # What a stack machine meets in a damaged program: too few operands, or of other kinds.
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            f"{path} is no pickle, or cut short ({type(error).__name__}: {error}). Get the file "
            "again."
        ) from error


def _interpret(content: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name == "STOP":
            (result,) = stack
            return _plain(result)
        if name == "PROTO":
            if argument != 2:
                raise _RefusedError(f"it is of protocol {argument}")
        elif name in _PUSH:
            stack.append(_PUSH[name](argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _COMBINE:
            _COMBINE[name](stack)
        else:
            raise _RefusedError(f"it contains the instruction {name}")
    raise ValueError("it does not end")


def _global(argument: str) -> _Name:
    if argument not in _NAMES:
        raise _RefusedError(f"it names {argument}, which could run code")
    return _Name(argument)


def _string(argument: str) -> bytes:
    return argument.encode("latin-1")


def _reduce(stack: list[Any]) -> None:
    """What calling one of the known names would return."""
    arguments = stack.pop()
    name = stack.pop().name
    if name == "_codecs encode" and arguments[1] in ("latin1", b"latin1"):
        stack.append(arguments[0].encode("latin-1"))
    elif name in _EMPTY_BYTES and arguments == ():
        stack.append(b"")
    elif name in _RECONSTRUCT and arguments[0] == _Name("numpy ndarray"):
        stack.append(_Array())
    elif name == "numpy dtype" and arguments[0] in ("u1", b"u1"):
        stack.append(_ByteType())
    else:
        raise _RefusedError(f"it calls {name} with {str(arguments)[:80]}")


def _build(stack: list[Any]) -> None:
    """What setting the state of an array or of its type would do."""
    state = stack.pop()
    target = stack[-1]
    if isinstance(target, _ByteType):
        return
    if not isinstance(target, _Array):
        raise _RefusedError(f"it sets the state of {type(target).__name__}")
    _, shape, kind, by_columns, values = state
    if not isinstance(kind, _ByteType):
        raise _RefusedError("it has an array of something else than bytes")
    if not all(size >= 0 for size in shape) or math.prod(shape) != len(values):
        raise ValueError(f"{len(values):,} bytes for an array of shape {shape}")
    flat = np.frombuffer(values, dtype=np.uint8)
    target.value = flat.reshape(shape, order="F" if by_columns else "C")


def _plain(value: Any) -> Any:
    """Put arrays in the place of what stands for them, one level deep, as such tables are."""
    if isinstance(value, dict):
        return {key: _plain_entry(entry) for key, entry in value.items()}
    return _plain_entry(value)


def _plain_entry(value: Any) -> Any:
    found = value.value if isinstance(value, _Array) else value
    if isinstance(value, _Name | _ByteType) or (isinstance(value, _Array) and found is None):
        raise _RefusedError("it holds an object that is no data")
    return found


def _popped(stack: list[Any]) -> list[Any]:
    """Take what lies above the last mark off the stack, and the mark."""
    place = len(stack) - 1
    while stack[place] is not _MARK:
        place -= 1
        if place < 0:
            raise IndexError("no mark")
    found = stack[place + 1 :]
    del stack[place:]
    return found


def _append(stack: list[Any]) -> None:
    entry = stack.pop()
    stack[-1].append(entry)


def _appends(stack: list[Any]) -> None:
    entries = _popped(stack)
    stack[-1].extend(entries)


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    stack[-1][key] = value


def _set_items(stack: list[Any]) -> None:
    entries = _popped(stack)
    stack[-1].update(zip(entries[::2], entries[1::2], strict=True))


def _tuple_of(num: int) -> Callable[[list[Any]], None]:
    def combine(stack: list[Any]) -> None:
        if len(stack) < num:
            raise IndexError("too few entries for a tuple")
        stack[len(stack) - num :] = [tuple(stack[len(stack) - num :])]

    return combine


def _marked_tuple(stack: list[Any]) -> None:
    stack.append(tuple(_popped(stack)))


# What puts its argument on the stack, and what works on the stack, by pickletools' names.
_PUSH: dict[str, Callable[[Any], Any]] = {
    "MARK": lambda _: _MARK,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "BININT": int,
    "BININT1": int,
    "BININT2": int,
    "LONG1": int,
    "SHORT_BINSTRING": _string,
    "BINSTRING": _string,
    "BINUNICODE": str,
    "GLOBAL": _global,
}
_COMBINE: dict[str, Callable[[list[Any]], None]] = {
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "TUPLE": _marked_tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "REDUCE": _reduce,
    "BUILD": _build,
}
