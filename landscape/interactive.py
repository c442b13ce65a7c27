"""A loss surface to turn around and read values off, in one HTML page that needs no network."""

from collections.abc import Mapping
from html import escape
from importlib import import_module
from typing import Any

import numpy as np

from landscape.figure_style import to_numpy
from landscape.plane_figure import axis_labels, color_range, grid_axes
from landscape.planes import Plane
from landscape.records import Evaluation


def surface_html(
    evaluation: Evaluation,
    plane: Plane,
    *,
    floor: float | None = None,
    cap: float | None = None,
    label: str = "loss",
    title: str = "",
    provenance: Mapping[str, str] | None = None,
    whole_page: bool = True,
    with_library: bool = True,
) -> str:
    """Return a surface as HTML, with the loss and its standard error under the pointer.

    Height and colour are log10 of the loss between floor and cap; a button changes the height to
    the loss itself. Points where the loss is not finite are holes, and counted.

    Args:
        evaluation: Evaluation on a `grid`, points of shape [nx, ny, 2].
        plane: The plane of the evaluation, for the names of the axes.
        floor: Losses up to here share the lowest height. Default: the smallest positive loss, at
            most six decades below the largest.
        cap: Losses from here on share the highest. Default: the largest loss.
        label: Name of the loss, with its unit.
        title: Over the surface.
        provenance: What to write under it, e.g. directions, seeds, number of samples.
        whole_page: Whether to return a page, or a part to put into one.
        with_library: Whether the text holds plotly itself, some 5 MB. A page with several surfaces
            needs it once, before them.

    Raises:
        ValueError: If the evaluation is not on a rectangular grid, has no finite loss, or the floor
            is not positive and below the cap.
        ModuleNotFoundError: If plotly is not installed.
    """
    graph = _plotly()
    xs, ys = grid_axes(evaluation)
    losses, errors = to_numpy(evaluation.mean), to_numpy(evaluation.standard_error)
    low, high = color_range(np.ma.masked_invalid(losses), floor, cap)
    clipped = losses.clip(low, high)  # NaN stays
    logs = np.log10(clipped)
    # Rows of equal y, as plotly has them.
    values = np.stack([losses.T, errors.T], axis=-1)
    ticks = _ticks(low, high)
    names = [f"{10**tick:.2g}" for tick in ticks]
    names[-1] = f"≥ {names[-1]}" if (losses > high).any() else names[-1]
    surface = graph.Surface(
        x=xs,
        y=ys,
        z=logs.T,
        customdata=values,
        surfacecolor=logs.T,
        colorscale="Viridis",
        cmin=np.log10(low),
        cmax=np.log10(high),
        colorbar={"title": {"text": label}, "tickvals": ticks, "ticktext": names},
        hovertemplate=(
            "x = %{x:.4g}<br>y = %{y:.4g}<br>"
            + escape(label)
            + " = %{customdata[0]:.4g} ± %{customdata[1]:.2g} (standard error)<extra></extra>"
        ),
    )
    figure = graph.Figure(surface)
    xlabel, ylabel = axis_labels(plane)
    log_axis = {"title": {"text": label}, "tickvals": ticks, "ticktext": names}
    linear_axis = {"title": {"text": label}, "tickvals": None, "ticktext": None}
    missing = evaluation.num_nonfinite
    figure.update_layout(
        title={"text": escape(title) + (f" ({missing} points not finite)" if missing else "")},
        scene={
            "xaxis": {"title": {"text": xlabel}},
            "yaxis": {"title": {"text": ylabel}},
            "zaxis": log_axis,
            "aspectmode": "manual",
            "aspectratio": {"x": 1, "y": 1, "z": 0.7},
        },
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "y": 1.08,
                "buttons": [
                    _button("height: log", logs.T, log_axis),
                    _button("height: linear", clipped.T, linear_axis),
                ],
            }
        ],
        margin={"l": 0, "r": 0, "t": 60, "b": 0},
    )
    html: str = figure.to_html(full_html=whole_page, include_plotlyjs=with_library)
    notes = "".join(
        f"<li>{escape(key)}: {escape(value)}</li>" for key, value in (provenance or {}).items()
    )
    note = f"<ul>{notes}</ul>" if notes else ""
    return html.replace("</body>", f"{note}</body>") if whole_page else html + note


def _button(name: str, heights: Any, axis: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "label": name,
        "method": "update",
        "args": [{"z": [heights]}, {f"scene.zaxis.{key}": axis[key] for key in axis}],
    }


def _ticks(low: float, high: float) -> list[float]:
    """A handful of heights from the lowest to the highest."""
    return [float(tick) for tick in np.linspace(np.log10(low), np.log10(high), 6)]


def _plotly() -> Any:
    try:
        return import_module("plotly.graph_objects")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Interactive surfaces need plotly. Install it with `pip install flatvalley[surface]`."
        ) from error
