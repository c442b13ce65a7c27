"""Every notebook runs, answers its question, and lies beside its source as it was executed."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def runs():
    """Two at a time: they are the last to be done, when other processes have nothing left."""
    with ThreadPoolExecutor(2) as pool:
        yield {source: pool.submit(run, source) for source in SOURCES}


def run(source):
    return subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", str(source)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(NOTEBOOKS.parent)},
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs_to_its_answer(source, runs):
    done = runs[source].result()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_executed_copy_is_that_of_the_source_and_shows_figures(source):
    jupytext = pytest.importorskip("jupytext")
    written, executed = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    assert [c.source for c in executed.cells] == [c.source for c in written.cells], (
        "run `make notebooks`"
    )
    outputs = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 1


def test_there_are_notebooks():
    assert len(SOURCES) >= 2
