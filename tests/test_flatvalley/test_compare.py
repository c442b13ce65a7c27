"""``flatvalley compare`` and ``flatvalley published`` as a user runs them, against plain torch."""

import contextlib
import itertools
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from flatvalley.data import default_root
from flatvalley.pruning_methods import METHODS
from flatvalley.run import Run
from flatvalley.studies import compare as study
from flatvalley.studies.compare_cell import cell_file
from flatvalley.studies.compare_config import CompareConfig
from flatvalley.studies.compare_figures import COLORS
from flatvalley.studies.compare_report import compare_tables
from flatvalley.studies.compare_rows import TRAININGS, parse_row, training_run
from flatvalley.studies.direct_labels import spread
from flatvalley.studies.published import PROTOCOLS, Point, frontier, read_published
from flatvalley.train_config import TrainConfig, file_name
from tests.program import flatvalley, rows

MODULE = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))


def samples():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    return (x[:200], y[:200]), (x[200:], y[200:])
"""
SIZE = 6 * 20 + 20 + 20 * 3 + 3
OWN = (
    "--model=own_compare:net",
    "--data=own_compare:samples",
    "--batch-size=20",
    "--lr=0.2",
    "--epochs=10",
    "--validation=0.2",
    "--workers=1",
)
KRYLOV = "krylov:products=6,stages=2,temperature=1|4"
ROWS = ("magnitude", KRYLOV, "net-trim:within=0.05", "grda", "gradual-magnitude:every=1")
SHARES, SEEDS = (0.5, 0.8), (0, 1)
WHAT = ("--sparsities=0.5,0.8", "--seeds=0 1", *(f"--methods={row}" for row in ROWS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the user's module, as the current one."""
    path = tmp_path_factory.mktemp("user")
    (path / "own_compare.py").write_text(MODULE)
    with contextlib.chdir(path), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield path
    sys.modules.pop("own_compare", None)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Only those of the folder that all tests share."""
    monkeypatch.setattr("flatvalley.commands.compare.draw_comparison", lambda findings, run: [])


@pytest.fixture(scope="module")
def compared(folder):
    """The folder of a comparison, and what was printed."""
    out = folder / "compared"
    status, printed, errors = flatvalley("compare", *OWN, *WHAT, f"--out={out}")
    assert status == 0, errors
    return out, printed


def cells_of(out, **wanted):
    return [
        row
        for row in rows(out / "tables" / "cells.csv")
        if all(row[key] == str(value) for key, value in wanted.items())
    ]


def test_magnitude_is_what_plain_torch_makes_of_the_dense_networks(compared):
    import own_compare

    out, _ = compared
    _, (x, y) = own_compare.samples()
    for seed in SEEDS:
        model = own_compare.net()
        model.load_state_dict(
            load_file(out / "trainings" / f"sgd_seed{seed}" / "sgd" / "weights.safetensors")
        )
        w = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        with torch.no_grad():
            dense = model(x).log_softmax(1)
        for share in SHARES:
            kept = w.abs().argsort(descending=True)[: SIZE - math.ceil(share * SIZE)]
            u = torch.zeros_like(w)
            u[kept] = w[kept]
            torch.nn.utils.vector_to_parameters(u, model.parameters())
            with torch.no_grad():
                z = model(x).log_softmax(1)
            (cell,) = cells_of(out, row="magnitude", seed=seed, wanted=share)
            assert float(cell["test_accuracy"]) == float((z.argmax(1) == y).double().mean())
            assert float(cell["test_loss"]) == pytest.approx(float(cross_entropy(z, y)), rel=1e-5)
            distance = float((dense.exp() * (dense - z)).sum(1).mean())
            assert float(cell["test_distance"]) == pytest.approx(distance, rel=1e-4)
            assert float(cell["sparsity"]) == pytest.approx(math.ceil(share * SIZE) / SIZE)


def test_the_summary_is_mean_and_range_of_the_cells_that_were_chosen(compared):
    out, _ = compared
    summary = rows(out / "tables" / "summary.csv")
    assert [(row["row"], row["sparsity"]) for row in summary] == [
        (text, str(share)) for text in ROWS for share in SHARES
    ]
    for row in summary:
        cells = cells_of(out, row=row["row"], spec=row["chosen"], wanted=row["sparsity"])
        assert len(cells) == len(SEEDS)
        for key in ("test_accuracy", "test_loss", "test_distance"):
            values = [float(cell[key]) for cell in cells]
            assert float(row[key]) == pytest.approx(statistics.fmean(values))
            assert float(row[f"{key}_low"]) == min(values)
            assert float(row[f"{key}_high"]) == max(values)


def test_console_and_report_say_what_the_summary_says(compared):
    out, printed = compared
    html = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    for row in rows(out / "tables" / "summary.csv"):
        shown = f"{100 * float(row['test_accuracy']):.2f}"
        assert shown in printed
        low, high = (float(row[f"test_accuracy_{end}"]) for end in ("low", "high"))
        assert f"{shown} ({100 * low:.2f}–{100 * high:.2f})" in html
    for title in (
        *("magnitude", "compensated, Krylov", "Net-Trim, within=0.05"),
        *("gRDA (retrained)", "Settings that were"),
    ):
        assert title in html
    assert "inputs" in html
    for name in ("accuracy", "loss", "cost"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (out / "figures" / f"{name}.pdf").exists()


def test_iterations_stand_for_net_trims_cost_and_nothing_for_others(compared):
    out, _ = compared
    by_row = {(row["row"], row["sparsity"]): row for row in rows(out / "tables" / "summary.csv")}
    first, last = (by_row["net-trim:within=0.05", str(share)] for share in SHARES)
    cells = cells_of(out, row="net-trim:within=0.05", wanted=SHARES[-1])
    mean = statistics.fmean(int(cell["iterations"]) for cell in cells)
    assert float(last["iterations"]) == mean >= float(first["iterations"]) > 0
    assert float(last["products"]) == 0
    assert float(by_row["magnitude", "0.8"]["iterations"]) == 0
    html = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    assert re.search(rf"Net-Trim, within=0\.05\s+inputs\s+0\s+0\s+{mean:,.0f}\s", html)


def test_cells_from_before_iterations_were_counted_are_read(tmp_path):
    config = CompareConfig(
        TrainConfig(model="digits-mlp", data="digits", runs=("sgd",)),
        ("magnitude",),
        (0.5,),
        (0,),
    )
    found = written(tmp_path, config, {("magnitude", 0): [point(0.5, 0.9, 0.9)]})
    assert found.rows[0].over_seeds(0.5, "iterations") == []
    assert "iterations" not in compare_tables(found)["summary"][0]


def test_every_method_has_a_colour():
    assert {*METHODS, *TRAININGS} == set(COLORS)


def test_rows_that_train_end_at_the_sparsity_with_as_many_steps(compared):
    out, _ = compared
    for row in ("grda", "gradual-magnitude:every=1"):
        for cell in cells_of(out, row=row):
            assert abs(float(cell["sparsity"]) - float(cell["wanted"])) <= 0.01
            assert cell["gradients"] == str(10 * 8)
            assert float(cell["seconds"]) > 0


def test_called_again_it_computes_nothing_and_says_the_same(compared):
    out, printed = compared
    files = [*(out / "cells").iterdir(), *(out / "tables").iterdir(), *out.rglob("*.safetensors")]
    before = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    status, again, errors = flatvalley("compare", *OWN, *WHAT, f"--out={out}")
    assert status == 0, errors
    assert "Going on with the run" in again
    table = printed[printed.index("Test accuracy") : printed.index("Report")]
    assert table in again
    assert {path: path.read_bytes() for path in files} == before
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == times


def test_a_folder_takes_more_methods_later(compared):
    out, _ = compared
    trained = {p: p.stat().st_mtime_ns for p in (out / "trainings").rglob("*.safetensors")}
    more = ("--methods=random", "--methods=magnitude")
    status, printed, errors = flatvalley("compare", *OWN, *WHAT[:2], *more, f"--out={out}")
    assert status == 0, errors
    assert "random" in printed
    assert "Krylov" not in printed
    assert {p: p.stat().st_mtime_ns for p in (out / "trainings").rglob("*.safetensors")} == trained
    flatvalley("compare", *OWN, *WHAT, f"--out={out}")


def test_what_was_cut_off_goes_on_to_the_same_numbers(compared, folder, monkeypatch):
    out, whole = folder / "cut", compared[0]
    begun = 0
    real = study.run_cell

    def cut(*arguments, **options):
        nonlocal begun
        begun += 1
        if begun == 4:
            raise KeyboardInterrupt
        real(*arguments, **options)

    monkeypatch.setattr(study, "run_cell", cut)
    command = ("compare", *OWN, *WHAT[:2], *WHAT[2:4], f"--out={out}")
    status, _, errors = flatvalley(*command)
    assert status == 130
    assert "run the same command again" in errors
    assert not (out / "tables").exists()
    kept = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert len(kept) == 3
    monkeypatch.setattr(study, "run_cell", real)
    assert flatvalley(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in (out / "cells").iterdir():
        found, expected = (
            json.loads((place / "cells" / path.name).read_text()) for place in (out, whole)
        )
        for record in (found, expected):
            record.pop("seconds", None)
            for point in record.get("points", ()):
                point.pop("seconds")
        assert found == expected


def test_the_random_state_and_the_threads_are_left_alone(folder, tmp_path):
    training = TrainConfig(
        model="own_compare:net",
        data="own_compare:samples",
        runs=("sgd",),
        epochs=1,
        batch_size=50,
        threads=1,
    )
    config = CompareConfig(training, ("random:seed=3",), (0.5,), (0,))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run = Run(tmp_path / "run", "compare", config.identity())
    found = study.compare(run, config, workers=1, console=Console(quiet=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert found.complete
    assert found.num_weights == SIZE
    assert found.num_test_samples == 100
    assert found.num_calibration_samples == 200


def test_excluded_parameters_stay_as_they_are(folder, tmp_path):
    import own_compare

    training = TrainConfig(
        model="own_compare:net", data="own_compare:samples", runs=("sgd",), epochs=1, threads=1
    )
    config = CompareConfig(training, ("magnitude",), (0.8,), (0,), exclude=("*.bias",))
    run = Run(tmp_path / "run", "compare", config.identity())
    study.compare(run, config, workers=1, console=Console(quiet=True))
    (found,) = json.loads(cell_file(run.path, "magnitude", 0).read_text())["points"]
    model = own_compare.net()
    weights = load_file(run.path / "trainings" / "sgd_seed0" / "sgd" / "weights.safetensors")
    matrices = torch.cat([weights[name].flatten() for name in ("0.weight", "2.weight")])
    cut = matrices.abs().sort().values[math.ceil(0.8 * SIZE) - 1]
    for name in ("0.weight", "2.weight"):
        weights[name][weights[name].abs() <= cut] = 0.0
    model.load_state_dict(weights)
    _, (x, y) = own_compare.samples()
    with torch.no_grad():
        assert found["test"]["loss"] == pytest.approx(float(cross_entropy(model(x), y)), rel=1e-5)
    assert found["sparsity"] == pytest.approx(math.ceil(0.8 * SIZE) / SIZE)


def point(share, validation, test):
    """A cell's point with these accuracies."""
    measured = {"loss": 1.0, "distance": 0.1}
    return {
        "wanted": share,
        "sparsity": share,
        "products": 0,
        "gradients": 0,
        "seconds": 1.0,
        "validation": {"accuracy": validation} | measured,
        "test": {"accuracy": test} | measured,
    }


def written(folder, config, points):
    """Write cells with these points, by setting and seed, and collect them."""
    dense = {"test": {"accuracy": 1.0, "loss": 0.0, "distance": 0.0}}
    for seed in config.seeds:
        texts = {text: found for (text, s), found in points.items() if s == seed}
        for text, found in ({"dense": []} | texts).items():
            path = cell_file(folder, text, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"spec": text, "seed": seed, "points": found, "refused": None, "notes": []}
            path.write_text(json.dumps(record | (dense if text == "dense" else {})))
    return study.collect(folder, config)


def test_settings_are_chosen_by_held_out_samples_for_every_sparsity(tmp_path):
    """And never by the test samples, which say the opposite here."""
    training = TrainConfig(model="digits-mlp", data="digits", runs=("sgd",), validation=0.1)
    config = CompareConfig(training, ("krylov:temperature=1|4",), SHARES, SEEDS)
    low, high = "krylov:temperature=1", "krylov:temperature=4"
    found = written(
        tmp_path,
        config,
        {
            (low, 0): [point(0.5, 0.9, 0.1), point(0.8, 0.5, 0.9)],
            (low, 1): [point(0.5, 0.9, 0.2), point(0.8, 0.7, 0.8)],
            (high, 0): [point(0.5, 0.8, 0.9), point(0.8, 0.8, 0.3)],
            # The mean over seeds decides: one that wins by little once loses by much.
            (high, 1): [point(0.5, 0.91, 0.9), point(0.8, 0.6, 0.4)],
        },
    )
    (row,) = found.rows
    assert row.chosen == {0.5: low, 0.8: high}
    assert row.over_seeds(0.5, "test", "accuracy") == [0.1, 0.2]
    assert row.over_seeds(0.8, "test", "accuracy") == [0.3, 0.4]


def test_ties_go_to_the_smaller_loss_and_what_some_seed_lacks_is_out(tmp_path):
    training = TrainConfig(model="digits-mlp", data="digits", runs=("sgd",), validation=0.1)
    config = CompareConfig(training, ("krylov:temperature=1|4",), SHARES, (0, 1))
    low, high = "krylov:temperature=1", "krylov:temperature=4"
    points = {(text, seed): [point(0.5, 0.9, 0.5)] for text in (low, high) for seed in (0, 1)}
    points[high, 0][0]["validation"]["loss"] = 0.5
    points[low, 0].append(point(0.8, 0.9, 0.9))
    found = written(tmp_path, config, points)
    assert found.rows[0].chosen == {0.5: high}
    assert not found.complete


def test_a_sparsity_out_of_reach_ends_with_status_1_and_the_rest_is_there(folder):
    out = folder / "out_of_reach"
    status, printed, errors = flatvalley(
        "compare",
        *OWN,
        "--sparsities=0.5,0.95",
        "--seeds=0",
        "--methods=path:k=40",
        "--methods=magnitude",
        f"--out={out}",
    )
    assert status == 1, errors
    assert "Take fewer eigenpairs" in printed.replace("\n", " ")
    summary = {(row["row"], row["sparsity"]): row for row in rows(out / "tables" / "summary.csv")}
    assert summary["path:k=40", "0.5"]["chosen"] == "path:k=40"
    assert summary["path:k=40", "0.95"]["chosen"] == ""
    assert float(summary["magnitude", "0.95"]["test_accuracy"]) > 0
    html = (out / "report.html").read_text()
    assert "Take fewer eigenpairs" in html
    assert "<td>–</td>" in html


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsities=0.9,0.5"], "`sparsities` must increase, got 0.9, 0.5"),
        (["--sparsities=-0.5"], "`sparsity` must be in (0, 1)"),
        (["--sparsities=0.5,half"], "`sparsities` must be numbers such as 0.9,0.95"),
        (["--seeds=0,0"], "each once and none negative"),
        (["--seeds=0.5"], "`seeds` must be numbers such as 0,1,2"),
        (["--methods=nonsense"], "`methods` must begin with one of random, magnitude"),
        (["--methods=magnitude:p=2"], "`methods` magnitude takes allocation="),
        (["--methods=krylov:products=1"], "at least 2 a step, got products=1"),
        (["--methods=grda:target=0.5"], "`methods` grda takes"),
        (["--methods=grda:mu=2|x"], "`methods` needs a number for mu"),
        (["--methods=magnitude", "--methods=magnitude"], "differ from each other"),
        (["--methods=krylov:damping=0.1|1", "--validation=0"], "`validation` must be above 0"),
        (["--methods=dp-projector:k=204"], "needs k at most 203"),
        (["--methods=grda", "--exclude=*.bias"], "`exclude` cannot go with grda"),
        (["--methods=magnitude", "--exclude=nothing"], '`exclude` pattern "nothing" matches'),
        (["--dense=grda:c=0.1"], "`dense` must be one run of sgd"),
        (["--calibration=161"], "`calibration` must be at most 160"),
        (["--epochs=0"], "`epochs` must be at least 1"),
        (["--model=own_compare:nothing"], "which has no `nothing`"),
        (["--data=digits"], "must be able to evaluate `data` digits"),
        (["--workers=-1"], "`workers` must be at least 1"),
        (["--device=nowhere"], "`device` must be one that is here"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(folder, tmp_path, options, message):
    out = tmp_path / "out"
    status, _, errors = flatvalley("compare", *OWN, *options, f"--out={out}")
    assert status == 2, errors
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not out.exists()


def test_folders_of_something_else_and_damaged_cells_are_refused(compared, tmp_path):
    out, _ = compared
    status, _, errors = flatvalley("compare", *OWN, "--epochs=11", *WHAT, f"--out={out}")
    assert status == 2
    assert "holds a run with other settings (training differ)" in errors
    cell = cell_file(out, "magnitude", 0)
    whole = cell.read_text()
    cell.write_text(whole[: len(whole) // 2])
    status, _, errors = flatvalley("compare", *OWN, *WHAT, f"--out={out}")
    cell.write_text(whole)
    assert status == 2
    assert "is damaged" in errors
    assert "Remove it" in errors


def test_a_row_is_named_by_what_all_its_settings_share():
    row = parse_row("krylov:products=20,temperature=2|4")
    assert row.title == "compensated, Krylov, products=20"
    assert (row.sees, row.retrains, row.kind) == ("inputs", False, "krylov")
    assert parse_row("magnitude").sees == "nothing"
    assert parse_row("path:k=3").sees == "labels"
    assert parse_row("woodfisher:kind=monte_carlo").sees == "inputs"
    assert parse_row("grda:mu=0.7").sees == "training"
    assert training_run("grda:mu=0.7", 0.95) == "grda:mu=0.7,target=0.95"
    TrainConfig(runs=(training_run("gradual-magnitude", 1 / 3),))


def test_cells_of_different_settings_have_files_of_their_own():
    texts = [text for row in (*ROWS, "magnitude:allocation=uniform") for text in [row]]
    names = {file_name(candidate) for text in texts for candidate in parse_row(text).candidates}
    assert len(names) == sum(len(parse_row(text).candidates) for text in texts)


@pytest.mark.parametrize("places", [[0.0], [0.1, 0.1, 0.1], [0.0, 0.5, 0.52, 0.9, 0.9, 1.0]])
def test_labels_stand_apart_in_their_order_and_near_their_lines(places):
    found = spread(places, 0.08)
    assert all(b - a >= 0.08 - 1e-9 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(places))
    if len(places) == 1:
        assert found == places


# --- flatvalley published ---

HEADS = {
    "rn50_gRDA.csv": "lr_schedule,c,mu,epoch,global sparsity,Accuracy",
    "rn50_magnitude_pruning.csv": (
        "global sparsity,begin,end,freq,label smoothing,Accuracy,method"
    ),
}
LINES = {
    "rn50_gRDA.csv": ["official,0.005,0.8,90,0.95,0.7", "0.1_ep140_0.01,0.005,0.5,148,0.9,0.73"],
    "rn50_magnitude_pruning.csv": [
        "0.8,1,2,3,0,0.75,magnitude_pruning",
        "0.8,1,2,3,0.1,0.755,magnitude_pruning",
        "0.9,1,2,3,0,0.74,magnitude_pruning",
    ],
}


def csv_folder(path, **changed):
    """A folder of small files; ``gRDA=lines`` replaces those of one."""
    path.mkdir(exist_ok=True)
    for name, head in HEADS.items():
        key = name.split("_")[1].removesuffix(".csv")
        lines = changed.get(key, [head, *LINES[name]])
        (path / name).write_text("\n".join(lines) + "\n")
    return path


def test_published_points_are_those_of_the_files(tmp_path):
    points = read_published(csv_folder(tmp_path / "csv"))
    found = {(p.method, p.sparsity, p.accuracy) for p in points}
    assert ("gRDA, official", 0.95, 0.7) in found
    assert ("magnitude_pruning", 0.8, 0.755) in found
    assert len(found) == len(points) == 5
    out = tmp_path / "out"
    status, printed, errors = flatvalley("published", tmp_path / "csv", f"--out={out}")
    assert status == 0, errors
    assert "75.50" in printed
    html = (out / "report.html").read_text()
    for name in ("gRDA, official", "gRDA, 0.1_ep140_0.01", "magnitude_pruning"):
        assert PROTOCOLS[name].counts.replace("'", "&#39;") in html
        assert PROTOCOLS[name].training in html
    assert (out / "figures" / "resnet50.png").stat().st_size > 10_000
    assert len(rows(out / "tables" / "points.csv")) == 5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADS["rn50_gRDA.csv"].replace("mu,", ""), "official,1,2,0.9,0.7"], "but lacks mu"),
        ([HEADS["rn50_gRDA.csv"], "official,0.005,0.8,90,0.95"], "line 2, must have 6 values"),
        ([HEADS["rn50_gRDA.csv"], "official,1,1,1,0.9,0.7,8"], "line 2, must have 6 values"),
        ([HEADS["rn50_gRDA.csv"], "official,1,1,1,0.9,x"], "as Accuracy, got 'x'"),
        ([HEADS["rn50_gRDA.csv"], "official,1,1,1,90,0.7"], "as global sparsity, got '90'"),
        ([HEADS["rn50_gRDA.csv"], "official,1,1,1,nan,0.7"], "as global sparsity, got 'nan'"),
        ([HEADS["rn50_gRDA.csv"], "other,1,1,1,0.9,0.7"], "got 'gRDA, other'"),
        ([HEADS["rn50_gRDA.csv"]], "must have one row or more"),
        ([""], "must have the columns"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, lines, message):
    folder = csv_folder(tmp_path / "csv", gRDA=lines)
    status, _, errors = flatvalley("published", folder, f"--out={tmp_path / 'out'}")
    assert status == 2
    assert "rn50_gRDA.csv" in errors
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_folders_without_such_files_are_refused(tmp_path):
    for place, message in (
        (tmp_path, "must have one or more of rn50_magnitude_pruning.csv"),
        (tmp_path / "nowhere", "there is no"),
    ):
        status, _, errors = flatvalley("published", place, f"--out={tmp_path / 'out'}")
        assert status == 2
        assert message in errors


def test_the_frontier_is_what_nothing_beats_in_both():
    points = [
        Point("random_pruning", sparsity, accuracy, "")
        for sparsity, accuracy in ((0.5, 0.7), (0.5, 0.6), (0.8, 0.65), (0.9, 0.66), (0.99, 0.1))
    ]
    assert [(p.sparsity, p.accuracy) for p in frontier(points)] == [
        (0.5, 0.7),
        (0.9, 0.66),
        (0.99, 0.1),
    ]


GALE = default_root() / "gale2019"


@pytest.mark.skipif(not Path(GALE).is_dir(), reason=f"the published CSV files are not in {GALE}")
def test_the_published_files_read_in_full():
    points = read_published(GALE)
    assert len(points) == 18 + 236 + 288 + 161
    best = {(p.method, p.sparsity): p.accuracy for p in sorted(points, key=lambda p: p.accuracy)}
    # As the tables of the sources have them.
    assert best["magnitude_pruning", 0.9] == pytest.approx(0.7391, abs=5e-5)
    assert best["random_pruning", 0.8] == pytest.approx(0.7021, abs=5e-5)
    assert best["gRDA, 0.1_ep140_0.01", 0.915893364] == 0.7324
