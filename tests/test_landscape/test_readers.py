"""Files in exactly the layout of the tools that write them, made here from known functions."""

import numpy as np
import pytest
import torch

from hessian import DamagedFileError
from landscape import (
    PublishedLine,
    plot_plane,
    plot_profile,
    read_connectivity_curve,
    read_connectivity_plane,
    read_loss_landscape,
)

h5py = pytest.importorskip("h5py")


def loss(x, y):
    """A ridge at x = 5 that is lower the larger y is."""
    return np.exp(-((x - 5.0) ** 2) / 8 - y / 4) + 0.01


@pytest.fixture
def plane_file(tmp_path):
    """What the plane script of dnn-mode-connectivity saves, for models at (0, 0) and (10, 0)."""
    dx, dy, size = 10.0, 4.0, 29
    alphas, betas = np.linspace(-0.2, 1.2, size), np.linspace(-0.2, 1.2, size)
    grid, tr_loss = np.zeros((size, size, 2)), np.zeros((size, size))
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(betas):
            grid[i, j] = [alpha * dx, beta * dy]
            tr_loss[i, j] = loss(alpha * dx, beta * dy)
    bends = np.array([[0.0, 0.0], [5.0, dy], [dx, -0.007]])
    ts = np.linspace(0, 1, 61)
    B = np.stack([(1 - ts) ** 2, 2 * ts * (1 - ts), ts**2], axis=1)
    others = {k: tr_loss + i for i, k in enumerate(("tr_nll", "te_loss", "te_nll"))}
    accuracy = {f"{p}_{k}": tr_loss * 10 for p in ("tr", "te") for k in ("acc", "err")}
    path = tmp_path / "plane.npz"
    np.savez(
        path, ts=ts, bend_coordinates=bends, curve_coordinates=B @ bends, alphas=alphas,
        betas=betas, grid=grid, tr_loss=tr_loss, **others, **accuracy,
    )  # fmt: skip
    return path


def test_a_published_plane_redraws_and_tells_its_straight_line_maximum(plane_file):
    found = read_connectivity_plane(plane_file)
    assert list(found.points) == ["start", "bend", "end"]
    assert set(found.values) == {
        f"{part} {what}"
        for part in ("train", "test")
        for what in ("loss", "nll", "error (%)", "accuracy (%)")
    }
    line = found.line_maximum("train loss")
    assert line.value == pytest.approx(1.01, rel=5e-3)  # between grid points of 0.5 and 0.2
    assert line.t == pytest.approx(0.5, abs=0.03)
    ends = loss(0.0, 0.0), loss(10.0, 0.0)
    assert line.ends == pytest.approx(ends, rel=2e-2)
    assert line.barrier == pytest.approx(1.01 - sum(ends) / 2, rel=1e-2)
    assert str(line).startswith("train loss: at most 1.0")
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
        found.values["train loss"], torch.as_tensor(loss(x.numpy(), y.numpy()))
    )
    assert float(x[1, 0]) > float(x[0, 0])
    assert float(y[0, 1]) > float(y[0, 0])


def test_a_curve_file_has_its_length_and_profile(tmp_path):
    ts = np.linspace(0, 1, 61)
    np.savez(tmp_path / "curve.npz", ts=ts, dl=np.full(61, 0.5), tr_loss=ts**2, te_err=100 * ts,
             tr_loss_max=1.0)  # fmt: skip
    found = read_connectivity_curve(tmp_path / "curve.npz")
    assert found.length == pytest.approx(30.5)
    assert set(found.values) == {"train loss", "test error (%)"}
    ax = plot_profile({"Bezier": found.evaluation("train loss")})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), ts**2)


@pytest.mark.parametrize("shape", [(4, 4), (4, 7), (7, 4)])
def test_surfaces_of_loss_landscape_get_their_axes_right(tmp_path, shape):
    """That tool makes arrays [nx, ny] and fills them along a mesh of shape [ny, nx]."""
    xs, ys = np.linspace(-1, 1, shape[0]), np.linspace(0, 2, shape[1])
    mesh_x, mesh_y = np.meshgrid(xs, ys)
    values = -np.ones(shape)
    values.ravel()[:] = (mesh_x + 10 * mesh_y + 3).ravel()
    values.ravel()[5] = -1  # not computed
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["dir_file"] = "directions.h5"
        file["xcoordinates"], file["ycoordinates"] = xs, ys
        file["train_loss"], file["train_acc"] = values, values
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
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["xcoordinates"], file["train_loss"] = np.linspace(-1, 1, 5), np.zeros(5)
    found = read_loss_landscape(tmp_path / "s.h5")
    assert isinstance(found, PublishedLine)
    assert found.values["train loss"].tolist() == [0, 0, 0, 0, 0]  # a loss of zero is one


def test_a_missing_cell_on_the_line_makes_no_maximum(plane_file, tmp_path):
    with np.load(plane_file) as file:
        arrays = dict(file)
    arrays["tr_loss"][15] = np.nan
    np.savez(tmp_path / "hole.npz", **arrays)
    assert np.isnan(read_connectivity_plane(tmp_path / "hole.npz").line_maximum("train loss").value)


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
