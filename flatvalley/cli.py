"""The command line: ``flatvalley verify`` and its kin."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import flatvalley
from flatvalley.run import DamagedFileError, Run
from flatvalley.studies.verify import VerifyConfig
from flatvalley.studies.verify import verify as run_study
from flatvalley.studies.verify_figures import draw_all
from flatvalley.studies.verify_report import console_summary, write_verify_report
from hessian import NonFiniteError

EXIT_CLAIMS_FAIL, EXIT_BAD_INPUT, EXIT_NOT_FINITE, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="flatvalley",
    help="Hessian, loss landscape and directional pruning of neural networks.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)

_DEFAULT = VerifyConfig()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flatvalley {flatvalley.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Hessian, loss landscape and directional pruning of neural networks."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def verify(
    data: Annotated[str, typer.Option(help="Data set: digits.")] = _DEFAULT.data,
    gamma: Annotated[
        list[float], typer.Option(help="Learning rate; give it several times for several.")
    ] = list(_DEFAULT.gammas),  # noqa: B006
    seeds: Annotated[int, typer.Option(help="Number of repetitions.")] = _DEFAULT.seeds,
    c: Annotated[float, typer.Option(help="gRDA's sparsity constant c.")] = _DEFAULT.c,
    mu: Annotated[float, typer.Option(help="gRDA's exponent, in (1/2, 1).")] = _DEFAULT.mu,
    time: Annotated[
        float, typer.Option(help="Training time t: steps times learning rate.")
    ] = _DEFAULT.time,
    batch_size: Annotated[int, typer.Option(help="Samples in a minibatch.")] = _DEFAULT.batch_size,
    hidden: Annotated[int, typer.Option(help="Width of the hidden layer.")] = _DEFAULT.hidden,
    k: Annotated[
        list[int], typer.Option(help="Eigenpairs for the projector scores; several for several.")
    ] = list(_DEFAULT.ks),  # noqa: B006
    out: Annotated[
        Path, typer.Option(help="Folder of the run; an interrupted run resumes.")
    ] = Path("runs/verify"),
    workers: Annotated[
        int, typer.Option(help="Processes. Default: one a core. The numbers do not depend on it.")
    ] = 0,
) -> None:
    """Ask whether gRDA performs directional pruning, and write a report.

    Trains SGD and gRDA side by side at several learning rates, prunes the SGD minimum with every
    kind of directional-pruning score, and compares the result with gRDA's minimum. Exit status: 0
    if the claims hold, 1 if they do not, 2 for a mistake in the options, 3 if a loss is not finite,
    130 if interrupted.
    """
    console = Console()
    with _at_the_door():
        config = VerifyConfig(data, tuple(gamma), seeds, c, mu, time, batch_size, hidden, tuple(k))
        if workers < 0:
            raise ValueError(f"`workers` must be at least 1, or 0 for one a core, got {workers}.")
        run = Run(out, "verify", vars(config))
    if run.resumed:
        console.print(f"Going on with the run in {out}.")
    findings = run_study(run, config, workers=workers or os.cpu_count() or 1, console=console)
    with console.status("Drawing the figures and writing the report"):
        report = write_verify_report(findings, run, draw_all(findings, run))
    console.print(console_summary(findings))
    for claim in findings.claims:
        console.print(f"{'[green]holds[/]' if claim.holds else '[red]FAILS[/]'}  {claim.statement}")
        console.print(f"       {claim.evidence}", style="dim", highlight=False)
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
    if not findings.holds:
        raise typer.Exit(EXIT_CLAIMS_FAIL)


def main() -> None:
    """Run the program; what the user can mend is one line on standard error, no traceback."""
    try:
        status = app(standalone_mode=False)
    except typer.TyperException as error:
        _stop(f"{error.format_message()} See `{_help_command()}`.", EXIT_BAD_INPUT)
    except DamagedFileError as error:
        _stop(str(error), EXIT_BAD_INPUT)
    except NonFiniteError as error:
        _stop(str(error), EXIT_NOT_FINITE)
    if status == EXIT_INTERRUPTED:  # what Typer makes of Ctrl-C
        _stop("interrupted; run the same command again to go on.", EXIT_INTERRUPTED)
    sys.exit(status)


@contextmanager
def _at_the_door() -> Iterator[None]:
    """Turn what is wrong with the settings into a mistake of usage; later errors stay as loud."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _help_command() -> str:
    known = [command.callback.__name__ for command in app.registered_commands if command.callback]
    given = next((word for word in sys.argv[1:] if word in known), None)
    return f"flatvalley {given} --help" if given else "flatvalley --help"


def _stop(message: str, status: int) -> None:
    sys.stderr.write(f"flatvalley: {' '.join(message.split())}\n")
    sys.exit(status)
