import warnings

import pytest
import torch
from torch import nn

from hessian.objective import Objective
from landscape import (
    BatchNormWarning,
    BezierCurve,
    Evaluation,
    Line,
    Plane,
    evaluate,
    grid,
    zero_one_loss,
)


def quadratic(w, x):
    """Loss of sample x: ½ Σ a_j (w_j − x_j)², a = (1, 10, 3)."""
    scale = torch.tensor([1.0, 10.0, 3.0], dtype=w.dtype)
    return 0.5 * (scale * (w - x) ** 2).sum(dim=1)


@pytest.fixture
def samples():
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("cuts", [12, 5, 1])
def test_path_values_are_the_formula(formula_objective, samples, cuts):
    objective = formula_objective(quadratic, torch.zeros(3), samples, batch_size=cuts)
    line = Line(torch.zeros(3).double(), torch.ones(3).double())
    ts = [-0.5, 0.0, 0.4, 1.0, 1.5, 0.2]  # any order, beyond the ends
    found = evaluate(objective, line, ts)
    losses = torch.stack([quadratic(line(t), samples) for t in ts])
    torch.testing.assert_close(found.mean, losses.mean(dim=1))
    torch.testing.assert_close(found.standard_error, losses.std(dim=1) / 12**0.5)
    assert found.points.tolist() == ts
    assert found.count.tolist() == [12.0] * 6
    assert found.num_nonfinite == 0


def test_plane_values_keep_axis_order_scale_and_zero(formula_objective):
    """Not square, ranges that start at 0, steep in y only: swapped axes cannot pass."""
    objective = formula_objective(quadratic, torch.zeros(3), torch.zeros(1, 3).double())
    e = torch.eye(3, dtype=torch.float64)
    plane = Plane(torch.zeros(3).double(), e[0], e[1])
    xs = torch.linspace(0, 4, 5).double()
    ys = torch.linspace(0, 1, 3).double()
    found = evaluate(objective, plane, grid(xs, ys))
    assert found.mean.shape == found.count.shape == (5, 3)
    expected = 0.5 * xs[:, None] ** 2 + 5 * ys[None, :] ** 2
    torch.testing.assert_close(found.mean, expected)
    assert found.mean[0, 0] == 0  # a loss of zero is a loss
    assert found.num_nonfinite == 0


def test_a_flat_list_of_plane_coordinates_is_fine(formula_objective, samples):
    objective = formula_objective(quadratic, torch.zeros(3), samples)
    e = torch.eye(3, dtype=torch.float64)
    plane = Plane(e[2], e[0], e[1])
    coordinates = grid([0.0, 1.0], [2.0, 3.0, 4.0])
    flat = evaluate(objective, plane, coordinates.reshape(-1, 2))
    assert torch.equal(flat.mean.reshape(2, 3), evaluate(objective, plane, coordinates).mean)


def test_points_without_a_loss_are_kept_as_nan_and_counted(formula_objective):
    objective = formula_objective(lambda w, x: torch.sqrt(w) + x[:, 0], [1.0])
    line = Line(torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())
    found = evaluate(objective, line, [0.0, 0.25, 0.5, 1.0])
    assert torch.isnan(found.mean).tolist() == [True, True, False, False]
    assert torch.isnan(found.total_squares).tolist() == [True, True, False, False]
    assert found.mean[2:].tolist() == [0.0, 1.0]
    assert found.num_nonfinite == 2


def test_an_infinite_loss_is_nan_and_not_infinite(formula_objective):
    """So that no file, table or mean takes it for a number."""
    objective = formula_objective(lambda w, x: 1 / w.abs() + x[:, 0], [1.0])
    found = evaluate(objective, Line(-torch.ones(1).double(), torch.ones(1).double()), [0.0, 0.5])
    assert found.total.tolist()[0] == 1 and torch.isnan(found.total[1])
    assert torch.isnan(found.total_squares[1]) and found.count.tolist() == [1, 1]


def test_infinite_weights_are_a_point_without_a_loss(formula_objective, samples):
    objective = formula_objective(quadratic, torch.zeros(3), samples)
    found = evaluate(objective, lambda t: torch.full((3,), 1.0 / (1 - t)).double(), [0.0, 0.999])
    assert found.num_nonfinite == 0
    infinite = evaluate(objective, lambda t: torch.full((3,), float("inf")).double(), [0.0])
    assert infinite.num_nonfinite == 1


def test_other_errors_are_not_swallowed(formula_objective, samples):
    objective = formula_objective(quadratic, torch.zeros(3), samples)
    with pytest.raises(ValueError, match="`w` must be a flat vector"):
        evaluate(objective, Line(torch.zeros(4).double(), torch.ones(4).double()), [0.5])


def test_model_and_random_state_stay_as_they_were(formula_objective, samples):
    objective = formula_objective(quadratic, torch.tensor([3.0, 1.0, 2.0]), samples)
    objective.model.train()
    before = objective.weights(), torch.get_rng_state(), objective.model.w.grad
    curve = BezierCurve(torch.randn(3, 3, generator=torch.Generator(), dtype=torch.float64))
    evaluate(objective, curve, torch.linspace(0, 1, 5))
    assert torch.equal(objective.weights(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert objective.model.w.grad is before[2] is None
    assert objective.model.training


def test_progress_counts_every_point(formula_objective, samples):
    objective = formula_objective(quadratic, torch.zeros(3), samples)
    e = torch.eye(3, dtype=torch.float64)
    seen = []
    plane = Plane(e[2], e[0], e[1])
    coordinates = grid([0.0, 1.0], [2.0, 3.0])
    evaluate(objective, plane, coordinates, progress=lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_one_sample_has_no_standard_error(formula_objective):
    objective = formula_objective(quadratic, torch.zeros(3), torch.zeros(1, 3).double())
    found = evaluate(objective, Line(torch.zeros(3).double(), torch.ones(3).double()), [0.3])
    assert torch.isnan(found.standard_error).all()


def test_equal_losses_have_standard_error_zero():
    n = torch.full((2,), 3.0, dtype=torch.float64)
    found = Evaluation(torch.zeros(2).double(), n, 0.1 * n, 0.1**2 * n)  # rounding may go below 0
    assert found.standard_error.tolist() == pytest.approx([0, 0], abs=1e-9)


def test_frozen_batch_norm_is_warned_about_once(batch_norm_objective):
    w = batch_norm_objective.weights()
    with pytest.warns(BatchNormWarning, match="running statistics in `1`") as caught:
        evaluate(batch_norm_objective, Line(w, 2 * w), [0.0, 0.5, 1.0], batch_norm="frozen")
    assert len(caught) == 1


def test_layer_norm_is_not_warned_about():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.GroupNorm(1, 2)).double()
    x = torch.ones(4, 2, dtype=torch.float64)
    objective = Objective(model, nn.MSELoss(), (x, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(objective, Line(objective.weights(), objective.weights()), [0.0])


@pytest.mark.parametrize("ts", [[], [[0.0, 1.0]], 0.5])
def test_wrong_shapes_along_a_path_are_named(formula_objective, samples, ts):
    objective = formula_objective(quadratic, torch.zeros(3), samples)
    line = Line(torch.zeros(3).double(), torch.ones(3).double())
    with pytest.raises(ValueError, match=r"`ts` must hold values of shape \[m\]"):
        evaluate(objective, line, torch.tensor(ts))


def test_wrong_shapes_in_a_plane_are_named(formula_objective, samples):
    objective = formula_objective(quadratic, torch.zeros(3), samples)
    e = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"coordinates of shape \[..., 2\].* got shape \[3\]"):
        evaluate(objective, Plane(e[2], e[0], e[1]), [0.0, 0.5, 1.0])


def test_evaluation_refuses_shapes_that_do_not_fit():
    n = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`points` must have shape .* got \[4\] and \[3\]"):
        Evaluation(torch.zeros(4).double(), n, n, n)


def test_error_rate_comes_from_a_second_objective():
    x = torch.tensor([[1.0], [2.0], [-1.0], [3.0]], dtype=torch.float64)
    target = torch.tensor([0, 0, 1, 1])
    model = nn.Linear(1, 2, bias=False).double()
    objective = Objective(model, zero_one_loss, (x, target), batch_size=3)
    right = torch.tensor([1.0, -1.0]).double()  # class 0 for positive x: one of four is wrong
    found = evaluate(objective, Line(right, -right), [0.0, 1.0])
    assert found.mean.tolist() == [0.25, 0.75]
    assert found.standard_error[0] == pytest.approx(0.25)  # sqrt(p (1 − p) / (n − 1))


def test_zero_one_loss_takes_positions_and_refuses_columns():
    output = torch.zeros(2, 3, 4).double()
    output[:, 1] = 1.0
    target = torch.ones(2, 4, dtype=torch.long)
    target[0, 2] = 0
    expected = torch.zeros(2, 4).double()
    expected[0, 2] = 1
    assert torch.equal(zero_one_loss(output, target), expected)
    with pytest.raises(ValueError, match=r"class indices of shape \[2\] .* got torch.int64"):
        zero_one_loss(output[:, :, 0], torch.ones(2, 1, dtype=torch.long))
