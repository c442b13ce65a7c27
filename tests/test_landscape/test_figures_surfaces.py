"""Figures over planes; each would fail on a picture with swapped axes, or a blank one."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D

from landscape import (
    Directions,
    Evaluation,
    Plane,
    grid,
    plot_contours,
    plot_eigen_ratio,
    plot_run_on_plane,
    plot_surface,
    principal_components,
    project_trajectory,
)

E = torch.eye(3, dtype=torch.float64)
ORTHONORMAL = Plane(torch.zeros(3, dtype=torch.float64), E[0], E[1])
OBLIQUE = Plane.along(
    torch.zeros(3, dtype=torch.float64),
    Directions(torch.stack([14.2 * E[0], 14.1 * E[1]]), "random", ("first", "second")),
)


def on_grid(f, xs=(-1.0, 0.0, 1.0, 2.0, 3.0), ys=(-1.0, 0.0, 1.0)):
    """An evaluation of f on a grid that is not square."""
    points = grid(list(xs), list(ys))
    mean = f(*points.unbind(-1))
    one = torch.full_like(mean, 4.0)
    return Evaluation(points, one, 4 * mean, 4 * mean**2 + 12)


def steep_in_y(x, y):
    return 10.0 + x + 4 * y


def pixels(ax):
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, dpi=50)
    buffer.seek(0)
    return plt.imread(buffer)[..., :3]


def test_contour_lines_put_the_first_coordinate_on_x():
    ax = plot_contours(on_grid(steep_in_y), ORTHONORMAL)
    lines = ax.collections[0]
    spans = [np.ptp(path.vertices, axis=0) for path in lines.get_paths() if len(path.vertices) > 3]
    assert spans
    assert all(span[0] > 2 * span[1] for span in spans)
    assert ax.get_xlim() == (-1, 3)
    assert ax.get_aspect() == 1
    levels = lines.levels
    np.testing.assert_allclose(levels[1:] / levels[:-1], levels[1] / levels[0])
    assert levels[0] > 5
    assert levels[-1] < 17


def test_contour_values_are_those_of_the_formula():
    ax = plot_contours(on_grid(lambda x, y: x + 2.0), ORTHONORMAL, num_levels=3, spacing="linear")
    lines = ax.collections[0]
    found = {
        round(float(level), 6): path.vertices[:, 0].mean()
        for level, path in zip(lines.levels, lines.get_paths(), strict=True)
    }
    assert found == pytest.approx({2.0: 0.0, 3.0: 1.0, 4.0: 2.0})


def test_axes_are_named_with_their_unit():
    ax = plot_contours(on_grid(steep_in_y), OBLIQUE, equal_aspect=False)
    assert ax.get_xlabel() == "first (1 is a distance of 14.2)"
    assert ax.get_ylabel() == "second (1 is a distance of 14.1, other scale than x)"
    assert plot_contours(on_grid(steep_in_y), ORTHONORMAL).get_xlabel() == (
        "x (distance in weight space)"
    )


def test_the_surface_is_drawn_and_not_blank():
    """A surface in space that does not join its figure leaves axes without it."""
    ax = plot_surface(on_grid(steep_in_y), ORTHONORMAL)
    assert ax in ax.figure.axes
    image = pixels(ax)
    colourful = (image.max(axis=-1) - image.min(axis=-1)) > 0.2
    assert colourful.mean() > 0.05


def test_surface_heights_are_logarithms_of_x_and_y():
    """The highest corner is at large x and y, on a grid that is not square."""
    ax = plot_surface(on_grid(lambda x, y: 10 ** (x + 0.1 * y)), ORTHONORMAL, floor=0.01)
    x, y, z = ax.collections[0]._faces.reshape(-1, 3).T
    np.testing.assert_allclose(z, x + 0.1 * y, atol=1e-9)
    assert (x.max(), y.max()) == (3, 1)
    assert (ax.elev, ax.azim) == (32.0, -60.0)


def test_surface_caps_heights_and_says_so():
    ax = plot_surface(on_grid(lambda x, y: 10 ** (x + 0 * y)), ORTHONORMAL, cap=50.0)
    assert ax.collections[0]._faces[..., 2].max() == pytest.approx(np.log10(50))
    assert ax.get_zticklabels()[-1].get_text() == "≥ 50"


def test_eigen_ratio_is_absolute_and_capped():
    largest, smallest = on_grid(lambda x, y: 10 + 0 * x), on_grid(lambda x, y: -x - 2 * y)
    ax = plot_eigen_ratio(largest, smallest, ORTHONORMAL)
    mesh = ax.collections[0]
    values = np.asarray(mesh.get_array()).reshape(3, 5)  # rows of equal y
    xs, ys = np.meshgrid([-1, 0, 1, 2, 3], [-1, 0, 1])
    np.testing.assert_allclose(values, abs(xs + 2 * ys) / 10)
    assert mesh.get_clim() == (0, 0.5)
    assert not ax.child_axes[0].texts
    over = plot_eigen_ratio(largest, smallest, ORTHONORMAL, cap=0.1)
    assert [text.get_text() for text in over.child_axes[0].texts] == ["≥ 0.1"]
    with pytest.raises(ValueError, match="must be on one grid"):
        plot_eigen_ratio(largest, on_grid(steep_in_y, xs=(0.0, 1.0)), ORTHONORMAL)
    with pytest.raises(ValueError, match="`cap` must be positive"):
        plot_eigen_ratio(largest, smallest, ORTHONORMAL, cap=0.0)


def test_a_loss_of_zero_has_its_lines():
    """Two cells of zero are not missing: the lowest line runs around them."""

    def cut_off(x, y):
        return (steep_in_y(x, y) - steep_in_y(x, y).min() - 1e-3).clamp(min=0)

    ax = plot_contours(on_grid(cut_off), ORTHONORMAL)
    assert "not finite" not in " ".join(t.get_text() for t in ax.get_legend().get_texts())
    assert len(ax.collections[0].get_paths()[0].vertices) > 2


def test_missing_values_stay_missing_and_are_counted():
    def broken(x, y):
        return torch.where(x > 2, torch.nan, steep_in_y(x, y))

    for draw in (plot_contours, plot_surface):
        ax = draw(on_grid(broken), ORTHONORMAL)
        if draw is plot_contours:
            assert "not finite (3)" in [t.get_text() for t in ax.get_legend().get_texts()]
            # Only their own cells are grey, not all that is between lines.
            cells = ax.collections[-1].get_array()
            assert cells.count() == 3 and cells.T[-1].count() == 3
    ax = plot_eigen_ratio(on_grid(broken), on_grid(steep_in_y), ORTHONORMAL)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["not finite (3)"]


def test_a_run_is_drawn_where_its_coordinates_are():
    """In multiples of the directions: a length along each would draw (0.7, −0.3) at (9.9, −4.2)."""
    points = torch.stack([OBLIQUE(0.0, 0.0), OBLIQUE(0.7, -0.3) + 3 * E[2]])
    basis = torch.stack([OBLIQUE.u, OBLIQUE.v], dim=1)
    seen = project_trajectory(points, basis, OBLIQUE.origin)
    ax = plot_run_on_plane(seen, OBLIQUE, evaluation=on_grid(steep_in_y))
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 0], [0.7, -0.3]], atol=1e-12)
    share = 1 - 9 / (9 + (0.7 * 14.2) ** 2 + (0.3 * 14.1) ** 2)
    faded = next(c for c in ax.collections if "run" in str(c.get_label()))
    np.testing.assert_allclose(faded.get_alpha(), [1.0, 0.15 + 0.85 * share])
    assert [text.get_text() for text in ax.texts][-2:] == ["start", "end"]


def test_the_plane_of_the_components_names_their_shares():
    points = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).double().cumsum(dim=0)
    found = principal_components(points)
    plane = Plane.along(found.center, found.directions)
    seen = project_trajectory(points, found.directions.basis, found.center)
    ax = plot_run_on_plane(seen, plane, marks={2: "lr / 10"})
    assert ax.get_xlabel().startswith(f"PC 1 ({100 * float(found.explained[0]):.1f} %)")
    assert [text.get_text() for text in ax.texts] == ["start", "end", "lr / 10"]
    with pytest.raises(ValueError, match="`marks` must number the 6 points from 0, got 6"):
        plot_run_on_plane(seen, plane, marks={6: "no"})
    one = project_trajectory(points, found.directions.basis[:, :1], found.center)
    with pytest.raises(ValueError, match="must have two coordinates, got 1"):
        plot_run_on_plane(one, plane)


def test_given_axes_are_drawn_into_and_pyplot_knows_nothing():
    figure = Figure()
    ax, space = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
    found = on_grid(steep_in_y)
    assert plot_contours(found, ORTHONORMAL, ax=ax) is ax
    assert plot_surface(found, ORTHONORMAL, ax=space) is space
    assert isinstance(space, Axes3D)
    assert plot_eigen_ratio(found, found, ORTHONORMAL, ax=ax) is ax
    assert plt.get_fignums() == []


def test_scattered_points_are_refused():
    scattered = Evaluation(*(torch.ones(s).double() for s in ((4, 2), (4,), (4,), (4,))))
    for draw in (plot_contours, plot_surface):
        with pytest.raises(ValueError, match="must be on a rectangular grid"):
            draw(scattered, ORTHONORMAL)
