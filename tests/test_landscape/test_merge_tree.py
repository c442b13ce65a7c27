"""Merge trees against connected components counted level by level, and a formula."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.testing import assert_close

from landscape import Evaluation, grid, merge_tree, plot_merge_tree


def evaluation(losses, error=0.1, samples=64):
    """Losses of a line or grid, each with this standard error."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    axes = [torch.arange(n).double() for n in losses.shape]
    points = axes[0] if len(axes) == 1 else grid(*axes)
    count = torch.full_like(losses, float(samples))
    squares = samples * losses**2 + error**2 * samples * (samples - 1)
    return Evaluation(points, count, samples * losses, squares)


def noise(shape, seed=0, missing=False, ties=False):
    values = np.random.default_rng(seed).normal(size=shape)
    if ties:
        values = np.round(values)
    if missing:
        values[values > 1] = np.nan
        values[values > 0.9] = np.inf
    return values


def double_well(spacing=0.05):
    """Two minima near x = -1 and x = 1 that differ by .4, a pass between them of about 1."""
    axis = torch.arange(-2, 2 + spacing / 2, spacing, dtype=torch.float64)
    x, y = grid(axis, axis[::2]).unbind(-1)
    return (x**2 - 1) ** 2 + y**2 + 0.2 * x + 0.3, x, y


@pytest.mark.parametrize("shape", [(40,), (12, 9), (2, 20), (30, 2)], ids=str)
@pytest.mark.parametrize("kind", ["distinct", "ties", "missing"])
def test_branches_are_the_components_at_every_level(shape, kind):
    values = noise(shape, missing=kind == "missing", ties=kind == "ties")
    tree = merge_tree(evaluation(values))
    corners = np.ones((3,) * len(shape))
    for level in [*np.unique(values[np.isfinite(values)]), -9.0, 9.0]:
        _, expected = ndimage.label(values <= level, structure=corners)
        alive = (tree.births <= level) & (level < tree.deaths)
        assert int(alive.sum()) == expected
    assert bool((tree.persistence[:-1] >= tree.persistence[1:]).all())
    assert bool((tree.persistence > 0).all())


def test_a_double_well_has_two_branches_that_meet_at_the_pass():
    losses, x, y = double_well()
    tree = merge_tree(evaluation(losses))
    places = torch.stack([x.flatten()[tree.minima], y.flatten()[tree.minima]])
    assert_close(places, torch.tensor([[-1.0, 0.95], [0.0, 0.0]]).double(), atol=0.051, rtol=0)
    assert tree.deaths[0] == math.inf
    assert float(x.flatten()[tree.passes[1]]) == pytest.approx(0.05, abs=0.051)
    on_axis = losses[:, y[0].abs().argmin()]
    assert float(tree.deaths[1]) == float(on_axis[20:60].max())
    assert tree.parents.tolist() == [-1, 0]
    border = x.flatten()[tree.passes[1]]
    assert bool(((x < border - 0.1) == (tree.basins == 0))[(x - border).abs() > 0.1].all())


def test_basins_are_where_steps_to_the_lowest_neighbour_end():
    values = noise((11, 8), seed=3, missing=True)
    tree = merge_tree(evaluation(values))

    def descend(i, j):
        while True:
            near = [(a, b) for a in range(i - 1, i + 2) for b in range(j - 1, j + 2)]
            near = [(a, b) for a, b in near if 0 <= a < 11 and 0 <= b < 8]
            best = min(near, key=lambda p: values[p] if np.isfinite(values[p]) else math.inf)
            if best == (i, j):
                return i * 8 + j
            i, j = best

    for (i, j), value in np.ndenumerate(values):
        basin = int(tree.basins[i, j])
        if np.isfinite(value):
            assert int(tree.minima[basin]) == descend(i, j)
        else:
            assert basin == -1


def test_short_branches_are_taken_into_those_that_they_meet():
    values = noise((15, 15), seed=1)
    every, few = merge_tree(evaluation(values)), merge_tree(evaluation(values), min_persistence=0.7)
    kept = every.persistence > 0.7
    assert 1 < len(few.minima) < len(every.minima)
    for name in ("minima", "deaths", "passes", "errors"):
        assert_close(getattr(few, name), getattr(every, name)[kept], equal_nan=True)
    assert few.basins.unique().tolist() == list(range(len(few.minima)))
    same = every.basins == 0
    assert bool((few.basins[same] == 0).all())


def test_branches_within_two_standard_errors_are_not_certain():
    tree = merge_tree(evaluation([1.0, 0.0, 3.0, 2.0, 4.0], error=0.3))
    assert_close(tree.errors[1], torch.tensor(0.3 * math.sqrt(2)).double())
    assert tree.is_certain.tolist() == [True, True]
    assert merge_tree(evaluation([1.0, 0, 3, 2, 4], error=0.4)).is_certain.tolist() == [True, False]
    unknown = merge_tree(evaluation([1.0, 0.0, 3.0, 2.0, 4.0], error=0.0, samples=1))
    assert unknown.is_certain.tolist() == [True, True]


def test_the_error_is_that_of_minimum_and_pass():
    given = evaluation([1.0, 0.0, 3.0, 2.0, 4.0])
    squares = given.total_squares.clone()
    squares[2] += 0.4**2 * 64 * 63
    tree = merge_tree(replace(given, total_squares=squares))
    assert_close(tree.errors[1], torch.tensor(math.sqrt(0.1**2 + 0.1**2 + 0.4**2)).double())


def test_parts_that_missing_losses_cut_off_never_end():
    tree = merge_tree(evaluation([0.0, 1.0, math.nan, 5.0, 4.0]))
    assert tree.deaths.tolist() == [math.inf, math.inf]
    assert tree.parents.tolist() == [-1, -1]
    assert tree.basins.tolist() == [0, 0, -1, 1, 1]


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (evaluation([math.nan, math.nan]), {}, "`evaluation` must hold a finite loss"),
        (evaluation([1.0, 2.0]), {"min_persistence": -1.0}, "`min_persistence` must be at least 0"),
        (evaluation([1.0, 2.0]), {"min_persistence": math.nan}, "`min_persistence` must be at"),
        (replace(evaluation(noise(3)), points=torch.ones(3, 2).double()), {}, "rectangular grid"),
        (replace(evaluation(noise(3)), points=torch.ones(3).double()), {}, "rising values of t"),
    ],
)
def test_bad_input_is_named(given, options, words):
    with pytest.raises(ValueError, match=words):
        merge_tree(given, **options)


def test_valleys_are_as_wide_as_what_lies_below():
    losses, _, _ = double_well()
    tree = merge_tree(evaluation(losses))
    ax = plot_merge_tree(tree)
    outlines = [c.get_paths()[0].vertices for c in ax.collections]
    assert len(outlines) == 3  # both valleys, and what they share
    top = max(v[:, 1].max() for v in outlines)
    assert top == pytest.approx(float(losses.max()))
    for vertices in outlines:
        for level in np.unique(vertices[:, 1])[[0, -1]]:
            at = vertices[vertices[:, 1] == level][:, 0]
            widths = {
                float(((tree.basins == b) & (losses <= level)).double().mean()) for b in (0, 1)
            } | {float((losses <= level).double().mean())}
            assert any(np.ptp(at) == pytest.approx(w, abs=1e-9) for w in widths)
    level = float(tree.deaths[1])
    spans = [(at.min(), at.max()) for v in outlines for at in [v[v[:, 1] == level][:, 0]]]
    both, deep, shallow = sorted(spans, key=lambda s: s[0] - s[1])
    assert deep[1] == pytest.approx(shallow[0])
    assert (deep[0], shallow[1]) == pytest.approx(both)
    assert len({tuple(c.get_facecolor()[0]) for c in ax.collections}) == 3
    markers = [line for line in ax.lines if line.get_marker() == "v" and len(line.get_xdata())]
    markers.sort(key=lambda m: m.get_ydata()[0])
    for span, marker in zip((deep, shallow), markers, strict=True):
        assert span[0] < marker.get_xdata()[0] < span[1]
    assert sorted(float(m.get_ydata()[0]) for m in markers) == pytest.approx(tree.births.tolist())
    assert ax.get_yscale() == "log"
    plt.close("all")


def test_of_several_that_end_in_one_the_first_to_meet_it_are_drawn_inside():
    # The lowest minimum stands between two that it meets at 3 and at 5.
    tree = merge_tree(evaluation([6.0, 1.0, 3.0, 0.5, 5.0, 2.0, 7.0]))
    assert tree.parents.tolist() == [-1, 0, 0]
    assert tree.deaths.tolist() == [math.inf, 5.0, 3.0]
    ax = plot_merge_tree(tree)
    outlines = [c.get_paths()[0].vertices for c in ax.collections]
    spans = {
        (float(v[:, 1].min()), float(v[:, 1].max())): (v[:, 0].min(), v[:, 0].max())
        for v in outlines
    }
    assert sorted(spans) == [(0.5, 3.0), (1.0, 3.0), (2.0, 5.0), (3.0, 5.0), (5.0, 7.0)]
    shared = spans[3.0, 5.0]
    for inner in (spans[0.5, 3.0], spans[1.0, 3.0]):
        assert shared[0] - 1e-9 <= inner[0] and inner[1] <= shared[1] + 1e-9
    assert spans[2.0, 5.0][0] == pytest.approx(shared[1])


def test_deep_nesting_is_drawn():
    count = 1100  # minima rise and passes fall: each branch ends in the one before it
    losses = torch.stack([torch.arange(1.0, count + 1), 9999 - torch.arange(1.0, count + 1)], dim=1)
    tree = merge_tree(evaluation(losses.flatten().tolist()), min_persistence=8000.0)
    assert len(tree.minima) > 500
    plot_merge_tree(tree)


def test_what_is_not_certain_is_hollow_and_counted():
    ax = plot_merge_tree(merge_tree(evaluation([1.0, 0.5, 3, 2, 4, math.nan], error=0.4)))
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["2 minima (1 losses are not finite)", "1 of them within two standard errors"]
    fills = {
        float(m.get_ydata()[0]): m.get_markerfacecolor() for m in ax.lines if len(m.get_xdata())
    }
    assert fills == {0.5: "black", 2.0: "white"}


def test_losses_of_zero_need_a_linear_axis():
    tree = merge_tree(evaluation([1.0, 0.0, 3.0]))
    with pytest.raises(ValueError, match=r"`log` needs losses above 0, got 0 .* log=False"):
        plot_merge_tree(tree)
    assert plot_merge_tree(tree, log=False).get_yscale() == "linear"
