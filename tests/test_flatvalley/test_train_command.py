"""``flatvalley train`` as a user runs it: alone, on code of their own, and under ``torchrun``."""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.program import flatvalley, launched, rows

ROOT = Path(__file__).parents[2]
MODULE = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Dropout(0.0), nn.Linear(12, 3))


def samples():
    x = torch.randn(240, 4, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    return (x[:180], y[:180]), (x[180:], y[180:])


def training_samples():
    return samples()[0]


def bad_samples():
    (x, y), test = samples()
    x[7, 1] = float("nan")
    return (x, y), test


def loss():
    return nn.CrossEntropyLoss(label_smoothing=0.1)
"""
OWN = ["--model=own_train:net", "--data=own_train:samples", "--batch-size=36", "--lr=0.2"]
RUNS = ["--runs=sgd", "--runs=grda:c=0.05", "--runs=grda:target=0.6", "--runs=magnitude:target=0.6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the user's module, as the current one."""
    path = tmp_path_factory.mktemp("user")
    (path / "own_train.py").write_text(MODULE)
    with contextlib.chdir(path):
        yield path
    sys.modules.pop("own_train", None)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def trained(folder):
    out = folder / "trained"
    options = ["--epochs=40", "--criterion=own_train:loss", "--log-every=20", "--validation=0.2"]
    return out, flatvalley("train", *OWN, *RUNS, *options, "--batch-size=36", "--out", out)


def test_exit_status_summary_and_files(trained):
    out, (status, printed, errors) = trained
    assert status == 0, errors
    assert str(out / "report.html") in printed.replace("\n", "")
    for name in ("SGD", "gRDA c=0.05", "gRDA to 60 %", "magnitude to 60 %"):
        assert name in printed
    for name in ("learning_curves", "sparsity", "cost_of_sparsity"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (out / "figures" / f"{name}.pdf").exists()


def test_summary_and_report_say_what_the_table_says(trained):
    out, (_, printed, _) = trained
    html = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    last = rows(out / "tables" / "epochs.csv")[-4:]
    assert [row["run"] for row in last] == [option.split("=", 1)[1] for option in RUNS]
    for row in last:
        for column in ("test_accuracy", "sparsity"):
            shown = f"{100 * float(row[column]):.2f} %"
            assert shown in printed
            assert shown in html
    assert abs(float(last[2]["sparsity"]) - 0.6) <= 0.01
    assert "every wanted sparsity was reached" in html
    assert "looked at once, after the last epoch" in html


def test_called_again_it_trains_nothing_and_says_the_same(trained):
    out, _ = trained
    before = {p: p.read_bytes() for p in out.rglob("*.csv")}
    status, printed, errors = flatvalley(
        "train",
        *OWN,
        *RUNS,
        "--epochs=40",
        "--criterion=own_train:loss",
        "--log-every=20",
        "--validation=0.2",
        "--out",
        out,
    )
    assert status == 0, errors
    assert "Going on with the run" in printed
    assert {p: p.read_bytes() for p in out.rglob("*.csv")} == before


def test_the_weights_can_be_measured_by_spectrum(trained, folder):
    out, _ = trained
    status, printed, errors = flatvalley(
        "spectrum",
        "--model=own_train:net",
        "--data=own_train:training_samples",
        f"--weights={out / 'grda_target0.6' / 'weights.safetensors'}",
        "--k=2",
        f"--out={folder / 'spectrum'}",
    )
    assert status == 0, errors
    assert "Eigenvalues of largest magnitude" in printed


def test_a_recipe_is_recorded_with_what_was_changed(folder, tmp_path):
    options = ["--epochs=1", "--train-samples=60", "--data=digits", "--model=own_train:digits"]
    (folder / "own_train.py").write_text(
        MODULE + "\n\ndef digits():\n    return nn.Linear(64, 10)\n"
    )
    sys.modules.pop("own_train", None)
    status, _, errors = flatvalley(
        "train", "lenet-300-100-mnist", *options, "--runs=sgd", "--out", tmp_path / "run"
    )
    assert status == 0, errors
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["recipe"]["name"] == "lenet-300-100-mnist"
    assert set(config["recipe"]["overrides"]) == {
        "epochs",
        "train_samples",
        "data",
        "model",
        "runs",
    }
    assert config["lr"] == 0.1


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["nonsense"], 2, "`RECIPE` must be one of lenet-300-100-mnist"),
        ([*OWN, "--runs=grda"], 2, "`runs` needs either c or target for grda"),
        ([*OWN, "--epochs=0"], 2, "`epochs` must be at least 1, got 0"),
        ([*OWN, "--model=own_train:nothing"], 2, "which has no `nothing`"),
        ([*OWN, "--data=own_train:loss"], 2, "must return a flatvalley.data.Dataset, or two pairs"),
        ([*OWN, "--data=own_train:bad_samples", "--runs=sgd"], 3, "An input of the batch is not"),
        (["--data=mnist"], 2, "is not there. Put the file there"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    folder, tmp_path, monkeypatch, options, status, message
):
    monkeypatch.setenv("FLATVALLEY_DATA", str(tmp_path / "nowhere"))
    found, _, errors = flatvalley("train", "--epochs=2", *options, "--out", tmp_path / "run")
    assert found == status, errors
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_damaged_folder_and_a_full_disk_are_one_line_too(folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = ["train", *OWN, "--runs=sgd", "--epochs=2", "--out", out]
    assert flatvalley(*command)[0] == 0
    for file in (out / "checkpoints").iterdir():
        file.write_bytes(b"nothing")
    status, _, errors = flatvalley(*command)
    assert status == 2
    assert "No checkpoint in" in errors
    shutil.rmtree(out / "checkpoints")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flatvalley.checkpoints.write_tensors", full)
    status, _, errors = flatvalley(*command)
    assert status == 2
    assert "could not be written (No space left on device). Make room and run the same" in errors


def test_a_sparsity_that_is_not_reached_ends_with_status_1(folder, tmp_path):
    with pytest.warns(UserWarning, match="sparsity"):
        status, printed, _ = flatvalley(
            "train", *OWN, "--runs=grda:target=0.6,lr=0", "--epochs=1", "--out", tmp_path / "r"
        )
    assert status == 1
    assert "sparsity" in printed.replace("\n", " ")
    html = (tmp_path / "r" / "report.html").read_text()
    assert "did not reach the wanted sparsity" in html


@pytest.mark.slow
def test_two_processes_train_what_one_trains(folder, tmp_path):
    runs = RUNS[:2] + RUNS[3:]
    options = ["train", *OWN, "--epochs=5", "--log-every=3", *runs]
    launched(folder, 2, *options, "--snapshots=3", f"--out={tmp_path / 'two'}")
    status, _, errors = flatvalley(*options, "--out", tmp_path / "one")
    assert status == 0, errors
    for run in ("sgd", "grda_c0.05", "magnitude_target0.6"):
        one, two = (
            load_file(tmp_path / count / run / "weights.safetensors") for count in ("one", "two")
        )
        for name, t in one.items():
            torch.testing.assert_close(two[name], t, rtol=2e-5, atol=2e-6)
            # Rounding may move a weight across the threshold, and no more than a few.
            assert int(((two[name] == 0) != (t == 0)).sum()) <= 1
    tables = [rows(tmp_path / count / "tables" / "epochs.csv") for count in ("one", "two")]
    for a, b in zip(*tables, strict=True):
        assert (a["run"], a["epoch"], a["step"]) == (b["run"], b["epoch"], b["step"])
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-5)
        assert a["test_accuracy"] == b["test_accuracy"]
    assert (tmp_path / "two" / "report.html").exists()
    assert len(list((tmp_path / "two" / "trajectory").iterdir())) == 4
