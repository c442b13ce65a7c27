"""Measures the curvature at one or several points, part by part; finished parts are kept."""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from torch import Tensor

from flatvalley.run import Run, plain, read_tensors
from flatvalley.studies.spectrum import (
    Limits,
    Measured,
    Part,
    Record,
    SpectrumConfig,
    SpectrumFindings,
)
from flatvalley.studies.spectrum_sources import Source, Subject
from hessian import (
    ConvergenceWarning,
    DamagedFileError,
    Eigenspace,
    Operator,
    hessian_operator,
    layer_table,
    leading_eigenspace,
    spectral_density,
    trace,
)
from hessian.progress import Step
from hessian.storage import load_eigenspace, save
from hessian.subspace import Which

SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Relative change of the loss, for the same weights, that another order of sums may explain."""

Watch = Callable[[str], Callable[[Step], None]]
"""Gives the progress callback for a task's name."""


def measure(
    run: Run,
    source: Source,
    config: SpectrumConfig,
    limits: Limits,
    *,
    parts: Sequence[Part],
    console: Console,
) -> SpectrumFindings:
    """Measure at every point what is not in the run's folder yet.

    Args:
        run: The folder. Every part is written to it as soon as it is finished.
        source: Points, with model and data.
        config: Settings.
        limits: Products and memory.
        parts: What to measure beside the eigenspace. Parts that are in the folder already are
            reported as well.
        console: Where progress is shown.

    Returns:
        The findings.

    Raises:
        ValueError: If the folder's numbers belong to another function, or the settings do not fit
            the size of the model.
        NonFiniteError: If a loss or a product is not finite.
    """
    points = []
    with _bars(console) as watch:
        for subject in source.subjects:
            several = len(source.subjects) > 1
            place = _Place(run, subject.name.replace(" ", "_") if several else "")
            named = partial(_named, watch, subject.name) if several else watch
            points.append(_measure_point(place, subject, config, limits, parts, named))
    return SpectrumFindings(config, source.description, points)


def _named(watch: Watch, point: str, task: str) -> Callable[[Step], None]:
    return watch(f"{point}, {task}")


class _Place:
    """Where the parts of one point are kept: tensors beside ``parts.json``, which lists them."""

    def __init__(self, run: Run, folder: str) -> None:
        self.run, self.folder = run, Path(folder)
        self._file = run.path / folder / "parts.json"
        try:
            self.parts: dict[str, Record] = (
                json.loads(self._file.read_text()) if self._file.exists() else {}
            )
        except ValueError as error:
            raise DamagedFileError(f"{self._file} is damaged ({error}). Remove it.") from error

    def path(self, name: str) -> Path:
        return self.run.path / self.folder / name

    def finish(self, part: str, record: Record) -> None:
        self.parts[part] = record
        text = json.dumps(plain(self.parts), indent=2, allow_nan=False)
        self.run.write_text(str(self.folder / "parts.json"), text + "\n")


def _measure_point(
    place: _Place,
    subject: Subject,
    config: SpectrumConfig,
    limits: Limits,
    parts: Sequence[Part],
    watch: Watch,
) -> Measured:
    gradient = _loss(place, subject)
    H = hessian_operator(subject.objective, subject.weights, memory_budget=limits.memory_budget)
    space = _eigenspace(place, H, config, limits, watch)
    if "trace" in parts and "trace" not in place.parts:
        with _part(place, "trace", H) as record:
            found = trace(
                H, eigenspace=space, rtol=config.rtol, seed=config.seed, progress=watch("trace")
            )
            record |= {
                "value": found.value,
                "standard_error": found.standard_error,
                "samples": found.samples.tolist(),
                "products": found.num_products,
                "converged": found.converged,
            }
    if "density" in parts and "density" not in place.parts:
        with _part(place, "density", H) as record:
            record["products"] = _density(place, H, space, config, watch)
    if "layers" in parts and "layers" not in place.parts:
        with _part(place, "layers", H) as record:
            record |= _layers(subject, config, limits, watch)
    return _read(place, subject, gradient, space)


def _loss(place: _Place, subject: Subject) -> Tensor:
    """Return the gradient; check that the parts in the folder belong to this function."""
    objective, w = subject.objective, subject.weights
    loss, gradient = objective.loss_and_gradient(w)
    if "loss" not in place.parts:
        try:
            error = objective.statistics(w).standard_error
        except ValueError:  # a criterion that cannot be taken apart by sample
            error = math.nan
        record = {
            "loss": loss,
            "standard_error": error,
            "gradient_norm": float(gradient.to(torch.float64).norm()),
            "size": objective.size,
            "samples": objective.num_samples,
            "batches": sum(1 for _ in objective.batches()),
        }
        place.finish("loss", record)
    before = place.parts["loss"]
    slack = SLACK.get(objective.dtype, 1e-2)
    if before["size"] != objective.size or not math.isclose(
        before["loss"], loss, rel_tol=slack, abs_tol=slack
    ):
        raise ValueError(
            f"`out` {place.run.path} holds numbers of another function: {before['size']} weights "
            f"with a loss of {before['loss']:.9g}, and now {objective.size} with {loss:.9g}. The "
            "model or the data changed. Choose another folder, or remove that one."
        )
    return gradient


def _eigenspace(
    place: _Place, H: Operator, config: SpectrumConfig, limits: Limits, watch: Watch
) -> Eigenspace:
    file, checkpoint = place.path("eigenspace.safetensors"), place.path("eigenspace.checkpoint")
    before = place.parts.get("eigenspace")
    # What a budget cut short goes on from its checkpoint once the budget is raised.
    if before and (before["converged"] or before["products"] >= limits.max_products):
        return load_eigenspace(file)
    with _part(place, "eigenspace", H) as record:
        space = leading_eigenspace(
            H,
            k=config.k,
            tol=config.tol,
            max_products=limits.max_products,
            max_basis=_basis_to_go_on(checkpoint, limits.max_basis),
            which=cast(Which, config.which),
            seed=config.seed,
            checkpoint=checkpoint,
            progress=watch("eigenspace"),
        )
        save(space, file)
        record |= {"products": space.num_products, "converged": space.converged}
        record["seconds"] = before["seconds"] if before else 0.0
    if space.converged:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return space


def _basis_to_go_on(checkpoint: Path, asked: int | None) -> int | None:
    """Return the size of basis that an interrupted iteration had, unless another is asked for.

    The default depends on the budget and on free memory, which may have changed since. With
    another size the iteration begins anew.
    """
    file = checkpoint / "checkpoint.json"
    if not file.exists():
        return asked
    try:
        before = int(json.loads(file.read_text())["problem"]["max_basis"])
    except (ValueError, KeyError, TypeError):
        return asked  # damaged: the solver says so
    if asked is None or asked == before:
        return before
    shutil.rmtree(checkpoint)
    return asked


def _density(
    place: _Place, H: Operator, space: Eigenspace, config: SpectrumConfig, watch: Watch
) -> int:
    found = spectral_density(
        H,
        num_probes=config.probes,
        num_steps=config.steps,
        eigenspace=space,
        seed=config.seed,
        progress=watch("density"),
    )
    curve = found.on()
    place.run.write_tensors(
        str(place.folder / "density.safetensors"),
        {
            "nodes": found.nodes,
            "weights": found.weights,
            "outliers": found.outliers,
            "grid": curve.grid,
            "density": curve.value,
            "standard_error": curve.standard_error,
            "sigma": torch.tensor(curve.sigma, dtype=torch.float64),
        },
    )
    return found.num_products


def _layers(subject: Subject, config: SpectrumConfig, limits: Limits, watch: Watch) -> Record:
    found = layer_table(
        subject.objective,
        subject.weights,
        num_probes=config.probes,
        memory_budget=limits.memory_budget,
        seed=config.seed,
        progress=watch("layers"),
    )
    return {"rows": [dict(vars(row)) for row in found.rows], "products": found.num_products}


def _read(place: _Place, subject: Subject, gradient: Tensor, space: Eigenspace) -> Measured:
    """Everything about one point, as its folder tells it."""
    parts = {name: _numbers(record) for name, record in place.parts.items()}
    loss = parts.pop("loss")
    density = None
    if "density" in parts:
        density, _ = read_tensors(place.path("density.safetensors"))
    return Measured(
        name=subject.name,
        size=loss["size"],
        samples=loss["samples"],
        batches=loss["batches"],
        loss=loss["loss"],
        loss_error=loss["standard_error"],
        gradient=gradient,
        space=space,
        trace=parts.get("trace"),
        density=density,
        layers=parts["layers"]["rows"] if "layers" in parts else None,
        costs=parts,
    )


@contextmanager
def _part(place: _Place, name: str, H: Operator) -> Iterator[Record]:
    """Time a part, collect its warnings, and list it as finished."""
    record: Record = {"seconds": 0.0}
    began = monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield record
    record["seconds"] = round(record["seconds"] + monotonic() - began, 3)
    record["method"] = H.method
    record["warnings"] = []
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            record["warnings"].append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    place.finish(name, record)


def _numbers(value: Any) -> Any:
    """Undo what strict JSON made of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: math.nan if part is None else _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return (
        {"inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value
    )


@contextmanager
def _bars(console: Console) -> Iterator[Watch]:
    """Show a bar for every task, with products, error and time to go."""
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=12)),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[reached]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:

        def watch(name: str) -> Callable[[Step], None]:
            task = bars.add_task(name, total=None, reached="")

            def show(step: Step) -> None:
                bars.update(
                    task,
                    completed=step.products,
                    total=max(step.expected, step.products),
                    reached=_reached(step),
                )

            return show

        yield watch


def _reached(step: Step) -> str:
    text = f"{step.products}/{step.expected} products"
    if math.isfinite(step.error):
        text += f", error {step.error:.1e}"
    if math.isfinite(step.goal):
        text += f" (goal {step.goal:.1e})"
    if math.isfinite(step.seconds_left):
        minutes, seconds = divmod(round(step.seconds_left), 60)
        text += f", {minutes}:{seconds:02} left"
    return text
