"""Points shared by ranks: the bits of one process, on every rank."""

import json
import subprocess
import sys

import pytest
import torch

from landscape import evaluate, load_sweep
from tests.test_landscape.rank_worker import POINTS, barriers, numbers, problem, surface

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A folder with what two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.test_landscape.rank_worker"]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(out / "store"), str(out)])
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=500) for process in processes] == [0, 0]
    return out


@pytest.fixture(autouse=True)
def on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ranks_share_the_points_and_agree_with_one_process(ranks):
    alone = evaluate(*problem(), POINTS)
    for rank in (0, 1):
        found = load_sweep(ranks / f"{rank}.safetensors")["objective", "loss"]
        assert torch.equal(found.total, alone.total)
        assert torch.equal(found.total_squares, alone.total_squares)
        assert torch.equal(found.count, alone.count)
        nowhere = load_sweep(ranks / f"{rank}.nan.safetensors")["objective", "loss"]
        assert nowhere.num_nonfinite == 1 and nowhere.mean[3, 4].isnan()
    assert len(list((ranks / "kept").glob("points-*"))) == 3


def test_no_point_is_measured_by_two_ranks(ranks):
    """Of three files with 8, 8 and 4 points, rank 0 has the first and the last."""
    steps = [json.loads((ranks / f"{rank}.json").read_text())["steps"] for rank in (0, 1)]
    assert steps[0] == [[k, 12] for k in range(1, 13)]
    assert steps[1] == [[k, 8] for k in range(1, 9)]


def test_what_ranks_have_kept_one_process_goes_on_with(ranks):
    steps = []
    again = evaluate(
        *problem(), POINTS, folder=ranks / "kept", progress=lambda *step: steps.append(step)
    )
    assert torch.equal(again.total, evaluate(*problem(), POINTS).total)
    assert steps == [(8, 20), (16, 20), (20, 20)]  # by files: nothing is measured


def test_barriers_of_ranks_are_those_of_one_process(ranks):
    alone = numbers(barriers())
    for rank in (0, 1):
        assert (ranks / f"{rank}.barriers.json").read_text() == alone
    assert len(list((ranks / "lines").rglob("points-*"))) == 2 * 2


def test_an_adaptive_surface_of_ranks_is_that_of_one_process(ranks):
    alone = surface()
    assert int((~alone.measured).sum()) > 0
    for rank in (0, 1):
        found = load_sweep(ranks / f"{rank}.surface.safetensors")["objective", "loss"]
        assert torch.equal(found.total, alone.evaluation.total)


def test_all_ranks_are_told_what_is_wrong(ranks):
    said = [json.loads((ranks / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert said[1]["failure"] == "ZeroDivisionError: planned"
    assert said[0]["failure"].startswith("RankError: Rank 1 of 2 failed with Zero")
    for rank in (0, 1):
        for name in ("points", "path", "function"):
            assert said[rank][name].startswith(
                "ValueError: Every rank must be given the same weights and vectors"
            ), name
        assert said[rank]["data"].startswith(
            "ValueError: `objectives` must hold the same samples in the same order on every rank"
        )
