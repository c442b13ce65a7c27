"""``flatvalley compare``: methods of pruning side by side, on the same dense networks."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from flatvalley.commands.refusals import EXIT_NOT_REACHED, at_the_door, files_wanted, refusals
from flatvalley.dense_network import CALIBRATION_BATCH
from flatvalley.pruning_methods import METHODS
from flatvalley.run import Run
from flatvalley.studies.compare import compare as run_compare
from flatvalley.studies.compare import look_at_the_door
from flatvalley.studies.compare_config import DEFAULT_TRAINING, CompareConfig
from flatvalley.studies.compare_figures import draw_comparison
from flatvalley.studies.compare_report import (
    compare_tables,
    console_summary,
    summary,
    write_compare_report,
)
from flatvalley.studies.compare_rows import TRAININGS
from flatvalley.user_code import importable_from

_DEFAULT = CompareConfig()
_Number = TypeVar("_Number", int, float)


def compare(
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A row: {', '.join([*METHODS, *TRAININGS])}; with settings: "
            "krylov:temperature=4, or ones to choose from: krylov:temperature=2|4. Several times "
            "for several."
        ),
    ] = None,
    sparsities: Annotated[
        list[str] | None,
        typer.Option(help="Shares of zeros, e.g. 0.9,0.95,0.98.", show_default="0.8,0.9,0.95,0.98"),
    ] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option(help="Seeds, a dense network each, e.g. 0,1,2.", show_default="0,1,2"),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Name of a network, or package.module:factory.")
    ] = DEFAULT_TRAINING.model,
    data: Annotated[
        str, typer.Option(help="Name of a data set, folder of images, or package.module:factory.")
    ] = DEFAULT_TRAINING.data,
    criterion: Annotated[
        str, typer.Option(help="cross-entropy, or package.module:factory.")
    ] = DEFAULT_TRAINING.criterion,
    dense: Annotated[
        str, typer.Option(help="How dense networks are trained, e.g. sgd:momentum=0.9.")
    ] = DEFAULT_TRAINING.runs[0],
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = DEFAULT_TRAINING.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Samples in a batch of the training.")
    ] = DEFAULT_TRAINING.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = DEFAULT_TRAINING.lr,
    schedule: Annotated[
        str, typer.Option(help="constant, paper, cosine, step:every=30 or step:at=80/120.")
    ] = DEFAULT_TRAINING.schedule,
    augment: Annotated[
        str, typer.Option(help="none or crop-flip; calibration samples are never changed.")
    ] = DEFAULT_TRAINING.augment,
    train_samples: Annotated[
        int, typer.Option(help="Only so many training samples; 0 for all.")
    ] = 0,
    validation: Annotated[
        float, typer.Option(help="Share of the training samples held out to choose settings by.")
    ] = 0.0,
    calibration: Annotated[
        int | None,
        typer.Option(help="Training samples that methods look at. Default: up to 10,000."),
    ] = None,
    calibration_batch: Annotated[
        int, typer.Option(help="Of them in a forward pass.")
    ] = CALIBRATION_BATCH,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of parameters that stay; several times for several."),
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option(help="Renew the statistics of batch norm for sparse weights.")
    ] = True,
    threads: Annotated[
        int, typer.Option(help="Threads of every process; 0 for what torch takes.")
    ] = DEFAULT_TRAINING.threads,
    workers: Annotated[int, typer.Option(help="Processes. Default: one a core; one on a GPU.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute, e.g. cuda.")] = "cpu",
    out: Annotated[
        Path, typer.Option(help="Folder of the result; an interrupted comparison resumes.")
    ] = Path("runs/compare"),
) -> None:
    """Prune the same dense networks by several methods, and write a table and a report.

    Trains a dense network for every seed, prunes it by every method to every sparsity without
    training again (but for grda and gradual-magnitude, which train from the start), and compares
    accuracy, loss and cost. A folder takes more methods and seeds later. Exit status: 0 if every
    method reached every sparsity, 1 if one did not, 2 for a mistake in the options, the model, the
    data or the folder, 3 if a training does not stay finite, 130 if interrupted.
    """
    console = Console()
    with importable_from(Path.cwd()):
        with at_the_door(), files_wanted():
            training = replace(
                DEFAULT_TRAINING,
                model=model,
                data=data,
                criterion=criterion,
                runs=(dense,),
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                schedule=schedule,
                augment=augment,
                train_samples=train_samples,
                validation=validation,
                threads=threads,
                device=device,
            )
            config = CompareConfig(
                training,
                tuple(methods or _DEFAULT.methods),
                tuple(_listed(sparsities, "sparsities", float)) or _DEFAULT.sparsities,
                tuple(_listed(seeds, "seeds", int)) or _DEFAULT.seeds,
                calibration,
                calibration_batch,
                tuple(exclude or ()),
                recalibrate,
            )
            if workers < 0:
                raise ValueError(
                    f"`workers` must be at least 1, or 0 for one a core, got {workers}."
                )
            look_at_the_door(config)
            run = Run(out, "compare", config.identity())
        if run.resumed:
            console.print(f"Going on with the run in {out}.")
        processes = workers or (1 if device.startswith("cuda") else os.cpu_count() or 1)
        with refusals():
            findings = run_compare(run, config, workers=processes, console=console)
    for name, rows in compare_tables(findings).items():
        run.write_table(name, rows)
    run.finish(summary(findings))
    with console.status("Drawing the figures and writing the report"):
        report = write_compare_report(findings, run, draw_comparison(findings, run))
    console.print(console_summary(findings))
    for row in findings.rows:
        for remark in row.remarks:
            console.print(f"{row.row.title}: {remark}", style="yellow", highlight=False)
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
    if not findings.complete:
        raise typer.Exit(EXIT_NOT_REACHED)


def _listed(texts: list[str] | None, option: str, kind: type[_Number]) -> list[_Number]:
    """Numbers given one by one, or with commas or blanks between them."""
    words = [word for text in texts or () for word in text.replace(",", " ").split()]
    try:
        return [kind(word) for word in words]
    except ValueError:
        example = "0,1,2" if kind is int else "0.9,0.95"
        raise ValueError(
            f"`{option}` must be numbers such as {example}, got {' '.join(words)}."
        ) from None
