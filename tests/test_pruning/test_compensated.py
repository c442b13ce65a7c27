import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import Eigenspace, Objective, gauss_newton_operator
from pruning import (
    CalibrationWarning,
    DenseDistance,
    EigenspaceSolver,
    KrylovSolver,
    compensate,
    compensated_prune,
    magnitude_prune,
)
from pruning.eigenspace_compensation import remove_compensated
from pruning.krylov_compensation import compensating_step, shortened
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(operator):
    return operator @ torch.eye(operator.size, dtype=operator.dtype)


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


def mlp_distance(**options):
    return DenseDistance(mlp(), normal(30, 4), batch_size=16, **options)


def linear_distance():
    return DenseDistance(seeded(lambda: nn.Linear(5, 3)), normal(40, 5), kind="squared")


def exact_space(H):
    values, V = torch.linalg.eigh(H)
    values, V = values.flip(0), V.flip(1)
    return Eigenspace(values, V, torch.zeros_like(values), math.inf, 3, True)


def mask_without(gone, size):
    alive = torch.ones(size, dtype=torch.bool)
    alive[gone] = False
    return alive


# One step by products


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_step_is_the_dense_solution_and_its_prediction_the_dense_quadratic(kind):
    distance = mlp_distance(kind=kind)
    w = distance.weights() + 0.05 * normal(distance.size, seed=4)
    alive = mask_without([0, 3, 11, 30, 50], distance.size)
    tau = 1e-2
    step = compensating_step(distance, w, alive, tau=tau, tol=1e-12, progress=0.0, max_products=200)
    G, g = dense(gauss_newton_operator(distance, w)), distance.gradient(w)
    f, z = alive, ~alive
    b = -(g[f] - G[f][:, z] @ w[z])
    x = torch.linalg.solve(G[f][:, f] + tau * torch.eye(int(f.sum())).double(), b)
    expected = torch.zeros_like(w)
    expected[f] = w[f] + step.length * x
    assert step.length == 1.0
    assert_close(step.weights, expected, rtol=1e-8, atol=1e-9)
    move = expected - w
    assert step.predicted_change == pytest.approx(float(g @ move + 0.5 * move @ G @ move), rel=1e-7)
    assert step.loss == pytest.approx(distance.loss(step.weights), rel=1e-12)
    assert step.loss_before == pytest.approx(distance.loss(w), rel=1e-12)


def test_on_a_quadratic_the_prediction_is_the_measured_change():
    distance = linear_distance()
    w = distance.weights() + 0.1
    step = compensating_step(distance, w, mask_without([0, 7], distance.size), tau=1e-3)
    assert step.loss - step.loss_before == pytest.approx(step.predicted_change, rel=1e-9)


def test_measured_change_approaches_the_prediction_for_small_removals():
    distance = mlp_distance()
    gaps = []
    for size in (0.02, 0.002):
        w = distance.weights()
        w[:6] *= size / w[:6].norm()
        distance.write_(w)
        small = DenseDistance(distance.model, normal(30, 4))
        step = compensating_step(small, w, mask_without(slice(0, 6), len(w)), tau=1e-6)
        gaps.append(abs(step.loss / step.predicted_change - 1.0))
    assert gaps[1] < 0.25 * gaps[0] and gaps[1] < 0.03


def test_step_at_fixed_zeros_is_a_gauss_newton_step_that_lowers_the_loss():
    distance = mlp_distance()
    alive = mask_without(slice(0, 12), distance.size)
    w = distance.weights() * alive
    step = compensating_step(distance, w, alive, tau=1e-4)
    assert step.loss < 0.5 * step.loss_before and not step.weights[~alive].any()
    assert step.num_products == step.solution.num_products


def test_products_are_counted_and_the_budget_kept():
    distance = mlp_distance()
    w = distance.weights()
    alive = mask_without([0, 3], len(w))
    step = compensating_step(distance, w, alive, tau=1e-3, tol=0.0, progress=0.0, max_products=7)
    assert step.num_products == 7 and step.solution.num_products == 6
    assert not step.solution.converged


def test_preconditioned_step_has_the_same_solution():
    distance = mlp_distance()
    w = distance.weights()
    alive = mask_without([0, 3, 11], len(w))
    scale = torch.linspace(0.5, 2.0, len(w)).double()
    options = {"tau": 1e-2, "tol": 1e-12, "progress": 0.0, "max_products": 300}
    plain = compensating_step(distance, w, alive, **options)
    scaled = compensating_step(distance, w, alive, preconditioner=lambda r: scale * r, **options)
    assert_close(plain.weights, scaled.weights, rtol=1e-7, atol=1e-8)


def test_overshooting_step_is_halved_until_the_loss_rises_again():
    assert shortened(lambda a: (a - 0.2) ** 2) == (0.25, pytest.approx(0.0025), 5)
    assert shortened(lambda a: (a - 1.5) ** 2) == (1.0, 0.25, 3)
    assert shortened(lambda a: math.inf if a > 0.3 else (a - 0.2) ** 2)[0] == 0.25


def test_step_that_never_helps_is_not_made():
    length, loss, asked = shortened(lambda a: a)
    assert length == 0.0 and loss == 0.0 and asked == 8


# One removal by an eigenspace


def brain_surgeon(w, H, count):
    """Optimal Brain Surgeon with a dense inverse, one weight after the other."""
    w, alive = w.clone(), torch.ones(len(w), dtype=torch.bool)
    for _ in range(count):
        places = alive.nonzero()[:, 0]
        inverse = torch.linalg.inv(H[places][:, places])
        j = int((w[places].square() / inverse.diagonal()).argmin())
        w[places] -= w[places[j]] / inverse[j, j] * inverse[:, j]
        w[places[j]] = 0.0
        alive[places[j]] = False
    return w, alive


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("count", [1, 5, 15])
def test_removal_is_optimal_brain_surgeon_with_the_damped_eigenspace(count, k):
    V, _ = torch.linalg.qr(normal(20, k))
    values = torch.linspace(9.0, 1.0, k).double()
    space = Eigenspace(values, V, torch.zeros(k).double(), 1.0, 0, True)
    w, tau = normal(20, seed=5), 0.3
    H = V @ torch.diag(values) @ V.T + tau * torch.eye(20).double()
    found = remove_compensated(
        w, torch.ones(20, dtype=torch.bool), space, tau=tau, count=count, batch=0.0
    )
    expected, alive = brain_surgeon(w, H, count)
    assert torch.equal(found.alive, alive)
    assert_close(found.weights, expected, rtol=1e-9, atol=1e-10)
    move = expected - w
    assert found.predicted_change == pytest.approx(
        float(0.5 * move @ (V @ torch.diag(values) @ V.T) @ move), rel=1e-9, abs=1e-15
    )


def test_a_batch_moves_the_rest_as_the_dense_block_formula_does():
    V, _ = torch.linalg.qr(normal(20, 4))
    values = torch.tensor([5.0, 3.0, 2.0, 1.0]).double()
    space = Eigenspace(values, V, torch.zeros(4).double(), 1.0, 0, True)
    w, tau = normal(20, seed=5), 0.3
    found = remove_compensated(
        w, torch.ones(20, dtype=torch.bool), space, tau=tau, count=6, batch=1.0
    )
    H = V @ torch.diag(values) @ V.T + tau * torch.eye(20).double()
    f, z = found.alive, ~found.alive
    assert int(z.sum()) == 6
    expected = torch.zeros_like(w)
    expected[f] = w[f] + torch.linalg.solve(H[f][:, f], H[f][:, z] @ w[z])
    assert_close(found.weights, expected, rtol=1e-9, atol=1e-10)


def test_negative_eigenvalues_count_for_nothing():
    V, _ = torch.linalg.qr(normal(20, 4))
    values = torch.tensor([5.0, -3.0, 2.0, -1.0]).double()
    both = Eigenspace(values, V, torch.zeros(4).double(), 1.0, 0, True)
    positive = Eigenspace(values[::2], V[:, ::2], torch.zeros(2).double(), 1.0, 0, True)
    w, alive = normal(20, seed=5), torch.ones(20, dtype=torch.bool)
    found, expected = (remove_compensated(w, alive, s, tau=0.3, count=6) for s in (both, positive))
    assert_close(found.weights, expected.weights)


# The whole method


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_sparsity_is_met_exactly_and_every_stage_says_where_it_is(sparsity):
    distance = mlp_distance()
    seen = []
    result = compensated_prune(
        distance.weights(),
        distance,
        sparsity=sparsity,
        stages=4,
        on_stage=lambda stage, w: seen.append((stage.sparsity, int((w == 0).sum()))),
    )
    zeros = math.ceil(sparsity * distance.size)
    assert int((result.weights == 0).sum()) == zeros
    assert result.sparsity == pytest.approx(zeros / distance.size)
    assert torch.equal(result.mask, result.weights != 0)
    assert [s for s, _ in seen] == [stage.sparsity for stage in result.stages]
    assert all(round(s * distance.size) == n for s, n in seen)
    left = [1.0] + [1.0 - stage.sparsity for stage in result.stages]
    ratios = [b / a for a, b in itertools.pairwise(left)]
    assert max(ratios) - min(ratios) < 0.06  # every stage removes the same share
    assert result.measured_change == pytest.approx(distance.loss(result.weights), abs=1e-12)
    assert result.num_products == sum(stage.num_products for stage in result.stages)


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_compensation_beats_removal_alone_by_far(kind):
    distance = mlp_distance(kind=kind)
    w = distance.weights()
    result = compensated_prune(
        w, distance, sparsity=0.5, solver=KrylovSolver(damping=1e-2, products=100), stages=6
    )
    assert distance.loss(result.weights) < 0.3 * distance.loss(magnitude_prune(w, 0.5).weights)


def test_one_stage_with_an_exact_hessian_is_optimal_brain_surgeon():
    distance = linear_distance()
    w = distance.weights()
    H = dense(gauss_newton_operator(distance, w))
    space = exact_space(H)
    solver = EigenspaceSolver(k=18, damping=0.01, batch=1e-9)
    result = compensated_prune(w, lambda w, alive: space, sparsity=0.5, solver=solver, stages=1)
    tau = 0.01 * float(space.values[-1])
    expected, _ = brain_surgeon(w, H + tau * torch.eye(18).double(), 9)
    assert_close(result.weights, expected, rtol=1e-9, atol=1e-10)
    assert math.isnan(result.measured_change) and result.num_products == 3
    assert result.predicted_change == pytest.approx(distance.loss(result.weights), rel=1e-9)


def test_both_solvers_agree_on_a_quadratic_with_all_eigenpairs():
    distance = linear_distance()
    w = distance.weights()
    krylov = KrylovSolver(damping=1e-9, tol=1e-13, progress=0.0, saliency_damping=1e-9)
    eigenspace = EigenspaceSolver(k=18, damping=1e-9, batch=1.0, tol=1e-10)
    # A stage removes one weight, so that saliencies are of the same matrices.
    found = [
        compensated_prune(w, distance, sparsity=1 / 18, solver=solver, stages=1).weights
        for solver in (krylov, eigenspace)
    ]
    assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_eigenspaces_of_an_objective_are_estimated_anew_at_every_stage():
    distance = mlp_distance()
    w = distance.weights()
    errors = []
    for k in (2, 30):
        solver = EigenspaceSolver(k=k, damping=0.01)
        result = compensated_prune(w, distance, sparsity=0.5, solver=solver, stages=4)
        assert int((result.weights == 0).sum()) == math.ceil(0.5 * len(w))
        assert len(result.stages) == 4 and result.num_products > 4 * k / 2
        errors.append(distance.loss(result.weights))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("noise", [1e-20, -1e-20, 0.0])
def test_an_eigenvalue_that_is_zero_but_for_rounding_does_not_set_the_damping(noise):
    A = normal(3, 8)
    space = exact_space(A.T @ A)
    space = replace(space, values=torch.cat([space.values[:3], space.values.new_full((5,), noise)]))
    result = compensated_prune(
        normal(8), lambda w, alive: space, sparsity=0.25, solver=EigenspaceSolver(k=8), stages=1
    )
    assert result.stages[0].tau == pytest.approx(0.1 * float(space.values[2]))


def test_labelled_objective_serves_the_eigenspace_solver():
    x = normal(30, 4)
    objective = Objective(mlp(), nn.CrossEntropyLoss(), (x, mlp()(x).argmax(1)))
    w = objective.weights()
    solver = EigenspaceSolver(k=10)
    result = compensated_prune(w, objective, sparsity=0.5, solver=solver, stages=3)
    assert result.measured_change == pytest.approx(
        objective.loss(result.weights) - objective.loss(w), abs=1e-12
    )


def test_excluded_parameters_keep_their_count_and_count_for_the_sparsity():
    distance = mlp_distance()
    w = distance.weights()
    result = compensated_prune(w, distance, sparsity=0.6, exclude=["*.bias"], stages=3)
    parts = distance.unflatten(result.mask.double())
    assert parts["0.bias"].all() and parts["2.bias"].all()
    assert int((~result.mask).sum()) == math.ceil(0.6 * len(w))
    with pytest.raises(
        ValueError, match=r"`sparsity` must be at most 0\.8235294118 with what `exclude`"
    ):
        compensated_prune(w, distance, sparsity=0.9, exclude=["*.bias"])
    with pytest.raises(ValueError, match=r'`exclude` pattern "conv" matches none of 0\.weight'):
        compensated_prune(w, distance, sparsity=0.5, exclude=["conv"])
    with pytest.raises(ValueError, match="`exclude` needs an Objective"):
        compensated_prune(w, lambda w, a: None, sparsity=0.5, solver="eigenspace", exclude=["0.*"])


@pytest.mark.parametrize("solver", ["krylov", "eigenspace"])
def test_every_parameter_may_get_its_share_in_every_stage(solver):
    distance = mlp_distance()
    w = distance.weights()
    chosen = KrylovSolver() if solver == "krylov" else EigenspaceSolver(k=8, batch=0.05)
    halves: list[float] = []

    def look(stage, weights):
        parts = distance.unflatten(weights)
        halves.extend(
            float((parts[name] == 0).double().mean()) for name in ("0.weight", "2.weight")
        )

    options = {"solver": chosen, "stages": [0.25], "on_stage": look}
    result = compensated_prune(w, distance, sparsity=0.5, allocation="uniform", **options)
    zeros = {name: int((p == 0).sum()) for name, p in distance.unflatten(result.weights).items()}
    assert zeros == {"0.weight": 12, "0.bias": 3, "2.weight": 9, "2.bias": 2} or zeros == {
        "0.weight": 12,
        "0.bias": 3,
        "2.weight": 9,
        "2.bias": 1,
    }
    assert sum(zeros.values()) == math.ceil(0.5 * len(w))
    assert halves[:2] == pytest.approx([0.25, 0.25], abs=0.09)
    shares = {"2.*": 0.0}
    result = compensated_prune(w, distance, sparsity=0.5, allocation=shares, **options)
    parts = distance.unflatten(result.weights)
    assert parts["2.weight"].all() and parts["2.bias"].all()
    assert int((result.weights == 0).sum()) == math.ceil(0.5 * len(w))
    with pytest.raises(ValueError, match="with this `allocation`"):
        compensated_prune(w, distance, sparsity=0.9, allocation=shares, **options)


def test_zeros_of_an_already_sparse_network_stay():
    model = mlp()
    with torch.no_grad():
        model[0].weight[::2] = 0.0
    distance = DenseDistance(model, normal(30, 4))
    w = distance.weights()
    before = w == 0
    result = compensated_prune(w, distance, sparsity=0.6, stages=2)
    assert not result.weights[before].any() and int((result.weights == 0).sum()) == 31
    with pytest.raises(ValueError, match=r"`sparsity` must be at least 0\.2353"):
        compensated_prune(w, distance, sparsity=0.1)


def test_model_random_state_and_arguments_are_left_as_found():
    distance = mlp_distance()
    w = distance.weights()
    before, state = w.clone(), torch.get_rng_state()
    results = [
        compensated_prune(w, distance, sparsity=0.5, stages=2, solver=solver).weights
        for solver in ("krylov", "krylov", "eigenspace")
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(distance.weights(), before) and torch.equal(w, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in distance.model.parameters())
    assert not distance.model[0]._forward_hooks


def test_convolutions_and_frozen_batch_norm_are_pruned_together():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )
    model[1].running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    distance = DenseDistance(model.eval(), normal(40, 1, 6, 6), batch_size=20)
    w = distance.weights()
    result = compensated_prune(
        w, distance, sparsity=0.5, solver=KrylovSolver(damping=0.01), stages=5
    )
    assert distance.loss(result.weights) < 0.2 * distance.loss(magnitude_prune(w, 0.5).weights)


def test_fewer_calibration_rows_than_inputs_are_told():
    distance = DenseDistance(mlp(), normal(6, 4))  # the last layer has 7 inputs with its bias
    with pytest.warns(CalibrationWarning, match=r"1 of 2 layers .* `2\.weight` with 6 for 7"):
        compensated_prune(distance.weights(), distance, sparsity=0.2, stages=1)


def test_further_steps_at_the_same_zeros_follow_the_curve():
    distance = mlp_distance()
    w = distance.weights()
    found = [
        compensated_prune(
            w,
            distance,
            sparsity=0.6,
            solver=KrylovSolver(products=60 * steps, steps=steps, damping=1e-2),
            stages=1,
        )
        for steps in (1, 3)
    ]
    assert found[1].measured_change < 0.7 * found[0].measured_change
    change = found[1].stages[0].loss - found[1].stages[0].loss_before
    assert found[1].measured_change == pytest.approx(change)


def test_bad_input_is_refused_before_anything_is_done(unchecked_shapes):
    distance = mlp_distance()
    w = distance.weights()
    for sparsity in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\)"):
            compensated_prune(w, distance, sparsity=sparsity)
    with pytest.raises(ValueError, match="`w` must be finite, got 1 entries"):
        compensated_prune(torch.cat([w[1:], w.new_tensor([math.nan])]), distance, sparsity=0.5)
    with pytest.raises(ValueError, match="`w` must be a flat vector with one entry for each"):
        compensated_prune(w[1:], distance, sparsity=0.5)
    with pytest.raises(ValueError, match='`solver` must be "krylov"'):
        compensated_prune(w, distance, sparsity=0.5, solver=KrylovSolver)
    with pytest.raises(ValueError, match="`stages` must be at least 1"):
        compensated_prune(w, distance, sparsity=0.5, stages=0)
    with pytest.raises(ValueError, match="`stages` must increase"):
        compensated_prune(w, distance, sparsity=0.5, stages=[0.3, 0.2])
    with pytest.raises(ValueError, match="`stages` must increase"):
        compensated_prune(w, distance, sparsity=0.5, stages=[0.3, 0.6])
    objective = Objective(mlp(), nn.MSELoss(), (normal(9, 4), normal(9, 3)))
    with pytest.raises(TypeError, match='must be a DenseDistance for `solver="krylov"`'):
        compensated_prune(w, objective, sparsity=0.5)
    with pytest.raises(TypeError, match="must be an Objective or a function"):
        compensated_prune(w, 3.0, sparsity=0.5, solver="eigenspace")
    with pytest.raises(ValueError, match="eigenvectors of 51 entries"):
        space = exact_space(torch.eye(4).double())
        compensated_prune(w, lambda w, a: space, sparsity=0.5, solver="eigenspace")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KrylovSolver(products=1), "`products` at least 2 a step"),
        (lambda: KrylovSolver(steps=0), "`steps` must be at least 1"),
        (lambda: KrylovSolver(damping=0.0), "`damping` must be positive"),
        (lambda: EigenspaceSolver(k=0), "`k` must be at least 1"),
        (lambda: EigenspaceSolver(batch=-1.0), "`batch` must be positive"),
    ],
)
def test_solver_options_out_of_range_say_what_to_change(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Weights that another method pruned


def test_compensated_supports_are_least_squares_on_them():
    """Of a linear layer every output is a regression on the inputs that it has left."""
    distance = linear_distance()
    pruned = magnitude_prune(distance.weights(), 0.5).weights
    solver = KrylovSolver(damping=1e-9, tol=1e-12, progress=0.0, products=200)
    found = compensate(pruned, distance, solver=solver)
    X = torch.cat([normal(40, 5), torch.ones(40, 1, dtype=torch.float64)], dim=1)
    W, b = distance.unflatten(distance.weights()).values()
    rows = torch.cat([W, b[:, None]], dim=1)
    left, bias = distance.unflatten(pruned).values()
    expected = torch.zeros_like(rows)
    masks = torch.cat([left, bias[:, None]], dim=1) != 0
    for row, goal, mask in zip(expected, rows, masks, strict=True):
        row[mask] = torch.linalg.lstsq(X[:, mask], X @ goal).solution
    moved, shift = distance.unflatten(found.weights).values()
    assert_close(torch.cat([moved, shift[:, None]], dim=1), expected, rtol=1e-6, atol=1e-7)
    assert found.sparsity == 0.5
    assert found.measured_change < 0.0


def test_compensated_supports_keep_their_zeros_and_come_nearer():
    distance = mlp_distance(temperature=2.0)
    pruned = magnitude_prune(distance.weights(), 0.6).weights
    before = pruned.clone()
    found = compensate(pruned, distance, solver=KrylovSolver(preconditioner="rows", steps=2))
    assert torch.equal(found.weights == 0, pruned == 0)
    assert distance.loss(found.weights) < 0.5 * distance.loss(pruned)
    assert found.measured_change == pytest.approx(
        distance.loss(found.weights) - distance.loss(pruned)
    )
    assert 0 < found.num_products <= 50
    assert torch.equal(pruned, before)


def test_supports_that_cannot_move_are_refused(unchecked_shapes):
    distance = mlp_distance()
    w = distance.weights()
    with pytest.raises(ValueError, match="`w` must hold weights that can move"):
        compensate(torch.zeros_like(w), distance)
    with pytest.raises(ValueError, match="`w` must be"):
        compensate(w[:-1], distance)
    with pytest.raises(ValueError, match="finite"):
        compensate(w * torch.nan, distance)
    with pytest.raises(TypeError, match="`curvature` must be a DenseDistance"):
        compensate(w, Objective(mlp(), nn.CrossEntropyLoss(), (normal(3, 4), torch.arange(3))))
