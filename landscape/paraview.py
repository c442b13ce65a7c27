"""A loss surface for ParaView: a structured grid in VTK's XML, any n x m."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from hessian.atomic import write_atomically
from landscape.figure_style import to_numpy
from landscape.plane_figure import color_range, grid_axes
from landscape.records import Evaluation

HIDDEN_POINT = 2
"""Flag of VTK's ghost array for a point that is not drawn."""


def write_paraview(
    evaluation: Evaluation,
    path: str | os.PathLike[str],
    *,
    floor: float | None = None,
    cap: float | None = None,
    height: float | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Write a surface that ParaView and other VTK programs open, and return its path.

    Points stand at (x, y) of the grid and log10 of the loss between floor and cap, scaled to
    ``height``. Each carries the loss as it was measured, its log10 and its standard error. Points
    where the loss is not finite are hidden; their value stays NaN.

    Args:
        evaluation: Evaluation on a `grid` of nx x ny points.
        path: The file, by custom ``.vts``; it appears whole or not at all.
        floor: Losses up to here stand at the lowest height. Default: the smallest positive loss,
            at most six decades below the largest.
        cap: Losses from here on stand at the highest. Default: the largest loss.
        height: Of the surface, in units of x. Default: half the longer side of the grid.
        provenance: What to note in the file, e.g. directions, seeds, number of samples.

    Raises:
        ValueError: If the evaluation is not on a rectangular grid, has no finite loss, or the floor
            is not positive and below the cap, or ``height`` is not positive.
        OSError: If the file cannot be written.
    """
    xs, ys = grid_axes(evaluation)
    losses = to_numpy(evaluation.mean)
    low, high = color_range(np.ma.masked_invalid(losses), floor, cap)
    if height is None:
        height = 0.5 * max(float(np.ptp(xs)), float(np.ptp(ys)))
    if not height > 0:
        raise ValueError(f"`height` must be positive, got {height}.")
    finite = np.isfinite(losses)
    logs = np.log10(np.where(finite, losses, low).clip(low, high))
    z = height * (logs - np.log10(low)) / np.log10(high / low)
    X, Y = np.meshgrid(xs, ys, indexing="ij")
    extent = f"0 {len(xs) - 1} 0 {len(ys) - 1} 0 0"
    with np.errstate(divide="ignore", invalid="ignore"):
        arrays = [
            _array("loss", losses),
            _array("log10 loss", np.log10(losses)),
            _array("standard error", to_numpy(evaluation.standard_error)),
        ]
    hidden = np.where(finite, 0, HIDDEN_POINT)
    # VTK runs through x first, our arrays through y.
    points = np.stack([X, Y, z], axis=-1).transpose(1, 0, 2).reshape(-1, 3)
    notes = "".join(
        f"<!-- {_comment(f'{key}: {value}')} -->\n" for key, value in (provenance or {}).items()
    )
    text = f"""<?xml version="1.0"?>
{notes}<VTKFile type="StructuredGrid" version="1.0" byte_order="LittleEndian">
<StructuredGrid WholeExtent="{extent}">
<Piece Extent="{extent}">
<PointData Scalars="loss">
{"".join(arrays)}<DataArray type="UInt8" Name="vtkGhostType" format="ascii">
{" ".join(map(str, hidden.T.reshape(-1).tolist()))}
</DataArray>
</PointData>
<Points>
<DataArray type="Float64" NumberOfComponents="3" format="ascii">
{_numbers(points)}
</DataArray>
</Points>
</Piece>
</StructuredGrid>
</VTKFile>
"""
    return write_atomically(Path(path), text.encode())


def _array(name: str, values: Any) -> str:
    return (
        f'<DataArray type="Float64" Name={quoteattr(name)} format="ascii">\n'
        f"{_numbers(values.T)}\n</DataArray>\n"
    )


def _numbers(values: Any) -> str:
    """Numbers with every digit, x running fastest."""
    return " ".join(repr(float(value)) for value in values.reshape(-1))


def _comment(text: str) -> str:
    """Text that may stand in an XML comment."""
    while "--" in text:
        text = text.replace("--", "- -")
    return text.rstrip("-")
