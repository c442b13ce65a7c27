"""The program as tests call it, and the tables that it writes."""

import contextlib
import csv
import io
import os
import subprocess
import sys
from pathlib import Path

from flatvalley.cli import main

ROOT = Path(__file__).parents[1]


def flatvalley(*arguments):
    """Run the program in this process; exit status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["flatvalley", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        return end.code or 0, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("main must end with an exit status")


def launched(folder, processes, *arguments):
    """Run the program from a folder in so many processes under torchrun; what it printed."""

    def run():
        return subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc-per-node={processes}", "-m", "flatvalley", *map(str, arguments)),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    done = run()
    for _ in range(4):  # gloo's threads abort now and then as a process ends (pytorch 190489)
        if done.returncode and "terminate called without an active exception" in done.stderr:
            done = run()
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))
