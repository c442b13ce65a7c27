"""Independent pieces of work spread over processes, with one progress bar for each."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from queue import Empty
from time import monotonic
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

Work = Callable[..., None]
"""Called with a job's arguments and ``progress=``, a function of (done, total)."""

REPORT_SECONDS = 0.2


def run_jobs(
    work: Work, jobs: Mapping[str, tuple[Any, ...]], *, workers: int, console: Console
) -> None:
    """Run ``work(*arguments, progress=...)`` for every job; the longest jobs should come first.

    Args:
        work: A module-level function, so that other processes can import it.
        jobs: Arguments by a name that the progress bar shows.
        workers: Processes; 1 runs everything in this one.
        console: Where the progress bars go.

    Raises:
        ValueError: If ``workers`` is below 1.
        RuntimeError: If a worker process dies. An exception of a job is raised as it is, with
            the traceback of its process as a note.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}.")
    with Progress(*_columns(), console=console) as bars:
        tasks = {name: bars.add_task(name, total=None, start=False) for name in jobs}

        def show(name: str, done: int, total: int) -> None:
            if not bars.tasks[tasks[name]].started:
                bars.start_task(tasks[name])
            bars.update(tasks[name], completed=done, total=total)

        if workers == 1:
            for name, arguments in jobs.items():
                work(*arguments, progress=_throttled(partial(show, name)))
        elif jobs:
            _spread(work, jobs, min(workers, len(jobs)), show)


@contextmanager
def bars(console: Console, *names: str) -> Iterator[list[Callable[[int, int], None]]]:
    """Yield a function of (done, total) for each name, which moves its bar with the time left."""
    with Progress(*_columns(), console=console) as shown:
        tasks = [shown.add_task(name, total=None, start=False, visible=False) for name in names]

        def show(task: TaskID, done: int, total: int) -> None:
            if not shown.tasks[task].started:
                shown.start_task(task)
            shown.update(task, completed=done, total=total, visible=True)

        yield [_throttled(partial(show, task)) for task in tasks]


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )


def _spread(
    work: Work,
    jobs: Mapping[str, tuple[Any, ...]],
    workers: int,
    show: Callable[[str, int, int], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    waiting: Queue[Any] = context.Queue()
    events: Queue[Any] = context.Queue()
    for item in [*jobs.items(), *[None] * workers]:
        waiting.put(item)
    processes = [
        context.Process(target=_serve, args=(work, waiting, events), daemon=True)
        for _ in range(workers)
    ]
    left = len(jobs)
    with _remembered_interrupt() as raise_if_interrupted:
        _serve_jobs(processes, events, left, show, raise_if_interrupted)


def _serve_jobs(
    processes: list[Any],
    events: "Queue[Any]",
    left: int,
    show: Callable[[str, int, int], None],
    raise_if_interrupted: Callable[[], None],
) -> None:
    """Start the workers and show what they report until all jobs are done; then end them."""
    try:
        with _interrupts_held_back():  # the workers inherit it: Ctrl-C is for the parent
            for process in processes:
                process.start()
        while left:
            raise_if_interrupted()
            try:
                kind, name, *rest = events.get(timeout=REPORT_SECONDS)
            except Empty:
                dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                if dead:
                    raise RuntimeError(
                        f"A worker process died with exit code {dead[0]} (out of memory?). What "
                        "was finished is kept; run the command again to go on."
                    ) from None
                continue
            if kind == "progress":
                show(name, *rest)
            elif kind == "done":
                left -= 1
            else:
                error, trace = rest
                error.add_note(f"In the worker process for {name}:\n{trace}")
                raise error
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


@contextmanager
def _remembered_interrupt() -> Iterator[Callable[[], None]]:
    """Keep a Ctrl-C from being lost where Python ignores exceptions, as in finalisers."""
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        raise KeyboardInterrupt

    def raise_if_seen() -> None:
        if seen:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield raise_if_seen  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Deliver a Ctrl-C only after the block, so that no process is left half started."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(work: Work, waiting: "Queue[Any]", events: "Queue[Any]") -> None:
    """Work through the queue, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    parent = os.getppid()
    while (item := waiting.get()) is not None:
        name, arguments = item

        def report(done: int, total: int, name: str = name) -> None:
            if os.getppid() != parent:  # killed: nobody waits for this any more
                sys.exit(1)
            events.put(("progress", name, done, total))

        try:
            work(*arguments, progress=_throttled(report))
        except Exception as error:
            events.put(("error", name, error, traceback.format_exc()))
            return
        events.put(("done", name))


def _throttled(report: Callable[[int, int], None]) -> Callable[[int, int], None]:
    last = -REPORT_SECONDS

    def throttled(done: int, total: int) -> None:
        nonlocal last
        now = monotonic()
        if done >= total or now - last >= REPORT_SECONDS:
            last = now
            report(done, total)

    return throttled
