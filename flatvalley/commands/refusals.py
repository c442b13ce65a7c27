"""Exit statuses, and what turns a mistake of the user's into one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from flatvalley.user_code import is_refusal

EXIT_NOT_REACHED, EXIT_BAD_INPUT, EXIT_NOT_FINITE, EXIT_INTERRUPTED = 1, 2, 3, 130


@contextmanager
def at_the_door() -> Iterator[None]:
    """Turn what is wrong with the settings into a mistake of usage; later errors stay as loud."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def refusals() -> Iterator[None]:
    """The same for what the package itself refuses later on: too large, or a model that changes."""
    try:
        yield
    except MemoryError as error:
        raise typer.BadParameter(str(error) or "out of memory.") from error
    except ValueError as error:
        if not is_refusal(error):
            raise
        raise typer.BadParameter(str(error)) from error


@contextmanager
def files_wanted() -> Iterator[None]:
    """A file or a package that is not there is a mistake of usage."""
    try:
        yield
    except (FileNotFoundError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
