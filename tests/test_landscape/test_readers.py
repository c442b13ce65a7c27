"""Files of other tools open: axes, names and the numbers that they stand for."""

from functools import partial

import numpy as np
import pytest
import torch

from hessian import DamagedFileError
from landscape import (
    PublishedLine,
    PublishedPlane,
    plot_plane,
    plot_profile,
    read_connectivity_curve,
    read_connectivity_plane,
    read_loss_landscape,
    read_published_landscape,
)
from tests.published_files import BENDS, ridge, write_curve, write_line, write_plane, write_surface

h5py = pytest.importorskip("h5py")


@pytest.fixture
def plane_file(tmp_path):
    """For models at (0, 0) and (10, 0)."""
    return write_plane(tmp_path / "plane.npz")


def test_a_published_plane_redraws_and_tells_its_straight_line_maximum(plane_file):
    found = read_connectivity_plane(plane_file)
    assert list(found.points) == ["start", "bend", "end"]
    assert set(found.values) == {
        f"{part} {what}"
        for part in ("train", "test")
        for what in ("loss", "nll", "error (%)", "accuracy (%)")
    }
    line = found.line_maximum("train nll")
    assert line.value == pytest.approx(1.01, rel=5e-3)  # between grid points of 0.5 and 0.2
    assert line.t == pytest.approx(0.5, abs=0.03)
    ends = ridge(0.0, 0.0), ridge(10.0, 0.0)
    assert line.ends == pytest.approx(ends, rel=2e-2)
    assert line.barrier == pytest.approx(1.01 - sum(ends) / 2, rel=1e-2)
    assert str(line).startswith("train nll: at most 1.0")
    assert "on the straight line, at t = 0.5" in str(line)
    curve = found.curve_maximum("train nll")  # over the ridge at y = 2, where t = 0.5
    assert curve.value == pytest.approx(float(np.exp(-0.5)) + 0.01, rel=5e-3)
    assert curve.t == pytest.approx(0.5, abs=0.03)
    assert "on the curve" in str(curve)
    ax = plot_plane(found.evaluation("train loss"), found.plane, found.points, curve=found.curve)
    drawn = {text.get_text(): text.xy for text in ax.texts}
    assert drawn["bend"] == pytest.approx((5.0, 4.0))
    assert drawn["end"] == pytest.approx((10.0, -0.007))
    assert ax.get_xlim() == pytest.approx((-2, 12))
    assert ax.get_ylim() == pytest.approx((-0.8, 4.8))
    curve = next(line for line in ax.lines if line.get_label() == "curve")
    assert curve.get_xydata()[50] == pytest.approx((5.0, 2.0), abs=0.01)


def test_entry_ij_is_at_x_i_and_y_j(plane_file):
    found = read_connectivity_plane(plane_file)
    x, y = found.grid.unbind(-1)
    torch.testing.assert_close(
        found.values["train nll"], torch.as_tensor(ridge(x.numpy(), y.numpy()))
    )
    assert float(x[1, 0]) > float(x[0, 0])
    assert float(y[0, 1]) > float(y[0, 0])


def test_a_curve_file_has_its_length_and_profile(tmp_path):
    found = read_connectivity_curve(write_curve(tmp_path / "curve.npz"))
    assert found.length == pytest.approx(30.0)
    assert len(found.values) == 8 and "test error (%)" in found.values
    top = found.maximum("train nll")
    assert (top.value, top.t) == pytest.approx((0.35, 0.5)) and top.barrier == pytest.approx(0.25)
    ax = plot_profile({"Bezier": found.evaluation("train nll")})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 0.1 + found.ts * (1 - found.ts))


@pytest.mark.parametrize("shape", [(4, 4), (4, 7), (7, 4)])
def test_surfaces_of_loss_landscape_get_their_axes_right(tmp_path, shape):
    """That tool makes arrays [nx, ny] and fills them along a mesh of shape [ny, nx]."""
    xs, ys = np.linspace(-1, 1, shape[0]), np.linspace(0, 2, shape[1])
    write_surface(tmp_path / "s.h5", xs, ys, lambda x, y: x + 10 * y + 3, missing=(5,))
    found = read_loss_landscape(tmp_path / "s.h5")
    x, y = found.grid.unbind(-1)
    assert found.grid.shape == (*shape, 2)
    expected = x + 10 * y + 3
    got = found.values["train loss"]
    assert int(torch.isnan(got).sum()) == 1
    torch.testing.assert_close(got[~torch.isnan(got)], expected[~torch.isnan(got)])
    assert found.evaluation("train acc").num_nonfinite == 1
    with pytest.raises(ValueError, match="must say where two models are"):
        found.line_maximum("train loss")


def test_lines_of_loss_landscape_are_lines(tmp_path):
    write_line(tmp_path / "s.h5", np.linspace(-1, 1, 5), np.zeros_like)
    found = read_loss_landscape(tmp_path / "s.h5")
    assert isinstance(found, PublishedLine)
    assert found.values["train loss"].tolist() == [0, 0, 0, 0, 0]  # a loss of zero is one


def test_files_are_known_by_what_is_in_them(tmp_path):
    """Whatever they are called: published ones have names of their own."""
    for write, name, kind in (
        (write_plane, "eval_plane_ep200.zpz.npz", PublishedPlane),
        (write_curve, "eval_curve-300.npz", PublishedLine),
        (partial(write_line, xs=np.arange(3.0), loss=np.cos), "surface", PublishedLine),
    ):
        assert isinstance(read_published_landscape(write(tmp_path / name)), kind)
    (tmp_path / "text").write_text("loss 1.0")
    with pytest.raises(DamagedFileError, match=r"must be a whole `\.npz` file"):
        read_published_landscape(tmp_path / "text")


def test_of_more_than_three_control_points_the_end_is_not_in_the_plane(tmp_path):
    """The writer puts the plane through the first three; the end would be another model."""
    bends = np.concatenate([BENDS, BENDS[1:2] + 3])
    found = read_connectivity_plane(write_plane(tmp_path / "four.npz", bends=bends))
    assert list(found.points) == ["start", "bend 1", "bend 2", "end"]
    for read in (found.line_maximum, found.curve_maximum):
        with pytest.raises(ValueError, match="first three of 4 control points"):
            read("train loss")


def test_a_missing_cell_on_the_line_makes_no_maximum(plane_file, tmp_path):
    with np.load(plane_file) as file:
        arrays = dict(file)
    arrays["tr_loss"][15] = np.nan
    np.savez(tmp_path / "hole.npz", **arrays)
    line = read_connectivity_plane(tmp_path / "hole.npz").line_maximum("train loss")
    assert np.isnan(line.value) and str(line).endswith("a value is missing on the straight line")


def test_files_that_are_something_else_are_named(tmp_path, plane_file):
    whole = plane_file.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-200])
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.savez(tmp_path / "pickled.npz", grid=np.array([{}]), bend_coordinates=np.ones((3, 2)))
    np.savez(tmp_path / "empty.npz", grid=np.ones((2, 3, 2)), bend_coordinates=np.ones((3, 2)))
    for name, message in (
        ("cut", "must be a whole `.npz` file"),
        ("other", "must hold `grid` as dnn-mode-connectivity writes it, got a"),
        ("pickled", "of plain arrays"),
        ("empty", r"must hold values of shape \[2, 3\]"),
    ):
        with pytest.raises(DamagedFileError, match=message):
            read_connectivity_plane(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        read_connectivity_plane(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        read_loss_landscape(tmp_path / "none.h5")
    with pytest.raises(DamagedFileError, match="must be a whole HDF5 file"):
        read_loss_landscape(tmp_path / "other.npz")
    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file["xcoordinates"] = np.ones(3)
    with pytest.raises(DamagedFileError, match="has none"):
        read_loss_landscape(tmp_path / "bare.h5")
    with pytest.raises(ValueError, match=r"`name` must be one of .*train loss.*, got \"loss\""):
        read_connectivity_plane(plane_file).evaluation("loss")


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"flatvalley\[surface\]"):
        read_loss_landscape(tmp_path / "s.h5")
