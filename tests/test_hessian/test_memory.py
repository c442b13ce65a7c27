import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hessian import Operator, leading_eigenspace, memory
from tests.oracles import counted, with_spectrum

GIB = 2**30


def size(asked=None, *, k=10, n=30_000_000, columns=False, local=None):
    return memory.basis_size(
        asked,
        k=k,
        size=n,
        local_size=local or n,
        dtype=torch.float32,
        device=torch.device("cpu"),
        columns=columns,
    )


@pytest.fixture
def free(monkeypatch):
    def set_free(gib):
        monkeypatch.setattr(memory, "free_memory", lambda device: int(gib * GIB))

    return set_free


def test_defaults_hold_small_problems_whole_and_large_ones_a_hundred_vectors(free):
    free(1000)
    assert size(n=50) == 50
    assert size(n=1510) == 1000
    assert size(n=1510, k=600) == 1220
    assert size(n=10_000_000) == 100
    assert size(n=10_000_000, k=90) == 200
    assert size(n=266_610) == 2**28 // (4 * 266_610)


def test_a_default_is_the_same_whatever_is_free_as_long_as_it_fits(free):
    for gib in (7, 8, 9.5, 100):
        free(gib)
        assert size(n=10_000_000) == 100
    free(6)
    assert size(n=10_000_000) < 100


def test_a_default_shrinks_with_the_memory_and_a_wish_is_refused(free):
    free(8)  # 71 vectors of 30 million
    few = size()
    assert 20 <= few < 50
    assert size(columns=True) == few - 8  # ten more vectors for the result, rounded to blocks
    assert size(local=15_000_000) > few
    with pytest.raises(MemoryError, match=r"100 basis vectors and 10 eigenvectors.* 8 GiB are fr"):
        size(100)


def test_the_cure_of_the_error_works_and_is_the_best_there_is(free):
    for gib in (4, 6, 8):
        free(gib)
        with pytest.raises(MemoryError) as caught:
            size(10_000)
        fits = int(re.search(r"max_basis=(\d+)", str(caught.value)).group(1))
        assert size(fits) == fits
        with pytest.raises(MemoryError):
            size(fits + 8)


def test_too_many_pairs_are_refused_with_the_number_that_fits(free):
    free(6)
    with pytest.raises(MemoryError) as caught:
        size(k=100)
    most = int(re.search(r"k=(\d+)", str(caught.value).split("Ask for")[1]).group(1))
    assert size(k=most) >= most + 6
    with pytest.raises(MemoryError):
        size(k=most + 1)
    free(0.5)
    with pytest.raises(MemoryError, match="Not even one pair fits"):
        size(k=2)


def test_memory_is_refused_before_the_first_product(free):
    free(1e-6)
    operator, products = counted(with_spectrum(torch.linspace(0, 1, 200)))
    with pytest.raises(MemoryError, match="basis vectors"):
        leading_eigenspace(operator, k=5)
    assert products == []


@pytest.mark.parametrize("k", [1, 4])
def test_a_basis_without_room_is_refused(k):
    A = Operator.from_matrix(torch.eye(20).double())
    with pytest.raises(ValueError, match=f"`max_basis` must be at least {k + 6} for k={k}"):
        leading_eigenspace(A, k=k, max_basis=k + 5)
    assert leading_eigenspace(A, k=k, max_basis=k + 6).converged


def test_free_memory_is_what_the_system_says():
    found = memory.free_memory(torch.device("cpu"))
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            assert 0 < found <= 1024 * int(line.split()[1])


LARGE = """
import resource, torch
from hessian import Operator, leading_eigenspace

torch.set_num_threads(1)
n = 30_000_000
top = torch.arange(10, 0, -1) + 0.0
bulk = torch.linspace(0, 0.4, n)

def product(v):
    out = v * bulk
    out[: len(top)] += top * v[: len(top)]
    return out

operator = Operator(product, n, torch.float32, torch.device("cpu"))
space = leading_eigenspace(operator, k=10, tol=1e-3, max_basis=16, multiple=False)
assert space.converged
assert space.num_products > 26  # more than the basis holds, and the ten of the residuals
torch.testing.assert_close(space.values, top.double(), rtol=1e-4, atol=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_thirty_million_parameters_stay_within_six_gibibytes():
    done = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert 1024 * int(done.stdout) < 6 * GIB


ROOT = Path(__file__).parents[2]


def test_blocks_that_torch_keeps_for_itself_on_a_device_are_free(monkeypatch):
    device = torch.device("cuda", 1)
    facts = {"mem_get_info": (300, 1000), "memory_reserved": 500, "memory_allocated": 120}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda d, value=value: value if d == device else None)
    assert memory.free_memory(device) == 300 + 500 - 120
