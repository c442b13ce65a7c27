import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import Objective, Operator
from landscape import BatchNormWarning, Line, barrier, barrier_table, curvature_share, evaluate
from tests.cases import seeded


@pytest.fixture
def wells():
    """Per-sample height s, tilt b and offset c of a double well in one weight."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    return x * torch.tensor([0.2, 0.3, 50.0]) + torch.tensor([1.0, 0.25, 0.0])


def double_well(w, x):
    return x[:, 0] * (w**2 - 1) ** 2 + x[:, 1] * w + x[:, 2]


LINE = Line(torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())


def test_a_tilted_double_well_has_the_analytic_barrier(formula_objective, wells):
    """On w = 2t − 1 the tilt is the chord, so the excess over it is s at t = ½."""
    found = barrier(formula_objective(double_well, [0.0], wells, batch_size=7), LINE)
    s, n = wells[:, 0], len(wells)
    assert found.excess_over_chord.location == 0.5
    assert found.excess_over_chord.value == pytest.approx(float(s.mean()), rel=1e-12)
    # Offset and tilt drop out of every sample: the error is that of the heights alone.
    expected = float(s.std()) / math.sqrt(n)
    assert found.excess_over_chord.standard_error == pytest.approx(expected, rel=1e-9)
    assert expected < 0.01 * float(found.evaluation.standard_error[30])


def test_excess_over_the_mean_is_its_formula(formula_objective, wells):
    found = barrier(formula_objective(double_well, [0.0], wells), LINE, num_points=2001)
    s, b = float(wells[:, 0].mean()), float(wells[:, 1].mean())
    # The maximum of s (w² − 1)² + b w is the middle root of 4 s (w³ − w) + b = 0.
    w = b / (4 * s)
    for _ in range(100):
        w = w**3 + b / (4 * s)
    excess = found.excess_over_mean
    assert excess.location == pytest.approx((w + 1) / 2, abs=1 / 2000)
    assert excess.value == pytest.approx(s * (w**2 - 1) ** 2 + b * w, abs=1e-5)
    at = LINE(excess.location)
    differences = (
        double_well(at, wells) - (double_well(LINE.start, wells) + double_well(LINE.end, wells)) / 2
    )
    expected = float(differences.std()) / math.sqrt(len(wells))
    assert excess.standard_error == pytest.approx(expected, rel=1e-9)


def test_definitions_agree_where_the_ends_are_equal(formula_objective, wells):
    wells[:, 1] = 0
    found = barrier(formula_objective(double_well, [0.0], wells), LINE)
    chord, mean = found.excess_over_chord, found.excess_over_mean
    assert mean.value == pytest.approx(chord.value, rel=1e-12)
    assert mean.standard_error == pytest.approx(chord.standard_error, rel=1e-9)
    assert mean.location == chord.location == 0.5


def test_a_convex_loss_has_no_barrier_but_exceeds_the_mean(formula_objective, wells):
    objective = formula_objective(lambda w, x: x[:, 0] * (w + 1) ** 2, [0.0], wells)
    found = barrier(objective, LINE)
    assert found.excess_over_chord.value == 0
    assert found.excess_over_chord.location in (0.0, 1.0)
    assert found.excess_over_chord.standard_error == 0
    half = 2 * float(wells[:, 0].mean())  # (L(1) − L(0)) / 2 with L(1) = 4 s
    assert found.excess_over_mean.value == pytest.approx(half)
    assert found.excess_over_mean.location == 1.0


def test_evaluation_is_the_one_along_the_path(formula_objective, wells):
    objective = formula_objective(double_well, [0.0], wells)
    found = barrier(objective, LINE, num_points=5)
    again = evaluate(objective, LINE, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert torch.equal(found.evaluation.total, again.total)
    assert torch.equal(found.evaluation.points, again.points)


def test_a_loss_that_is_not_finite_is_not_hidden(formula_objective):
    objective = formula_objective(lambda w, x: torch.log(w.abs()) + x[:, 0], [1.0])
    found = barrier(objective, LINE, num_points=5)
    assert found.evaluation.num_nonfinite == 1
    for excess in (found.excess_over_chord, found.excess_over_mean):
        assert math.isnan(excess.value)
        assert math.isnan(excess.standard_error)
        assert excess.location == 0.5


def test_one_sample_has_no_standard_error(formula_objective):
    x = torch.tensor([[1.0, 0.0, 0.0]]).double()
    found = barrier(formula_objective(double_well, [0.0], x), LINE)
    assert found.excess_over_chord.value == 1.0
    assert math.isnan(found.excess_over_chord.standard_error)


def test_batch_norm_is_warned_about_here(batch_norm_objective):
    w = batch_norm_objective.weights()
    with pytest.warns(BatchNormWarning, match="running statistics in `1`"):
        barrier(batch_norm_objective, Line(w, 2 * w), num_points=3, batch_norm="frozen")


def test_progress_and_too_few_points(formula_objective, wells):
    objective = formula_objective(double_well, [0.0], wells)
    seen = []
    barrier(objective, LINE, num_points=3, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match=r"`num_points` must be at least 3 .* got 2"):
        barrier(objective, LINE, num_points=2)


def test_the_interval_holds_the_height_and_its_place(formula_objective, wells):
    found = barrier(formula_objective(double_well, [0.0], wells), LINE).excess_over_chord
    assert found.low < found.value < found.high
    # All points move with the one height s, so the interval is that of a single mean.
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * found.standard_error, rel=0.03)
    assert 0 < found.earliest < found.location < found.latest < 1
    assert found.earliest == pytest.approx(1 - found.latest)
    # s (w² − 1)² is above low of its peak s where (w² − 1)² is.
    edge = 2 * found.earliest - 1
    assert (edge**2 - 1) ** 2 * found.high >= found.low
    narrow = barrier(formula_objective(double_well, [0.0], wells), LINE, confidence=0.5)
    assert narrow.excess_over_chord.low > found.low


def test_a_flat_path_shows_no_barrier_though_its_highest_point_is_above_zero(formula_objective):
    """Losses that are noise, another draw at every t."""
    x = torch.zeros(400, 1, dtype=torch.float64)
    naive = shown = 0
    for seed in range(8):
        draws = torch.randn(
            61, 400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )

        def noise(w, x, draws=draws):
            return draws[round(30 * float(w + 1))] + 3.0

        found = barrier(formula_objective(noise, [0.0], x), LINE).excess_over_chord
        naive += found.value > 1.96 * found.standard_error  # selected among 61
        shown += found.low > 0
        assert found.high > 0
    assert shown <= 1 and naive >= 2  # one in twenty is allowed to be wrong


def test_controls_losses_and_errors_come_in_one_table():
    """Two classes on a line: the mirrored classifier is wrong everywhere but at its end."""
    x = torch.tensor([[1.0], [2.0], [-1.0], [3.0]]).double()
    y = torch.tensor([0, 0, 1, 0])
    model = nn.Linear(1, 2, bias=False).double()
    train = Objective(model, nn.CrossEntropyLoss(), (x, y), batch_size=3)
    test = Objective(model, nn.CrossEntropyLoss(), (x[:2], y[:2]))
    right = torch.tensor([1.0, -1.0]).double()
    table = barrier_table(
        {"train": train, "test": test},
        Line(right, 3 * right),
        controls={"mirrored": -right, "itself": Line(right, right)},
        metrics=("loss", "error"),
        num_points=5,
    )
    assert len(table.barriers) == 3 * 2 * 2
    assert table["path", "train", "error"].excess_over_mean.value == 0
    mirrored = table["mirrored", "train", "error"].evaluation
    line = Line(right, -right)
    for t, loss in zip(mirrored.points.tolist(), mirrored.mean.tolist(), strict=True):
        wrong = train.output(line(t), (x, y)).argmax(dim=1) != y
        assert loss == float(wrong.double().mean())
    loss = table["mirrored", "test", "loss"]
    assert loss.evaluation.mean[2] == pytest.approx(math.log(2))
    assert table["itself", "test", "loss"].excess_over_chord.value == 0
    rows = table.rows()
    assert rows[0]["path"] == "path" and rows[-1]["objective"] == "test"
    assert rows[-1]["over_chord_value"] == table["itself", "test", "error"].excess_over_chord.value
    assert loss.evaluation.provenance["samples"] == {"train": 4, "test": 2}


def test_a_killed_barrier_goes_on(tmp_path, formula_objective, wells):
    calls = []

    def counted(w, x):
        calls.append(w)
        return double_well(w, x)

    objective = formula_objective(counted, [0.0], wells)

    def stop(done, total):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        barrier(objective, LINE, num_points=20, folder=tmp_path, progress=stop)
    calls.clear()
    found = barrier(objective, LINE, num_points=20, folder=tmp_path)
    assert len(calls) == 12 + 2  # both ends show that it is the same loss
    whole = barrier(objective, LINE, num_points=20)
    assert found.excess_over_mean == whole.excess_over_mean
    assert torch.equal(found.evaluation.total, whole.evaluation.total)


@pytest.fixture
def classifier():
    """Two classes by a small network in float32, and a line that leads away from it."""
    x = torch.linspace(-2, 2, 60).sin().reshape(20, 3)
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))).float()
    objective = Objective(model, nn.CrossEntropyLoss(), (x, torch.arange(20) % 2), batch_size=7)
    w = objective.weights()
    return objective, Line(w, w.flip(0))


def test_worker_processes_find_the_same_barriers_to_the_last_bit(tmp_path, classifier):
    objective, line = classifier
    options = {"controls": {"back": 2 * line.start}, "metrics": ("loss", "error"), "num_points": 19}
    alone = barrier_table(objective, line, **options)
    spread = barrier_table(objective, line, **options, workers=2, folder=tmp_path)
    assert spread.rows() == alone.rows()
    for key, found in spread.barriers.items():
        assert torch.equal(found.evaluation.total, alone[key].evaluation.total)
    assert len(list(tmp_path.rglob("points-*"))) == 2 * 3  # 8, 8 and 3 points on each path


def test_a_barrier_in_reduced_precision_says_how_far_it_is_off(classifier):
    objective, line = classifier
    full = barrier(objective, line, num_points=5).evaluation
    found = barrier(objective, line, num_points=5, precision="bfloat16")
    again = evaluate(objective, line, [0.0, 0.25, 0.5, 0.75, 1.0], precision="bfloat16")
    assert_close(found.evaluation.total, again.total)
    plan = found.evaluation.provenance["plan"]
    assert plan["precision"] == "bfloat16"
    deviations = (found.evaluation.mean / full.mean - 1).abs()
    # Measured at some of the points.
    assert float((deviations / plan["deviation"] - 1).abs().min()) < 0.02
    assert 1e-6 < plan["deviation"] < 1e-2


def test_bad_barrier_options_are_named(formula_objective, wells):
    objective = formula_objective(double_well, [0.0], wells)
    with pytest.raises(ValueError, match="`confidence` must be between 0 and 1, got 95"):
        barrier(objective, LINE, confidence=95.0)
    with pytest.raises(ValueError, match='`controls` must have other names than "path"'):
        barrier_table(objective, LINE, controls={"path": LINE.end})


def test_curvature_share_is_one_along_the_sharpest_direction_and_a_mean_without_preference():
    values = torch.tensor([8.0, 2.0, -1.0]).double()
    H = Operator.from_matrix(torch.diag(values))
    e = torch.eye(3, dtype=torch.float64)
    assert curvature_share(H, 5 * e[0], 8.0) == 1
    assert curvature_share(H, e[2], 8.0) == -0.125
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    mean = sum(curvature_share(H, s, 8.0) for s in signs) / 8
    assert mean == pytest.approx(float(values.sum()) / (3 * 8))
    with pytest.raises(ValueError, match="`direction` must have positive, finite length"):
        curvature_share(H, 0 * e[0], 8.0)
    with pytest.raises(ValueError, match="`largest` must hold a positive eigenvalue, got -1"):
        curvature_share(H, e[0], -1.0)
