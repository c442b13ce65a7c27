"""Surfaces for other programs, parsed back."""

import json
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from landscape import Directions, Evaluation, Plane, grid, surface_html, write_paraview

XS, YS = [-1.0, 0.0, 1.0, 3.0], [0.0, 2.0, 3.0]
E = torch.eye(3, dtype=torch.float64)
PLANE = Plane.along(
    torch.zeros(3, dtype=torch.float64),
    Directions(torch.stack([2 * E[0], 3 * E[1]]), "random", ("first <b>", "second")),
)


def surface(f=lambda x, y: 10 ** (x + y / 10)):
    points = grid(XS, YS)
    mean = f(*points.unbind(-1))
    count = torch.full_like(mean, 5.0)
    return Evaluation(points, count, 5 * mean, 5 * mean**2 + 20 * 0.25 * mean**2)


def parsed(path):
    root = ElementTree.parse(path).getroot()
    piece = root.find("StructuredGrid/Piece")
    arrays = {
        a.get("Name"): np.array(a.text.split(), dtype=float)
        for a in piece.findall("PointData/DataArray")
    }
    points = np.array(piece.find("Points/DataArray").text.split(), dtype=float).reshape(-1, 3)
    return root, piece.get("Extent"), arrays, points


def test_paraview_gets_points_and_values_of_a_grid_that_is_not_square(tmp_path):
    path = write_paraview(surface(), tmp_path / "s.vts", height=2.0, provenance={"seed": "a--b-"})
    root, extent, arrays, points = parsed(path)
    assert root.get("type") == "StructuredGrid"
    assert extent == "0 3 0 2 0 0"
    # VTK's order: the first extent runs fastest.
    expected = [(x, y) for y in YS for x in XS]
    np.testing.assert_array_equal(points[:, :2], expected)
    losses = np.array([10 ** (x + y / 10) for x, y in expected])
    np.testing.assert_allclose(arrays["loss"], losses)
    np.testing.assert_allclose(arrays["log10 loss"], np.log10(losses))
    np.testing.assert_allclose(arrays["standard error"], 0.5 * losses, rtol=1e-9)
    np.testing.assert_allclose(points[:, 2], 2 * (np.log10(losses) + 1) / 4.3, atol=1e-9)
    assert not arrays["vtkGhostType"].any()
    assert "seed: a- -b" in path.read_text()


def test_paraview_hides_what_is_not_finite_and_caps_heights(tmp_path):
    found = surface(lambda x, y: torch.where((x == 1) & (y == 2), torch.nan, 10**x))
    path = write_paraview(found, tmp_path / "s.vts", cap=5.0, height=1.0)
    _, _, arrays, points = parsed(path)
    hidden = [(x, y) == (1.0, 2.0) for y in YS for x in XS]
    np.testing.assert_array_equal(arrays["vtkGhostType"], np.where(hidden, 2, 0))
    np.testing.assert_array_equal(np.isnan(arrays["loss"]), hidden)
    assert np.isfinite(points).all()
    assert points[:, 2].max() == pytest.approx(1)
    assert np.nanmax(arrays["loss"]) == 1000  # as measured
    with pytest.raises(ValueError, match="`height` must be positive"):
        write_paraview(found, path, height=0.0)


def figure_of(html):
    """Data and layout that plotly is called with."""
    call = re.search(r"Plotly\.newPlot\(\s*\"[^\"]+\",\s*(\[.*?\]),\s*(\{.*\}),\s*\{", html, re.S)
    return json.loads(call[1]), json.loads(call[2])


def decoded(value):
    """Plotly's arrays, as lists or as base64."""
    if not isinstance(value, dict):
        return np.array(value, dtype=float)
    import base64

    flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
    return flat.reshape([int(n) for n in value["shape"].split(",")]) if "shape" in value else flat


def test_the_interactive_surface_holds_rows_of_equal_y_and_needs_no_network():
    pytest.importorskip("plotly")
    html = surface_html(surface(), PLANE, title="T <i>", provenance={"seed": "<3>"})
    assert len(html) > 1_000_000  # the library itself
    assert not re.search(r"<script[^>]+src=", html)
    assert "<li>seed: &lt;3&gt;</li>" in html
    part = surface_html(surface(), PLANE, with_library=False, whole_page=False)
    assert len(part) < 50_000
    (trace,), layout = figure_of(part)
    np.testing.assert_array_equal(decoded(trace["x"]), XS)
    np.testing.assert_array_equal(decoded(trace["y"]), YS)
    X, Y = np.meshgrid(XS, YS)
    np.testing.assert_allclose(decoded(trace["z"]), X + Y / 10)
    hover = decoded(trace["customdata"])
    np.testing.assert_allclose(hover[..., 0], 10 ** (X + Y / 10))
    np.testing.assert_allclose(hover[..., 1], 0.5 * 10 ** (X + Y / 10))
    assert "standard error" in trace["hovertemplate"]
    assert layout["scene"]["yaxis"]["title"]["text"] == "second (1 is a distance of 3)"


def test_the_interactive_surface_caps_and_counts():
    pytest.importorskip("plotly")
    found = surface(lambda x, y: torch.where((x == 1) & (y == 2), torch.nan, 10**x))
    part = surface_html(found, PLANE, cap=5.0, title="T", with_library=False, whole_page=False)
    (trace,), layout = figure_of(part)
    assert np.nanmax(decoded(trace["z"])) == pytest.approx(np.log10(5))
    assert trace["colorbar"]["ticktext"][-1] == "≥ 5"
    assert layout["title"]["text"] == "T (1 points not finite)"


def test_without_plotly_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ModuleNotFoundError, match=r"flatvalley\[surface\]"):
        surface_html(surface(), PLANE)
