import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from landscape import (
    Evaluation,
    plot_barriers,
    plot_interpolation,
    plot_matching,
    plot_norms,
    plot_random_lines,
    plot_share_over_time,
    random_share,
    run_norms,
    save_figure,
)

T = torch.linspace(-0.5, 1.5, 9, dtype=torch.float64)


def evaluation(mean, points=T, error=0.0):
    """An evaluation of 101 samples with the given means and standard error."""
    count = torch.full_like(mean, 101.0)
    return Evaluation(points, count, 101 * mean, 101 * mean**2 + error**2 * 101 * 100)


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def band(collection, x):
    edges = collection.get_paths()[0].vertices
    ys = edges[np.isclose(edges[:, 0], x)][:, 1]
    return ys.min(), ys.max()


@pytest.fixture(autouse=True)
def nothing_global_changes():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_interpolation_has_loss_left_and_accuracy_right(tmp_path):
    loss = {"train": evaluation(T**2 + 1, error=0.1), "test": evaluation(T**2 + 2)}
    wrong = {"train": evaluation(0.1 + 0 * T, error=0.01), "test": evaluation(0.3 + 0 * T)}
    ax = plot_interpolation(loss, wrong, ends=("SGD", "gRDA"))
    (right,) = ax.child_axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), T**2 + 1)
    np.testing.assert_allclose(right.lines[0].get_ydata(), 90)
    np.testing.assert_allclose(right.lines[1].get_ydata(), 70)
    np.testing.assert_allclose(band(ax.collections[0], 0.5), [1.05, 1.45])
    np.testing.assert_allclose(band(right.collections[0], 0.5), [88, 92])
    assert [line.get_linestyle() for line in right.lines] == ["-", "--"]
    assert right.get_ylim() == (0, 100)
    ticks = dict(zip(ax.get_xticks(), [t.get_text() for t in ax.get_xticklabels()], strict=True))
    assert (ticks[0.0], ticks[1.0]) == ("0\nSGD", "1\ngRDA")
    assert legend_of(ax) == ["train", "test"]
    marked = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]
    assert marked == [0, 1]
    save_figure(ax.figure, tmp_path / "f", {"seed": "0"})


def test_random_lines_show_the_mean_and_all_seeds():
    found = [evaluation(T**2 * k) for k in (1.0, 2.0, 6.0)]
    ax = plot_random_lines({"net": found})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 3 * T**2)
    np.testing.assert_allclose(band(ax.collections[0], 1.5), [2.25, 13.5])
    assert legend_of(ax) == ["net (3 directions)"]
    with pytest.raises(ValueError, match="at the same points for every seed"):
        plot_random_lines({"net": [found[0], evaluation(T, points=T + 1)]})
    with pytest.raises(ValueError, match="at the same points for every seed"):
        plot_random_lines({"net": []})


def test_barriers_below_zero_are_hatched_and_repeats_have_bars():
    rows = torch.tensor([[1.0, -0.2, 0.1], [3.0, -0.4, 0.3]])
    ax = plot_barriers({"train": rows, "test": rows[0]}, [0, 1, 2], errors={"test": rows[1].abs()})
    np.testing.assert_allclose(ax.containers[0].lines[0].get_ydata(), [2, -0.3, 0.2], rtol=1e-6)
    bars = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([bars[0][0][1], bars[0][1][1]], [1, 3])
    assert legend_of(ax) == ["train (2 runs, mean and range)", "test"]
    (hatched,) = [p for p in ax.patches if p.get_hatch()]
    low, high = ax.get_ylim()
    assert hatched.get_y() == low < -0.4
    assert hatched.get_y() + hatched.get_height() == pytest.approx(0)
    assert high > 3


def test_a_barrier_above_zero_still_shows_where_zero_is():
    ax = plot_barriers({"a": torch.tensor([5.0, 6.0])}, [1, 2], log_x=True)
    assert ax.get_ylim()[0] < 0
    assert ax.get_xscale() == "log"


def test_matching_is_green_over_grey():
    naive, matched = {"train": evaluation(T + 1)}, {"train": evaluation(T)}
    ax = plot_matching(naive, matched)
    assert ax.lines[0].get_color() == "0.55"
    np.testing.assert_allclose(ax.lines[1].get_ydata(), T)
    assert legend_of(ax) == ["units as trained", "units matched"]
    with pytest.raises(ValueError, match="`matched` must have the names of `naive`, train, got"):
        plot_matching(naive, {"test": matched["train"]})


def test_share_over_time_has_the_random_floor_and_a_band_of_seeds():
    rows = torch.tensor([[0.1, 0.2], [0.3, 0.6]], dtype=torch.float64)
    ax = plot_share_over_time({"gRDA": rows}, [1, 5], 10, 1000)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.2, 0.4])
    np.testing.assert_allclose(band(ax.collections[0], 5), [0.2, 0.6])
    floor = [line for line in ax.lines if "random" in line.get_label()]
    assert floor[0].get_ydata()[0] == pytest.approx(random_share(10, 1000)) == pytest.approx(0.1)
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "share in the top-10 eigenspace"
    with pytest.raises(ValueError, match="`k` must be between 1 and d = 3"):
        plot_share_over_time({"a": rows}, [1, 5], 4, 3)


def test_norms_are_the_formulas_and_the_floor_is_drawn():
    points = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    points[2:, :25] = 0
    found = run_norms(points)
    torch.testing.assert_close(found.distance, (points - points[0]).double().norm(dim=1))
    torch.testing.assert_close(
        found.norm_ratio, (points.norm(dim=1) / points.abs().sum(dim=1)).double()
    )
    assert found.sparsity.tolist() == [0, 0, 0.25, 0.25]
    axes = plot_norms({"run": found}, [0, 1, 2, 3])
    assert [ax.lines[0].get_ydata()[-1] for ax in axes] == pytest.approx(
        [float(found.distance[-1]), float(found.norm_ratio[-1]), 25]
    )
    assert axes[1].lines[1].get_ydata()[0] == pytest.approx(0.1)  # 100 weights
    with pytest.raises(ValueError, match="at least one checkpoint"):
        run_norms(points[:0])
    with pytest.raises(ValueError, match="one value for each of the 2 positions"):
        plot_norms({"run": found}, [0, 1])


def test_given_axes_are_drawn_into():
    ax = Figure().add_subplot()
    assert plot_interpolation({"a": evaluation(T)}, ax=ax) is ax
    assert plot_random_lines({"a": [evaluation(T)]}, ax=ax) is ax
    assert plot_barriers({"a": T}, list(range(9)), ax=ax) is ax
    assert plot_matching({"a": evaluation(T)}, {"a": evaluation(T)}, ax=ax) is ax
    assert plot_share_over_time({"a": T + 1}, list(range(9)), 1, 9, ax=ax) is ax


def test_a_plane_is_no_line_and_nothing_is_refused():
    points = torch.zeros(2, 2, 2, dtype=torch.float64)
    plane = evaluation(torch.ones(2, 2, dtype=torch.float64), points=points)
    with pytest.raises(ValueError, match="must be along a path"):
        plot_interpolation({"a": plane})
    for draw in (plot_interpolation, plot_random_lines):
        with pytest.raises(ValueError, match="at least one thing to draw"):
            draw({})
