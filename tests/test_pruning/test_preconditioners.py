import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import gauss_newton_operator
from pruning import DenseDistance, KrylovSolver, compensated_prune, preconditioners
from pruning.krylov_compensation import compensating_step
from pruning.preconditioners import diagonal_preconditioner, row_preconditioner
from pruning.saliency import kronecker_factors
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_distance():
    # Of a linear layer with squared differences G is I ⊗ 2 A / m exactly.
    return DenseDistance(seeded(lambda: nn.Linear(5, 3)), normal(40, 5), kind="squared")


def network_distance():
    model = seeded(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))
    )
    scales = torch.linspace(0.05, 3.0, 4).double()
    return DenseDistance(model, normal(60, 2, 4) * scales)


def mask_without(gone, size):
    alive = torch.ones(size, dtype=torch.bool)
    alive[gone] = False
    return alive


def dense(apply, size):
    return torch.stack([apply(row) for row in torch.eye(size).double()])


def test_row_preconditioner_is_the_inverse_where_the_matrix_is_one_of_kronecker():
    distance, tau = linear_distance(), 0.3
    w = distance.weights()
    apply = row_preconditioner(kronecker_factors(distance, w), distance, w != 0, tau)
    G = dense(lambda v: gauss_newton_operator(distance, w) @ v, len(w))
    assert_close(dense(apply, len(w)), torch.linalg.inv(G + tau * torch.eye(len(w)).double()))


def test_blocks_are_those_of_the_weights_that_stay(monkeypatch):
    # Rows of different lengths, in batches that must be filled up.
    monkeypatch.setattr(preconditioners, "ROWS_TOGETHER", 2)
    distance, tau = linear_distance(), 0.3
    w = distance.weights()
    alive = mask_without([0, 1, 2, 7, 15, 17], len(w))
    apply = row_preconditioner(kronecker_factors(distance, w), distance, alive, tau)
    G = dense(lambda v: gauss_newton_operator(distance, w) @ v, len(w))
    G[~alive] = 0.0
    G[:, ~alive] = 0.0
    P = dense(apply, len(w))
    expected = torch.linalg.inv(G + tau * torch.eye(len(w)).double())
    assert_close(P[alive][:, alive], expected[alive][:, alive])
    assert not P[alive][:, ~alive].any() and not P[~alive][:, alive].any()


def test_layers_of_too_many_blocks_get_their_diagonal(monkeypatch):
    monkeypatch.setattr(preconditioners, "MAX_BLOCK_ELEMENTS", 3)
    distance = linear_distance()
    w = distance.weights()
    factors = kronecker_factors(distance, w)
    apply = row_preconditioner(factors, distance, w != 0, 0.3)
    assert_close(apply(w), diagonal_preconditioner(factors, 0.3)(w))


def test_diagonal_preconditioner_divides_by_the_damped_diagonal():
    distance, tau = linear_distance(), 0.3
    w = distance.weights()
    apply = diagonal_preconditioner(kronecker_factors(distance, w), tau)
    G = dense(lambda v: gauss_newton_operator(distance, w) @ v, len(w))
    assert_close(apply(torch.ones_like(w)), 1.0 / (G.diagonal() + tau))


def test_row_preconditioner_is_symmetric_and_positive_definite():
    distance = network_distance()
    w = distance.weights()
    factors = kronecker_factors(distance, w)
    alive = w > 0
    P = dense(row_preconditioner(factors, distance, alive, 1e-3), len(w))
    assert_close(P, P.T)
    assert float(torch.linalg.eigvalsh(P)[0]) > 0


@pytest.mark.parametrize("tol", [1e-3, 1e-8])
def test_the_solution_is_the_same_with_fewer_products(tol):
    model = seeded(lambda: nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4)))
    scales = torch.logspace(-1.0, 0.7, 20).double()
    distance = DenseDistance(model, normal(400, 20) * scales)
    w = distance.weights()
    alive = w.abs() > w.abs().median()
    factors = kronecker_factors(distance, w, num_draws=4)
    options = {"tau": 1e-4, "tol": tol, "progress": 0.0, "max_products": 2000}
    plain = compensating_step(distance, w, alive, **options)
    rows = row_preconditioner(factors, distance, alive, 1e-4)
    helped = compensating_step(distance, w, alive, preconditioner=rows, **options)
    assert_close(helped.weights, plain.weights, rtol=1e2 * tol, atol=1e2 * tol)
    assert helped.num_products < 0.75 * plain.num_products


@pytest.mark.parametrize("name", ["none", "diagonal", "rows"])
def test_solvers_take_it_by_name(name):
    distance = network_distance()
    w = distance.weights()
    solver = KrylovSolver(preconditioner=name, tol=1e-9, progress=0.0, products=300, damping=1e-2)
    pruned = compensated_prune(w, distance, sparsity=0.5, solver=solver, stages=2)
    other = KrylovSolver(tol=1e-9, progress=0.0, products=300, damping=1e-2)
    expected = compensated_prune(w, distance, sparsity=0.5, solver=other, stages=2)
    assert_close(pruned.weights, expected.weights, rtol=1e-5, atol=1e-7)
    assert (pruned.num_products == expected.num_products) == (name == "none")


def test_an_unknown_name_is_refused(unchecked_shapes):
    with pytest.raises(ValueError, match="`preconditioner` must be one of"):
        KrylovSolver(preconditioner="ilu")
