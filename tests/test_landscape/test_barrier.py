import math

import pytest
import torch

from landscape import BatchNormWarning, Line, barrier, evaluate


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
