import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hessian import ConvergenceWarning, Operator, leading_eigenspace, memory, thick_restart
from hessian.checkpoint import Checkpoint
from hessian.thick_restart import random_direction
from tests.oracles import counted, with_spectrum

ROOT = Path(__file__).parents[2]

# One process imports everything once; each life is a fork of it that kills itself in a product.
# There are copies to be searched for, and a basis that is restarted again and again.
LIVES = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from hessian import Operator, leading_eigenspace
from tests.oracles import with_spectrum

torch.set_num_threads(1)
base = Path(sys.argv[1])
values = torch.cat([torch.tensor([3.0, 3.0, 2.0]), torch.linspace(0, 1, 57) ** 2])
A = with_spectrum(values)

def life(folder, out, fatal):
    count = 0

    def product(v):
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return A @ v

    operator = Operator(product, len(A), A.dtype, A.device)
    space = leading_eigenspace(
        operator, k=4, tol=1e-9, max_basis=14, checkpoint=folder, checkpoint_every=3
    )
    rest = torch.tensor([space.gap, space.num_products, space.missed], dtype=torch.float64)
    tensors = {"values": space.values, "vectors": space.vectors.contiguous()}
    save_file(tensors | {"residuals": space.residuals, "rest": rest}, base / out)

def fork(*arguments):
    pid = os.fork()
    if pid == 0:
        life(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert fork(None, "whole", 0) == 0
for fatal in torch.randint(4, 8, (20,), generator=torch.Generator().manual_seed(0)).tolist():
    assert fork(base / "state", "resumed", fatal) == -signal.SIGKILL, fatal
assert fork(base / "state", "resumed", 0) == 0
"""


def test_killed_twenty_times_the_result_is_that_of_an_uninterrupted_run_to_the_last_bit(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LIVES, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


class Killed(BaseException):
    pass


def problem():
    values = torch.cat([torch.tensor([3.0, 3.0, 2.0]), torch.linspace(0, 1, 57) ** 2])
    return with_spectrum(values)


OPTIONS = {"k": 4, "tol": 1e-9, "max_basis": 14, "checkpoint_every": 3}


def plain(A):
    """An operator without a product of its own for matrices, like the mortal and counted ones."""
    return counted(A)[0]


def mortal(A, fatal):
    """An operator that dies at one of its products."""
    count = 0

    def product(v):
        nonlocal count
        count += 1
        if count == fatal:
            raise Killed
        return A @ v

    return Operator(product, len(A), A.dtype, A.device)


def same(a, b):
    return (
        torch.equal(a.values, b.values)
        and torch.equal(a.vectors, b.vectors)
        and torch.equal(a.residuals, b.residuals)
        and (a.gap, a.num_products, str(a.missed), a.converged)
        == (b.gap, b.num_products, str(b.missed), b.converged)
    )


def difference(a, b):
    """What to print where two results differ."""
    return {
        "products": (a.num_products, b.num_products),
        "gap": a.gap - b.gap,
        "missed": (a.missed, b.missed),
        **{
            name: float((getattr(a, name) - getattr(b, name)).abs().max())
            for name in ("values", "vectors", "residuals")
        },
    }


@pytest.mark.parametrize("start", [False, True])
def test_an_end_at_any_product_changes_nothing(tmp_path, start):
    A = problem()
    options = OPTIONS | ({"start": torch.linspace(1, 2, 60).double()} if start else {})
    whole = leading_eigenspace(plain(A), **options)
    for fatal in range(1, whole.num_products + 1, 9 if start else 3):
        folder = tmp_path / f"{fatal}"
        with pytest.raises(Killed):
            leading_eigenspace(mortal(A, fatal), checkpoint=folder, **options)
        operator, products = counted(A)
        resumed = leading_eigenspace(operator, checkpoint=folder, **options)
        assert same(resumed, whole), difference(resumed, whole)
        # Made again: what came after the last write, which may be the measuring, and the check.
        assert len(products) <= whole.num_products - fatal + 1 + (3 + 4) + 1


def test_random_directions_go_on_where_they_were(tmp_path, monkeypatch):
    # The first search finds copies, so a second one draws another direction.
    d = torch.cat([torch.full((4,), 3.0), torch.linspace(0, 1, 56) ** 2]).double()

    def operator(fatal=0):
        count = itertools.count(1)

        def product(v):
            if next(count) == fatal:
                raise Killed
            return d * v

        return Operator(product, len(d), d.dtype, d.device)

    seeds = []

    def noted(operator, seed):
        seeds.append(seed)
        return random_direction(operator, seed)

    monkeypatch.setattr(thick_restart, "random_direction", noted)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    options = {"k": 4, "tol": 1e-9, "checkpoint_every": 1}
    whole = leading_eigenspace(operator(), **options)
    drawn = list(seeds)
    assert len(set(drawn)) == len(drawn) >= 3
    for fatal in range(2, whole.num_products, 4):
        seeds.clear()
        with pytest.raises(Killed):
            leading_eigenspace(operator(fatal), checkpoint=tmp_path / f"{fatal}", **options)
        before = list(seeds)
        seeds.clear()
        resumed = leading_eigenspace(operator(), checkpoint=tmp_path / f"{fatal}", **options)
        # The start is made anew, and not used; nothing else is drawn twice.
        assert [*before, *seeds[1:]] == drawn
        assert same(resumed, whole), difference(resumed, whole)


def test_an_end_during_any_write_changes_nothing(tmp_path, monkeypatch):
    A = problem()
    whole = leading_eigenspace(plain(A), **OPTIONS)
    write = Checkpoint._write
    left = 0

    def dies(self, name, data):
        nonlocal left
        left -= 1
        if left == 0:
            (self.folder / ".partial-torn").write_bytes(data[: len(data) // 2])
            raise Killed
        return write(self, name, data)

    for fatal in range(1, 100, 5):
        folder = tmp_path / f"{fatal}"
        left = fatal
        monkeypatch.setattr(Checkpoint, "_write", dies)
        try:
            leading_eigenspace(plain(A), checkpoint=folder, **OPTIONS)
        except Killed:
            pass
        else:
            break
        monkeypatch.setattr(Checkpoint, "_write", write)
        resumed = leading_eigenspace(plain(A), checkpoint=folder, **OPTIONS)
        assert same(resumed, whole), difference(resumed, whole)
        assert not list(folder.glob(".partial-*"))
    assert fatal > 20


def killed_folder(tmp_path, A, **options):
    with pytest.raises(Killed):
        leading_eigenspace(mortal(A, 12), checkpoint=tmp_path, **(OPTIONS | options))
    return tmp_path


def test_a_write_costs_what_was_added(tmp_path):
    A = problem()
    sizes = {}
    write = Checkpoint._write

    def noting(self, name, data):
        sizes.setdefault(name, []).append(len(data))
        return write(self, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "_write", noting)
        killed_folder(tmp_path, A)
    vectors = [size for name, list_ in sizes.items() for size in list_ if "vectors" in name]
    assert len(vectors) == 3
    assert all(3 * 60 * 8 <= size <= 3 * 60 * 8 + 200 for size in vectors)
    record = json.loads((tmp_path / "checkpoint.json").read_text())
    assert record["products"] == 9
    assert sum(entry["rows"] for entry in record["vectors"]) == 9


def test_a_finished_run_is_repeated_for_the_price_of_its_measuring(tmp_path):
    A = problem()
    first = leading_eigenspace(plain(A), checkpoint=tmp_path, **OPTIONS)
    operator, products = counted(A)
    again = leading_eigenspace(operator, checkpoint=tmp_path, **OPTIONS)
    assert same(first, again), difference(first, again)
    assert len(products) <= 4 + 3 + 1


def test_an_exhausted_budget_can_be_raised_wherever_it_ended(tmp_path):
    A = problem()
    options = OPTIONS | {"checkpoint_every": 1000}
    whole = leading_eigenspace(plain(A), **options)
    for budget in range(8, whole.num_products - 4, 3):
        with pytest.warns(ConvergenceWarning):
            folder = tmp_path / f"{budget}"
            leading_eigenspace(plain(A), checkpoint=folder, max_products=budget, **options)
        operator, products = counted(A)
        more = leading_eigenspace(operator, checkpoint=folder, **options)
        assert same(more, whole), difference(more, whole)
        # All but the last four were for the basis, and one compares the operator.
        assert len(products) == whole.num_products - (budget - 4) + 1


def test_a_budget_is_raised_step_by_step_without_repeating_or_naming_anything(
    tmp_path, monkeypatch
):
    values = torch.cat([torch.tensor([3.0, 3.0, 2.0]), torch.linspace(0, 1, 1397) ** 2])
    d = values.double()
    options = {"k": 4, "tol": 1e-9}

    def operator():
        products = []

        def product(v):
            products.append(1)
            return d * v

        return Operator(product, len(d), d.dtype, d.device), products

    # What is free differs between the runs, and the first one had little.
    monkeypatch.setattr(memory, "free_memory", lambda device: 600_000)
    whole = leading_eigenspace(operator()[0], max_basis=24, **options)
    for budget in (30, 31, 80):
        A, products = operator()
        with pytest.warns(ConvergenceWarning):
            leading_eigenspace(A, checkpoint=tmp_path, max_products=budget, **options)
        made = json.loads((tmp_path / "checkpoint.json").read_text())
        assert made["products"] == budget - 4
        assert made["problem"]["max_basis"] == 24
        monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)
    assert len(products) == (80 - 31) + 4 + 1
    A, products = operator()
    more = leading_eigenspace(A, checkpoint=tmp_path, **options)
    assert same(more, whole), difference(more, whole)
    assert len(products) == whole.num_products - 76 + 1


def test_what_was_found_can_be_measured_later(tmp_path):
    A = problem()
    found = leading_eigenspace(plain(A), checkpoint=tmp_path, measure=False, **OPTIONS)
    operator, products = counted(A)
    certified = leading_eigenspace(operator, checkpoint=tmp_path, **OPTIONS)
    assert certified.measured
    assert torch.equal(certified.vectors, found.vectors)
    assert certified.num_products == found.num_products + 4
    assert len(products) <= 4 + 3 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 3}, "k=4, got k=3"),
        ({"seed": 1}, "seed=0, got seed=1"),
        ({"which": "largest"}, "which=magnitude, got which=largest"),
        ({"max_basis": 15}, "max_basis=14, got max_basis=15"),
        ({"multiple": False}, "multiple=True, got multiple=False"),
        ({"start": torch.ones(60).double()}, "start=None, got start="),
    ],
)
def test_another_problem_is_refused(tmp_path, options, message):
    A = problem()
    killed_folder(tmp_path, A)
    with pytest.raises(ValueError, match=message):
        leading_eigenspace(plain(A), checkpoint=tmp_path, **(OPTIONS | options))


def test_another_type_and_another_operator_are_refused(tmp_path):
    A = problem()
    killed_folder(tmp_path, A)
    with pytest.raises(ValueError, match=r"dtype=torch.float64, got dtype=torch.float32"):
        leading_eigenspace(plain(A.float()), checkpoint=tmp_path, **OPTIONS)
    operator, products = counted(A + 1e-6 * torch.eye(60).double())
    with pytest.raises(ValueError, match="`operator` must be the one"):
        leading_eigenspace(operator, checkpoint=tmp_path, **OPTIONS)
    assert len(products) == 1


def test_torn_and_lost_files_are_named(tmp_path):
    A = problem()
    killed_folder(tmp_path, A)
    files = [*sorted(tmp_path.glob("*.safetensors")), tmp_path / "checkpoint.json"]
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        flipped = bytes([*data[:-9], data[-9] ^ 1, *data[-8:]])
        for bad in (data[: len(data) // 2], b"", flipped):
            if path.suffix == ".json" and bad is flipped:
                continue
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=f"{path.name} .*Remove the folder"):
                leading_eigenspace(plain(A), checkpoint=tmp_path, **OPTIONS)
        path.write_bytes(data)
        if path.suffix != ".json":
            path.unlink()
            with pytest.raises(ValueError, match=f"{path.name} .*missing"):
                leading_eigenspace(plain(A), checkpoint=tmp_path, **OPTIONS)
            path.write_bytes(data)
    assert leading_eigenspace(plain(A), checkpoint=tmp_path, **OPTIONS).converged


def test_a_file_in_place_of_the_folder_and_a_foreign_format_are_refused(tmp_path):
    A = plain(problem())
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="`checkpoint` must be a folder"):
        leading_eigenspace(A, checkpoint=file, **OPTIONS)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"format": 99, "problem": {}}))
    with pytest.raises(ValueError, match="must be of format 1, got 99"):
        leading_eigenspace(A, checkpoint=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="`checkpoint_every` must be at least 1, got 0"):
        leading_eigenspace(A, k=1, checkpoint=tmp_path, checkpoint_every=0)


def test_float32_resumes_to_the_same_bits(tmp_path):
    A = problem().float()
    options = OPTIONS | {"tol": 1e-4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = leading_eigenspace(plain(A), **options)
    with pytest.raises(Killed):
        leading_eigenspace(mortal(A, 14), checkpoint=tmp_path, **options)
    assert same(leading_eigenspace(plain(A), checkpoint=tmp_path, **options), whole)
