"""What other tools for landscapes were seen to get wrong, and this one must not.

Other defects have their tests beside the code: planes that are not square, axes that start at 0,
blank figures in space, losses of zero taken for missing ones, directions over buffers.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessian import NonDeterministicError, Objective
from landscape import Line, Plane, evaluate, grid, project_trajectory, random_directions, sweep
from tests.cases import seeded

E = torch.eye(2, dtype=torch.float64)


@pytest.fixture
def visited(formula_objective):
    """An objective of two weights, and every pair of weights that its loss was asked for."""
    seen = []

    def loss(w, x):
        seen.append(w.tolist())
        return w.sum() + x[:, 0]

    objective = formula_objective(loss, [0.0, 0.0])
    seen.clear()  # what construction looked at
    return objective, seen


def test_a_line_runs_from_one_model_to_the_other(visited):
    """Not along the second as a direction, nor without its start: 10 to 11 in 5 points."""
    objective, seen = visited
    line = Line(torch.tensor([10.0, 0.0]).double(), torch.tensor([11.0, 0.0]).double())
    evaluate(objective, line, torch.linspace(0, 1, 5), speed="plain")
    assert [a for a, _ in seen] == [10.0, 10.25, 10.5, 10.75, 11.0]


def test_every_row_of_a_grid_has_the_same_columns_and_reaches_both_ends(visited):
    """No zig-zag by a cell from row to row, and no ±0.8 under axes that say ±1."""
    objective, seen = visited
    axis = torch.linspace(-1, 1, 5)
    evaluate(objective, Plane(torch.zeros(2).double(), *E), grid(axis, axis), speed="plain")
    expected = [[a, b] for a in axis.tolist() for b in axis.tolist()]
    assert torch.allclose(torch.tensor(seen), torch.tensor(expected), atol=1e-7)
    assert seen[0] == [-1.0, -1.0] and seen[-1] == [1.0, 1.0] and seen[12] == [0.0, 0.0]


def test_missing_cells_are_not_filled_in_and_others_not_touched(formula_objective):
    """No mean for NaN, no maximum for infinity, no noise on the largest."""

    def loss(w, x):
        value = w[0] ** 2 + 3 * w[1]
        value = torch.where(w[0] == 1, torch.nan, value)
        return torch.where(w[1] == 1, torch.inf, value) + 0 * x[:, 0]

    axis = torch.linspace(-1, 1, 5).double()
    plane = Plane(torch.zeros(2).double(), *E)
    found = evaluate(formula_objective(loss, [0.0, 0.0]), plane, grid(axis, axis))
    broken = (axis == 1)[:, None] | (axis == 1)
    assert torch.equal(torch.isnan(found.mean), broken) and found.num_nonfinite == 9
    exact = axis[:, None] ** 2 + 3 * axis
    assert torch.equal(found.mean[~broken], exact[~broken])


def test_coordinates_are_in_the_unit_of_the_grid():
    """A run through (0.7, -0.3) is drawn there, not at these times the length of the direction."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 5))).double()
    x = torch.zeros(2, 8).double(), torch.zeros(2).long()
    objective = Objective(model, nn.CrossEntropyLoss(), x)
    w = objective.weights()
    drawn = random_directions(objective, normalization="filter", num=2, seed=3)
    plane = Plane.along(w, drawn)
    assert min(plane.lengths) > 2 and abs(plane.cosine) > 1e-3  # neither unit nor orthogonal
    point = w + 0.7 * plane.u - 0.3 * plane.v
    assert plane.coordinates(point)[:2] == pytest.approx((0.7, -0.3), abs=1e-12)
    run = project_trajectory(torch.stack([w, point]), drawn.basis, w)
    torch.testing.assert_close(run.coordinates[1], torch.tensor([0.7, -0.3]).double())


def test_an_eigenvalue_is_that_of_the_mean_loss_and_need_not_be_positive():
    """Not summed over batches, nor of matrices alone; -2 is a result, not a missing cell."""

    class Hill(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2).double())

        def forward(self, x):
            return x - self.bias**2 * torch.tensor([1.0, 2.0]).double()

    x = torch.ones(6, 2).double()
    objective = Objective(Hill(), lambda out, _: out.sum(dim=1), (x, x), batch_size=2)
    metrics = ("top_eigenvalue", "bottom_eigenvalue")
    line = Line(torch.zeros(2).double(), torch.ones(2).double())
    found = sweep(objective, line, [0.0, 0.5], metrics=metrics)
    torch.testing.assert_close(
        found["objective", "top_eigenvalue"].mean, torch.full((2,), -2.0).double(), rtol=1e-3,
        atol=0,
    )  # fmt: skip
    assert found["objective", "bottom_eigenvalue"].mean.tolist() == pytest.approx([-4, -4], 1e-3)


def test_a_loader_that_shuffles_is_refused():
    """Every point would see its samples in another order, and with batch norm another loss."""
    data = TensorDataset(torch.arange(24.0).reshape(8, 3), torch.arange(8) % 2)
    loader = DataLoader(data, batch_size=2, shuffle=True)
    with pytest.raises(NonDeterministicError, match="shuffle"):
        Objective(seeded(lambda: nn.Linear(3, 2)), nn.CrossEntropyLoss(), loader)
