"""``flatvalley spectrum``: the spectrum of the Hessian of a training loss."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flatvalley.commands.refusals import EXIT_NOT_REACHED, at_the_door, refusals
from flatvalley.run import Run
from flatvalley.studies.spectrum import Limits, Part, SpectrumConfig
from flatvalley.studies.spectrum_figures import draw_spectrum
from flatvalley.studies.spectrum_report import (
    console_summary,
    spectrum_tables,
    summary,
    write_spectrum_report,
)
from flatvalley.studies.spectrum_sources import (
    Options,
    Source,
    UserCode,
    built_in,
    from_run,
    from_user_code,
)
from flatvalley.user_code import importable_from

_SPECTRUM, _LIMITS, _OPTIONS = SpectrumConfig(), Limits(), Options()
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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
        with at_the_door():
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
        with refusals():
            findings = measure(run, source, config, limits, parts=parts, console=console)
    for name, rows in spectrum_tables(findings).items():
        run.write_table(name, rows)
    run.finish(summary(findings))
    with console.status("Drawing the figures and writing the report"):
        report = write_spectrum_report(findings, run, draw_spectrum(findings, run))
    console.print(console_summary(findings))
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
