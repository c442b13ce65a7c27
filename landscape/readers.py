"""Planes and curves that other tools have written, as what our figures draw."""

import os
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian.tensor_files import DamagedFileError
from landscape.paths import PolyChain
from landscape.published import PublishedLine, PublishedPlane

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
HDF5 = b"\x89HDF\r\n\x1a\n"
"""How such a file begins."""
MISSING = -1.0
"""What loss-landscape writes where nothing has been computed yet."""


def read_published_landscape(path: str | os.PathLike[str]) -> PublishedPlane | PublishedLine:
    """Return what a file of another tool holds, known by what is in it.

    Args:
        path: ``plane.npz`` or ``curve.npz`` of dnn-mode-connectivity, whatever they are called, or
            a surface or line of loss-landscape, ending in ``.h5``. Nothing in it is unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is none of these, or cut short.
        ModuleNotFoundError: If h5py is needed, and not installed.
    """
    with Path(path).open("rb") as file:
        begins = file.read(8)
    if begins == HDF5:
        return read_loss_landscape(path)
    if "grid" in _load_npz(path, ()):
        return read_connectivity_plane(path)
    return read_connectivity_curve(path)


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
        return PublishedLine(xs, found, float("nan"), between_models=False)
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


def _tensor(array: Any) -> Tensor:
    return torch.as_tensor(np.asarray(array, dtype=np.float64))


def _h5py() -> Any:
    try:
        return import_module("h5py")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading HDF5 needs h5py. Install it with `pip install flatvalley[surface]`."
        ) from error
