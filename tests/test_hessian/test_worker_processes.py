import multiprocessing
import os
import signal
import time
from contextlib import closing

import pytest
import torch

from hessian.worker_processes import UnsendableError, WorkerError, by_workers


class OfItsOwnError(Exception):
    """An exception that cannot be made anew from its message."""

    def __init__(self, number, text):
        super().__init__(f"{text} {number}")


def make(recipe):
    def serve(job):
        what, number = job
        if what == "sleep":
            time.sleep(number)
        if what == "raise":
            raise OfItsOwnError(number, "planned")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return number * recipe, os.getpid(), torch.get_num_threads(), torch.get_default_dtype()

    return serve


@pytest.mark.slow
def test_jobs_go_to_whoever_is_free_and_nobody_outlives_an_error():
    jobs = [("sleep", 3.0), *[("do", float(i)) for i in range(4)]]
    recipe = torch.full((2,), 2.0)
    torch.set_default_dtype(torch.float64)
    try:
        with closing(by_workers(make, recipe, jobs, workers=2, threads=3)) as results:
            found = dict(results)
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(found)[-1] == 0 and sorted(found) == [0, 1, 2, 3, 4]
    for place, (number, _, threads, dtype) in found.items():
        assert torch.equal(number, torch.full((2,), 2.0 * jobs[place][1]))
        assert (threads, dtype) == (3, torch.float64)
    assert {found[i][1] for i in (1, 2, 3, 4)}.isdisjoint({found[0][1], os.getpid()})
    assert not multiprocessing.active_children()

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="OfItsOwnError: planned 7") as caught:
        list(by_workers(make, 1, [("sleep", 300.0), ("raise", 7)], workers=2, threads=1))
    assert "in serve\n    raise OfItsOwnError" in caught.value.__notes__[0]
    assert time.monotonic() - began < 200 and not multiprocessing.active_children()

    with pytest.raises(WorkerError, match="A worker process died") as died:
        list(by_workers(make, 1, [("do", 1), ("die", 0)], workers=1, threads=1))
    assert died.value.place == 1


def test_what_cannot_be_sent_is_named_before_a_process_is_started():
    with pytest.raises(UnsendableError, match="pickle"):
        list(by_workers(make, lambda: None, [("do", 1)], workers=1, threads=1))
    assert list(by_workers(make, 1, [], workers=2, threads=1)) == []
