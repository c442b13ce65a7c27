import math
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hessian import (
    DamagedFileError,
    Eigenspace,
    Operator,
    leading_eigenspace,
    load_eigenspace,
    save,
    to_pandas,
)
from tests.oracles import with_spectrum

A = with_spectrum([4.0, -3.0, 2.0, 1.0, 0.5])


def space(dtype=torch.float64, gap=0.25, converged=True, **evidence):
    generator = torch.Generator().manual_seed(0)
    return Eigenspace(
        torch.tensor([4.0, -0.0, 1 / 3], dtype=torch.float64),
        torch.randn(7, 3, generator=generator, dtype=torch.float64).to(dtype),
        torch.tensor([1e-9, 5e-324, 0.1], dtype=torch.float64),
        gap,
        12,
        converged,
        **evidence,
    )


def assert_same(a, b):
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            kind = torch.int64 if left.element_size() == 8 else torch.int32
            assert torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))
        else:
            assert type(left) is type(right)
            assert left == right or (math.isnan(left) and math.isnan(right))


@pytest.mark.parametrize("gap", [0.25, 0.1 + 0.2, math.inf, math.nan, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path, gap, dtype):
    written = space(dtype, gap, converged=dtype == torch.float64)
    assert_same(load_eigenspace(save(written, tmp_path / "new" / "space.safetensors")), written)


@pytest.mark.parametrize("missed", [math.nan, 0.0, 1e-4])
def test_all_evidence_is_kept(tmp_path, missed):
    written = space(which="both", missed=missed, measured=False)
    read = load_eigenspace(save(written, tmp_path / "a"))
    assert_same(read, written)
    assert (read.which, read.measured) == ("both", False)


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("which", ["magnitude", "smallest", "both"])
def test_a_real_eigenspace_survives_and_projects_alike(tmp_path, which, measure):
    written = leading_eigenspace(Operator.from_matrix(A), k=2, which=which, measure=measure)
    read = load_eigenspace(save(written, str(tmp_path / "space.safetensors")))
    assert_same(read, written)
    x = torch.ones(5).double()
    # The order in memory may differ, and with it the last bit of a sum.
    torch.testing.assert_close(read.project_flat(x), written.project_flat(x), rtol=0, atol=1e-15)
    assert read.projector_error_bound == written.projector_error_bound


def test_columns_of_a_larger_matrix_are_written_whole(tmp_path):
    written = space().first(2)
    assert not written.vectors.is_contiguous()
    assert_same(load_eigenspace(save(written, tmp_path / "a")), written)


def test_any_reader_of_safetensors_sees_the_numbers(tmp_path):
    path = save(space(gap=math.inf), tmp_path / "a.safetensors")
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"values", "vectors", "residuals"}
        assert file.metadata()["gap"] == '"inf"'
        assert file.metadata()["num_products"] == "12"
        assert file.get_tensor("vectors").shape == (7, 3)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save(space(), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(space(gap=1.0), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path, keep):
    path = save(space(), tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFileError, match=r"a\.safetensors is damaged .* must be a whole"):
        load_eigenspace(path)


def test_files_of_something_else_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DamagedFileError, match=r"wrote from an eigenspace, got .* with weight"):
        load_eigenspace(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        load_eigenspace(tmp_path / "none.safetensors")


def test_a_file_of_another_version_names_the_field_and_the_version(tmp_path):
    metadata = {"format": "flatvalley eigenspace", "version": "0.0.9", "gap": "1.0"}
    save_file({"values": torch.zeros(2)}, tmp_path / "a", metadata)
    with pytest.raises(DamagedFileError, match=r"flatvalley 0\.0\.9 .*: converged, num_products"):
        load_eigenspace(tmp_path / "a")


def test_the_table_has_a_row_a_pair():
    table = to_pandas(space(gap=math.inf, converged=False, missed=1e-4, measured=False))
    assert list(table.columns) == ["value", "residual"]
    assert table["value"].tolist() == [4.0, -0.0, 1 / 3]
    assert table["residual"].tolist() == [1e-9, 5e-324, 0.1]
    assert table.attrs == {
        "gap": math.inf,
        "num_products": 12,
        "converged": False,
        "which": "magnitude",
        "missed": 1e-4,
        "measured": False,
        "num_exact": 0,
    }


def test_without_pandas_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        to_pandas(space())
