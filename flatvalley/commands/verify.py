"""``flatvalley verify``: whether gRDA performs directional pruning."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flatvalley.commands.refusals import EXIT_NOT_REACHED, at_the_door
from flatvalley.run import Run
from flatvalley.studies.verify import VerifyConfig
from flatvalley.studies.verify import verify as run_study
from flatvalley.studies.verify_figures import draw_all
from flatvalley.studies.verify_report import console_summary, write_verify_report

_DEFAULT = VerifyConfig  # the class has the defaults; an object looks at the data


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
    with at_the_door():
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
