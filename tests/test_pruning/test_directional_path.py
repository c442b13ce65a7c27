import math

import pytest
import torch
from torch.testing import assert_close

from hessian import ConvergenceWarning, Eigenspace, Objective, Operator, leading_eigenspace
from pruning import (
    directional_path,
    directional_paths,
    directional_prune,
    directional_scores,
    first_clip,
)

D, K = 30, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def space_of(V, values, converged=True):
    zeros = torch.zeros_like(values)
    return Eigenspace(values, V, zeros, 1.0, 7, converged)


def valley(seed=0, d=D, k=K):
    V, _ = torch.linalg.qr(normal(d, k, seed=seed))
    return normal(d, seed=seed + 1), space_of(V, torch.linspace(5.0, 1.0, k).double())


def by_definition(w, space, *, zeros=None, lam=math.inf, ridge=0.0):
    """The path with a dense projector, solved anew at each event; one weight at a time."""
    u, now, V = w.clone(), 0.0, space.vectors
    zeros = len(w) if zeros is None else zeros
    while now < lam and int((u == 0).sum()) < zeros:
        A = u != 0
        VA = V * A[:, None]
        if ridge:
            H = VA @ torch.diag(space.values) @ VA.T
            P = torch.linalg.inv(torch.eye(len(w)).double() + H / ridge)
        else:
            P = torch.eye(len(w)).double() - VA @ torch.linalg.pinv(VA)
        direction = -(P @ u.sign()) * A
        rate = -direction * u.sign()
        times = torch.where(rate > 1e-10, u.abs() / rate, math.inf)
        step = float(times.min())
        if step == math.inf or now + step >= lam:
            return u + (lam - now) * direction, lam
        u = u + step * direction
        u[times.argmin()] = 0.0
        now += step
    return u, now


@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_path_is_the_definition_with_a_dense_projector(sparsity, ridge, seed):
    w, space = valley(seed)
    result = directional_path(w, space, sparsity=sparsity, ridge=ridge)
    u, lam = by_definition(w, space, zeros=round(sparsity * D), ridge=ridge)
    assert_close(result.weights, u, rtol=1e-9, atol=1e-9)
    assert result.lam == pytest.approx(lam, rel=1e-9)
    assert result.sparsity == pytest.approx(sparsity) and result.num_events == round(sparsity * D)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_a_lambda_between_two_events_is_met_exactly(ridge):
    w, space = valley()
    for lam in (0.05, 0.3, 0.9):
        result = directional_path(w, space, lam=lam, ridge=ridge)
        assert_close(result.weights, by_definition(w, space, lam=lam, ridge=ridge)[0])
        assert result.lam == lam


def test_up_to_the_first_clip_it_is_directional_pruning():
    w, space = valley()
    scores = directional_scores(w, space)
    lam = 0.99 * first_clip(w, scores)
    result = directional_path(w, space, lam=lam)
    assert_close(result.weights, directional_prune(w, scores, lam).weights)
    assert result.num_events == 0


def test_hard_path_stays_in_the_valley_where_one_shot_pruning_leaves_it():
    w, space = valley(d=200)
    result = directional_path(w, space, sparsity=0.8)
    one_shot = directional_prune(w, directional_scores(w, space), result.lam).weights
    assert float(space.project_sharp(result.weights - w).norm()) < 1e-9
    assert float(space.project_sharp(one_shot - w).norm()) > 0.1
    assert abs(result.predicted_change) < 1e-15


def test_long_path_with_many_updates_of_the_inverse_stays_exact():
    w, space = valley(d=300, k=20)
    result = directional_path(w, space, sparsity=0.9)
    u, lam = by_definition(w, space, zeros=270)
    assert_close(result.weights, u, rtol=1e-7, atol=1e-8)
    assert result.lam == pytest.approx(lam, rel=1e-8)


def test_batches_of_events_come_near_the_exact_path_and_meet_the_count():
    w, space = valley(d=400, k=10)
    exact = directional_path(w, space, sparsity=0.6)
    errors = []
    for batch in (32, 8, 2):
        rough = directional_path(w, space, sparsity=0.6, batch=batch)
        assert int((rough.weights == 0).sum()) == 240
        errors.append(float((rough.weights - exact.weights).norm()))
    assert errors[0] > errors[1] > errors[2] > 0


def test_zeros_stay_and_signs_are_kept():
    w, space = valley(d=60)
    w[::5] = 0.0
    result = directional_path(w, space, sparsity=0.5)
    assert torch.all(result.weights[::5] == 0)
    alive = result.mask
    assert torch.all(result.weights[alive].sign() == w[alive].sign())
    assert_close(result.weights, by_definition(w, space, zeros=30)[0])


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_one_path_passes_all_sparsities_where_single_ones_end(ridge):
    w, space = valley()
    sparsities = [0.1, 0.35, 0.4, 0.7]
    found = list(directional_paths(w, space, sparsities, ridge=ridge))
    for sparsity, stop in zip(sparsities, found, strict=True):
        alone = directional_path(w, space, sparsity=sparsity, ridge=ridge)
        assert torch.equal(stop.weights, alone.weights)
        assert torch.equal(stop.mask, alone.mask)
        for name in ("lam", "sparsity", "num_events", "predicted_change", "num_products"):
            assert getattr(stop, name) == getattr(alone, name)


def test_stops_on_the_way_meet_their_counts_in_batches_too():
    w, space = valley(d=400)
    found = list(directional_paths(w, space, [0.101, 0.5, 0.505], batch=7))
    assert [int((stop.weights == 0).sum()) for stop in found] == [41, 200, 202]
    exact = directional_path(w, space, sparsity=0.505).weights
    assert float((found[-1].weights - exact).norm() / (exact - w).norm()) < 0.05


def test_a_sparsity_out_of_reach_comes_after_those_before_it():
    w, space = valley(d=10, k=6)
    stops = directional_paths(w, space, [0.2, 0.9])
    assert next(stops).sparsity == pytest.approx(0.2)
    with pytest.raises(ValueError, match="Take fewer eigenpairs"):
        next(stops)


@pytest.mark.parametrize("sparsities", [[], [0.5, 0.5], [0.5, 0.2]])
def test_sparsities_that_do_not_increase_are_refused_at_the_door(sparsities):
    with pytest.raises(ValueError, match="`sparsities` must be one or more that increase"):
        directional_paths(*valley(), sparsities)


def test_path_ends_where_the_sharp_directions_fix_every_weight():
    w, space = valley()
    with pytest.raises(ValueError, match=r"`sparsity` must be at most 0\.8000.*eigenspace.first"):
        directional_path(w, space, sparsity=0.9)
    assert directional_path(w, space, sparsity=0.9, ridge=0.1).sparsity == pytest.approx(0.9)


def test_change_of_the_loss_is_measured_and_predicted_on_a_quadratic():
    w, space = valley()
    root = torch.diag(space.values.sqrt()) @ space.vectors.T
    model = torch.nn.Linear(D, 1, bias=False, dtype=torch.float64)
    model.weight.data.copy_(w)
    # L(u) = ½ |root (u − w)|²: a mean over K rows of K/2 squares.
    X = root * (K / 2) ** 0.5
    objective = Objective(model, torch.nn.MSELoss(), (X, X @ w[:, None]))
    result = directional_path(w, space, sparsity=0.7, ridge=3.0, objective=objective)
    assert result.predicted_change > 0.01
    assert result.measured_change == pytest.approx(result.predicted_change, rel=1e-9)
    assert math.isnan(directional_path(w, space, lam=0.1).measured_change)


def test_float32_agrees_with_float64():
    w, space = valley(d=200)
    single = space_of(space.vectors.float(), space.values)
    result = directional_path(w.float(), single, sparsity=0.5)
    assert_close(result.weights.double(), by_definition(w, space, zeros=100)[0], rtol=0, atol=1e-4)


def test_unconverged_eigenspace_is_told():
    w, space = valley()
    with pytest.warns(ConvergenceWarning, match="directions count as flat that are not"):
        result = directional_path(w, space_of(space.vectors, space.values, False), lam=0.1)
    assert not result.converged and result.num_products == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Exactly one of `sparsity` and `lam`"),
        ({"sparsity": 0.5, "lam": 1.0}, "Exactly one of `sparsity` and `lam`"),
        ({"sparsity": -0.1}, r"`sparsity` must be in \[0, 1\]"),
        ({"lam": -1.0}, "`lam` must be finite and not negative"),
        ({"lam": math.inf}, "`lam` must be finite and not negative"),
        ({"lam": 1.0, "batch": 0}, "`batch` must be at least 1"),
        ({"lam": 1.0, "ridge": -1.0}, "`ridge` must be finite and not negative"),
    ],
)
def test_options_out_of_range_say_what_to_change(options, message):
    w, space = valley()
    with pytest.raises(ValueError, match=message):
        directional_path(w, space, **options)


def test_weights_that_do_not_fit_are_refused():
    w, space = valley()
    with pytest.raises(ValueError, match="`w` must have 30 entries like the eigenspace, got 29"):
        directional_path(w[1:], space, lam=1.0)
    w[3] = math.nan
    with pytest.raises(ValueError, match="`w` must be finite"):
        directional_path(w, space, lam=1.0)


def test_weights_given_are_not_changed():
    w, space = valley()
    before = w.clone()
    directional_path(w, space, sparsity=0.5)
    assert torch.equal(w, before)


def test_eigenspace_from_products_serves():
    H = Operator.from_matrix(torch.diag(torch.tensor([9.0, 4.0, 0.0, 0.0, 0.0]).double()))
    space = leading_eigenspace(H, k=2)
    w = torch.tensor([1.0, -1.0, 3.0, -2.0, 1.0]).double()
    result = directional_path(w, space, sparsity=0.2)
    assert_close(result.weights, torch.tensor([1.0, -1.0, 2.0, -1.0, 0.0]).double())
