"""Points shared by ranks: the bits of one process, on every rank."""

import subprocess
import sys

import pytest
import torch

from landscape import evaluate, load_sweep
from tests.test_landscape.rank_worker import POINTS, problem


@pytest.mark.slow
def test_ranks_share_the_points_and_agree_with_one_process(tmp_path):
    command = [sys.executable, "-m", "tests.test_landscape.rank_worker"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store"), str(tmp_path)])
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=500) for process in ranks] == [0, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = evaluate(*problem(), POINTS)
    finally:
        torch.set_num_threads(threads)
    for rank in (0, 1):
        found = load_sweep(tmp_path / f"{rank}.safetensors")["objective", "loss"]
        assert torch.equal(found.total, alone.total)
        assert torch.equal(found.total_squares, alone.total_squares)
        nowhere = load_sweep(tmp_path / f"{rank}.nan.safetensors")["objective", "loss"]
        assert nowhere.num_nonfinite == 1 and nowhere.mean[3, 4].isnan()
    assert len(list((tmp_path / "kept").glob("points-*"))) == 3
    # What ranks have kept, one process goes on with.
    again = evaluate(*problem(), POINTS, folder=tmp_path / "kept")
    assert torch.equal(again.total, alone.total)
    assert (tmp_path / "1.txt").read_text() == "ZeroDivisionError: planned"
    assert (tmp_path / "0.txt").read_text().startswith("RankError: Rank 1 of 2 failed with Zero")
