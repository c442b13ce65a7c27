"""The command line: ``flatvalley verify`` and its kin."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import flatvalley
from flatvalley.run import Run
from flatvalley.studies.spectrum import Limits, Part, SpectrumConfig
from flatvalley.studies.spectrum_figures import draw_spectrum
from flatvalley.studies.spectrum_report import (
    console_summary as spectrum_summary,
)
from flatvalley.studies.spectrum_report import spectrum_tables, summary, write_spectrum_report
from flatvalley.studies.spectrum_sources import (
    Options,
    Source,
    UserCode,
    built_in,
    from_run,
    from_user_code,
)
from flatvalley.studies.verify import VerifyConfig
from flatvalley.studies.verify import verify as run_study
from flatvalley.studies.verify_figures import draw_all
from flatvalley.studies.verify_report import console_summary, write_verify_report
from flatvalley.user_code import importable_from, is_refusal
from hessian import DamagedFileError, NonFiniteError, SecondDerivativeError

EXIT_NOT_REACHED, EXIT_BAD_INPUT, EXIT_NOT_FINITE, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="flatvalley",
    help="Hessian, loss landscape and directional pruning of neural networks.",
    pretty_exceptions_enable=False,
)

_DEFAULT = VerifyConfig()
_SPECTRUM, _LIMITS, _OPTIONS = SpectrumConfig(), Limits(), Options()
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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
        raise typer.Exit(EXIT_NOT_REACHED)


@app.command()
def spectrum(
    run_folder: Annotated[
        Path | None, typer.Argument(help="Folder of a `flatvalley verify` run.")
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(help="Which cell of the run. Default: the smallest learning rate's first."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="package.module:factory of your model; the current folder is searched."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The same for its data: a pair of tensors or re-iterable batches."),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="The same for its loss. Default: cross-entropy; for batches that are mappings, "
            "the output's own loss."
        ),
    ] = None,
    count: Annotated[
        str | None,
        typer.Option(help="The same for what a batch counts for. Default: its samples."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Its weights, a safetensors file. Default: as it is made.")
    ] = None,
    k: Annotated[int, typer.Option(help="Number of eigenpairs.")] = _SPECTRUM.k,
    which: Annotated[
        str, typer.Option(help="Of which: magnitude, largest, smallest or both ends.")
    ] = _SPECTRUM.which,
    trace: Annotated[bool, typer.Option("--trace", help="Estimate the trace.")] = False,
    density: Annotated[bool, typer.Option("--density", help="Estimate the density.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Trace and top eigenvalue of every layer.")
    ] = False,
    tol: Annotated[
        float, typer.Option(help="Residual wanted, relative to the largest eigenvalue.")
    ] = _SPECTRUM.tol,
    rtol: Annotated[
        float, typer.Option(help="Standard error wanted of the trace, relative to it.")
    ] = _SPECTRUM.rtol,
    probes: Annotated[
        int, typer.Option(help="Random vectors for the density and the layers.")
    ] = _SPECTRUM.probes,
    steps: Annotated[
        int, typer.Option(help="Lanczos steps for every probe of the density.")
    ] = _SPECTRUM.steps,
    max_products: Annotated[
        int, typer.Option(help="Most Hessian-vector products for the eigenpairs.")
    ] = _LIMITS.max_products,
    max_basis: Annotated[
        int | None,
        typer.Option(help="Most Lanczos vectors in memory. Default: what fits into 256 MiB."),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Memory for graphs kept between products, e.g. 2GiB; 0 keeps none."),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of parameter names; give it several times for several."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples at a time, if the data is a pair of tensors.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or float64. Default: what the model has.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute, e.g. cuda.")] = _OPTIONS.device,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = _SPECTRUM.seed,
    out: Annotated[
        Path, typer.Option(help="Folder of the result; an interrupted run resumes.")
    ] = Path("runs/spectrum"),
) -> None:
    """Measure the spectrum of the Hessian of a training loss, and write a report.

    Of the end points of a run (RUN_FOLDER), of a model of your own (--model and --data), or,
    given neither, of a small network before and after training. Exit status: 0 if every tolerance
    was met, 1 if a budget ran out before, 2 for a mistake in the options, the model or the data, 3
    if a loss is not finite, 130 if interrupted.
    """
    from flatvalley.studies.spectrum_measure import measure

    console = Console()
    with importable_from(Path.cwd()):
        with _at_the_door():
            config = SpectrumConfig(k, which, tol, rtol, probes, steps, seed)
            limits = Limits(max_products, max_basis, _bytes(memory_budget))
            options = Options(dtype, device, tuple(parameters or ()), batch_size, seed)
            code = {
                "model": model,
                "data": data,
                "criterion": criterion,
                "count": count,
                "weights": weights,
            }
            source = _source(run_folder, cell, code, options)
            smallest = min(len(subject.weights) for subject in source.subjects)
            if k > smallest:
                raise ValueError(
                    f"`k` must be between 1 and {smallest}, the number of weights, got {k}."
                )
            run = Run(out, "spectrum", dict(source.identity) | vars(config))
        if run.resumed:
            console.print(f"Going on with the run in {out}.")
        wanted: dict[Part, bool] = {"trace": trace, "density": density, "layers": layers}
        parts = [part for part, asked in wanted.items() if asked]
        with _refusals():
            findings = measure(run, source, config, limits, parts=parts, console=console)
    for name, rows in spectrum_tables(findings).items():
        run.write_table(name, rows)
    run.finish(summary(findings))
    with console.status("Drawing the figures and writing the report"):
        report = write_spectrum_report(findings, run, draw_spectrum(findings, run))
    console.print(spectrum_summary(findings))
    for point in findings.points:
        for part, cost in point.costs.items():
            for text in cost["warnings"]:
                console.print(f"{point.name}, {part}: {text}", style="yellow", highlight=False)
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
    if not findings.converged:
        raise typer.Exit(EXIT_NOT_REACHED)


def _source(
    run_folder: Path | None, cell: str | None, code: dict[str, Any], options: Options
) -> Source:
    """Decide which of the three kinds of source the options describe."""
    given = [f"`{name}`" for name, value in code.items() if value is not None]
    if run_folder is not None:
        if given:
            raise ValueError(f"`RUN_FOLDER` cannot go with {', '.join(given)}. Leave one out.")
        return from_run(run_folder, cell, options)
    if cell is not None:
        raise ValueError("`cell` names a cell of a run. Give the run's folder before it.")
    if not given:
        return built_in(options)
    if code["model"] is None or code["data"] is None:
        raise ValueError(f"`model` and `data` must be given together, got only {', '.join(given)}.")
    return from_user_code(UserCode(**code), options)


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = found.group(2).upper() if found else ""
    if found is None or unit not in _UNITS:
        raise ValueError(
            f'`memory_budget` must be a number of bytes such as 500MB or 2GiB, got "{text}".'
        )
    return int(float(found.group(1)) * _UNITS[unit])


def main() -> None:
    """Run the program; what the user can mend is one line on standard error, no traceback."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        _stop(f"{error.format_message()} See `{_help_command()}`.", EXIT_BAD_INPUT)
    except (DamagedFileError, SecondDerivativeError) as error:
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


@contextmanager
def _refusals() -> Iterator[None]:
    """The same for what the package itself refuses later on: too large, or a model that changes."""
    try:
        yield
    except MemoryError as error:
        raise typer.BadParameter(str(error) or "out of memory.") from error
    except ValueError as error:
        if not is_refusal(error):
            raise
        raise typer.BadParameter(str(error)) from error


def _help_command() -> str:
    known = [command.callback.__name__ for command in app.registered_commands if command.callback]
    given = next((word for word in sys.argv[1:] if word in known), None)
    return f"flatvalley {given} --help" if given else "flatvalley --help"


def _stop(message: str, status: int) -> None:
    sys.stderr.write(f"flatvalley: {' '.join(message.split())}\n")
    sys.exit(status)
