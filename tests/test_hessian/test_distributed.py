import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_hessian.rank_worker import SCENARIOS

pytestmark = pytest.mark.slow  # every rank is a process that imports torch
ROOT = Path(__file__).parents[2]
SAME_ON_TWO = [
    "ragged, float64",
    "ragged, float32",
    "loader",
    "tokens",
    "counted and regularised",
    "wrapped",
    "given",
    "fully sharded",
    "sharded",
    "short of memory",
    "rows",
    "resumed",
    "certified",
]


def run_ranks(names, ranks, out, backend="gloo"):
    """Run scenarios on several ranks; return what each of them wrote, by scenario."""
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.test_hessian.rank_worker"]
    started = [
        subprocess.Popen(
            [*command, "|".join(names), str(rank), str(ranks), str(out / "store"), out, backend],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(errors)
    return {
        name: [load_file(out / f"{name}.{rank}.safetensors") for rank in range(ranks)]
        for name in names
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks([*SAME_ON_TWO, "refusals"], 2, tmp_path_factory.mktemp("two"))


def assert_same(found, expected, tolerance):
    assert found.keys() >= expected.keys()
    for name, truth in expected.items():
        if name != "bytes":
            slack = tolerance * float(truth.abs().max())
            torch.testing.assert_close(found[name], truth, rtol=0, atol=slack, msg=name)


@pytest.mark.parametrize("name", SAME_ON_TWO)
def test_two_ranks_give_what_one_gives(name, two_ranks):
    expected = SCENARIOS[name](None)
    tolerance = 1e-6 if "float32" in name else 1e-12
    for found in two_ranks[name]:
        assert_same(found, expected, tolerance)


@pytest.mark.parametrize("name", SAME_ON_TWO)
def test_both_ranks_hold_the_same_bits(name, two_ranks):
    first, second = two_ranks[name]
    for key in first.keys() - {"bytes"}:
        assert torch.equal(first[key], second[key]), key


def test_a_rank_without_batches_takes_part(tmp_path):
    expected = SCENARIOS["few batches"](None)
    for found in run_ranks(["few batches"], 3, tmp_path)["few batches"]:
        assert_same(found, expected, 1e-12)


def test_a_sharded_basis_takes_half_of_the_memory_of_a_whole_one(two_ranks):
    whole = int(SCENARIOS["sharded"](None)["bytes"])
    halves = [int(found["bytes"]) for found in two_ranks["sharded"]]
    assert whole >= 9 * 1510 * 8
    assert sum(halves) == whole
    assert halves[0] == halves[1]


DIFFERENT = "ValueError: Every rank must be given the same weights and vectors"
ALIKE = {
    "weights of a call": DIFFERENT,
    "weights of a call, same sum": DIFFERENT,
    "vector of a product": DIFFERENT,
    "weights of the model": DIFFERENT,
    "buffers": DIFFERENT,
    "data": "ValueError: `data` must be the same on every rank",
    "number of batches": "ValueError: `data` must be the same on every rank",
    "sampler": "ValueError: `data` must be the same on every rank, got a DataLoader with a Dist",
    "padding sampler": "pads 11 samples to 12, so that 1 would count twice. Leave the sampler",
    "same data": '`split="given"` needs data that differ from rank to rank',
    "unknown split": '`split` must be "batches" or "given", got "rows"',
    "shuffling": "NonDeterministicError: `data` must give the same batches .* shuffles",
    "no rows": "ValueError: `size` must be at least 1, got 0",
    "full rows": r"ValueError: `v` must be a full tensor of 5 rows, got shape \[4\]",
    "rows of a part": r"ValueError: `part` must have this rank's [23] rows, got shape \[5\]",
    "no data": "ValueError: `data` must hold at least one sample, got none",
    "NaN": r"NonFiniteError: The loss is nan \(first in batch 1 of 3\)",
}
ON_ONE = {  # the rank that fails, and with what
    "length of a vector": (0, "ValueError: `w` must be a flat vector"),
    "loss": (1, "ZeroDivisionError: planned for 4"),
    "gradient": (1, "ZeroDivisionError: planned for 4"),
    "sample_losses": (1, "ZeroDivisionError: planned for 4"),
    "hessian_product": (1, "ZeroDivisionError: planned for 4"),
    "construction": (1, "ZeroDivisionError: planned for 4"),
    "training mode": (1, "NonDeterministicError: Dropout must be off"),
}


@pytest.fixture(scope="module")
def refusals(two_ranks):
    return [
        {name: bytes(text.tolist()).decode() for name, text in found.items()}
        for found in two_ranks["refusals"]
    ]


@pytest.mark.parametrize("name", ALIKE)
def test_ranks_that_differ_are_told_so_on_every_rank(name, refusals):
    for texts in refusals:
        assert re.search(ALIKE[name], texts[name])


@pytest.mark.parametrize("name", ON_ONE)
def test_an_error_on_one_rank_is_an_error_on_all(name, refusals):
    rank, message = ON_ONE[name]
    assert message in refusals[rank][name]
    assert f"RankError: Rank {rank} of 2 failed with {message}" in refusals[1 - rank][name]


def test_a_weighted_mean_is_refused_where_a_batch_shows_it(refusals):
    messages = [texts["criterion without reduction"] for texts in refusals]
    assert any(message.startswith("ValueError: `criterion` must weight") for message in messages)


def test_nothing_else_is_refused_and_an_error_leaves_the_group_usable(refusals):
    for texts in refusals:
        assert texts.keys() == ALIKE.keys() | ON_ONE.keys() | {"criterion without reduction"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged on cuda", "sharded on cuda"])
def test_nccl_gives_what_one_process_gives(name, tmp_path):
    """On as many GPUs as there are, one rank each: NCCL allows no more."""
    found = run_ranks([name], min(torch.cuda.device_count(), 2), tmp_path, "nccl")[name]
    for part in found:
        assert_same(part, SCENARIOS[name](None), 1e-12)


def test_the_script_of_the_guide_prints_the_same_on_one_and_on_two_ranks(tmp_path):
    page = (ROOT / "docs/how-to/use_several_gpus.md").read_text()
    script = tmp_path / "spectrum.py"
    script.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])

    def run(*launcher):
        return subprocess.run(
            [sys.executable, *launcher, str(script)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = [run(), run(*torchrun)]
    for _ in range(4):  # gloo's threads abort now and then as a process ends (pytorch 190489)
        if "terminate called without an active exception" in printed[1].stderr:
            printed[1] = run(*torchrun)
    assert printed[1].returncode == 0, printed[1].stderr
    assert printed[0].stdout == printed[1].stdout
    assert "500 samples" in printed[0].stdout
