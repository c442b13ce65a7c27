"""Jobs done by worker processes on a CPU, with the bits of one process."""

import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

Serve = Callable[[Any], Any]


class UnsendableError(ValueError):
    """Something cannot be sent to another process; the message says why."""


class WorkerError(RuntimeError):
    """A worker process died.

    Args:
        place: Of the job that it had.
    """

    def __init__(self, place: int) -> None:
        super().__init__(
            "A worker process died (out of memory, or a script without "
            '`if __name__ == "__main__":`).'
        )
        self.place = place


def by_workers(
    make: Callable[[Any], Serve],
    recipe: Any,
    jobs: Sequence[Any],
    *,
    workers: int,
    threads: int,
) -> Generator[tuple[int, Any], None, None]:
    """Yield the place of every job and what came of it, as soon as it is done.

    Jobs are handed out in their order, the next one to whoever is free first: the longest should
    come first. Everything is sent by value through pipes. Close the generator, as by
    ``contextlib.closing``, to be sure that no process is left after an exception.

    Args:
        make: Called once in each process with a copy of the recipe; what it returns is called with
            every job. A function at the top of a module.
        recipe: What all jobs need.
        jobs: What is done by itself.
        workers: Processes at most; no more are started than there are jobs.
        threads: Of torch, in each of them. A product of matrices on another number of threads
            rounds in another way.

    Raises:
        UnsendableError: If the recipe cannot be pickled.
        WorkerError: If a process dies. The place of its job is in ``place``.
        Exception: What a job raised, with the worker's traceback as a note.

    Example:
        ``with closing(by_workers(make, recipe, jobs, workers=2, threads=1)) as done: …``
    """
    settings = threads, torch.get_default_dtype()
    try:
        sent = pickle.dumps((make, recipe, settings))
    except Exception as error:
        raise UnsendableError(f"{type(error).__name__}: {error}") from error
    context = get_context("spawn")
    started: dict[Connection, SpawnProcess] = {}
    busy: dict[Connection, int] = {}
    waiting = iter(range(len(jobs)))
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            started[ours] = context.Process(target=_work, args=(theirs,))
            started[ours].start()
            theirs.close()
        for pipe in started:
            place = next(waiting)
            busy[pipe] = place
            _send(pipe, sent, place)
            _send(pipe, pickle.dumps(jobs[place]), place)
        while busy:
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                done = busy.pop(pipe)
                succeeded, found = _receive(pipe, done)
                if not succeeded:
                    raise found
                place = next(waiting, -1)
                if place >= 0:
                    busy[pipe] = place
                    _send(pipe, pickle.dumps(jobs[place]), place)
                yield done, found
    finally:
        for pipe, process in started.items():
            pipe.close()  # who waits for a job then ends by itself
            if pipe in busy and process.pid is not None:
                process.terminate()
        for process in started.values():
            if process.pid is not None:
                process.join()


def _send(pipe: Connection, data: bytes, place: int) -> None:
    try:
        pipe.send_bytes(data)
    except OSError as error:
        raise WorkerError(place) from error


def _receive(pipe: Connection, place: int) -> Any:
    try:
        # Made by a process of ours and sent through a pipe, never read from a file.
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError) as error:
        raise WorkerError(place) from error


def _work(pipe: Connection) -> None:
    """Do jobs until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us is interrupted, and ends us
    with suppress(EOFError, OSError):
        sent, serve = pipe.recv_bytes(), None
        while True:
            job = pipe.recv_bytes()
            try:
                serve = serve or _begun(sent)
                answer = pickle.dumps((True, serve(pickle.loads(job))))
            except Exception as error:
                answer = _failure(error)
            pipe.send_bytes(answer)


def _begun(sent: bytes) -> Serve:
    make, recipe, (threads, dtype) = pickle.loads(sent)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    serve: Serve = make(recipe)
    return serve


def _failure(error: Exception) -> bytes:
    note = "In a worker process:\n" + "".join(traceback.format_exception(error))
    error.add_note(note)
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)  # an exception with arguments of its own may not come back
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(note)
        return pickle.dumps((False, plain))
    return answer
