import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from hessian import ConvergenceWarning, NonFiniteError
from pruning import LayerProgram, net_trim_layer, net_trim_path
from pruning.net_trim_admm import Splitting
from pruning.net_trim_certificate import lower_bound
from pruning.net_trim_targets import LayerTargets
from tests.test_pruning import net_trim_reference as reference


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(n, m, p, seed=0):
    """Weights with a bias, and inputs that differ in size, with ones."""
    X = normal(p, n, seed=seed) * torch.linspace(0.3, 3.0, n).double()
    X[:, -1] = 1.0
    return normal(m, n, seed=seed + 1) / math.sqrt(n), X


def relu_goal(W, X):
    Z = X @ W.T
    return Z.relu(), Z > 0


SHAPES = [(21, 5, 100), (31, 8, 20), (51, 20, 300)]


@pytest.mark.oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["split", "joint", "linear"])
def test_objective_and_support_are_those_of_an_interior_point_solver(shape, case):
    pytest.importorskip("cvxpy")
    W, X = layer(*shape)
    T, active = relu_goal(W, X)
    if case == "linear":
        T, active = X @ W.T, torch.ones_like(active)
    epsilon = 0.1 * float(T.norm())
    least, U = reference.solved(X, T, active, epsilon, joint=case == "joint")
    options = {"kind": "linear"} if case == "linear" else {"ball": case}
    trim = net_trim_layer(W, X, epsilon=epsilon, **options)
    assert trim.converged and trim.feasible
    assert trim.objective == pytest.approx(least, rel=1e-4)
    exact = net_trim_layer(W, X, epsilon=epsilon, tol=1e-8, max_iterations=20_000, **options)
    assert exact.objective == pytest.approx(least, rel=1e-6)
    # The solver leaves up to 3e-5 where the weights are zero.
    assert torch.equal(exact.weights.abs() > 1e-4, U.abs() > 1e-4)
    assert exact.lower_bound <= exact.objective * (1 + 1e-7)
    assert exact.gap < 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize("ball", ["split", "joint"])
def test_pruned_inputs_keep_the_original_feasible_and_agree_with_the_solver(ball):
    pytest.importorskip("cvxpy")
    W, X = layer(21, 6, 120)
    Y, active = relu_goal(W, X)
    changed = X + 0.1 * normal(*X.shape, seed=5)
    V = changed @ W.T
    epsilon = 1.05 * float(((V - Y) * active).norm())
    trim = net_trim_layer(W, changed, Y, epsilon=epsilon, bound=V, ball=ball)
    assert trim.converged and trim.objective <= float(W.abs().sum())
    T = torch.where(active, Y, V)
    least, _ = reference.solved(changed, T, active, epsilon, joint=ball == "joint")
    assert trim.objective == pytest.approx(least, rel=1e-4)
    Z = changed @ trim.weights.T
    assert float(((Z - Y) * active).norm()) <= epsilon * (1 + 1e-3)
    worst = float((Z - V)[~active].max()) / trim.scale
    if ball == "split":
        assert worst <= 1e-3
    assert trim.violation == pytest.approx(max(worst, 0.0), abs=1e-12)


@pytest.mark.oracle
def test_penalties_and_offsets_agree_with_the_solver():
    pytest.importorskip("cvxpy")
    W, X = layer(21, 6, 120)
    S = normal(120, 6, seed=7)
    Z = X @ W.T + S
    active = Z > 0
    epsilon = 0.1 * float(Z.relu().norm())
    penalty = torch.linspace(0.5, 4.0, 21).double()
    T = Z.relu() - S
    least, U = reference.solved(X, T, active, epsilon, penalty=penalty)
    trim = net_trim_layer(W, X, epsilon=epsilon, offset=S, penalty=penalty, tol=1e-6)
    assert trim.converged
    assert trim.objective == pytest.approx(least, rel=1e-5)
    assert trim.lower_bound == pytest.approx(least, rel=1e-3)
    free = penalty.clone()
    free[-1] = 0.0
    least, U = reference.solved(X, T, active, epsilon, penalty=free)
    trim = net_trim_layer(
        W, X, epsilon=epsilon, offset=S, penalty=penalty, penalise_bias=False, tol=1e-6
    )
    assert trim.converged and trim.lower_bound == -math.inf
    assert trim.objective == pytest.approx(least, rel=1e-5)
    assert_close(trim.weights, U, atol=2e-3, rtol=0)
    assert torch.all(trim.weights[:, -1] != 0)
    # A bias that stays is an offset.
    fixed = net_trim_layer(W[:, :-1], X[:, :-1], epsilon=epsilon, offset=W[:, -1])
    whole = net_trim_layer(W[:, :-1], X[:, :-1], epsilon=epsilon, offset=W[:, -1].expand(120, 6))
    assert_close(fixed.weights, whole.weights)
    Z = X[:, :-1] @ fixed.weights.T + W[:, -1]
    assert fixed.output_discrepancy == pytest.approx(float((Z.relu() - (X @ W.T).relu()).norm()))


@pytest.mark.parametrize("relaxation", [1.0, 1.6])
def test_iterations_are_the_published_ones(relaxation):
    W, X = layer(9, 4, 60)
    T, active = relu_goal(W, X)
    program = LayerProgram(W, X, rho=3.0, relaxation=relaxation)
    work = program.split()
    expected = reference.published(
        X,
        T,
        active,
        2.0,
        c0=work.c0,
        threshold=work.unit / 3.0,
        iterations=40,
        relaxation=relaxation,
        changes=[(15, 4.0), (30, 0.3)],
    )
    for k, sparse in enumerate(expected, start=1):
        if k % 3:
            work.step(2.0 / work.c0)
        else:
            work.measured_step(2.0 / work.c0)
        assert_close(work.sparse, sparse, rtol=1e-9, atol=1e-12)
        if k in (15, 30):
            work.change_rho({15: 4.0, 30: 0.3}[k])
    assert any(torch.any(sparse == 0) for sparse in expected)


def test_evidence_is_what_the_weights_do():
    W, X = layer(31, 7, 200)
    Y, active = relu_goal(W, X)
    epsilon = 0.2 * float(Y.norm())
    trim = net_trim_layer(W, X, epsilon=epsilon)
    Z = X @ trim.weights.T
    assert trim.discrepancy == pytest.approx(float((Z - Y)[active].norm()), rel=1e-12)
    assert trim.violation * trim.scale == pytest.approx(float(Z[~active].max()), rel=1e-9)
    assert trim.scale == pytest.approx(float(Y[active].square().mean().sqrt()))
    assert trim.target_norm == pytest.approx(float(Y.norm()))
    assert trim.output_discrepancy == pytest.approx(float((Z.relu() - Y).norm()), rel=1e-12)
    assert trim.output_discrepancy <= epsilon * (1 + 2e-3)
    assert trim.objective == pytest.approx(float(trim.weights.abs().sum()))
    assert trim.ratio == pytest.approx(trim.discrepancy / epsilon)
    assert 0.0 < trim.density < 1.0 and trim.density * 31 * 7 == int((trim.weights != 0).sum())
    assert 0.0 < trim.primal_residual <= 1e-4 and 0.0 < trim.dual_residual <= 1e-3
    assert trim.flops == trim.iterations * (4 * 31 * 7 * 200 + 2 * 31 * 31 * 7)
    assert trim.seconds > 0.0
    joint = net_trim_layer(W, X, epsilon=epsilon, ball="joint")
    Z = X @ joint.weights.T
    off = torch.where(active, Z - Y, Z.relu())
    assert joint.joint and joint.discrepancy == pytest.approx(float(off.norm()), rel=1e-12)
    assert joint.objective < trim.objective  # it allows more
    assert joint.output_discrepancy <= joint.discrepancy <= epsilon * (1 + 1e-3)


def test_no_discrepancy_gives_the_weights_back_where_they_are_determined():
    W, X = layer(15, 6, 200)
    assert all(int(torch.linalg.matrix_rank(X[on])) == 15 for on in (X @ W.T > 0).T)
    trim = net_trim_layer(W, X, epsilon=0.0, tol=1e-7)
    assert trim.converged and trim.feasible and trim.discrepancy <= 1e-6 * trim.target_norm
    assert_close(trim.weights, W, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "linear"])
def test_a_discrepancy_as_large_as_the_outputs_gives_zero(kind):
    W, X = layer(15, 6, 50)
    Y = (X @ W.T).relu() if kind == "relu" else X @ W.T
    for factor in (1.0 + 1e-12, 3.0):
        trim = net_trim_layer(W, X, epsilon=factor * float(Y.norm()), kind=kind)
        assert trim.converged and not trim.weights.any()
        assert (trim.objective, trim.lower_bound, trim.gap, trim.iterations) == (0.0, 0.0, 0.0, 0)
        assert trim.discrepancy == pytest.approx(float(Y.norm()))
    assert net_trim_layer(W, X, epsilon=0.98 * float(Y.norm()), kind=kind).weights.any()


def test_zero_does_not_do_where_a_bound_is_negative():
    W, X = layer(15, 6, 50)
    Y, _ = relu_goal(W, X)
    trim = net_trim_layer(W, X, epsilon=2.0 * float(Y.norm()), bound=X @ W.T, max_iterations=10_000)
    assert trim.converged and trim.weights.any()
    assert trim.ratio < 0.9 and trim.iterations < 10_000  # the ball does not hold


def test_objectives_fall_along_a_path_and_are_those_of_cold_starts():
    W, X = layer(31, 7, 200)
    norm = float(relu_goal(W, X)[0].norm())
    program = LayerProgram(W, X)
    seen = []
    epsilons = [g * norm for g in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0)]
    path = net_trim_path(
        program, epsilons, tol=1e-6, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 7) for i in range(1, 8)]
    assert all(trim.converged for trim in path)
    objectives = [trim.objective for trim in path]
    assert objectives == sorted(objectives, reverse=True) and objectives[-1] == 0.0
    assert objectives[0] < float(W.abs().sum())
    for trim in path:  # the program goes on from its state, and must leave what it gave alone
        assert trim.objective == pytest.approx(float(trim.weights.abs().sum()), rel=1e-12)
        off = ((X @ trim.weights.T - relu_goal(W, X)[0]) * relu_goal(W, X)[1]).norm()
        assert trim.discrepancy == pytest.approx(float(off), rel=1e-9)
    for trim in path[::2]:
        cold = net_trim_layer(W, X, epsilon=trim.epsilon, tol=1e-6)
        assert trim.objective == pytest.approx(cold.objective, rel=1e-5)
    again = program.solve(epsilons[1], tol=1e-6)
    warm = program.solve(epsilons[1], tol=1e-6)
    assert warm.iterations <= 20 < again.iterations


def test_one_factor_serves_the_whole_path(monkeypatch):
    W, X = layer(11, 3, 60)
    program = LayerProgram(W, X)
    calls = []
    real = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda A: calls.append(A) or real(A))
    net_trim_path(program, [0.5, 1.0, 2.0])
    assert len(calls) == 1


def sparse_row(n, s, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(1, n, dtype=torch.float64)
    places = torch.randperm(n, generator=generator)[:s]
    w[0, places] = torch.randn(s, generator=generator, dtype=torch.float64)
    return w


def test_sparse_weights_are_recovered_from_enough_gaussian_samples_only():
    n, s, mu = 40, 3, 2
    # From (11 s + 7) μ log n samples on, each comes back with probability at least 1 − n^(1 − μ).
    proved = (11 + 7 / s) * mu
    rates = {}
    for factor in (0.7, proved):
        found = 0
        for seed in range(4):
            w = sparse_row(n, s, seed)
            X = normal(math.ceil(factor * s * math.log(n)), n, seed=100 + seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                U = net_trim_layer(w, X, epsilon=0.0, tol=1e-7).weights
            found += float((U - w).norm() / w.norm()) < 1e-3
        rates[factor] = found
    assert rates == {0.7: 0, proved: 4}


@pytest.mark.parametrize("p", [12, 200])
def test_moments_of_a_linear_layer_give_what_its_samples_give(p):
    W, X = layer(21, 6, p)
    Y = X @ W.T + 0.3 * normal(p, 6, seed=3)  # not what any weights give, where p > n
    left = Y - X @ torch.linalg.lstsq(X, Y, driver="gelsd").solution
    epsilon = math.hypot(float(left.norm()), 0.1 * float(Y.norm()))
    by_samples = LayerProgram(W, X, Y, kind="linear", gram=False).solve(epsilon, tol=1e-7)
    by_default = net_trim_layer(W, X, Y, kind="linear", epsilon=epsilon, tol=1e-7)
    moments = X.T @ X, Y.T @ X, float(Y.square().sum())
    by_moments = LayerProgram.from_gram(W, *moments).solve(epsilon, tol=1e-7)
    for trim in (by_default, by_moments):
        assert trim.converged
        assert_close(trim.weights, by_samples.weights, rtol=0, atol=1e-4)
        assert trim.objective == pytest.approx(by_samples.objective, rel=1e-6)
        off = float((X @ trim.weights.T - Y).norm())
        assert trim.discrepancy == pytest.approx(off, rel=1e-6)
        assert trim.target_norm == pytest.approx(float(Y.norm()), rel=1e-9)
        assert trim.lower_bound == pytest.approx(by_samples.objective, rel=1e-4)
    if p > 21:
        assert by_moments.flops / by_moments.iterations == 6 * 21 * 21 * 6
        with pytest.raises(ValueError, match=r"`epsilon` must be at least the distance.*got"):
            LayerProgram.from_gram(W, *moments).solve(0.99 * float(left.norm()))
        # What is least is rounded: the distance of the best weights themselves will do.
        nearest = LayerProgram.from_gram(W, *moments).solve(float(left.norm()) * (1 - 1e-13))
        assert nearest.discrepancy == pytest.approx(float(left.norm()), rel=1e-9)
    own = LayerProgram.from_gram(W, X.T @ X).solve(1.0)
    assert own.discrepancy == pytest.approx(float((X @ (own.weights - W).T).norm()), rel=1e-6)


def test_chunks_do_not_matter():
    W, X = layer(21, 6, 100)
    for options in ({}, {"ball": "joint"}, {"kind": "linear"}):
        whole = net_trim_layer(W, X, epsilon=2.0, **options)
        for chunk in (1, 7, 99):
            cut = net_trim_layer(W, X, epsilon=2.0, chunk=chunk, **options)
            assert_close(cut.weights, whole.weights, rtol=1e-7, atol=1e-9)
            assert cut.discrepancy == pytest.approx(whole.discrepancy, rel=1e-9)
            assert cut.violation == pytest.approx(whole.violation, rel=1e-4)
            assert cut.lower_bound == pytest.approx(whole.lower_bound, rel=1e-7)


@pytest.mark.parametrize("kind", ["relu", "linear"])
def test_float32_products_give_the_same_weights(kind):
    W, X = layer(51, 20, 300)
    X[:, 0] *= 30.0  # ill-conditioned
    full, mixed = (
        net_trim_layer(W, X, epsilon=8.0, kind=kind, precision=precision)
        for precision in ("full", "mixed")
    )
    assert mixed.converged and mixed.weights.dtype == torch.float64
    assert mixed.objective == pytest.approx(full.objective, rel=1e-4)
    assert_close(mixed.weights, full.weights, rtol=0, atol=5e-3 * float(W.abs().max()))
    single = net_trim_layer(W.float(), X.float(), epsilon=8.0, kind=kind, precision="mixed")
    assert single.converged and single.weights.dtype == torch.float32
    assert single.objective == pytest.approx(full.objective, rel=1e-4)


def test_rounding_of_moves_is_made_good():
    W, X = layer(51, 20, 300)
    X[:, :10] = X[:, :1] * 30.0 + 1e-2 * X[:, :10]  # nearly one input
    program = LayerProgram(W, X, precision="mixed")
    work = program.split()
    for _ in range(300):
        work.step(3.0 / work.c0)
    drifted = work._U.clone()
    work.anchor()
    C = X.T @ X / work.c0**2 + torch.eye(51).double()
    R = (work._v + work._T).double() @ X / work.c0 + work._V.double()
    exact = torch.linalg.solve(C, R.T).T
    assert_close(work._U.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))
    assert float((drifted - exact).norm()) > 10 * float((work._U - exact).norm())


def test_dead_inputs_neurons_and_few_samples_are_solved():
    W, X = layer(30, 8, 12)  # fewer samples than inputs
    X[:, [3, 7]] = 0.0
    X[:, 11] = 2.0  # constant, beside the ones
    W[:, 11] = 2.0
    W[5] = -W[5].abs()
    X = X.abs()
    Y, _ = relu_goal(W, X)
    assert not Y[:, 5].any()  # dead
    for options in ({}, {"ball": "joint"}, {"precision": "mixed"}, {"kind": "linear"}):
        trim = net_trim_layer(W, X, epsilon=0.1 * float(Y.norm()), **options)
        assert trim.converged and torch.isfinite(trim.weights).all()
        assert not trim.weights[:, [3, 7]].any()
        assert options.get("kind") == "linear" or not trim.weights[5].any()
        # Of two constants, the larger one costs less.
        assert torch.all(trim.weights[:, -1] == 0) and trim.weights[:, 11].any()
    nothing = net_trim_layer(W, torch.zeros(12, 30).double(), epsilon=0.0)
    assert nothing.converged and not nothing.weights.any() and nothing.feasible


def test_order_of_neurons_inputs_and_samples_does_not_matter():
    W, X = layer(21, 6, 100)
    trim = net_trim_layer(W, X, epsilon=2.0)
    m, n, p = (torch.randperm(k, generator=torch.Generator().manual_seed(k)) for k in (6, 21, 100))
    moved = net_trim_layer(W[m][:, n], X[p][:, n], epsilon=2.0)
    assert_close(moved.weights, trim.weights[m][:, n], rtol=1e-6, atol=1e-8)


def test_units_of_inputs_weights_and_penalties_do_not_matter():
    W, X = layer(21, 6, 100)
    trim = net_trim_layer(W, X, epsilon=2.0)
    scaled = net_trim_layer(1e-3 * W, 1e5 * X, epsilon=200.0, penalty=7.0)
    assert scaled.iterations == trim.iterations
    assert_close(1e3 * scaled.weights, trim.weights, rtol=1e-6, atol=1e-8)
    assert scaled.violation == pytest.approx(trim.violation, rel=1e-4)
    assert scaled.gap == pytest.approx(trim.gap, rel=1e-4)
    assert scaled.objective == pytest.approx(7e-3 * trim.objective, rel=1e-6)


@pytest.mark.parametrize("joint", [False, True])
def test_any_multipliers_prove_a_bound(joint):
    W, X = layer(15, 5, 80)
    Y, active = relu_goal(W, X)
    epsilon = 0.1 * float(Y.norm())
    penalty = torch.linspace(1.0, 2.0, 15).double().expand(5, 15)
    options = {"penalty": penalty, "ball": "joint" if joint else "split", "tol": 1e-7}
    best = net_trim_layer(W, X, epsilon=epsilon, **options)
    targets = LayerTargets(X, Y, "relu", chunk=17)
    bounds = []
    for seed in range(20):
        guess = normal(80, 5, seed=seed).abs() * torch.where(active, 1.0, -1.0)
        bounds.append(lower_bound(guess, targets, penalty, epsilon, joint=joint))
    assert max(bounds) > 0.0 and max(bounds) <= best.objective
    assert best.lower_bound == pytest.approx(best.objective, rel=1e-4)
    # Wrong signs are left out.
    flipped = torch.where(active, guess, guess.abs())
    assert lower_bound(flipped, targets, penalty, epsilon, joint=joint) == pytest.approx(
        lower_bound(guess * active, targets, penalty, epsilon, joint=joint)
    )


def test_a_spent_budget_is_told_and_the_result_says_so():
    W, X = layer(31, 7, 200)
    with pytest.warns(ConvergenceWarning, match=r"in 10 iterations: discrepancy .*max_iter"):
        trim = net_trim_layer(W, X, epsilon=3.0, max_iterations=10)
    assert not trim.converged and trim.iterations == 10
    # No weights come as near as this.
    with pytest.warns(ConvergenceWarning, match="`epsilon` if no weights may come as near"):
        trim = net_trim_layer(W, X, (X @ W.T).relu() + 5.0, epsilon=1.0, max_iterations=200)
    assert not trim.converged and not trim.feasible and trim.ratio > 1.001


def test_small_residuals_alone_do_not_stop_it():
    W, X = layer(31, 7, 200)
    trim = net_trim_layer(W, X, epsilon=3.0, tol=1e3)
    assert trim.converged and trim.feasible and trim.ratio <= 1.001 and trim.violation <= 1e-3
    with pytest.warns(ConvergenceWarning):
        trim = net_trim_layer(W, X, epsilon=3.0, tol=1e3, max_iterations=5)
    assert not trim.converged and not trim.feasible
    assert trim.primal_residual < 1e3 and trim.dual_residual < 1e4
    # A ball that holds is touched.
    W, X = layer(25, 1, 10, seed=3)
    trim = net_trim_layer(W, X, epsilon=0.7 * float((X @ W.T).norm()), kind="linear")
    assert trim.converged and abs(trim.ratio - 1.0) <= 1e-4


def test_progress_and_start_are_heard():
    W, X = layer(31, 7, 200)
    seen = []
    trim = net_trim_layer(
        W, X, epsilon=3.0, tol=1e-6, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(k, 3000) for k in range(20, trim.iterations + 1, 20)]
    program = LayerProgram(W, X)
    work = program.split()
    work.start_at(W)
    assert_close(work._v, W @ X.T / work.c0 - work._T)  # as if projected on the graph
    work.step(0.0)
    assert_close(work.sparse, torch.sign(W) * (W.abs() - work.unit).clamp(min=0.0))
    near = net_trim_layer(W, X, epsilon=3.0, tol=1e-6, start=trim.weights)
    assert near.objective == pytest.approx(trim.objective, rel=1e-5)


def test_everything_is_left_as_found():
    W, X = layer(21, 6, 100)
    W.requires_grad_()
    Y, V = torch.relu(X @ W.detach().T), 0.1 * normal(100, 6).abs()
    copies = [A.detach().clone() for A in (W, X, Y, V)]
    state = torch.get_rng_state()
    first = net_trim_layer(W, X, Y, bound=V, offset=V[0], epsilon=8.0, refit=True)
    again = net_trim_layer(W, X, Y, bound=V, offset=V[0], epsilon=8.0, refit=True)
    net_trim_layer(W, X, Y, kind="linear", epsilon=20.0, refit=True)
    assert torch.equal(first.weights, again.weights) and not first.weights.requires_grad
    for before, after in zip(copies, (W, X, Y, V), strict=True):
        assert torch.equal(before, after)
    assert W.grad is None and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


BAD = {
    "epsilon": [
        ({"epsilon": -1.0}, "`epsilon` must be a finite discrepancy of at least 0, got -1.0"),
        ({"epsilon": math.nan}, "`epsilon` must be .* got nan"),
        ({"epsilon": math.inf}, "`epsilon` must be .* got inf"),
    ],
    "options": [
        ({"kind": "gelu"}, '`kind` must be "relu" or "linear", got \'gelu\''),
        ({"ball": "box"}, '`ball` must be "split" or "joint", got \'box\''),
        ({"precision": "half"}, '`precision` must be "full" or "mixed", got \'half\''),
        ({"rho": 0.0}, "`rho` must be positive and finite, got 0.0"),
        ({"relaxation": 2.0}, r"`relaxation` must be in \(0, 2\), got 2.0"),
        ({"chunk": 0}, "`chunk` must be at least 1, got 0"),
        ({"tol": 0.0}, "`tol` must be positive and finite, got 0.0"),
        ({"max_iterations": 0}, "`max_iterations` must be at least 1, got 0"),
        ({"penalty": -1.0}, "`penalty` must be finite, at least 0 and not 0 for all weights"),
        ({"penalty": 0.0}, "`penalty` must be finite"),
        ({"penalty": torch.ones(5)}, r"`penalty` must be a number.*\[6, 21\], got shape \[5\]"),
    ],
    "shapes": [
        ({"W": torch.ones(6, 20)}, "`X` must have a column for each of the 20 inputs of `W`"),
        ({"W": torch.ones(6)}, r"`W` must be a matrix \[outputs, inputs\] with entries"),
        ({"X": torch.ones(0, 21)}, r"`X` must be a matrix \[samples, inputs\] with entries"),
        ({"Y": torch.ones(6, 100)}, r"`Y` must have a row for every sample.*\[100, 6\]"),
        ({"Y": -torch.ones(100, 6)}, '`Y` must not be negative with kind="relu".* got -1'),
        ({"bound": torch.ones(100, 5)}, "`bound` must have a row for every sample"),
        ({"bound": torch.ones(100, 6), "kind": "linear"}, '`bound` must be None with kind="lin'),
        ({"offset": torch.ones(5)}, "`offset` must have a row for every sample"),
        ({"start": torch.ones(6, 20)}, "`start` must be shaped as `W`"),
    ],
}


@pytest.mark.parametrize("group", BAD)
def test_bad_input_says_what_to_do(group, unchecked_shapes):
    W, X = layer(21, 6, 100)
    for options, message in BAD[group]:
        given = {"W": W, "X": X, "epsilon": 1.0} | options
        with pytest.raises(ValueError, match=message):
            net_trim_layer(given.pop("W"), given.pop("X"), given.pop("Y", None), **given)


def test_numbers_that_are_none_are_refused(unchecked_shapes):
    W, X = layer(21, 6, 100)
    bad = X.clone()
    bad[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match="`X` holds a NaN or an infinity"):
        net_trim_layer(W, bad, epsilon=1.0)
    with pytest.raises(NonFiniteError, match="`W` holds a NaN"):
        net_trim_layer(W / 0.0, X, epsilon=1.0)
    with pytest.raises(NonFiniteError, match="What comes out of the layer overflows"):
        net_trim_layer(1e30 * W.float(), 1e30 * X.float(), epsilon=1.0)
    with pytest.raises(NonFiniteError, match="What goes into the layer overflows when squared"):
        net_trim_layer(W, 1e200 * X, epsilon=1.0)
    with pytest.raises(TypeError, match=r"`X` must be a floating point tensor, got torch\.int64"):
        net_trim_layer(W, X.long(), epsilon=1.0)
    with pytest.raises(ValueError, match="`penalise_bias` must be True unless the last column"):
        net_trim_layer(W, 2.0 * X, epsilon=1.0, penalise_bias=False)
    with pytest.raises(ValueError, match='`gram` must be None or False with kind="relu"'):
        LayerProgram(W, X, gram=True)


def test_bad_moments_say_what_to_do(unchecked_shapes):
    W, X = layer(21, 6, 100)
    G, B = X.T @ X, W @ X.T @ X
    for moments, message in (
        ((G[:, :20],), "`gram` must have a row and a column for each of the 21 inputs"),
        ((G.triu(),), "`gram` must be symmetric"),
        ((-G,), "`gram` must have no negative eigenvalue"),
        ((G, B), "`cross` and `square` must be given together"),
        ((G, B[:3], 1.0), r"`cross` must be Yᵀ X, shaped as `W`: \[6, 21\], got \[3, 21\]"),
        ((G, B, 1.0), "`square` must be the squared norm of the targets"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerProgram.from_gram(W, *moments)


def test_a_path_refuses_before_it_begins():
    W, X = layer(21, 6, 100)
    seen = []
    with pytest.raises(ValueError, match="`epsilon` must be a finite discrepancy"):
        net_trim_path(LayerProgram(W, X), [1.0, -1.0], progress=lambda *done: seen.append(done))
    assert not seen


def test_float32_is_anchored_at_regular_looks_and_before_every_change_of_rho(monkeypatch):
    W, X = layer(21, 5, 100)
    done, calls = [0], []

    def noting(name):
        real = getattr(Splitting, name)

        def noted(self, *rest):
            done[0] += name.endswith("step")
            calls.append((name, done[0]))
            return real(self, *rest)

        return noted

    for name in ("step", "measured_step", "anchor", "change_rho"):
        monkeypatch.setattr(Splitting, name, noting(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        net_trim_layer(
            W.float(), X.float(), epsilon=0.5, precision="mixed", tol=1e-9, max_iterations=400
        )
    anchors = [k for name, k in calls if name == "anchor"]
    changes = [i for i, (name, _) in enumerate(calls) if name == "change_rho"]
    assert changes
    assert all(calls[i - 1] == ("anchor", calls[i][1]) for i in changes)
    assert set(range(60, 400, 60)) <= set(anchors)
    assert len(anchors) == len(set(anchors))
