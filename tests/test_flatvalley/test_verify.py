"""The study on a small scale, through the command line as a user runs it."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from flatvalley.studies.verify import VerifyConfig
from flatvalley.studies.verify_cell import read_cell, share_ks
from tests.program import flatvalley as in_this_process

SMALL = ["--gamma=0.4", "--gamma=0.1", "--time=12", "--seeds=2", "--hidden=5", "--k=3", "--k=20"]
FIGURES = {
    "error_against_gamma",
    "measured_scores",
    "regimes",
    "share_in_eigenspace",
    "valley",
    "loss_plane",
    "trajectories",
}


def command(*arguments):
    return [sys.executable, "-c", "from flatvalley.cli import main; main()", *map(str, arguments)]


def flatvalley(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, flatvalley("verify", *SMALL, "--out", out)


def test_exit_status_says_whether_the_claims_hold(finished):
    out, done = finished
    claims = json.loads((out / "run.json").read_text())["claims"]
    assert len(claims) == 4
    assert done.returncode == (0 if all(claim["holds"] for claim in claims) else 1), done.stderr
    assert "Traceback" not in done.stderr


def test_summary_and_path_of_the_report_are_printed(finished):
    out, done = finished
    assert "transport" in done.stdout
    assert "soft threshold" in done.stdout
    assert str(out / "report.html") in done.stdout


def test_folder_holds_record_tables_figures_and_weights(finished):
    out, _ = finished
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["config"]["gammas"] == [0.4, 0.1]
    assert {p.stem for p in (out / "figures").iterdir()} == FIGURES
    assert {p.suffix for p in (out / "figures").iterdir()} == {".pdf", ".png"}
    names = {p.stem for p in (out / "tables").iterdir()}
    assert names == {"summary", "methods", "minima", "shares", "barriers", "curvature"}
    assert len(list((out / "cells").iterdir())) == 4


DEPARTING = {"soft, best lambda", "soft, same sparsity"}


def scores_of(method, tensors):
    if method != "permuted scores":
        return tensors[f"scores.{method}"]
    generator = torch.Generator().manual_seed(0)
    return tensors["scores.transport"][torch.randperm(len(tensors["sgd"]), generator=generator)]


def test_controls_are_what_they_are_called(finished):
    out, _ = finished
    with (out / "tables" / "methods.csv").open() as file:
        cells = {}
        for r in csv.DictReader(file):
            cells.setdefault((r["gamma"], r["seed"]), {})[r["method"]] = r
    with (out / "tables" / "minima.csv").open() as file:
        grda = {(r["gamma"], r["seed"]): r for r in csv.DictReader(file) if r["point"] == "gRDA"}
    for key, methods in cells.items():
        best = float(methods["soft, best lambda"]["relative_error"])
        assert best <= float(methods["soft"]["relative_error"])
        assert best <= float(methods["soft, same sparsity"]["relative_error"]) + 1e-2
        for name in ("soft, same sparsity", "magnitude"):
            expected = pytest.approx(float(grda[key]["sparsity"]), abs=1e-12)
            assert float(methods[name]["sparsity"]) == expected


def test_networks_that_never_learned_do_not_pass(tmp_path):
    options = ["--gamma=30", "--gamma=0.4", "--time=60", "--seeds=1", "--hidden=3", "--k=2"]
    done = flatvalley("verify", *options, "--out", tmp_path / "run")
    assert done.returncode in (1, 3), done.stdout
    if done.returncode == 1:
        claims = json.loads((tmp_path / "run" / "run.json").read_text())["claims"]
        assert not claims[0]["holds"]


def test_run_of_another_version_is_not_mixed_in(finished, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(finished[0], out)
    record = json.loads((out / "run.json").read_text())
    record["environment"]["torch"] = "1.0"
    (out / "run.json").write_text(json.dumps(record))
    done = flatvalley("verify", *SMALL, "--out", out)
    assert done.returncode == 2
    assert "made with other versions of torch" in done.stderr


def test_tables_say_what_the_saved_weights_say(finished):
    out, _ = finished
    tensors, _ = read_cell(out / "cells" / "gamma0.1_seed1.safetensors")
    with (out / "tables" / "methods.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["gamma"] == "0.1" and r["seed"] == "1"]
    D = tensors["grda"] - tensors["sgd"]
    for row in rows:
        w = tensors["sgd"]
        if row["method"] == "magnitude":
            pruned = tensors["magnitude"]
            assert float((pruned == 0).double().mean()) == pytest.approx(float(row["sparsity"]))
        else:
            s = 1.0 if row["method"].startswith("soft") else scores_of(row["method"], tensors)
            pruned = w.sign() * (w.abs() - float(row["lam"]) * s).clamp(min=0)
            assert row["method"] in DEPARTING or float(row["lam"]) == float(row["lambda"])
        error = float((pruned - tensors["grda"]).norm() / D.norm())
        assert error == pytest.approx(float(row["relative_error"]), rel=1e-9), row["method"]
        kept = ~tensors["clipped"]
        error = float((pruned - tensors["grda"])[kept].norm() / D[kept].norm())
        assert error == pytest.approx(float(row["relative_error_never_clipped"]), rel=1e-9)


def test_shares_are_those_of_the_saved_eigenvectors(finished):
    out, _ = finished
    tensors, record = read_cell(out / "cells" / "gamma0.4_seed0.safetensors")
    D = tensors["second_sgd"] - tensors["sgd"]
    share = float((tensors["eigenvectors"][:, :2].T @ D).norm() / D.norm())
    assert record["shares"]["second SGD"][1] == pytest.approx(share, rel=1e-9)


def test_barrier_profile_ends_at_the_losses_of_the_minima(finished):
    out, _ = finished
    tensors, record = read_cell(out / "cells" / "gamma0.4_seed0.safetensors")
    for path in ("line", "bezier"):
        count, total, _ = tensors[f"profile.{path}.train loss"]
        losses = total / count
        assert float(losses[0]) == pytest.approx(record["points"]["gRDA"]["train_loss"])
        assert float(losses[-1]) == pytest.approx(record["points"]["SGD"]["train_loss"])


def test_second_run_in_the_folder_changes_no_number(finished):
    out, done = finished
    before = {p.name: p.read_bytes() for p in (out / "tables").iterdir()}
    again = flatvalley("verify", *SMALL, "--out", out)
    assert again.returncode == done.returncode
    assert "Going on with the run" in again.stdout
    assert {p.name: p.read_bytes() for p in (out / "tables").iterdir()} == before


def test_killed_run_resumes_and_ends_with_the_same_numbers(finished, tmp_path):
    out, _ = finished
    interrupted = tmp_path / "interrupted"
    process = subprocess.Popen(
        command("verify", *SMALL, "--workers", 1, "--out", interrupted),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    cells = interrupted / "cells"
    deadline = time.monotonic() + 120
    while not list(cells.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(list(cells.glob("*.safetensors"))) < 4
    flatvalley("verify", *SMALL, "--workers", 1, "--out", interrupted)
    for table in (out / "tables").iterdir():
        assert (interrupted / "tables" / table.name).read_bytes() == table.read_bytes(), table.name


def test_interrupt_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command("verify", *SMALL, "--out", out), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (out / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, (stdout.decode(), stderr.decode())
    assert stderr.decode() == "flatvalley: interrupted; run the same command again to go on.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nope"], '`data` must be one of digits, got "nope"'),
        (["--gamma", "0"], "`gamma` must be positive and finite, got 0.0"),
        (["--gamma", "0.1", "--gamma", "0.1"], "`gamma` must be one or more different"),
        (["--gamma", "fast"], "Invalid value for '--gamma'"),
        (["--mu", "1.5"], "`mu` must be between 1/2 and 1"),
        (["--k", "0"], "`k` must be between 1 and 755"),
        (["--seeds", "0"], "`seeds` must be at least 1, got 0"),
        (["--workers", "-1"], "`workers` must be at least 1"),
        (["--out", "/proc/nowhere"], "`out` must be a folder that can be written"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_option_is_one_line_and_status_two(arguments, message, tmp_path):
    status, _, err = in_this_process("verify", "--out", tmp_path / "run", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_study_survives_a_gamma_at_which_everything_clips(tmp_path):
    options = ["--gamma=0.4", "--time=8", "--c=5", "--seeds=1", "--hidden=3", "--k=2"]
    done = flatvalley("verify", *options, "--workers=1", "--out", tmp_path / "run")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_help_and_version_answer():
    for arguments in (["--help"], []):
        status, out, _ = in_this_process(*arguments)
        assert status == 0 and "verify" in out
    assert re.fullmatch(r"flatvalley \d+\.\d+\.\d+\n", flatvalley("--version").stdout)


def test_share_sizes_end_with_the_largest():
    assert share_ks(200) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert share_ks(3) == [1, 2, 3]


def test_learning_rates_are_sorted_so_that_their_order_does_not_matter():
    assert VerifyConfig(gammas=(0.1, 0.4)) == VerifyConfig(gammas=(0.4, 0.1))


class References(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]


def test_report_refers_to_nothing_outside_itself(finished):
    out, _ = finished
    parser = References()
    parser.feed((out / "report.html").read_text())
    assert len(parser.found) >= len(FIGURES)
    assert all(value.startswith("data:") for value in parser.found)


def chromium() -> str | None:
    return next((p for n in ("chromium", "google-chrome") if (p := shutil.which(n))), None)


@pytest.mark.skipif(chromium() is None, reason="needs a Chromium browser on the path")
def test_report_opens_in_a_browser_without_requests_or_errors(finished):
    sync_api = pytest.importorskip("playwright.sync_api")
    out, _ = finished
    page_url = (out / "report.html").resolve().as_uri()
    requests, messages = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(page_url)
        page.wait_for_load_state("networkidle")
        widths = page.evaluate("[...document.images].map(i => i.naturalWidth)")
        title = page.title()
        browser.close()
    outside = [url for url in requests if url != page_url and not url.startswith("data:")]
    assert outside == []
    assert messages == []
    assert title == "Does gRDA perform directional pruning?"
    assert len(widths) == len(FIGURES)
    assert all(width > 500 for width in widths)


def test_study_leaves_threads_as_they_were(tmp_path):
    from flatvalley.studies.verify_cell import run_cell

    torch.set_num_threads(2)
    try:
        config = VerifyConfig(gammas=(0.4,), time=4.0, hidden=3, ks=(2,), seeds=1)
        run_cell(config.cell(0.4, 0), tmp_path / "cell.safetensors")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["cell.safetensors"]
