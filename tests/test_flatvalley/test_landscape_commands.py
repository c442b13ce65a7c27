"""``flatvalley connect``, ``plane`` and ``surface`` as a user runs them, against plain torch."""

import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from flatvalley.dense_network import load_dense
from flatvalley.studies.landscape_networks import OwnModel, find_network, load_networks
from flatvalley.train_config import TrainConfig
from flatvalley.training import train
from landscape import load_sweep
from tests.program import flatvalley, launched, rows

MODULE = """
import os
import torch
from torch import nn


class Noted(nn.Sequential):
    def forward(self, x):
        with open(os.environ["FORWARDS"], "a") as file:
            print(os.environ["RANK"], file=file)
        return super().forward(x)


def noted():
    return Noted(*net())


def net():
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))


def other():
    return nn.Sequential(nn.Linear(6, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Linear(13, 3))


def samples():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    return (x[:200], y[:200]), (x[200:], y[200:])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A training of two runs with its way, a second start, and the first end pruned."""
    folder = tmp_path_factory.mktemp("landscape")
    (folder / "own_landscape.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    config = TrainConfig(
        model="own_landscape:net", data="own_landscape:samples", runs=("sgd", "grda:c=0.05"),
        epochs=8, batch_size=20, lr=0.3, snapshots=6, threads=1,
    )  # fmt: skip
    train(config, folder / "first")
    second = replace(config, seed=1, runs=("sgd",), snapshots=0)
    train(second, folder / "second")
    status, _, err = flatvalley(
        "prune", folder / "first", "--method=magnitude", "--sparsity=0.4", f"--out={folder / 'p'}"
    )
    assert status == 0, err
    yield folder
    sys.path.remove(str(folder))


def network_of(place, samples=None):
    source = find_network(str(place), OwnModel())
    return load_dense(source.config, source.weights, calibration=samples)


def flat(dense):
    return parameters_to_vector([p for p in dense.model.parameters() if p.requires_grad]).detach()


def renewed_loss(dense, w, samples, *, on):
    """The loss at w with running statistics computed anew, by torch alone."""
    model = dense.model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    vector_to_parameters(w, model.parameters())
    model[1].momentum = None
    model[1].reset_running_stats()
    model.train()
    with torch.no_grad():
        model(samples)
        model.eval()
        loss = float(cross_entropy(model(on[0]), on[1]))
    model.load_state_dict(before)
    return loss


@pytest.fixture(scope="module")
def connection(runs):
    status, out, err = flatvalley(
        "connect", runs / "first", runs / "first" / "grda_c0.05",
        f"--control={runs / 'second'}", "--epochs=3", "--points=9", f"--out={runs / 'c'}",
    )  # fmt: skip
    assert status == 0, err
    return out


def test_a_connection_has_the_losses_of_the_line_with_statistics_renewed(runs, connection):
    a, b = network_of(runs / "first"), network_of(runs / "first" / "grda_c0.05")
    x, y = (torch.cat(parts) for parts in zip(*a.batches, strict=True))
    assert "line" in connection and "curve" in connection
    table = rows(runs / "c" / "tables" / "profiles.csv")
    for t in (0.0, 0.375, 1.0):
        w = torch.lerp(flat(a), flat(b), t)
        (found,) = (
            row for row in table
            if row["path"] == "line" and row["samples"] == "train" and row["metric"] == "loss"
            and float(row["t"]) == t
        )  # fmt: skip
        # All 200 samples renew the statistics: fewer than 512.
        assert float(found["mean"]) == pytest.approx(renewed_loss(a, w, x, on=(x, y)), rel=1e-4)


def test_a_connection_has_its_controls_and_an_interval_around_each_barrier(runs, connection):
    table = rows(runs / "c" / "tables" / "barriers.csv")
    assert {row["path"] for row in table} == {
        "line", "curve", "SGD (2)", "SGD pruned by magnitude",
    }  # fmt: skip
    for row in table:
        assert float(row["over_chord_low"]) <= float(row["over_chord_value"])
        assert float(row["over_chord_value"]) <= float(row["over_chord_high"])
    pruned = load_file(runs / "c" / "curve.safetensors")["control_points"]
    assert torch.equal(pruned[0], flat(network_of(runs / "first")))
    record = json.loads((runs / "c" / "run.json").read_text())
    assert record["status"] == "complete" and record["cost"]["points"] == 4 * 9


def test_a_connection_that_lost_its_end_goes_on_without_measuring_again(runs, connection, tmp_path):
    shutil.copytree(runs / "c", tmp_path / "c")
    table = (tmp_path / "c" / "tables" / "profiles.csv").read_bytes()
    (tmp_path / "c" / "tables" / "profiles.csv").unlink()
    lost = sorted((tmp_path / "c" / "points" / "path-1").glob("points-*"))[0]
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "c" / "points").rglob("points-*")}
    lost.unlink()
    status, _, err = flatvalley(
        "connect", runs / "first", runs / "first" / "grda_c0.05",
        f"--control={runs / 'second'}", "--epochs=3", "--points=9", f"--out={tmp_path / 'c'}",
    )  # fmt: skip
    assert status == 0, err
    assert (tmp_path / "c" / "tables" / "profiles.csv").read_bytes() == table
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "c" / "points").rglob("points-*")}
    assert {p for p in kept if written[p] != kept[p]} == {lost}


def test_a_plane_goes_through_its_three_networks(runs):
    status, out, err = flatvalley(
        "plane", runs / "first", runs / "second", runs / "p", "--points=4", "--points-y=3",
        f"--out={runs / 'plane'}",
    )  # fmt: skip
    assert status == 0, err
    assert "SGD (2)" in out
    values = load_sweep(runs / "plane" / "surface.safetensors")
    assert values.points.shape == (4, 3, 2)
    assert values.columns == (
        ("train", "loss"), ("train", "error"), ("test", "loss"), ("test", "error"),
    )  # fmt: skip
    found = json.loads((runs / "plane" / "run.json").read_text())["results"]["points"]
    a, b = flat(network_of(runs / "first")), flat(network_of(runs / "second"))
    assert found["SGD"] == pytest.approx([0, 0], abs=1e-6)
    assert found["SGD (2)"] == pytest.approx([float((a - b).norm()), 0], abs=1e-4)
    for file in ("report.html", "surface.vts", "surface.html", "figures/train_loss.pdf"):
        assert (runs / "plane" / file).stat().st_size > 1000


def without_a_file_of_points(folder):
    """Lose the result and one file of points; return when the others were written."""
    (folder / "surface.safetensors").unlink()
    files = sorted((folder / "points").rglob("points-*"))
    files[1].unlink()
    return {path: path.stat().st_mtime_ns for path in files if path != files[1]}


def test_a_plane_that_lost_points_goes_on_to_the_same_bits(runs, tmp_path):
    arguments = (
        "plane", runs / "first", runs / "second", "--points=5", "--points-y=4", "--epochs=1",
        "--samples=50", f"--out={tmp_path / 'o'}",
    )  # fmt: skip
    assert flatvalley(*arguments)[0] == 0
    whole = (tmp_path / "o" / "surface.safetensors").read_bytes()
    written = without_a_file_of_points(tmp_path / "o")
    assert flatvalley(*arguments)[0] == 0
    assert (tmp_path / "o" / "surface.safetensors").read_bytes() == whole
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_surface_in_bfloat16_says_how_far_it_is_off_and_goes_on(runs, tmp_path):
    arguments = (
        "surface", runs / "first", "--precision=bfloat16", "--points=3", "--samples=50",
        f"--out={tmp_path / 'o'}",
    )  # fmt: skip
    assert flatvalley(*arguments)[0] == 0
    folder = tmp_path / "o"
    plan = json.loads((folder / "run.json").read_text())["evaluation"]["plan"]
    assert plan["precision"] == "bfloat16" and 1e-6 < plan["deviation"] < 0.05
    words = " ".join((folder / "report.html").read_text().split())
    assert f"which moves the loss by a share of {plan['deviation']:.1e}" in words
    whole = (folder / "surface.safetensors").read_bytes()
    written = without_a_file_of_points(folder)
    assert flatvalley(*arguments)[0] == 0
    assert (folder / "surface.safetensors").read_bytes() == whole
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_without_a_third_network_a_plane_takes_the_bend_of_a_curve(runs, tmp_path):
    status, out, err = flatvalley(
        "plane", runs / "first", runs / "second", "--points=3", "--epochs=2",
        f"--out={tmp_path / 'o'}",
    )  # fmt: skip
    assert status == 0, err
    assert "bend of the curve" in out
    bend = load_file(tmp_path / "o" / "curve.safetensors")["control_points"][1]
    record = json.loads((tmp_path / "o" / "run.json").read_text())["results"]["points"]
    distance = float((bend - flat(network_of(runs / "first"))).norm())
    assert math.hypot(*record["bend of the curve"]) == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("kind", ["filter", "saddle", "pca"])
def test_a_surface_lies_around_its_network(runs, kind, tmp_path):
    status, _, err = flatvalley(
        "surface", runs / "first", f"--directions={kind}", "--points=5", "--points-y=3",
        "--samples=100", f"--out={tmp_path / 'o'}",
    )  # fmt: skip
    assert status == 0, err
    dense = network_of(runs / "first", samples=100)
    x, y = (torch.cat(parts) for parts in zip(*dense.batches, strict=True))
    assert len(y) == 100
    expected = renewed_loss(dense, flat(dense), x, on=(x, y))
    record = json.loads((tmp_path / "o" / "run.json").read_text())["results"]["train"]
    table = rows(tmp_path / "o" / "tables" / "points.csv")
    assert len(table) == 15
    if kind == "pca":  # the way does not lie around its end
        assert record["center"] is None
        assert (tmp_path / "o" / "figures" / "way.png").stat().st_size > 1000
        return
    assert record["center"] == pytest.approx(expected, rel=1e-4)
    (center,) = (row for row in table if float(row["x"]) == 0 and float(row["y"]) == 0)
    assert float(center["train_loss"]) == pytest.approx(expected, rel=1e-4)


def test_an_adaptive_surface_says_what_was_measured_and_how_well_it_knows_the_rest(runs, tmp_path):
    status, _, err = flatvalley(
        "surface", runs / "first", "--adaptive", "--points=45", "--samples=60",
        f"--out={tmp_path / 'o'}",
    )  # fmt: skip
    assert status == 0, err
    report = (tmp_path / "o" / "report.html").read_text()
    assert "of 2,025 points were measured" in report and "held out are predicted" in report
    kept = list((tmp_path / "o" / "points").rglob("points-*.safetensors"))
    assert sum(len(load_file(path)["sums"]) for path in kept) <= 2025 // 8
    table = rows(tmp_path / "o" / "tables" / "points.csv")
    assert len(table) == 2025 and "test_loss" not in table[0]


def refused(*arguments):
    status, _, err = flatvalley(*arguments)
    assert status == 2
    return " ".join(err.split())


def test_mistakes_are_named_and_nothing_is_left(runs, tmp_path):
    first, out = runs / "first", f"--out={tmp_path / 'o'}"
    assert "must be different networks" in refused("connect", first, first, "--epochs=0", out)
    shutil.rmtree(tmp_path / "o")
    assert "there is no" in refused("connect", first, tmp_path / "nothing", out)
    assert "`model` and `data` must be given" in refused(
        "surface", first / "sgd" / "weights.safetensors", out
    )
    assert "cannot go with the folder" in refused("surface", first, "--model=digits-mlp", out)
    assert "`points` must be at least 2" in refused("surface", first, "--points=1", out)
    assert "`precision` must be one of full, bfloat16" in refused(
        "connect", first, runs / "second", "--precision=half", out
    )
    assert "`directions` must be one of" in refused("surface", first, "--directions=up", out)
    assert "--snapshots" in refused(
        "surface", runs / "second", "--directions=pca", "--points=3", out
    )
    shutil.rmtree(tmp_path / "o")
    assert "interpolated" in refused("surface", first, "--batch-norm=interpolated", out)
    assert "`points` must be at least 3" in refused(
        "connect", first, runs / "second", "--points=2", out
    )
    assert not (tmp_path / "o").exists()


def test_networks_of_another_architecture_are_refused(runs, tmp_path):
    config = TrainConfig(
        model="own_landscape:other",
        data="own_landscape:samples",
        runs=("sgd",),
        epochs=1,
        threads=1,
    )
    train(config, tmp_path / "other")
    message = refused("connect", runs / "first", tmp_path / "other", f"--out={tmp_path / 'o'}")
    assert "`model` is own_landscape:net for the first and own_landscape:other" in message
    assert not (tmp_path / "o").exists()


def test_a_file_of_weights_is_the_network_of_its_run(runs):
    file = runs / "first" / "sgd" / "weights.safetensors"
    own = OwnModel("own_landscape:net", "own_landscape:samples")
    networks = load_networks(
        [find_network(str(runs / "first"), OwnModel()), find_network(str(file), own)]
    )
    assert torch.equal(*networks.weights)
    assert not torch.equal(
        networks.weights[0], load_networks([find_network(str(runs / "p"), OwnModel())]).weights[0]
    )


@pytest.mark.slow
def test_processes_of_torchrun_share_the_points_and_end_with_the_same_bits(runs, tmp_path):
    a, b = runs / "first", runs / "first" / "grda_c0.05"
    for name, *options in (
        ["surface", a, "--directions=eigen", "--points=7", "--points-y=5"],
        ["plane", a, b, "--points=6", "--epochs=2"],
        ["connect", a, b, "--points=17", "--epochs=2", "--precision=bfloat16"],
    ):
        printed = []
        for processes in (1, 2):
            out = tmp_path / f"{name}-{processes}"
            printed.append(launched(runs, processes, name, *options, f"--out={out}"))
            assert json.loads((out / "run.json").read_text())["status"] == "complete"
            assert (out / "report.html").exists()
        one, two = (
            {
                file.relative_to(out): file.read_bytes()
                for out in [tmp_path / f"{name}-{processes}"]
                for file in out.rglob("*")
                if file.suffix in (".csv", ".safetensors")
            }
            for processes in (1, 2)
        )
        assert one == two
        assert printed[0].count("Report:") == printed[1].count("Report:") == 1


@pytest.mark.slow
def test_each_process_measures_points_of_its_own(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("FORWARDS", str(tmp_path / "forwards"))
    options = ["--model=own_landscape:noted", "--data=own_landscape:samples", "--points=17"]
    file = runs / "p" / "weights.safetensors"
    counts = []
    for processes in (1, 2):
        (tmp_path / "forwards").write_text("")
        out = tmp_path / str(processes)
        launched(runs, processes, "surface", file, "--adaptive", *options, f"--out={out}")
        ranks = (tmp_path / "forwards").read_text().split()
        counts.append([ranks.count("0"), ranks.count("1")])
    assert counts[0][1] == 0
    assert max(counts[1]) < 0.8 * counts[0][0], counts
