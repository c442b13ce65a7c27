import json
import re
import zlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from landscape import (
    BezierCurve,
    Evaluation,
    Plane,
    Trajectory,
    grid,
    plot_plane,
    plot_profile,
    plot_share,
    plot_trajectory,
    random_share_interval,
    save_figure,
)

PIL_Image = pytest.importorskip("PIL.Image")


def evaluation(points, mean, error=0.0):
    """An evaluation of 101 samples with the given means and standard error."""
    count = torch.full_like(mean, 101.0)
    return Evaluation(points, count, 101 * mean, 101 * mean**2 + error**2 * 101 * 100)


def rectangle(losses=lambda x, y: x + 10 * (y + 1) + 1):
    """Losses on a 4 x 3 grid over the first two axes of a space of four dimensions."""
    points = grid([0.0, 1.0, 2.0, 4.0], [-1.0, 0.0, 2.0])
    e = torch.eye(4, dtype=torch.float64)
    return evaluation(points, losses(*points.unbind(-1))), Plane(torch.zeros_like(e[0]), e[0], e[1])


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.fixture(autouse=True)
def nothing_global_changes():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_profile_shows_means_and_two_standard_errors():
    t = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)  # drawn in rising order
    ax = plot_profile({"line": evaluation(t, 2 * t + 1, error=0.1)}, ends=("A", "B"))
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 1], [0.5, 2], [1, 3]])
    edges = ax.collections[0].get_paths()[0].vertices
    at_half = edges[edges[:, 0] == 0.5][:, 1]
    np.testing.assert_allclose([at_half.min(), at_half.max()], [1.8, 2.2], rtol=1e-9)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert (labels[0], labels[-1]) == ("0\nA", "1\nB")


def test_profile_leaves_a_gap_where_there_is_no_loss_and_counts_it():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    ax = plot_profile({"line": evaluation(t, torch.tensor([1.0, torch.nan, 2.0]).double())})
    assert np.isnan(ax.lines[0].get_ydata()).tolist() == [False, True, False]
    assert legend_of(ax) == ["line (1 not finite)"]


def test_profile_of_a_zero_loss_on_a_log_axis_draws(tmp_path):
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    ax = plot_profile({"line": evaluation(t, t)}, log=True)
    save_figure(ax.figure, tmp_path / "zero", {})


def test_plane_puts_the_first_coordinate_on_x():
    found, plane = rectangle()
    ax = plot_plane(found, plane, {})
    assert ax.get_xlim() == (0, 4)
    assert ax.get_ylim() == (-1, 2)
    assert ax.get_aspect() == 1
    # y is the steep direction: a contour line of x + 10 y + 11 runs nearly level.
    lines = ax.collections[1]
    spans = [np.ptp(path.vertices, axis=0) for path in lines.get_paths() if len(path.vertices) > 3]
    assert spans
    assert all(span[0] > 2 * span[1] for span in spans)


def test_plane_has_log_colours_with_floor_and_cap():
    found, plane = rectangle(lambda x, y: x + y.clamp(min=0))  # zero at a corner, 6 at another
    ax = plot_plane(found, plane, {}, floor=0.5, cap=3.0)
    filled = ax.collections[0]
    assert isinstance(filled.norm, LogNorm)
    assert (filled.norm.vmin, filled.norm.vmax) == (0.5, 3.0)
    assert filled.extend == "both"
    assert texts(ax.child_axes[0]) == ["≥ 3", "≤ 0.5"]


def test_a_loss_of_zero_has_the_lowest_colour_and_is_not_blank():
    found, plane = rectangle(lambda x, y: x + y + 1)
    ax = plot_plane(found, plane, {})
    assert ax.collections[0].extend == "min"
    assert ax.get_legend() is None
    lowest = ax.collections[0].get_paths()[0]
    assert lowest.contains_point((0.001, -0.999))


def test_plane_without_a_cap_has_no_overflow():
    found, plane = rectangle(lambda x, y: x + y + 2)
    ax = plot_plane(found, plane, {})
    assert ax.collections[0].extend == "neither"
    assert texts(ax.child_axes[0]) == []


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_plane_of_a_constant_loss_draws(tmp_path, value):
    found, plane = rectangle(lambda x, y: 0 * x + value)
    save_figure(plot_plane(found, plane, {}).figure, tmp_path / "flat", {})


def test_plane_counts_points_without_a_loss(tmp_path):
    found, plane = rectangle(lambda x, y: torch.where(x > 3, torch.nan, x + y + 2))
    ax = plot_plane(found, plane, {})
    assert legend_of(ax) == ["not finite (3)"]
    save_figure(ax.figure, tmp_path / "gap", {})


def test_points_are_marked_at_their_coordinates_and_tell_how_far_off_they_are():
    found, plane = rectangle()
    on, off = (torch.tensor([3.0, 1.0, r, 0.0]).double() for r in (0.01, 2.0))
    ax = plot_plane(found, plane, {"on": on, "off": off})
    markers = [line.get_xydata().tolist() for line in ax.lines]
    assert markers == [[[3.0, 1.0]]] * 2
    assert texts(ax) == ["on", "off\n2 off the plane"]


def test_curve_and_chord_are_drawn():
    found, plane = rectangle()
    corners = torch.tensor([[0, 0, 0, 0], [2, 4, 0, 0], [4, 0, 0, 0]]).double()
    ax = plot_plane(found, plane, {}, curve=BezierCurve(corners))
    chord, curve = ax.lines
    assert chord.get_xydata().tolist() == [[0, 0], [4, 0]]
    assert chord.get_linestyle() == "--"
    np.testing.assert_allclose(curve.get_xydata()[50], [2, 2])
    assert legend_of(ax) == ["straight line", "curve"]
    corners[1, 3] = 3.0  # highest at t = ½, by half of the control point
    ax = plot_plane(found, plane, {}, curve=BezierCurve(corners))
    assert legend_of(ax)[1] == "curve (up to 1.5 off the plane)"


def test_another_aspect_is_stated():
    found, plane = rectangle()
    ax = plot_plane(found, plane, {}, equal_aspect=False)
    assert ax.get_aspect() == "auto"
    assert "other scale than x" in ax.get_ylabel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"floor": 0.0}, "`floor` must be positive and below `cap`, got 0"),
        ({"floor": 3.0, "cap": 2.0}, "`floor` must be positive and below `cap`, got 3 and 2"),
    ],
)
def test_bad_colour_ranges_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        plot_plane(*rectangle(), {}, **change)


def test_a_plane_without_a_grid_or_a_loss_is_refused():
    found, plane = rectangle()
    with pytest.raises(ValueError, match=r"rectangular grid .* shape \[12, 2\]"):
        flat = [part.reshape(-1) for part in (found.count, found.total, found.total_squares)]
        plot_plane(Evaluation(found.points.reshape(-1, 2), *flat), plane, {})
    with pytest.raises(ValueError, match="rectangular grid"):
        swapped = found.points.transpose(0, 1).contiguous()
        parts = [part.T for part in (found.count, found.total, found.total_squares)]
        plot_plane(Evaluation(swapped, *parts), plane, {})
    with pytest.raises(ValueError, match="finite loss somewhere"):
        plot_plane(rectangle(lambda x, y: x * torch.nan)[0], plane, {})
    with pytest.raises(ValueError, match="must be along a path"):
        plot_profile({"plane": found})


def test_trajectory_has_an_axes_a_direction_and_one_for_the_rest():
    coordinates = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).double()
    residuals = torch.tensor([7.0, 8.0, 9.0]).double()
    found = Trajectory(coordinates, residuals, 10 * residuals)
    axes = plot_trajectory({"SGD": found, "gRDA": found}, [0, 10, 20], names=["v1", "v2"])
    assert [ax.get_title(loc="left") for ax in axes] == ["v1", "v2", "distance outside"]
    drawn = [ax.lines[0].get_xydata().tolist() for ax in axes]
    assert drawn[1] == [[0, 2], [10, 4], [20, 6]]
    assert drawn[2] == [[0, 7], [10, 8], [20, 9]]
    assert axes[-1].get_xlabel() == "epoch"


def test_trajectories_that_do_not_fit_are_named():
    found = Trajectory(torch.zeros(3, 2).double(), torch.zeros(3).double(), torch.ones(3).double())
    with pytest.raises(ValueError, match=r'`trajectories\["SGD"\]` must have shape \[2, 2\]'):
        plot_trajectory({"SGD": found}, [0, 1])
    with pytest.raises(ValueError, match="`names` must hold 2 names and `axes` 3 axes"):
        plot_trajectory({"SGD": found}, [0, 1, 2], names=["v1"])


def test_share_shows_mean_reach_and_the_random_band():
    rows = torch.tensor([[0.2, 0.4], [0.4, 0.5]]).double()
    ax = plot_share({"repeated": rows, "once": rows[0]}, [1, 10], 100)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    container = ax.containers[0]
    np.testing.assert_allclose(container.lines[0].get_ydata(), [0.3, 0.45])
    bars = [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[0.2, 0.4], [0.4, 0.5]])
    floor = next(line for line in ax.lines if "random" in str(line.get_label()))
    np.testing.assert_allclose(floor.get_xydata()[[0, -1]], [[1, 0.1], [10, 0.1**0.5]])
    band = next(c for c in ax.collections if hasattr(c, "get_paths") and c.get_alpha() == 0.3)
    vertices = band.get_paths()[0].vertices
    ends = vertices[vertices[:, 0] == 10][:, 1]
    assert (ends.min(), ends.max()) == pytest.approx(random_share_interval(10, 100))
    assert legend_of(ax)[-2:] == ["repeated (2 runs, mean and range)", "once"]


def test_share_rows_of_another_length_are_named():
    with pytest.raises(ValueError, match=r'`shares\["x"\]` .* 3 entries of `ks`, got shape \[2\]'):
        plot_share({"x": torch.ones(2)}, [1, 2, 3], 100)


@pytest.mark.parametrize("plot", [plot_profile, lambda x: plot_share(x, [1], 5)])
def test_nothing_to_draw_is_an_error(plot):
    with pytest.raises(ValueError, match="must hold at least one thing to draw"):
        plot({})


def test_axes_that_are_given_are_used():
    ax = Figure().add_subplot()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert plot_profile({"line": evaluation(t, t)}, ax=ax) is ax
    ax = Figure().add_subplot()
    assert plot_plane(*rectangle(), {}, ax=ax) is ax


def test_files_carry_their_provenance_and_embed_their_fonts(tmp_path):
    provenance = {"commit": "1a2b", "note": "λ ≥ 1"}
    ax = plot_plane(*rectangle(), {"dense": torch.zeros(4).double()})
    pdf, png = save_figure(ax.figure, tmp_path / "mu.51", provenance)
    assert (pdf.name, png.name) == ("mu.51.pdf", "mu.51.png")  # a dot in the name is no suffix
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mu.51.pdf", "mu.51.png"]
    with PIL_Image.open(png) as image:
        assert {key: image.text[key] for key in provenance} == provenance
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    content = pdf.read_bytes()
    assert b"/Subtype /Type3" not in content
    assert json.dumps(provenance, ensure_ascii=False) in _keywords(content)


def _keywords(content):
    """The PDF's Keywords, from objects in the clear or in compressed streams."""
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL):
        try:
            content += zlib.decompress(stream)
        except zlib.error:
            continue
    found = re.search(rb"/Keywords <([0-9a-fA-F]+)>", content)
    if found:
        return bytes.fromhex(found[1].decode()).decode("utf-16")
    found = re.search(rb"/Keywords \((.*?)(?<!\\)\)", content, re.DOTALL)
    assert found is not None
    plain = re.sub(rb"\\([()\\])", rb"\1", found[1])
    plain = plain.replace(b"\\r", b"\r").replace(b"\\n", b"\n")
    return plain.decode("utf-16")


def test_the_same_figure_gives_the_same_pdf(tmp_path):
    first, second = (
        save_figure(plot_plane(*rectangle(), {}).figure, tmp_path / name, {})[0]
        for name in ("first", "second")
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    fig = plot_plane(*rectangle(), {}).figure
    old = tmp_path / "figure.pdf"
    old.write_text("old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(fig, tmp_path / "figure", {})
    assert [p.name for p in tmp_path.iterdir()] == ["figure.pdf"]
    assert old.read_text() == "old"
