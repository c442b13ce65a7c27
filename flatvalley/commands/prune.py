"""``flatvalley prune``: one trained network made sparse."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flatvalley.commands.refusals import at_the_door, files_wanted, refusals
from flatvalley.dense_network import CALIBRATION_BATCH, load_dense
from flatvalley.pruning_methods import METHODS
from flatvalley.run import Run
from flatvalley.studies.prune import PruneConfig, prune_tables
from flatvalley.studies.prune import prune as run_prune
from flatvalley.studies.prune_figures import draw_pruning
from flatvalley.studies.prune_report import console_summary, summary, write_prune_report
from flatvalley.studies.prune_sources import Source, from_model, from_train_run
from flatvalley.train_config import TrainConfig
from flatvalley.user_code import importable_from


def prune(
    network: Annotated[
        str,
        typer.Argument(
            help="Folder of a `flatvalley train` run, package.module:factory of a model, or its "
            "name."
        ),
    ],
    method: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(METHODS)}; with settings: krylov:temperature=4."),
    ] = "krylov",
    sparsity: Annotated[
        float, typer.Option(help="Share of zeros wanted among all trained weights.")
    ] = 0.9,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of parameters that stay; several times for several."),
    ] = None,
    allocation: Annotated[
        list[str] | None,
        typer.Option(help="global, uniform, or PATTERN=SHARE; several times for several."),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Which of the folder's runs. Default: its first by SGD.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights of a model, a safetensors file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Samples of a model: a data set, a folder, or package.module:factory."),
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="Its loss: cross-entropy, or package.module:factory.")
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(help="Training samples to look at. Default: up to 10,000.")
    ] = None,
    calibration_batch: Annotated[
        int, typer.Option(help="Of them in a forward pass.")
    ] = CALIBRATION_BATCH,
    recalibrate: Annotated[
        bool, typer.Option(help="Renew the statistics of batch norm for the sparse weights.")
    ] = True,
    fine_tune: Annotated[
        int, typer.Option(help="Epochs to train the sparse network on, its zeros kept.")
    ] = 0,
    fine_tune_lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of that. Default: a tenth of the training's."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute, e.g. cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("runs/prune"),
) -> None:
    """Prune one trained network, without training it again unless asked, and write a report.

    NETWORK is the folder of a `flatvalley train` run, whose dense end is pruned, or a model of
    your own with its --weights and --data. Exit status: 0 if it was pruned, 2 for a mistake in the
    options, the model, the data or the folder, 3 if a weight or a loss is not finite, 130 if
    interrupted.
    """
    console = Console()
    with importable_from(Path.cwd()):
        with at_the_door(), files_wanted():
            config = PruneConfig(
                method,
                sparsity,
                tuple(exclude or ()),
                tuple(allocation or ()),
                recalibrate,
                fine_tune,
                fine_tune_lr,
            )
            source = _source(network, run, weights, data, criterion, device)
            dense = load_dense(
                source.config,
                source.weights,
                trained=source.trained,
                calibration=calibration,
                calibration_batch=calibration_batch,
            )
            problem = dense.problem(exclude=config.exclude, allocation=config.shares)
            problem.require_sparsities([sparsity])
            config.pruner.require(problem)
            given = {"calibration": calibration, "calibration_batch": calibration_batch}
            result_run = Run(out, "prune", source.identity | vars(config) | given)
        with refusals(), console.status(f"Pruning by {config.pruner.title}"):
            findings = run_prune(result_run, dense, config, source)
    for name, rows in prune_tables(findings).items():
        result_run.write_table(name, rows)
    result_run.finish(summary(findings))
    with console.status("Drawing the figures and writing the report"):
        report = write_prune_report(findings, result_run, draw_pruning(findings, result_run))
    console.print(console_summary(findings))
    for note in findings.notes:
        console.print(note, style="yellow", highlight=False)
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)


def _source(
    network: str,
    run: str | None,
    weights: Path | None,
    data: str | None,
    criterion: str | None,
    device: str,
) -> Source:
    """Decide whether the argument is a folder or a model, and see that the options fit it."""
    if Path(network).is_dir():
        options = {"weights": weights, "data": data, "criterion": criterion}
        given = [f"`{name}`" for name, value in options.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} cannot go with the folder of a run, which says what they "
                "are. Leave them out."
            )
        return from_train_run(Path(network), run, device=device)
    if run is not None:
        raise ValueError("`run` names a run of a folder, but `NETWORK` is no folder.")
    if data is None:
        raise ValueError(
            f"`data` must be given with a model, or `NETWORK` be a folder, got {network!r} and no "
            "data."
        )
    config = TrainConfig(
        model=network, data=data, criterion=criterion or "cross-entropy", device=device
    )
    return from_model(config, weights)
