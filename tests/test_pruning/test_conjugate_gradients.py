import math

import pytest
import torch
from torch.testing import assert_close

from hessian import NonFiniteError, Operator
from pruning.conjugate_gradients import conjugate_gradients


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(n=12, seed=0, spread=2.0):
    Q, _ = torch.linalg.qr(normal(n, n, seed=seed))
    A = Q @ torch.diag(torch.logspace(0, spread, n, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2, normal(n, seed=seed + 1)


def operator(A):
    return Operator.from_matrix(A)


def test_solution_is_that_of_a_dense_solve_and_the_value_its_quadratic():
    A, b = system()
    found = conjugate_gradients(operator(A), b, tol=1e-12)
    x = torch.linalg.solve(A, b)
    assert_close(found.x, x, rtol=1e-9, atol=1e-9)
    assert found.value == pytest.approx(float(0.5 * x @ A @ x - b @ x), rel=1e-10)
    assert found.converged and found.stopped == "tolerance" and found.residual <= 1e-12


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_iterate_minimises_over_its_krylov_space(steps):
    A, b = system()
    found = conjugate_gradients(operator(A), b, tol=0.0, max_products=steps)
    K = torch.stack([torch.linalg.matrix_power(A, i) @ b for i in range(steps)], dim=1)
    K, _ = torch.linalg.qr(K)
    x = K @ torch.linalg.solve(K.T @ A @ K, K.T @ b)
    assert_close(found.x, x, rtol=1e-8, atol=1e-10)
    assert found.num_products == steps and not found.converged and found.stopped == "budget"
    assert found.residual == pytest.approx(float((b - A @ x).norm() / b.norm()), rel=1e-8)
    assert found.value == pytest.approx(float(0.5 * x @ A @ x - b @ x), rel=1e-9)


def test_the_inverse_as_preconditioner_needs_one_product():
    A, b = system()
    inverse = torch.linalg.inv(A)
    found = conjugate_gradients(operator(A), b, tol=1e-10, preconditioner=lambda r: inverse @ r)
    assert found.num_products == 1
    assert_close(found.x, inverse @ b)


def test_any_positive_preconditioner_leaves_the_solution():
    A, b = system()
    P = torch.diag(torch.rand(12, generator=torch.Generator().manual_seed(3)).double() + 0.1)
    found = conjugate_gradients(operator(A), b, tol=1e-12, preconditioner=lambda r: P @ r)
    assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)


def test_stalled_progress_stops_before_the_budget():
    A, b = system(n=200, spread=3.0)
    found = conjugate_gradients(operator(A), b, tol=0.0, progress=1e-3, max_products=200)
    assert found.stopped == "progress" and found.converged and 10 < found.num_products < 150
    before = conjugate_gradients(operator(A), b, tol=0.0, max_products=found.num_products - 10)
    assert before.value - found.value < 10 * 1e-3 * -found.value


def test_negative_curvature_is_told_and_the_iterate_before_it_returned():
    A = torch.diag(torch.tensor([1.0, -1.0]).double())
    found = conjugate_gradients(operator(A), torch.tensor([0.0, 1.0]).double())
    assert found.stopped == "curvature" and not found.converged
    assert torch.equal(found.x, torch.zeros(2).double()) and found.num_products == 1


def test_no_right_hand_side_costs_nothing():
    A, _ = system()
    found = conjugate_gradients(operator(A), torch.zeros(12).double())
    assert found.num_products == 0 and found.converged and not found.x.any()


def test_bad_input_says_what_is_wrong():
    A, b = system()
    with pytest.raises(ValueError, match="`b` must have one entry for each of the operator's 12"):
        conjugate_gradients(operator(A), b[1:])
    with pytest.raises(ValueError, match="`tol` and `progress` must not be negative"):
        conjugate_gradients(operator(A), b, tol=-1.0)
    with pytest.raises(ValueError, match="`max_products` must be at least 1"):
        conjugate_gradients(operator(A), b, max_products=0)
    with pytest.raises(NonFiniteError, match="`b`, the right-hand side"):
        conjugate_gradients(operator(A), b * math.nan)
