"""Surfaces from few points, against the dense surface of losses with a formula."""

import warnings

import pytest
import torch
from torch import nn

from hessian import Objective
from hessian.errors import ConvergenceWarning
from landscape import Plane, adaptive_surface
from tests.cases import seeded

E = torch.eye(2, dtype=torch.float64)
PLANE = Plane(torch.zeros(2).double(), E[0], E[1])
XS, YS = torch.arange(-40, 41).double() / 40, torch.arange(21).double() / 10


def dense(loss, x, xs=XS, ys=YS):
    """The mean loss at every point, from the formula."""
    return torch.stack([torch.stack([loss(torch.stack([a, b]), x).mean() for b in ys]) for a in xs])


def bowl(w, x):
    """Steep and lopsided; a different scale on each axis."""
    return (torch.exp(2 * w[0]) + 30 * (w[1] - 0.7) ** 2 + 0.1) * (1 + x[:, 0] ** 2)


def ridge(w, x):
    """A wall across x, narrow beside the coarse grid, along all of y."""
    return (1 + 4 * torch.exp(-((w[0] - 0.37) ** 2) / (2 * 0.1**2))) * (1 + x[:, 0] ** 2)


@pytest.fixture
def samples():
    return torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("loss", [bowl, ridge])
def test_the_dense_surface_is_met_within_the_error_reported(formula_objective, samples, loss):
    objective = formula_objective(loss, [0.0, 0.0], samples)
    found = adaptive_surface(objective, PLANE, XS, YS, seed=1, max_evaluations=600)
    truth = dense(loss, samples)
    deviations = torch.log(found.evaluation.mean / truth).abs()
    assert found.converged and found.error <= 0.01 and found.num_held_out == 59
    assert torch.quantile(deviations[~found.measured], 0.95) <= 0.01
    assert found.num_evaluations == int(found.measured.sum()) <= 600
    measured = found.measured
    torch.testing.assert_close(found.evaluation.mean[measured], truth[measured])
    assert torch.isnan(found.evaluation.standard_error[~measured]).all()
    assert found.evaluation.provenance["interpolated points"] == int((~measured).sum())


def test_lines_are_added_along_the_axis_that_bends(formula_objective, samples):
    objective = formula_objective(ridge, [0.0, 0.0], samples)
    found = adaptive_surface(objective, PLANE, XS, YS, seed=1, max_evaluations=600)
    across, along = ((found.measured.double().mean(dim=d) > 0.15).sum() for d in (1, 0))
    assert along <= 12  # 9 at the beginning: nothing changes that way
    assert across > 20


def test_an_exhausted_budget_says_what_was_reached(formula_objective, samples):
    def rough(w, x):
        return 2 + torch.sin(40 * w[0]) * torch.cos(40 * w[1]) + x[:, 0]

    objective = formula_objective(rough, [0.0, 0.0], samples)
    with pytest.warns(ConvergenceWarning, match=r"known to .* \(largest of 20 points\)"):
        found = adaptive_surface(objective, PLANE, XS, YS)
    true = torch.log(found.evaluation.mean / dense(rough, samples)).abs()[~found.measured]
    assert not found.converged
    assert found.error == pytest.approx(float(torch.quantile(true, 0.95)), rel=0.8)
    assert found.num_evaluations <= 81 * 21 // 8


def test_a_loss_of_zero_has_a_surface(formula_objective, samples):
    """Zero at a line of the first grid, where the logarithm is not finite."""
    objective = formula_objective(
        lambda w, x: (w[0] ** 2 + w[1] ** 2) + 0 * x[:, 0], [0.0, 0.0], samples
    )
    xs = torch.arange(-20, 21).double() / 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = adaptive_surface(objective, PLANE, xs, xs, tol=0.02, max_evaluations=400)
    assert found.evaluation.mean[20, 20] == 0
    assert (found.evaluation.mean - xs[:, None] ** 2 - xs**2).abs().max() < 0.03


def test_where_the_loss_is_not_finite_all_points_are_measured(formula_objective, samples):
    objective = formula_objective(lambda w, x: torch.sqrt(w[0]) + 1 + x[:, 0], [0.0, 0.0], samples)
    found = adaptive_surface(objective, PLANE, XS[::2], YS[::2])
    assert found.num_evaluations == 41 * 11 and found.error == 0
    assert found.evaluation.num_nonfinite == 20 * 11
    assert found.evaluation.mean[40].eq(found.evaluation.mean[40, 0]).all()


def test_small_grids_are_measured_whole(formula_objective, samples):
    objective = formula_objective(bowl, [0.0, 0.0], samples)
    found = adaptive_surface(objective, PLANE, XS[:7], YS[:5])
    assert found.measured.all() and found.num_held_out == 0


def test_a_killed_surface_goes_on(tmp_path, formula_objective, samples):
    calls = []

    def counted(w, x):
        calls.append(w)
        return bowl(w, x)

    objective = formula_objective(counted, [0.0, 0.0], samples)
    calls.clear()
    whole = adaptive_surface(objective, PLANE, XS, YS, max_evaluations=500)
    used = len(calls)

    def stop(done, total):
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adaptive_surface(
            objective, PLANE, XS, YS, max_evaluations=500, folder=tmp_path, progress=stop
        )
    calls.clear()
    found = adaptive_surface(objective, PLANE, XS, YS, max_evaluations=500, folder=tmp_path)
    rounds = len(list(tmp_path.iterdir()))
    # 81 on the first lines, and two files of 8; ends of each round show that it is the same loss
    assert len(calls) == used - 97 + 2 * rounds
    assert torch.equal(found.evaluation.total, whole.evaluation.total)
    assert found.error == whole.error


def test_reduced_precision_and_workers_are_those_of_the_sweep(tmp_path):
    x = torch.linspace(-2, 2, 60).sin().reshape(20, 3)
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))).float()
    objective = Objective(model, nn.CrossEntropyLoss(), (x, torch.arange(20) % 2))
    u, v = torch.randn(2, objective.size, generator=torch.Generator().manual_seed(0))
    plane = Plane(objective.weights(), u, v)
    xs, ys = XS[::10], YS[::5]  # measured whole
    alone = adaptive_surface(objective, plane, xs, ys, precision="bfloat16")
    assert alone.evaluation.provenance["plan"]["precision"] == "bfloat16"
    spread = adaptive_surface(objective, plane, xs, ys, precision="bfloat16", workers=2)
    assert torch.equal(spread.evaluation.total, alone.evaluation.total)
    full = adaptive_surface(objective, plane, xs, ys).evaluation
    assert not torch.equal(full.total, alone.evaluation.total)


def test_bad_axes_and_budgets_are_named(formula_objective, samples):
    objective = formula_objective(bowl, [0.0, 0.0], samples)
    with pytest.raises(ValueError, match="`ys` must hold at least two increasing values"):
        adaptive_surface(objective, PLANE, XS, YS.flip(0))
    with pytest.raises(ValueError, match="`tol` must be positive"):
        adaptive_surface(objective, PLANE, XS, YS, tol=0.0)
    with pytest.raises(ValueError, match=r"`max_evaluations` must be at least 140 .* got 100"):
        adaptive_surface(objective, PLANE, XS, YS, max_evaluations=100)
