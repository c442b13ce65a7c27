"""Progress of long computations: to a callback, or as a bar in the terminal or notebook."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Step:
    """Where a computation stands after a product."""

    task: str
    products: int
    """Products with the operator so far, those of an earlier, resumed run included."""
    expected: int
    """Products in all, as the solver expects now; never more than its budget."""
    error: float
    """Residual or standard error reached; NaN while unknown."""
    goal: float
    """The error at which the computation stops; NaN if it stops at the expected products."""
    seconds: float
    """Wall-clock time since the computation began or was resumed."""
    seconds_left: float
    """Expected time to go, from the pace of the products so far; NaN before the first."""


ProgressOption = bool | Callable[[Step], None]
"""False for silence, True for a bar, or a function that is called after every product."""

Update = Callable[..., None]
"""Called as ``update(products, made=..., expected=..., error=..., goal=...)``.

``made`` is how many products are new since the last call, or since the start; 1 if left out.
"""


@contextmanager
def report_progress(option: ProgressOption, task: str) -> Iterator[Update]:
    """Yield the function that a solver calls after every product.

    Args:
        option: What the user asked for.
        task: What is computed, in a few words.
    """
    began = time.monotonic()
    first: int | None = None
    bar: Progress | None = None

    def update(
        products: int,
        *,
        expected: int,
        made: int = 1,
        error: float = math.nan,
        goal: float = math.nan,
    ) -> None:
        nonlocal first
        if option is False:
            return
        first = products - made if first is None else first
        seconds = time.monotonic() - began
        done = products - first
        left = seconds / done * max(expected - products, 0) if done > 0 else math.nan
        step = Step(task, products, expected, error, goal, seconds, left)
        if bar is not None:
            reached = "" if math.isnan(error) else f", error {error:.1e}"
            reached += "" if math.isnan(goal) else f" (goal {goal:.1e})"
            bar.update(
                bar.task_ids[0],
                completed=products,
                total=max(expected, products),
                reached=f"{products} products{reached}, {_clock(left)} left",
            )
        elif callable(option):
            option(step)

    if option is not True:
        yield update
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[reached]}"),
        TimeElapsedColumn(),
    )
    with bar:
        bar.add_task(task, total=None, reached="")
        yield update


def _clock(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
