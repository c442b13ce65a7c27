"""``flatvalley redraw`` as a user runs it, on files in the layout of the tools that write them."""

import json

import numpy as np
import pytest

from flatvalley.studies.redraw import redraw
from flatvalley.studies.redraw_report import console_summary, notes
from tests.program import flatvalley, rows
from tests.published_files import ridge, write_curve, write_line, write_plane, write_surface


def redrawn(file, out, *options):
    status, text, err = flatvalley("redraw", file, f"--out={out}", *options)
    assert status == 0, err
    return text, json.loads((out / "run.json").read_text())["results"]


def test_a_plane_is_drawn_and_its_largest_losses_are_printed(tmp_path):
    file = write_plane(tmp_path / "plane.npz")
    text, results = redrawn(file, tmp_path / "o")
    lines = text.splitlines()
    assert lines[0] == "plane.npz: 29 x 29 points of a plane"
    assert "train loss: at most 1.012 on the straight line, at t = 0.50" in text
    maxima = {(row["measure"], row["along"]): row for row in results["maxima"]}
    assert len(maxima) == 6 * 2  # loss, nll and error of train and test
    # The ridge itself, over its lower ends; on the curve it is crossed at y = 2.
    assert maxima["train nll", "straight line"]["largest"] == pytest.approx(ridge(5, 0), rel=5e-3)
    assert maxima["train nll", "curve"]["largest"] == pytest.approx(ridge(5, 2), rel=5e-3)
    mean = (ridge(0, 0) + ridge(10, 0)) / 2
    over = maxima["train nll", "straight line"]["over_mean"]
    assert over == pytest.approx(ridge(5, 0) - mean, rel=1e-2)
    table = rows(tmp_path / "o" / "tables" / "points.csv")
    assert len(table) == 29 * 29
    for row in table[:: 29 * 7]:
        assert float(row["train nll"]) == pytest.approx(ridge(float(row["x"]), float(row["y"])))
    folder = tmp_path / "o"
    for name in ("train_loss", "train_nll", "train_error", "test_loss", "test_error", "in_space"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
        assert (folder / "figures" / f"{name}.pdf").stat().st_size > 5000
    assert (folder / "surface.html").stat().st_size > 10_000
    assert (folder / "surface.vts").stat().st_size > 10_000
    report = (folder / "report.html").read_text()
    assert "train loss: at most 1.012" in report and "plane.npz" in report


def test_accuracies_that_were_never_filled_in_are_pointed_out(tmp_path):
    """As in a published file: a third of its train accuracies is exactly zero."""
    file = write_plane(tmp_path / "plane.npz")
    with np.load(file) as arrays:
        found = dict(arrays)
    found["tr_acc"].ravel()[-261:] = 0
    np.savez(file, **found)
    result = redraw(file)
    (note,) = notes(result)
    assert note.startswith("train accuracy (%): exactly 0 at 261 points")
    assert note in console_summary(result) and result.missing == 0


def test_a_curve_has_its_profile(tmp_path):
    text, results = redrawn(write_curve(tmp_path / "curve.npz"), tmp_path / "o")
    assert text.startswith("curve.npz: 61 points on a path, length 30\n")
    assert "train nll: at most 0.35 on the path, at t = 0.50; 0.1 and 0.1 at its ends" in text
    assert len(results["maxima"]) == 6


def test_a_surface_of_loss_landscape_is_drawn_with_its_missing_cells(tmp_path):
    xs, ys = np.linspace(-1, 1, 9), np.linspace(0, 2, 5)
    file = write_surface(tmp_path / "s.h5", xs, ys, lambda x, y: 1 + x + 3 * y**2, missing=(3, 4))
    text, results = redrawn(file, tmp_path / "o", "--floor=0.5", "--cap=5")
    assert text.startswith("s.h5: 9 x 5 points of a plane\nAt 2 points there is no value")
    assert results == {"maxima": [], "missing": 2}
    table = rows(tmp_path / "o" / "tables" / "points.csv")
    known = [row for row in table if row["train loss"]]
    assert len(table) == 45 and len(known) == 43
    for row in known:
        x, y = float(row["x"]), float(row["y"])
        assert float(row["train loss"]) == pytest.approx(1 + x + 3 * y**2)
    # The tool has no error: 100 minus its accuracy is drawn.
    assert (tmp_path / "o" / "figures" / "train_error.png").stat().st_size > 5000


def test_a_line_of_loss_landscape_has_no_ends_to_compare(tmp_path):
    file = write_line(tmp_path / "line.h5", np.linspace(-1, 1, 21), lambda x: 1 + x**2)
    text, results = redrawn(file, tmp_path / "o")
    assert text.startswith("line.h5: 21 points on a path\n") and results["maxima"] == []


def refused(*arguments):
    status, _, err = flatvalley("redraw", *arguments)
    assert status == 2
    return " ".join(err.split())


def test_files_that_cannot_be_drawn_are_named(tmp_path):
    out = f"--out={tmp_path / 'o'}"
    assert "No such file" in refused(tmp_path / "none.npz", out)
    (tmp_path / "text.npz").write_text("loss")
    assert "must be a whole `.npz` file" in refused(tmp_path / "text.npz", out)
    assert "`floor` must be positive" in refused(
        write_plane(tmp_path / "b.npz"), f"--out={tmp_path / 'p'}", "--floor=3", "--cap=1"
    )
