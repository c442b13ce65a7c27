import csv
import json

import pytest
import torch

from flatvalley.run import DamagedFileError, Run, read_tensors, write_tensors


def test_run_of_the_same_settings_is_resumed(tmp_path):
    first = Run(tmp_path / "r", "study", {"a": 1, "b": (0.1, 2.0)})
    assert not first.resumed
    first.write_tensors("cells/x.safetensors", {"x": torch.ones(2)})
    assert Run(tmp_path / "r", "study", {"a": 1, "b": (0.1, 2.0)}).resumed


def test_other_settings_are_refused_by_name(tmp_path):
    Run(tmp_path, "study", {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"other settings \(b differ\). Choose another folder"):
        Run(tmp_path, "study", {"a": 1, "b": 3})


def test_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="`out` must be an empty or new folder"):
        Run(tmp_path, "study", {})
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_folder_of_a_run_killed_before_its_first_file_is_taken(tmp_path):
    (tmp_path / ".run.json.partial").write_text("{half")
    assert not Run(tmp_path, "verify", {"lr": 0.2}).resumed
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out` must be a folder that can be written"):
        Run(tmp_path / "file" / "run", "study", {})


def test_damaged_run_json_says_so(tmp_path):
    (tmp_path / "run.json").write_text('{"study": ')
    with pytest.raises(DamagedFileError, match=r"run\.json is damaged"):
        Run(tmp_path, "study", {})


def test_finished_run_is_strict_json_with_settings_and_versions(tmp_path):
    run = Run(tmp_path, "study", {"a": 1})
    run.finish({"nothing": float("nan"), "much": float("inf")})
    record = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert record["status"] == "complete"
    assert record["config"] == {"a": 1}
    assert record["nothing"] is None
    assert record["much"] == "inf"
    assert record["environment"]["torch"].startswith("2.")


def test_tables_keep_every_digit_and_all_columns(tmp_path):
    run = Run(tmp_path, "study", {})
    path = run.write_table("t", [{"a": 0.1 + 0.2}, {"a": 1, "b": "x,y"}])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["a"]) == 0.1 + 0.2
    assert rows[1] == {"a": "1", "b": "x,y"}


def test_tensors_and_metadata_round_trip_exactly(tmp_path):
    tensors = {"x": torch.randn(3, dtype=torch.float64), "m": torch.tensor([True, False])}
    write_tensors(tmp_path / "t", tensors, {"value": 0.1 + 0.2, "nested": {"k": [1, None]}})
    found, metadata = read_tensors(tmp_path / "t")
    assert torch.equal(found["x"], tensors["x"])
    assert torch.equal(found["m"], tensors["m"])
    assert metadata == {"value": 0.1 + 0.2, "nested": {"k": [1, None]}}


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_tensors_are_reported(tmp_path, keep):
    path = write_tensors(tmp_path / "t", {"x": torch.ones(9)}, {"a": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFileError, match="is damaged"):
        read_tensors(path)
