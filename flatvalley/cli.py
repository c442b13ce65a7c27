"""The command line: ``flatvalley verify`` and its kin."""

import sys
from typing import Annotated

import typer

import flatvalley
from flatvalley.checkpoints import StorageError
from flatvalley.commands.compare import compare
from flatvalley.commands.connect import connect
from flatvalley.commands.plane import plane
from flatvalley.commands.prune import prune
from flatvalley.commands.published import published
from flatvalley.commands.redraw import redraw
from flatvalley.commands.refusals import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NOT_FINITE
from flatvalley.commands.spectrum import spectrum
from flatvalley.commands.surface import surface
from flatvalley.commands.train import train
from flatvalley.commands.verify import verify
from hessian import DamagedFileError, NonFiniteError, SecondDerivativeError

app = typer.Typer(
    name="flatvalley",
    help="Hessian, loss landscape and directional pruning of neural networks.",
    pretty_exceptions_enable=False,
)
for command in (
    verify, train, spectrum, prune, compare, published, connect, plane, surface, redraw
):  # fmt: skip
    app.command()(command)


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"flatvalley {flatvalley.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Hessian, loss landscape and directional pruning of neural networks."""


def main() -> None:
    """Run the program; what the user can mend is one line on standard error, no traceback."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        _stop(f"{error.format_message()} See `{_help_command()}`.", EXIT_BAD_INPUT)
    except (DamagedFileError, SecondDerivativeError, StorageError) as error:
        _stop(str(error), EXIT_BAD_INPUT)
    except NonFiniteError as error:
        _stop(str(error), EXIT_NOT_FINITE)
    if status == EXIT_INTERRUPTED:  # what Typer makes of Ctrl-C
        _stop("interrupted; run the same command again to go on.", EXIT_INTERRUPTED)
    sys.exit(status)


def _help_command() -> str:
    known = [command.callback.__name__ for command in app.registered_commands if command.callback]
    given = next((word for word in sys.argv[1:] if word in known), None)
    return f"flatvalley {given} --help" if given else "flatvalley --help"


def _stop(message: str, status: int) -> None:
    sys.stderr.write(f"flatvalley: {' '.join(message.split())}\n")
    sys.exit(status)
