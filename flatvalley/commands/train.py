"""``flatvalley train``: SGD and gRDA side by side, from one start, on the same batches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from flatvalley.commands.refusals import EXIT_NOT_REACHED, at_the_door, files_wanted, refusals
from flatvalley.process_group import process_group, world
from flatvalley.recipes import RECIPES, config_of
from flatvalley.studies.train_figures import draw_training
from flatvalley.studies.train_report import console_summary, write_train_report
from flatvalley.training import train as run_training
from flatvalley.training_loop import Progress
from flatvalley.user_code import importable_from

SHOW_SECONDS = 0.2
SHOWN_LOSSES = 4


def train(
    recipe: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(RECIPES)}; or nothing.")
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(
            help="Optimizer: sgd, grda:c=0.004,mu=0.6, grda:target=0.9, magnitude:target=0.9; give "
            "it several times for several side by side."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of a network, or package.module:factory.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Name of a data set, folder of images, or package.module:factory."),
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="cross-entropy, or package.module:factory.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples in a batch, over all processes.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="constant, paper, cosine, step:every=30 or step:at=80/120."),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Epochs in which the learning rate rises.")
    ] = None,
    augment: Annotated[str | None, typer.Option(help="none or crop-flip.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Height and width of the images of a folder.")
    ] = None,
    drop_last: Annotated[
        bool | None, typer.Option(help="Leave out the last batch of an epoch if it is smaller.")
    ] = None,
    train_samples: Annotated[
        int | None, typer.Option(help="Only so many training samples; 0 for all.")
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(help="Share of the training samples held out to choose settings by."),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Epochs between two looks at the held-out samples.")
    ] = None,
    log_every: Annotated[
        int | None, typer.Option(help="Steps between two rows of steps.csv.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32, float64, tf32 or bf16.")] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option(help="Memory format of convolutions. Default: the faster one."),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the model; the first step waits."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads on the CPU; 0 for what torch takes.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, e.g. cuda.")] = None,
    snapshots: Annotated[
        int | None, typer.Option(help="Points of the trajectories to keep.")
    ] = None,
    snapshot_spacing: Annotated[str | None, typer.Option(help="even or log, in steps.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the start, the batches, augmentation and dropout.")
    ] = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="Time between two checkpoints.")] = 60.0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files for TensorBoard, too.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder of the run; an interrupted run resumes.")
    ] = Path("runs/train"),
) -> None:
    """Train optimizers side by side, from one start, on the same batches, and write a report.

    RECIPE names settings, which the options replace one by one; without it they replace the
    defaults. Exit status: 0 if it was trained to the end, 1 if a wanted sparsity was not reached,
    2 for a mistake in the options, the model, the data or the folder, 3 if a loss or a gradient is
    not finite, 130 if interrupted.
    """
    overrides = {
        "runs": tuple(runs) if runs else None,
        "model": model,
        "data": data,
        "criterion": criterion,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "schedule": schedule,
        "warmup": warmup,
        "augment": augment,
        "image_size": image_size,
        "drop_last": drop_last,
        "train_samples": train_samples,
        "validation": validation,
        "eval_every": eval_every,
        "log_every": log_every,
        "precision": precision,
        "channels_last": channels_last,
        "compile": compile_,
        "threads": threads,
        "device": device,
        "snapshots": snapshots,
        "snapshot_spacing": snapshot_spacing,
        "seed": seed,
    }
    with at_the_door():
        config = config_of(recipe, overrides)
    given = {key: value for key, value in overrides.items() if value is not None}
    origin = {"name": recipe, "overrides": given} if recipe else None
    with importable_from(Path.cwd()), process_group(config.device):
        first = world()[0] == 0
        console = Console(quiet=not first)
        if (out / "run.json").exists():
            console.print(f"Going on with the run in {out}.")
        with refusals(), files_wanted(), _bar(console) as progress:
            result = run_training(
                config,
                out,
                recipe=origin,
                checkpoint_seconds=checkpoint_seconds,
                tensorboard=tensorboard,
                progress=progress,
            )
        if result.run is None:
            return
        run = result.run
        with console.status("Drawing the figures and writing the report"):
            report = write_train_report(result, run, draw_training(result, run))
        console.print(console_summary(result))
        for note in result.notes:
            console.print(note, style="yellow", highlight=False)
        console.print(f"Report: {report}", soft_wrap=True, highlight=False)
    if not result.reached:
        raise typer.Exit(EXIT_NOT_REACHED)


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    """Yield the function that shows how far the training is."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}", style="dim"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=console.quiet) as bars:
        task = bars.add_task("training", total=None, losses="", start=False)
        shown = -SHOW_SECONDS

        def show(step: int, steps: int, losses: Mapping[str, float]) -> None:
            nonlocal shown
            now = monotonic()
            if now - shown < SHOW_SECONDS and step < steps:
                return
            shown = now
            if not bars.tasks[0].started:
                bars.start_task(task)
            shown_losses = [f"{loss:.3g}" for loss in losses.values()]
            text = f"loss {' '.join(shown_losses[:SHOWN_LOSSES])}" if losses else ""
            bars.update(task, total=steps, completed=step, losses=text)

        yield show
