"""Operators of SciPy, curvlinops and PyHessian as ours, and ours as SciPy's."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import nn

from hessian import Operator, leading_eigenspace
from tests.cases import cases, seeded
from tests.oracles import dense, dense_derivatives, with_spectrum

A = with_spectrum([4.0, -3.0, 2.0, 1.0, 0.5])
EYE = torch.eye(5).double()
F64 = torch.float64


def test_scipy_gets_columns_at_once():
    shapes = []

    def columns(V):
        shapes.append(tuple(V.shape))
        return A @ V

    operator = Operator(lambda v: A @ v, 5, F64, torch.device("cpu"), columns)
    linear = operator.to_scipy()
    assert np.allclose(linear.matmat(np.eye(5)), A.numpy(), rtol=0, atol=1e-14)
    assert np.allclose(linear.rmatmat(np.eye(5)), A.numpy(), rtol=0, atol=1e-14)
    assert np.allclose(linear.T @ np.ones(5), A.numpy() @ np.ones(5))
    assert shapes == [(5, 5), (5, 5)]
    assert linear.matvec(np.ones((5, 1))).shape == (5, 1)


def test_read_only_and_strided_arrays_are_taken():
    x = np.eye(5)[:, ::2]
    x.flags.writeable = False
    assert np.allclose(Operator.from_matrix(A).to_scipy() @ x, A.numpy() @ x)


def test_scipy_operators_multiply_columns_at_once():
    calls = []

    def matmat(x):
        calls.append(x.shape)
        return A.numpy() @ x

    linear = LinearOperator((5, 5), matvec=lambda x: A.numpy() @ x, matmat=matmat, dtype=np.float64)
    torch.testing.assert_close(Operator.from_scipy(linear) @ EYE, A)
    assert calls == [(5, 5)]


def test_sparse_matrices_are_operators():
    operator = Operator.from_scipy(csr_matrix(A.numpy()))
    torch.testing.assert_close(operator @ EYE, A)
    torch.testing.assert_close(dense(operator), A)


def test_scipy_block_solvers_run_on_our_columns():
    linear = Operator.from_matrix(with_spectrum(range(12))).to_scipy()
    found, _ = lobpcg(linear, np.eye(12)[:, :2] + 0.1, tol=1e-8, maxiter=200)
    assert np.allclose(np.sort(found), [10.0, 11.0])


def test_rectangles_and_complex_matrices_are_refused():
    with pytest.raises(ValueError, match=r"must be square, got shape \[2, 3\]"):
        Operator.from_scipy(LinearOperator((2, 3), matvec=lambda x: x[:2], dtype=np.float64))
    with pytest.raises(TypeError, match="must be real, got complex128"):
        Operator.from_scipy(csr_matrix(1j * A.numpy()))


class Linear:
    """What of a curvlinops operator we rely on."""

    def __init__(self, matrix, self_adjoint):
        self.matrix, self.SELF_ADJOINT = matrix, self_adjoint
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        self.calls = 0

    def __matmul__(self, v):
        self.calls += 1
        return (self.matrix @ v).requires_grad_()


@pytest.mark.parametrize("declared", [True, False])
def test_self_adjoint_is_believed_and_anything_else_probed(declared):
    C = Linear(A, declared)
    operator = Operator.from_curvlinops(C)
    assert C.calls == (0 if declared else 1)
    torch.testing.assert_close(operator @ EYE, A)
    assert C.calls == (1 if declared else 2)
    assert not (operator @ EYE).requires_grad
    assert operator.method == "curvlinops Linear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_that_are_not_symmetric_are_refused(dtype):
    skew = A.clone()
    skew[0, 1] += 0.3
    with pytest.raises(ValueError, match="must be symmetric, got a Linear with"):
        Operator.from_curvlinops(Linear(skew.to(dtype), False))
    with pytest.raises(ValueError, match=r"must be square, got shape \[5, 4\]"):
        Operator.from_curvlinops(Linear(A[:, :4], True))


@pytest.mark.parametrize("other", [A, None, np.eye(2)])
def test_anything_else_is_no_operator_of_theirs(other):
    with pytest.raises(TypeError, match="must be a curvlinops PyTorchLinearOperator"):
        Operator.from_curvlinops(other)
    with pytest.raises(TypeError, match=r"must be a pyhessian\.hessian, got"):
        Operator.from_pyhessian(other)


def pyhessian_of(case, criterion=None, cuts=None):
    from pyhessian import hessian

    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    criterion = criterion or nn.CrossEntropyLoss()
    if cuts is None:
        return hessian(model, criterion, data=case.data, cuda=False)
    return hessian(model, criterion, dataloader=case.batches(cuts), cuda=False)


@pytest.mark.oracle
@pytest.mark.parametrize("cuts", [None, [12], [7, 5], [11, 1]])
def test_pyhessian_products_weigh_ragged_batches_right(cuts):
    case = cases()["tanh MLP"]
    operator = Operator.from_pyhessian(pyhessian_of(case, cuts=cuts))
    assert (operator.size, operator.dtype) == (43, F64)
    expected = dense_derivatives(case.name)[3]
    torch.testing.assert_close(dense(operator), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.oracle
def test_pyhessian_products_leave_the_gradients_as_they_were():
    solver = pyhessian_of(cases()["tanh MLP"], cuts=[7, 5])
    operator = Operator.from_pyhessian(solver)
    held = []
    for p in solver.model.parameters():
        p.grad = torch.full_like(p, 0.25)
        held.append(p.grad)
    with torch.no_grad():
        operator @ torch.ones(43).double()
    for p, gradient in zip(solver.model.parameters(), held, strict=True):
        assert p.grad is gradient
        assert torch.all(gradient == 0.25)


@pytest.mark.oracle
def test_pyhessian_with_sums_over_several_batches_is_refused():
    criterion = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(ValueError, match=r'criterion that is a mean.* got reduction="sum"'):
        Operator.from_pyhessian(pyhessian_of(cases()["tanh MLP"], criterion, [7, 5]))
    whole = Operator.from_pyhessian(pyhessian_of(cases()["tanh MLP"], criterion))
    expected = 12 * dense_derivatives("tanh MLP")[3]
    torch.testing.assert_close(dense(whole), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.oracle
def test_pyhessian_with_an_idle_parameter_is_refused():
    from pyhessian import hessian

    model = nn.Linear(4, 3, dtype=F64)
    model.idle = nn.Parameter(torch.zeros(2, dtype=F64))
    solver = hessian(model, nn.CrossEntropyLoss(), data=cases()["tanh MLP"].data, cuda=False)
    with pytest.raises(ValueError, match="no part in the loss"):
        Operator.from_pyhessian(solver)


@pytest.mark.oracle
def test_our_solver_runs_on_every_kind_of_operator():
    from curvlinops import HessianLinearOperator

    case = cases()["tanh MLP"]
    H = dense_derivatives(case.name)[3]
    values = torch.linalg.eigvalsh(H)
    expected = values[values.abs().argsort(descending=True)[:3]]
    params = [p for p in case.model.parameters() if p.requires_grad]
    theirs = HessianLinearOperator(case.model, nn.CrossEntropyLoss(), params, case.batches([7, 5]))
    for operator in (
        Operator.from_matrix(H),
        Operator.from_scipy(Operator.from_matrix(H).to_scipy()),
        Operator.from_curvlinops(theirs),
        Operator.from_pyhessian(pyhessian_of(case, cuts=[7, 5])),
    ):
        space = leading_eigenspace(operator, k=3, tol=1e-9)
        torch.testing.assert_close(space.values, expected, rtol=1e-8, atol=1e-10)
