import io
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from flatvalley.workers import run_jobs
from hessian import NonFiniteError


def leave_a_file(path: Path, *, progress):
    for done in range(1, 4):
        progress(done, 3)
    path.write_text(str(os.getpid()))


def fail(path: Path, *, progress):
    raise NonFiniteError("the loss is nan")


def die(path: Path, *, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def quiet():
    return Console(file=io.StringIO())


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done(tmp_path, workers):
    jobs = {str(i): (tmp_path / str(i),) for i in range(3)}
    run_jobs(leave_a_file, jobs, workers=workers, console=quiet())
    pids = {(tmp_path / name).read_text() for name in jobs}
    assert (str(os.getpid()) in pids) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_a_job_arrives_as_it_is(tmp_path, workers):
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        run_jobs(fail, {"a": (tmp_path,)}, workers=workers, console=quiet())


def test_killed_worker_is_reported_and_does_not_hang(tmp_path):
    with pytest.raises(RuntimeError, match="worker process died with exit code -9"):
        run_jobs(die, {"a": (tmp_path,)}, workers=2, console=quiet())


def test_no_jobs_is_no_work():
    run_jobs(leave_a_file, {}, workers=2, console=quiet())


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="`workers` must be at least 1, got 0"):
        run_jobs(leave_a_file, {}, workers=0, console=quiet())
