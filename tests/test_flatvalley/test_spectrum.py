"""``flatvalley spectrum`` as a user runs it, against dense Hessians of small models."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatvalley.data import load_dataset
from flatvalley.models import tanh_mlp
from flatvalley.run import write_tensors
from flatvalley.studies import spectrum_measure
from flatvalley.studies.spectrum import Measured, SpectrumConfig, SpectrumFindings
from flatvalley.studies.spectrum_figures import MAX_LAYERS, eigenvalues, layers
from flatvalley.studies.spectrum_report import significant, with_error
from flatvalley.studies.verify import VerifyConfig
from hessian.storage import load_eigenspace
from tests.program import flatvalley, rows

MODULE = """
import os
import time
import torch
from torch import nn


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return x


def net():
    return nn.Sequential(
        nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.5), Slow(), nn.Linear(7, 3)
    ).double()


def data():
    return torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))


def loader():
    return list(zip(*(part.split(16) for part in data())))


def float_data():
    return data()[0].float(), data()[1]


def other_data():
    x, y = data()
    return 2 * x, y


def shuffled():
    dataset = torch.utils.data.TensorDataset(*data())
    return torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)


def wide_data():
    return torch.randn(40, 9).double(), torch.randint(0, 3, (40,))


def nan_data():
    x, y = data()
    x[3, 2] = float("nan")
    return x, y


def no_criterion():
    return 3


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, input_ids, labels):
        logits = self.head(self.embed(input_ids)[:, :-1].cumsum(1))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


def language():
    return Language().double()


def texts():
    ids = torch.randint(0, 5, (10, 6))
    labels = ids.masked_fill(torch.rand(10, 6) < 0.4, -100)
    return [
        {"input_ids": ids[:7], "labels": labels[:7]},
        {"input_ids": ids[7:], "labels": labels[7:]},
    ]


def tokens():
    return lambda batch: (batch["labels"][:, 1:] != -100).sum()
"""
OWN = ["--model=own_spectrum:net", "--data=own_spectrum:data"]
PROGRAM = "from flatvalley.cli import main; main()"
CHEAP = ["--probes=4", "--steps=12", "--rtol=0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the user's module, as the current one."""
    path = tmp_path_factory.mktemp("user")
    (path / "own_spectrum.py").write_text(MODULE)
    with contextlib.chdir(path):
        yield path
    sys.modules.pop("own_spectrum", None)


@pytest.fixture(scope="module")
def measured(folder):
    out = folder / "measured"
    options = ["--k=5", "--tol=1e-8", "--trace", "--density", "--layers", *CHEAP]
    return out, flatvalley("spectrum", *OWN, *options, "--out", out)


@pytest.fixture(scope="module")
def truth(folder):
    """The model as the program builds it, with its dense Hessian and gradient."""
    scope: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(MODULE, scope)
        model = scope["net"]().eval()
        torch.manual_seed(0)
        X, y = scope["data"]()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(w):
        parts = torch.split(w, [shape.numel() for shape in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, X), y)

    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    H = torch.func.hessian(loss)(w)
    return {"H": H, "gradient": torch.func.grad(loss)(w), "loss": float(loss(w)), "w": w}


def test_exit_status_and_summary(measured):
    out, (status, printed, errors) = measured
    assert status == 0, errors
    assert "Eigenvalues of largest magnitude" in printed
    assert str(out / "report.html") in printed.replace("\n", "")


def test_eigenpairs_are_those_of_the_dense_hessian(measured, truth):
    out, _ = measured
    exact = torch.linalg.eigvalsh(truth["H"])
    exact = exact[exact.abs().argsort(descending=True)][:5]
    space = load_eigenspace(out / "eigenspace.safetensors")
    torch.testing.assert_close(space.values, exact, rtol=1e-8, atol=1e-10)
    table = rows(out / "tables" / "eigenpairs.csv")
    assert [float(row["eigenvalue"]) for row in table] == space.values.tolist()
    found = truth["H"] @ space.vectors - space.vectors * space.values
    torch.testing.assert_close(found.norm(dim=0), space.residuals, rtol=0.1, atol=1e-14)
    bounds = [float(row["projector_error_bound_of_first"]) for row in table]
    assert bounds == [space.first(i + 1).projector_error_bound for i in range(5)]


def test_point_is_what_the_formulas_say(measured, truth):
    out, _ = measured
    (row,) = rows(out / "tables" / "points.csv")
    assert int(row["weights"]) == len(truth["w"])
    assert (int(row["samples"]), int(row["batches"])) == (40, 1)
    assert float(row["loss"]) == pytest.approx(truth["loss"], rel=1e-12)
    g = truth["gradient"]
    assert float(row["gradient_norm"]) == pytest.approx(float(g.norm()), rel=1e-10)
    values, vectors = torch.linalg.eigh(truth["H"])
    leading = values.abs().argsort(descending=True)[:5]
    inside = vectors[:, leading].T @ g
    share = float(inside.norm() / g.norm())
    assert float(row["gradient_share_in_eigenspace"]) == pytest.approx(share, rel=1e-6)
    up = values[leading] > 0
    assert 0 < int(up.sum()) <= 5
    fall = float((inside[up] ** 2 / (2 * values[leading][up])).sum())
    assert float(row["predicted_fall"]) == pytest.approx(fall, rel=1e-6)


def test_trace_and_layers_hold_the_dense_ones(measured, truth):
    out, _ = measured
    (point,) = rows(out / "tables" / "points.csv")
    exact = float(truth["H"].trace())
    assert abs(float(point["trace"]) - exact) < 4 * float(point["trace_standard_error"])
    found = {row["name"]: row for row in rows(out / "tables" / "layers.csv")}
    blocks = {"0": truth["H"][:49, :49], "4": truth["H"][49:, 49:]}
    assert found.keys() == blocks.keys()
    for name, block in blocks.items():
        row = found[name]
        off = abs(float(row["trace"]) - float(block.trace()))
        assert off < 5 * float(row["standard_error"])
        top = torch.linalg.eigvalsh(block)
        top = float(top[top.abs().argmax()])
        assert float(row["top_eigenvalue"]) == pytest.approx(top, rel=2e-3)
    assert sum(float(row["share"]) for row in found.values()) == pytest.approx(1)


def test_density_has_area_one_and_the_hessians_mean(measured, truth):
    out, _ = measured
    table = rows(out / "tables" / "density.csv")
    x, p = (
        torch.tensor([float(row[key]) for row in table], dtype=torch.float64)
        for key in ("eigenvalue", "density")
    )
    assert float(torch.trapezoid(p, x)) == pytest.approx(1.0, abs=2e-3)
    mean = float(truth["H"].trace()) / len(truth["w"])
    assert float(torch.trapezoid(p * x, x)) == pytest.approx(mean, rel=0.5)


def test_run_json_is_strict_and_says_what_was_done(measured):
    out, _ = measured
    record = json.loads((out / "run.json").read_text(), parse_constant=pytest.fail)
    assert record["status"] == "complete"
    assert record["converged"] is True
    assert record["config"]["model"] == "own_spectrum:net"
    costs = {row["part"]: int(row["products"]) for row in rows(out / "tables" / "cost.csv")}
    assert costs.keys() == {"eigenspace", "trace", "density", "layers"}
    assert record["cost"]["products"] == sum(costs.values())
    assert not (out / "eigenspace.checkpoint").exists()


def test_report_is_one_file_with_every_figure(measured):
    out, _ = measured
    names = {"eigenvalues", "density", "layers"}
    assert {p.stem for p in (out / "figures").iterdir()} == names
    assert {p.suffix for p in (out / "figures").iterdir()} == {".pdf", ".png"}
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3
    assert "http:" not in html
    assert "https:" not in html
    assert "reverse over reverse" in html
    assert "What was claimed" not in html


def chromium() -> str | None:
    return next((p for n in ("chromium", "google-chrome") if (p := shutil.which(n))), None)


@pytest.mark.skipif(chromium() is None, reason="needs a Chromium browser on the path")
def test_report_opens_in_a_browser_without_requests_or_errors(measured):
    sync_api = pytest.importorskip("playwright.sync_api")
    page_url = (measured[0] / "report.html").resolve().as_uri()
    requests, messages = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.goto(page_url)
        widths = page.evaluate("[...document.images].map(i => i.naturalWidth)")
        too_wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        browser.close()
    assert [u for u in requests if u != page_url and not u.startswith("data:")] == []
    assert messages == []
    assert len(widths) == 3
    assert all(width > 500 for width in widths)
    assert not too_wide


def test_second_call_measures_nothing_again_and_adds_what_is_new(folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    options = [*OWN, "--k=2", "--probes=2", "--steps=5", "--out", out]
    assert flatvalley("spectrum", *options)[0] == 0
    before = (out / "eigenspace.safetensors").read_bytes()
    assert not (out / "figures" / "density.png").exists()

    def never(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(spectrum_measure, "leading_eigenspace", never)
    status, _, errors = flatvalley("spectrum", *options, "--density", "--steps=6")
    assert status == 2  # other settings are another run
    assert "other settings (steps differ)" in errors
    status, printed, errors = flatvalley("spectrum", *options, "--density")
    assert status == 0, errors
    assert "Going on with the run" in printed
    assert (out / "eigenspace.safetensors").read_bytes() == before
    assert (out / "figures" / "density.png").exists()
    monkeypatch.setattr(spectrum_measure, "spectral_density", never)
    for asked in ([], ["--density"]):
        assert flatvalley("spectrum", *options, *asked)[0] == 0
        assert "The density of all eigenvalues" in (out / "report.html").read_text()


def test_code_that_changed_is_not_mixed_in(folder, tmp_path):
    (folder / "own_changing.py").write_text(MODULE)
    out = tmp_path / "run"
    options = ["--model=own_changing:net", "--data=own_changing:data", "--k=1", "--out", out]
    try:
        assert flatvalley("spectrum", *options)[0] == 0
        (folder / "own_changing.py").write_text(MODULE.replace("randn(40, 6", "rand(40, 6"))
        del sys.modules["own_changing"]
        status, _, errors = flatvalley("spectrum", *options)
    finally:
        sys.modules.pop("own_changing", None)
    assert status == 2
    assert "holds numbers of another function: 73 weights with a loss of" in errors


def test_budget_that_ran_out_is_status_one_and_a_larger_one_goes_on(folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    options = [*OWN, "--k=4", "--tol=1e-10", "--out", out]
    status, printed, errors = flatvalley("spectrum", *options, "--max-products=13")
    assert status == 1, errors
    assert "Raise `max_products`" in printed.replace("\n", " ")
    assert json.loads((out / "run.json").read_text())["converged"] is False
    assert "a budget ran out" in (out / "report.html").read_text()
    solve, calls = spectrum_measure.leading_eigenspace, []

    def noted(*arguments, **options):
        there = (options["checkpoint"] / "checkpoint.json").exists()
        calls.append((options["max_basis"], there))
        return solve(*arguments, **options)

    monkeypatch.setattr(spectrum_measure, "leading_eigenspace", noted)
    status, printed, errors = flatvalley("spectrum", *options, "--max-products=200")
    assert status == 0, errors
    assert calls == [(73, True)]  # all weights: the default for a small network
    went_on = load_eigenspace(out / "eigenspace.safetensors")
    assert 13 < went_on.num_products <= 200
    assert not (out / "eigenspace.checkpoint").exists()
    at_once = tmp_path / "at_once"
    flatvalley("spectrum", *OWN, "--k=4", "--tol=1e-10", "--max-products=200", "--out", at_once)
    torch.testing.assert_close(
        went_on.values, load_eigenspace(at_once / "eigenspace.safetensors").values
    )


def test_interrupt_says_how_to_go_on_and_the_next_call_does(folder, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = [*OWN, "--k=6", "--tol=1e-10", "--memory-budget=0"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "spectrum", *options, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "SLOW": "0.1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    deadline = time.monotonic() + 60
    while not (out / "eigenspace.checkpoint" / "checkpoint.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert errors.decode() == "flatvalley: interrupted; run the same command again to go on.\n"
    assert not (out / "eigenspace.safetensors").exists()
    status, printed, errors = flatvalley("spectrum", *options, "--out", out)
    assert status == 0, errors
    assert "Going on with the run" in printed
    assert flatvalley("spectrum", *options, "--out", whole)[0] == 0
    first, second = (load_eigenspace(p / "eigenspace.safetensors") for p in (out, whole))
    torch.testing.assert_close(first.values, second.values, rtol=1e-9, atol=1e-12)
    assert first.num_products == second.num_products


def test_weights_come_from_the_file(folder, tmp_path):
    scope: dict[str, object] = {}
    exec(MODULE, scope)
    model = scope["net"]()
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    options = [*OWN, "--weights", tmp_path / "w.safetensors", "--k=1"]
    status, _, errors = flatvalley("spectrum", *options, "--out", tmp_path / "run")
    assert status == 0, errors
    (row,) = rows(tmp_path / "run" / "tables" / "points.csv")
    # Equal rows of the last layer: every class has the same probability.
    assert float(row["loss"]) == pytest.approx(math.log(3))


def test_type_batches_and_parameters_are_the_users_choice(folder, tmp_path):
    options = ["--model=own_spectrum:net", "--data=own_spectrum:loader", "--dtype=float32"]
    options += ["--parameters=0.*", "--parameters=4.bias", "--k=2"]
    status, _, errors = flatvalley("spectrum", *options, "--out", tmp_path / "run")
    assert status == 0, errors
    (row,) = rows(tmp_path / "run" / "tables" / "points.csv")
    assert int(row["weights"]) == 49 + 3
    assert int(row["batches"]) == 3
    space = load_eigenspace(tmp_path / "run" / "eigenspace.safetensors")
    assert space.vectors.dtype == torch.float32


def test_language_model_counts_tokens(folder, tmp_path):
    options = ["--model=own_spectrum:language", "--data=own_spectrum:texts", "--k=2"]
    status, _, errors = flatvalley("spectrum", *options, "--out", tmp_path / "run")
    assert status == 2
    assert "`count` must say how many tokens a batch counts for" in errors
    options += ["--count=own_spectrum:tokens"]
    status, _, errors = flatvalley("spectrum", *options, "--out", tmp_path / "run")
    assert status == 0, errors
    scope: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(MODULE, scope)
        model = scope["language"]()
        torch.manual_seed(0)
        batches = scope["texts"]()
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    (row,) = rows(tmp_path / "run" / "tables" / "points.csv")
    assert float(row["loss"]) == pytest.approx(float(model(**joined)["loss"].detach()), rel=1e-10)
    assert row["loss_standard_error"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model=own_spectrum:net"], 2, "must be given together, got only `model`"),
        (["--weights=w.safetensors"], 2, "must be given together, got only `weights`"),
        (["--model=nowhere:net", "--data=digits"], 2, "there is no module nowhere"),
        (["--model=own_spectrum:nets", "--data=digits"], 2, "has no `nets`"),
        (["--model=own_spectrum:net", "--data=mars"], 2, "`data` must be one of"),
        ([*OWN, "--criterion=own_spectrum:no_criterion"], 2, "must return a function of output"),
        ([*OWN, "--weights=no.safetensors"], 2, "there is no file no.safetensors"),
        ([*OWN, "--parameters=7.*"], 2, "`parameters` pattern"),
        ([*OWN, "--batch-size=0"], 2, "`batch_size` must be at least 1"),
        ([*OWN, "--k=74"], 2, "`k` must be between 1 and 73, the number of weights"),
        ([*OWN, "--k=0"], 2, "`k` must be at least 1"),
        ([*OWN, "--which=middle"], 2, "`which` must be one of magnitude, largest, smallest, both"),
        ([*OWN, "--tol=0"], 2, "`tol` must be between 0 and 1"),
        ([*OWN, "--probes=1"], 2, "`probes` must be at least 2"),
        ([*OWN, "--steps=0"], 2, "`steps` must be at least 1"),
        ([*OWN, "--max-products=5"], 2, "`max_products` must be at least"),
        ([*OWN, "--memory-budget=much"], 2, "a number of bytes such as 500MB or 2GiB"),
        ([*OWN, "--dtype=half"], 2, "`dtype` must be float32 or float64"),
        ([*OWN, "--device=nowhere"], 2, "`device` must be one that is here"),
        ([*OWN, "--cell=x"], 2, "`cell` names a cell of a run"),
        (["runs/none"], 2, "but there is no runs/none/run.json"),
        (["runs/none", *OWN], 2, "`RUN_FOLDER` cannot go with `model`, `data`"),
        (
            ["--model=own_spectrum:net", "--data=own_spectrum:wide_data"],
            2,
            "must be able to evaluate the first batch of `data`, but that raised RuntimeError",
        ),
        (["--model=own_spectrum:net", "--data=own_spectrum:float_data"], 2, "torch.float32"),
        (["--model=own_spectrum:net", "--data=own_spectrum:shuffled"], 2, "that shuffles"),
        (["--model=own_spectrum:net", "--data=own_spectrum:nan_data"], 3, "The loss is nan"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_mistake_is_one_line_and_its_status(folder, tmp_path, arguments, status, message):
    code, _, errors = flatvalley("spectrum", "--out", tmp_path / "run", *arguments)
    assert code == status, errors
    assert message in errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors


def test_user_folder_does_not_stay_on_the_path(folder, tmp_path):
    before = list(sys.path)
    flatvalley("spectrum", *OWN, "--k=1", "--out", tmp_path / "run")
    assert sys.path == before


@pytest.fixture(scope="module")
def verify_run(tmp_path_factory):
    """What ``flatvalley verify`` leaves behind, without its training."""
    folder = tmp_path_factory.mktemp("runs") / "verify"
    config = VerifyConfig(gammas=(0.4, 0.1), hidden=3, ks=(2,), seeds=1)
    (folder / "cells").mkdir(parents=True)
    record = {"study": "verify", "config": vars(config)}
    (folder / "run.json").write_text(json.dumps(record))
    generator = torch.Generator().manual_seed(0)
    for gamma in config.gammas:
        tensors = {
            key: 0.3 * torch.randn(235, generator=generator, dtype=torch.float64)
            for key in ("sgd", "grda")
        }
        path = folder / "cells" / f"gamma{gamma:g}_seed0.safetensors"
        write_tensors(path, tensors, {"record": {}})
    return folder


def test_end_points_of_a_run_stand_side_by_side(verify_run, tmp_path):
    from flatvalley.run import read_tensors

    options = ["--k=3", "--which=both", "--max-products=400", "--out", tmp_path / "run"]
    status, printed, errors = flatvalley("spectrum", verify_run, *options)
    assert status == 0, errors
    assert "SGD" in printed
    assert "gRDA" in printed
    found = {row["point"]: float(row["loss"]) for row in rows(tmp_path / "run/tables/points.csv")}
    tensors, _ = read_tensors(verify_run / "cells" / "gamma0.1_seed0.safetensors")
    data = load_dataset("digits", dtype=torch.float64)
    model = tanh_mlp([64, 3, 10], seed=0, dtype=torch.float64)
    for name, key in (("SGD", "sgd"), ("gRDA", "grda")):
        nn.utils.vector_to_parameters(tensors[key], model.parameters())
        loss = nn.functional.cross_entropy(model(data.train_inputs), data.train_labels)
        assert found[name] == pytest.approx(float(loss.detach()), rel=1e-12)
    for name in ("SGD", "gRDA"):
        assert (tmp_path / "run" / name / "eigenspace.safetensors").exists()


def test_another_cell_can_be_asked_for_and_a_missing_one_is_named(verify_run, tmp_path):
    options = ["--k=1", "--tol=1e-2", "--cell"]
    out = ["--out", tmp_path / "run"]
    assert flatvalley("spectrum", verify_run, *options, "gamma0.4_seed0", *out)[0] == 0
    status, _, errors = flatvalley("spectrum", verify_run, *options, "gamma7_seed0", *out)
    assert status == 2
    assert "`cell` must be one of gamma0.1_seed0, gamma0.4_seed0" in errors
    status, _, errors = flatvalley("spectrum", tmp_path / "run", "--out", tmp_path / "other")
    assert status == 2
    assert "is one of the study 'spectrum'" in errors


def test_given_nothing_a_small_network_is_measured_before_and_after_training(tmp_path):
    status, _, errors = flatvalley("spectrum", "--k=2", "--tol=1e-3", "--out", tmp_path)
    assert status == 0, errors
    losses = {r["point"]: float(r["loss"]) for r in rows(tmp_path / "tables" / "points.csv")}
    assert losses["after training"] < 0.1 < 2.0 < losses["before training"]


def point(values, rows_=None, size=100):
    k = len(values)
    space = load_space(values, k, size)
    return Measured("model", size, 1, 1, 1.0, 0.1, torch.ones(size), space, layers=rows_)


def load_space(values, k, size):
    from hessian import Eigenspace

    return Eigenspace(
        torch.tensor(values, dtype=torch.float64),
        torch.eye(size)[:, :k],
        torch.full((k,), 1e-5, dtype=torch.float64),
        0.1,
        10,
        True,
    )


@pytest.mark.parametrize("which", ["magnitude", "both"])
def test_eigenvalue_figure_survives_zeros_and_signs(which, tmp_path):
    findings = SpectrumFindings(
        SpectrumConfig(which=which), "nothing", [point([2.0, -1.0, 0.0, -1e-30])]
    )
    figure, text = eigenvalues(findings)
    figure.savefig(tmp_path / "figure.png")
    assert "negative ones hollow" in text.caption


def test_many_layers_are_cut_to_the_largest_and_the_caption_says_so():
    many = [
        {
            "name": f"layer{i}",
            "size": 2,
            "trace": float(i),
            "standard_error": 0.1,
            "top_eigenvalue": 1.0,
            "residual": 0.1,
            "share": 0.1,
            "converged": True,
        }
        for i in range(MAX_LAYERS + 5)
    ]
    figure, text = layers(SpectrumFindings(SpectrumConfig(), "nothing", [point([1.0], many)]))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [f"layer{i}" for i in range(5, MAX_LAYERS + 5)]
    assert f"of {MAX_LAYERS + 5} layers the {MAX_LAYERS} with the largest traces" in text.caption


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (9.81, 0.095, "9.810 ± 0.095"),
        (-0.2961, 5e-4, "−0.29610 ± 0.00050"),
        (1234.5, 20.0, "1,234 ± 20"),
        (1.5, 3e-12, "1.500 ± 3e-12"),
        (2.0, 0.0, "2.000 ± 0e+00"),
        (2.0, math.nan, "2.000"),
    ],
)
def test_value_and_error_end_at_the_same_digit(value, error, text):
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (0.0012346, "0.001235"),
        (-12.3456, "−12.35"),
        (123456.0, "123,456"),
        (-1.5e-7, "−1.500e-07"),
        (3.2e9, "3.200e+09"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert significant(value) == text
