import math

import pytest
import torch
from torch.testing import assert_close

from hessian import ConvergenceWarning
from pruning import net_trim_layer
from pruning.net_trim_refit import _Refit, refitted
from pruning.net_trim_targets import LayerTargets
from tests.test_pruning import net_trim_reference as reference
from tests.test_pruning.test_net_trim_layer import layer, normal, relu_goal


def sparse(W, share=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return W * (torch.rand(W.shape, generator=generator, dtype=W.dtype) > share)


def distances(U, X, Y, S=0.0):
    """By neuron: squared distance as the refit counts it, and of the outputs."""
    Z = X @ U.T + S
    off = torch.where(Y > 0, Z - Y, Z.relu())
    return off.square().sum(dim=0), (Z.relu() - Y).square().sum(dim=0)


@pytest.mark.oracle
def test_distance_is_the_least_on_the_support():
    pytest.importorskip("cvxpy")
    W, X = layer(15, 5, 90)
    S = normal(90, 5, seed=4)
    Y = (X @ W.T + S).relu()
    U = sparse(W)
    found = refitted(U, LayerTargets(X, Y, "relu", offset=S))
    assert torch.equal(found != 0, U != 0)
    after, _ = distances(found, X, Y, S)
    before, _ = distances(U, X, Y, S)
    for row in range(5):
        least = reference.refitted(X, Y[:, row], S[:, row], U[row] != 0)
        assert float(after[row]) == pytest.approx(least, rel=1e-5)
        assert least < float(before[row])


@pytest.mark.oracle
@pytest.mark.parametrize("lift", [0.0, 0.5])
def test_distance_is_the_least_within_the_bounds(lift):
    pytest.importorskip("cvxpy")
    W, X = layer(15, 5, 90)
    S = lift * normal(90, 5, seed=4)
    Y = (X @ W.T + S).relu()
    U = sparse(W)
    V = torch.zeros_like(Y)  # zero is within, and U breaks some
    if lift:
        V = torch.maximum(lift * normal(90, 5, seed=6).relu(), X @ U.T + S)
    found = refitted(U, LayerTargets(X, Y, "relu", bound=V, offset=S), scale=1.0)
    assert torch.equal(found != 0, U != 0)
    above = (X @ found.T + S - V).masked_fill(Y > 0, 0.0)
    assert float(above.max()) <= 1e-3
    after, _ = distances(found, X, Y, S)
    before, _ = distances(U, X, Y, S)
    free, _ = distances(refitted(U, LayerTargets(X, Y, "relu", offset=S)), X, Y, S)
    for row in range(5):
        least = reference.refitted(X, Y[:, row], S[:, row], U[row] != 0, V[:, row])
        assert float(after[row]) == pytest.approx(least, rel=2e-3)  # with the slack of 1e-3
        assert lift == 0.0 or float(after[row]) <= float(before[row])
    assert float(after.sum()) > 1.01 * float(free.sum())  # the bounds hold somewhere


def test_multipliers_take_few_updates_to_a_millionth(monkeypatch):
    W, X = layer(31, 9, 400)
    Y, active = relu_goal(W, X)
    calls, least = [], _Refit._least
    monkeypatch.setattr(_Refit, "_least", lambda self, *a: calls.append(1) or least(self, *a))
    found = refitted(sparse(W, 0.3), LayerTargets(X, Y, "relu"), scale=1e-3)
    assert float((X @ found.T).masked_fill(active.bool(), 0.0).max()) <= 1e-6
    assert 3 <= len(calls) <= 12  # a penalty alone needs more


def test_before_a_refit_silent_outputs_need_not_keep_to_their_bounds():
    W, X = layer(31, 12, 2000)
    X = X.relu()
    epsilon = 0.15 * float((X @ W.T).relu().norm())
    plain, fitted = (
        net_trim_layer(W, X, epsilon=epsilon, tol=1e-3, refit=refit) for refit in (False, True)
    )
    assert plain.converged and fitted.converged
    assert fitted.iterations < 0.7 * plain.iterations
    assert fitted.violation <= 1e-3 and fitted.discrepancy < plain.discrepancy


def test_a_support_that_cannot_be_fitted_is_iterated_on_rather_than_ruined():
    generator = torch.Generator().manual_seed(39)
    X = torch.randn(3000, 8, generator=generator, dtype=torch.float64).relu()
    X[:, -1] = 1.0
    W = torch.randn(4, 8, generator=generator, dtype=torch.float64) / 8**0.5
    epsilon = 0.2 * float((X @ W.T).relu().norm())
    found = {}
    for refit in (False, True):
        with pytest.warns(ConvergenceWarning):
            found[refit] = net_trim_layer(W, X, epsilon=epsilon, max_iterations=60, refit=refit)
    # On the support, what keeps to the bounds is four times as far off as ε.
    assert found[True].output_discrepancy <= found[False].output_discrepancy
    assert found[True].violation > 1e-3 and not found[True].converged
    whole = net_trim_layer(W, X, epsilon=epsilon, refit=True)
    assert whole.converged and whole.iterations > 60
    assert whole.output_discrepancy < found[False].output_discrepancy


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [36, 38, 88])
def test_steps_that_lead_further_away_are_damped(seed):
    pytest.importorskip("cvxpy")
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    W = torch.randn(1, 12, generator=generator, dtype=torch.float64) / 12**0.5
    Y = (X @ W.T - (1.5 if seed % 2 else 1.0)).relu()  # rarely active
    S = torch.full_like(Y, -1.5 if seed % 2 else -1.0)
    U = 0.6 * W * (torch.rand(1, 12, generator=generator) > 0.3)
    scale = float(Y[Y > 0].square().mean().sqrt())
    found = refitted(U, LayerTargets(X, Y, "relu", offset=S), scale=scale)
    after, _ = distances(found, X, Y, S)
    least = reference.refitted(X, Y[:, 0], S[:, 0], U[0] != 0, torch.zeros(60))
    assert float(after) == pytest.approx(least, rel=0.01)


def test_with_the_joint_ball_a_refit_waits_for_the_whole_iteration():
    for seed in range(5):
        W, X = normal(3, 6, seed=seed), normal(9, 6, seed=seed + 50)
        bound = (X @ W.T).clamp(max=0.0)
        options = {"bound": bound, "epsilon": 0.0, "ball": "joint"}
        plain, fitted = (net_trim_layer(W, X, **options, refit=refit) for refit in (False, True))
        assert plain.converged and fitted.converged
        assert fitted.iterations == plain.iterations


def test_bounds_that_no_weights_on_the_support_keep_leave_weights_as_they_are():
    X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]]).double()
    Y = torch.tensor([[2.0], [0.0], [0.0]]).double()
    V = torch.tensor([[0.0], [-1.0], [0.0]]).double()
    U = torch.tensor([[1.0, 0.0]]).double()  # of the second sample nothing comes out
    targets = LayerTargets(X, Y, "relu", bound=V)
    assert torch.equal(refitted(U, targets, scale=1.0), U)
    assert float(refitted(U, targets)[0, 0]) == pytest.approx(2.0)
    X[1] = 0.0
    with pytest.warns(ConvergenceWarning, match=r"outputs up to 0.5 of the scale \(goal 0.001\)"):
        trim = net_trim_layer(U, X, Y, bound=V, epsilon=0.5, refit=True, max_iterations=100)
    assert not trim.converged and trim.violation == pytest.approx(0.5)


def test_refit_is_stationary_and_never_further_away():
    W, X = layer(31, 9, 60)
    Y, _ = relu_goal(W, X)
    for seed, share in enumerate((0.2, 0.6, 0.9)):
        U = sparse(W, share, seed)
        U[2] = 0.0
        U[3, 1:] = 0.0  # supports of different sizes
        found = refitted(U, LayerTargets(X, Y, "relu"))
        assert not found[U == 0].any() and not found[2].any()
        before, after = distances(U, X, Y), distances(found, X, Y)
        assert torch.all(after[0] <= before[0]) and torch.all(after[1] <= before[1])
        Z = X @ found.T
        gradient = torch.where(Y > 0, Z - Y, Z.relu()).T @ X
        moved = torch.any(found != U, dim=1)
        assert moved.sum() >= 4  # the others' outputs would come no nearer
        scale = float((Y.T @ X).abs().max())
        assert float((gradient * (U != 0))[moved].abs().max()) < 1e-6 * scale


def test_a_neuron_whose_outputs_would_come_no_nearer_stays():
    # Least distance pulls an active output up from far below zero, where it costs nothing.
    X = torch.tensor([[1.0], [0.9], [-1.0]]).double()
    Y = torch.tensor([[0.0], [0.0], [1.0]]).double()
    U = torch.tensor([[0.5]]).double()
    targets = LayerTargets(X, Y, "relu")
    found = refitted(U, targets)
    before, after = distances(U, X, Y), distances(found, X, Y)
    assert torch.all(after[0] <= before[0]) and torch.all(after[1] <= before[1])
    grown = torch.tensor([[-5.0]]).double()
    X = torch.tensor([[1.0], [-0.2]]).double()
    Y = torch.tensor([[0.1], [1.0]]).double()
    found = refitted(grown, LayerTargets(X, Y, "relu"))
    assert torch.equal(found, grown)  # 0.1² + 0² before; the nearest is at about −0.1


def test_linear_refit_is_least_squares_on_the_support():
    W, X = layer(15, 5, 90)
    Y = X @ W.T + 0.1 * normal(90, 5, seed=3)
    U = sparse(W)
    found = refitted(U, LayerTargets(X, Y, "linear"))
    for row in range(5):
        kept = U[row] != 0
        expected = torch.linalg.lstsq(X[:, kept], Y[:, row : row + 1]).solution[:, 0]
        assert_close(found[row, kept], expected, rtol=1e-6, atol=1e-8)


def test_repeated_and_dead_inputs_do_no_harm():
    W, X = layer(15, 5, 10)
    X[:, 4] = X[:, 5]
    X[:, 6] = 0.0
    Y, _ = relu_goal(W, X)
    found = refitted(W, LayerTargets(X, Y, "relu"))
    assert torch.isfinite(found).all()
    U = sparse(W, 0.3)
    found = refitted(U, LayerTargets(X, Y, "relu"))
    assert torch.isfinite(found).all()
    assert torch.all(distances(found, X, Y)[0] <= distances(U, X, Y)[0])


def test_chunks_of_neurons_and_samples_do_not_matter(monkeypatch):
    W, X = layer(21, 6, 100)
    Y, _ = relu_goal(W, X)
    U, targets = sparse(W), LayerTargets(X, Y, "relu")
    whole = refitted(U, targets)
    bounded = refitted(U, targets, scale=1.0)
    for size in (1, 20_000):
        monkeypatch.setattr("pruning.net_trim_supports.CHUNK_BYTES", size)
        assert_close(refitted(U, targets), whole, rtol=1e-8, atol=1e-10)
        assert_close(refitted(U, targets, scale=1.0), bounded, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", ["relu", "linear"])
def test_refit_of_a_trim_keeps_zeros_and_brings_outputs_nearer(kind):
    W, X = layer(31, 7, 200)
    Y = X @ W.T if kind == "linear" else (X @ W.T).relu()
    epsilon = 0.2 * float(Y.norm())
    plain = net_trim_layer(W, X, epsilon=epsilon, kind=kind)
    fitted = net_trim_layer(W, X, epsilon=epsilon, kind=kind, refit=True)
    assert not fitted.weights[plain.weights == 0].any()
    assert fitted.converged and fitted.feasible and not fitted.joint
    assert fitted.output_discrepancy < 0.8 * plain.output_discrepancy
    assert fitted.discrepancy <= plain.discrepancy * (1 + 1e-6)
    Z = X @ fitted.weights.T
    off = Z - Y if kind == "linear" else (Z - Y) * (Y > 0)
    assert fitted.discrepancy == pytest.approx(float(off.norm()), rel=1e-9)
    assert fitted.objective == pytest.approx(float(fitted.weights.abs().sum()))
    assert 0.0 < fitted.lower_bound <= plain.objective * (1 + 1e-3)
    silent = Z.masked_fill(Y > 0, -math.inf)
    assert kind == "linear" or float(silent.max()) <= 1e-3 * fitted.scale


def test_refit_with_the_joint_ball_lets_silent_outputs_speak_up_together():
    W, X = layer(31, 7, 200)
    Y, _ = relu_goal(W, X)
    epsilon = 0.2 * float(Y.norm())
    plain, fitted = (
        net_trim_layer(W, X, epsilon=epsilon, ball="joint", refit=refit) for refit in (False, True)
    )
    assert fitted.converged and fitted.joint and fitted.violation > 1e-3
    assert fitted.lower_bound == plain.lower_bound
    assert fitted.output_discrepancy <= fitted.discrepancy < 0.8 * plain.discrepancy
    whole = distances(fitted.weights, X, Y)[0].sum().sqrt()
    assert fitted.discrepancy == pytest.approx(float(whole), rel=1e-9)


def test_refit_on_pruned_inputs_keeps_to_the_bound():
    W, X = layer(21, 6, 120)
    Y, active = relu_goal(W, X)
    changed = X + 0.1 * normal(*X.shape, seed=5)
    V = (changed @ W.T).relu()
    epsilon = math.sqrt(1.1) * float(((V - Y) * active).norm())
    plain = net_trim_layer(W, changed, Y, epsilon=epsilon, bound=V)
    fitted = net_trim_layer(W, changed, Y, epsilon=epsilon, bound=V, refit=True)
    before, after = (distances(t.weights, changed, Y)[1].sum().sqrt() for t in (plain, fitted))
    assert float(after) == pytest.approx(fitted.output_discrepancy)
    off = ((changed @ fitted.weights.T - Y) * active).norm()
    assert fitted.discrepancy == pytest.approx(float(off), rel=1e-9)
    assert fitted.converged and fitted.violation <= 1e-3
    above = (changed @ fitted.weights.T - V).masked_fill(active.bool(), 0.0)
    assert float(above.max()) <= 1e-3 * fitted.scale
    assert float(after) < 0.95 * float(before)
