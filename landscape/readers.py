"""Planes and curves that other tools have written, as what our figures draw."""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from hessian.tensor_files import DamagedFileError
from landscape.paths import PolyChain
from landscape.planes import Plane
from landscape.records import Evaluation

CONNECTIVITY_NAMES = {
    f"{short}_{what}": f"{part} {name}"
    for short, part in (("tr", "train"), ("te", "test"))
    for what, name in (
        ("loss", "loss"),
        ("nll", "nll"),
        ("err", "error (%)"),
        ("acc", "accuracy (%)"),
    )
}
"""Keys of dnn-mode-connectivity, and what we call them."""
MISSING = -1.0
"""What loss-landscape writes where nothing has been computed yet."""
LINE_POINTS = 1001


@dataclass(frozen=True)
class LineMaximum:
    """The largest value on the straight line between two models, read off a plane."""

    name: str
    value: float
    t: float
    """Where on the line, from 0 to 1."""
    ends: tuple[float, float]
    """Values at both models."""

    @property
    def barrier(self) -> float:
        """The largest value over the mean of both ends."""
        return self.value - sum(self.ends) / 2

    def __str__(self) -> str:
        return (
            f"{self.name}: at most {self.value:.4g} on the straight line, at t = {self.t:.2f}; "
            f"{self.ends[0]:.4g} and {self.ends[1]:.4g} at its ends, "
            f"{self.barrier:.4g} above their mean"
        )


@dataclass(frozen=True)
class PublishedPlane:
    """Values over a plane from a file, without the weights.

    Pass ``evaluation(name)``, ``plane``, ``points`` and ``curve`` to `plot_plane`: the plane stands
    for itself, and a point of it is its two coordinates.
    """

    grid: Float64[Tensor, "nx ny 2"]
    """Coordinates of entry [i, j]."""
    values: Mapping[str, Float64[Tensor, "nx ny"]]
    """What was measured, by name; NaN where it is missing."""
    points: Mapping[str, Float64[Tensor, "2"]]
    """Coordinates of the models, by name: start, bends, end; empty if the file has none."""
    curve: PolyChain | None
    """The trained curve in the plane, through the points that the file holds."""

    @property
    def plane(self) -> Plane:
        """The plane of the coordinates themselves."""
        e = torch.eye(2, dtype=torch.float64)
        return Plane(torch.zeros(2, dtype=torch.float64), e[0], e[1])

    def evaluation(self, name: str) -> Evaluation:
        """Return one measure as our figures take it; the file has no standard errors.

        Raises:
            ValueError: If there is no such measure; the message lists what there is.
        """
        _require_name(name, self.values)
        return _without_errors(self.grid, self.values[name])

    def line_maximum(self, name: str) -> LineMaximum:
        """Return the largest value on the straight line from start to end.

        Interpolates linearly between grid points, in logarithms where all values are positive: a
        peak between them is missed, and the ends are as good as the grid around them. NaN if the
        line passes a cell with a missing value.

        Raises:
            ValueError: If there is no such measure, or the file does not say where the models are.
        """
        _require_name(name, self.values)
        if len(self.points) < 2:
            raise ValueError("The file must say where two models are, and does not.")
        values = self.values[name].numpy()
        positive = bool((values[np.isfinite(values)] > 0).all())
        field = RegularGridInterpolator(
            (self.grid[:, 0, 0].numpy(), self.grid[0, :, 1].numpy()),
            np.log(values) if positive else values,
            bounds_error=False,
            fill_value=np.nan,
        )
        start, *_, end = (point.numpy() for point in self.points.values())
        ts = np.linspace(0, 1, LINE_POINTS)
        found = field(start + ts[:, None] * (end - start))
        found = np.exp(found) if positive else found
        if not np.isfinite(found).all():
            return LineMaximum(name, np.nan, np.nan, (float(found[0]), float(found[-1])))
        k = int(found.argmax())
        return LineMaximum(name, float(found[k]), float(ts[k]), (float(found[0]), float(found[-1])))


@dataclass(frozen=True)
class PublishedLine:
    """Values along a path from a file."""

    ts: Float64[Tensor, " m"]
    """Positions: t on a curve, or multiples of a direction."""
    values: Mapping[str, Float64[Tensor, " m"]]
    """What was measured, by name; NaN where it is missing."""
    length: float
    """Length of the curve in weight space, NaN if the file does not say."""

    def evaluation(self, name: str) -> Evaluation:
        """Return one measure as our figures take it; the file has no standard errors.

        Raises:
            ValueError: If there is no such measure; the message lists what there is.
        """
        _require_name(name, self.values)
        return _without_errors(self.ts, self.values[name])


def read_connectivity_plane(path: str | os.PathLike[str]) -> PublishedPlane:
    """Return a plane that dnn-mode-connectivity (``plane.npz``) wrote.

    Args:
        path: The file. Nothing in it is unpickled.

    Returns:
        Values on its grid, rectangular or not square, with the models, called "start", "bend" (or
        "bend 1", …) and "end", and the curve through them.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is no such file, or cut short.

    References:
        Garipov et al. (2018), Loss surfaces, mode connectivity, and fast ensembling of DNNs.
    """
    arrays = _load_npz(path, ("grid", "bend_coordinates"))
    grid, bends = _tensor(arrays["grid"]), _tensor(arrays["bend_coordinates"])
    shape = grid.shape[:2]
    if grid.ndim != 3 or grid.shape[2] != 2 or bends.ndim != 2 or bends.shape[1] != 2:
        raise DamagedFileError(
            f"{path} must hold `grid` [nx, ny, 2] and `bend_coordinates` [n, 2], got "
            f"{list(grid.shape)} and {list(bends.shape)}."
        )
    values = _measures(arrays, shape, path)
    inner = len(bends) - 2
    names = ["start", *(f"bend {i + 1}" if inner > 1 else "bend" for i in range(inner)), "end"]
    curve = _tensor(arrays["curve_coordinates"]) if "curve_coordinates" in arrays else None
    return PublishedPlane(
        grid,
        values,
        dict(zip(names, bends, strict=True)),
        None if curve is None else PolyChain(curve),
    )


def read_connectivity_curve(path: str | os.PathLike[str]) -> PublishedLine:
    """Return the values along a curve that dnn-mode-connectivity (``curve.npz``) wrote.

    Args:
        path: The file. Nothing in it is unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is no such file, or cut short.
    """
    arrays = _load_npz(path, ("ts",))
    ts = _tensor(arrays["ts"])
    length = float(arrays["dl"].sum()) if "dl" in arrays else float("nan")
    return PublishedLine(ts, _measures(arrays, ts.shape, path), length)


def read_loss_landscape(path: str | os.PathLike[str]) -> PublishedPlane | PublishedLine:
    """Return a surface or line that loss-landscape wrote to HDF5.

    Its arrays have one row for each x in their shape, but are filled as if for each y: they are put
    right here, so that entry [i, j] belongs to x_i and y_j, on grids that are not square, too.
    Cells that were never computed hold −1 there and become NaN.

    Args:
        path: The ``.h5`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is no such file, or cut short.
        ModuleNotFoundError: If h5py is not installed.

    References:
        Li et al. (2018), Visualizing the loss landscape of neural nets.
    """
    h5py = _h5py()
    if not Path(path).exists():
        raise FileNotFoundError(f"`path` must be a file, got {path}.")
    try:
        with h5py.File(path, "r") as file:
            arrays = {key: item[()] for key, item in file.items() if isinstance(item, h5py.Dataset)}
    except OSError as error:
        raise DamagedFileError(f"{path} must be a whole HDF5 file ({error}).") from error
    if "xcoordinates" not in arrays:
        raise DamagedFileError(
            f"{path} must hold `xcoordinates` as loss-landscape writes them, got "
            f"{', '.join(sorted(arrays)) or 'nothing'}."
        )
    xs = _tensor(arrays["xcoordinates"])
    ys = _tensor(arrays["ycoordinates"]) if "ycoordinates" in arrays else None
    found = {
        key.replace("_", " "): torch.where((values := _tensor(item)) == MISSING, torch.nan, values)
        for key, item in arrays.items()
        if key not in ("xcoordinates", "ycoordinates")
        and getattr(item, "shape", ()) == (xs.shape if ys is None else (len(xs), len(ys)))
    }
    if not found:
        raise DamagedFileError(f"{path} must hold values for its coordinates, and has none.")
    if ys is None:
        return PublishedLine(xs, found, float("nan"))
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="ij"), dim=-1)
    by_x = {name: v.reshape(len(ys), len(xs)).T.contiguous() for name, v in found.items()}
    return PublishedPlane(grid, by_x, {}, None)


def _load_npz(path: str | os.PathLike[str], wanted: tuple[str, ...]) -> dict[str, Any]:
    try:
        # Opened here: numpy leaves a damaged file open.
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise DamagedFileError(
            f"{path} must be a whole `.npz` file of plain arrays ({error})."
        ) from error
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise DamagedFileError(
            f"{path} must hold `{missing[0]}` as dnn-mode-connectivity writes it, got "
            f"{', '.join(sorted(arrays)) or 'nothing'}."
        )
    return arrays


def _measures(
    arrays: Mapping[str, Any], shape: torch.Size, path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    found = {
        name: _tensor(arrays[key])
        for key, name in CONNECTIVITY_NAMES.items()
        if key in arrays and arrays[key].shape == tuple(shape)
    }
    if not found:
        raise DamagedFileError(f"{path} must hold values of shape {list(shape)}, and has none.")
    return found


def _without_errors(points: Tensor, values: Tensor) -> Evaluation:
    one = torch.ones_like(values)
    return Evaluation(points, one, values, values.square())


def _require_name(name: str, values: Mapping[str, Tensor]) -> None:
    if name not in values:
        raise ValueError(f'`name` must be one of {", ".join(values)}, got "{name}".')


def _tensor(array: Any) -> Tensor:
    return torch.as_tensor(np.asarray(array, dtype=np.float64))


def _h5py() -> Any:
    try:
        return import_module("h5py")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading HDF5 needs h5py. Install it with `pip install flatvalley[surface]`."
        ) from error
