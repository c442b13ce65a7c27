import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh

from hessian import NonFiniteError, Operator, hessian_operator
from tests.cases import cases, digits_network
from tests.oracles import dense, dense_derivatives, digits_leading, with_spectrum

A = with_spectrum([4.0, -3.0, 2.0, 1.0, 0.5])


B = with_spectrum([1.0, 2.0, -2.0, 0.0, 3.0], seed=2)


def slow(matrix: torch.Tensor) -> Operator:
    """An operator without a way of its own for several columns."""
    return Operator(lambda v: matrix @ v, len(matrix), matrix.dtype, matrix.device, method="slow")


ARITHMETIC = {
    "A + B": (lambda a, b: a + b, A + B),
    "A - B": (lambda a, b: a - b, A - B),
    "-A": (lambda a, b: -a, -A),
    "2 A": (lambda a, b: 2 * a, 2 * A),
    "A 2": (lambda a, b: a * 2.0, 2 * A),
    "numpy number times A": (lambda a, b: np.float32(0.5) * a, 0.5 * A),
    "shifted": (lambda a, b: a.shifted(-0.25), A - 0.25 * torch.eye(5).double()),
    "all at once": (
        lambda a, b: (3.0 * (a - b)).shifted(1.0) + a,
        4 * A - 3 * B + torch.eye(5).double(),
    ),
}


@pytest.mark.parametrize("wrap", [slow, Operator.from_matrix])
@pytest.mark.parametrize(("combine", "expected"), ARITHMETIC.values(), ids=ARITHMETIC)
def test_arithmetic_is_that_of_the_matrices(combine, expected, wrap):
    result = combine(wrap(A), wrap(B))
    torch.testing.assert_close(dense(result), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(result @ torch.eye(5).double(), expected, rtol=0, atol=1e-14)
    assert (result.columns is None) == (wrap is slow)


def test_a_sum_uses_the_fast_columns_of_the_part_that_has_them():
    matrix, calls = with_spectrum([1.0, 2.0, 3.0]), []

    def columns(V):
        calls.append(V.shape)
        return matrix @ V

    fast = Operator(lambda v: matrix @ v, 3, matrix.dtype, matrix.device, columns)
    V = torch.eye(3).double()
    torch.testing.assert_close((slow(matrix) + 2.0 * fast) @ V, 3 * matrix)
    assert calls == [(3, 3)]


def test_the_method_of_a_sum_is_told_in_words():
    sum_ = (slow(A) - 2 * Operator.from_matrix(B)).shifted(0.5)
    assert sum_.method == "slow + -1 (2 (dense matrix)), shifted by 0.5"


@pytest.mark.parametrize(
    "other",
    [
        Operator.from_matrix(torch.eye(4).double()),
        Operator.from_matrix(torch.eye(5)),
        Operator(lambda v: v, 5, torch.float64, torch.device("meta")),
    ],
)
def test_operators_that_do_not_fit_are_not_added(other):
    with pytest.raises(ValueError, match=r"must share size, type and device.* 5, torch\.float64"):
        Operator.from_matrix(A) + other
    with pytest.raises(ValueError, match="must share size, type and device"):
        Operator.from_matrix(A) - other


def test_a_number_is_not_added_but_shifts():
    with pytest.raises(TypeError, match=r"got the number 2\.0\. `A.shifted\(2.0\)`"):
        Operator.from_matrix(A) + 2.0
    with pytest.raises(TypeError, match="needs two operators"):
        Operator.from_matrix(A) - 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_and_shifts_must_be_finite(bad):
    with pytest.raises(ValueError, match="`factor` must be a finite number"):
        bad * Operator.from_matrix(A)
    with pytest.raises(ValueError, match="`tau` must be a finite number"):
        Operator.from_matrix(A).shifted(bad)


@pytest.mark.parametrize("other", ["A", None, [1.0]])
def test_arithmetic_with_anything_else_is_refused_by_python(other):
    for call in (lambda: Operator.from_matrix(A) + other, lambda: other * Operator.from_matrix(A)):
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply sequence"):
            call()


def test_a_part_of_another_length_cannot_hide_in_a_sum():
    short = Operator(lambda v: v.sum(dim=0, keepdim=True), 5, A.dtype, A.device)  # broadcasts
    with pytest.raises(ValueError, match=r"must have the shape of its argument, \[5\], got \[1\]"):
        (Operator.from_matrix(A) + short) @ A[0]


def test_matrices_that_are_not_symmetric_are_refused():
    skew = A.clone()
    skew[0, 1] += 1e-3
    with pytest.raises(
        ValueError, match=r"symmetric, got .* by up to 1\.00e-03.*\(A \+ A\.T\) / 2"
    ):
        Operator.from_matrix(skew)
    Operator.from_matrix(A + 1e-12 * skew)  # rounding is let pass


def test_no_columns_give_no_columns():
    assert (slow(A) @ A[:, :0]).shape == (5, 0)


def test_matrix_products_go_column_by_column():
    V = with_spectrum([1.0, 2.0, 3.0, 4.0, 5.0], seed=1)[:, :3]
    torch.testing.assert_close(Operator.from_matrix(A) @ V, A @ V, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(4,), (6,), (4, 2), (), (2, 5, 1)])
def test_vectors_of_another_length_are_refused(shape):
    with pytest.raises(
        ValueError, match="vector of length 5, or a matrix of such columns, is needed"
    ):
        Operator.from_matrix(A) @ torch.zeros(shape).double()


def test_products_of_another_length_are_refused():
    short = Operator(lambda v: v[:-1], 5, A.dtype, A.device)
    with pytest.raises(ValueError, match=r"must have the shape of its argument, \[5\], got \[4\]"):
        short @ A[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite_are_refused(bad):
    with pytest.raises(NonFiniteError, match="holds a NaN or an infinity"):
        Operator(lambda v: v * bad, 5, A.dtype, A.device) @ A[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy_round_trip_keeps_products_and_type(dtype):
    ours = Operator.from_matrix(A.to(dtype))
    back = Operator.from_scipy(ours.to_scipy())
    assert (back.size, back.dtype, back.device) == (5, dtype, torch.device("cpu"))
    torch.testing.assert_close(dense(back), A.to(dtype))
    assert np.allclose(ours.to_scipy() @ np.eye(5), A.numpy())


@pytest.mark.parametrize(
    ("matvec", "expected"),
    [
        (lambda x: x[::-1], torch.eye(5).double().flip(0)),  # negative strides
        (lambda x: np.broadcast_to(x.sum(), 5), torch.ones(5, 5).double()),  # read-only
        (lambda x: x, torch.eye(5).double()),  # the argument itself
    ],
)
def test_any_array_that_scipy_returns_is_taken(matvec, expected):
    operator = Operator.from_scipy(LinearOperator((5, 5), matvec=matvec, dtype=np.float64))
    torch.testing.assert_close(dense(operator), expected)
    v = torch.ones(5).double()
    (operator @ v).zero_()
    assert torch.all(v == 1)


def test_integer_matrices_of_scipy_become_float64():
    operator = Operator.from_scipy(aslinearoperator(np.diag([1, 2])))
    assert operator.dtype == torch.float64
    torch.testing.assert_close(operator @ torch.ones(2).double(), torch.tensor([1.0, 2.0]).double())


@pytest.mark.oracle
def test_scipy_eigsh_on_the_digits_hessian_agrees_with_dense():
    H = hessian_operator(digits_network().objective([400]))
    found = eigsh(H.to_scipy(), k=4, which="LM", tol=1e-10, return_eigenvectors=False)
    expected = digits_leading(4)[0]
    assert np.allclose(np.sort(found), np.sort(expected.numpy()), rtol=1e-8)


@pytest.mark.oracle
def test_scipy_cg_solves_with_our_products():
    B = with_spectrum([1.0, 2.0, 3.0, 4.0, 5.0])
    b = np.arange(5.0)
    x, info = cg(Operator.from_matrix(B).to_scipy(), b, rtol=1e-12)
    assert info == 0
    assert np.allclose(B.numpy() @ x, b)


def test_the_operator_stays_where_it_was_taken():
    case = cases()["tanh MLP"]
    objective = case.objective([8, 4])
    w = objective.weights()
    H = hessian_operator(objective, w)
    v = torch.ones_like(w)
    before = H @ v
    w.zero_()
    assert torch.equal(H @ v, before)


def test_the_operator_can_be_taken_anywhere():
    case = cases()["tanh MLP"]
    w, _, _, at_weights = dense_derivatives(case.name)
    elsewhere = dense(hessian_operator(case.objective(), 0.5 * w))
    assert not torch.allclose(elsewhere, at_weights, atol=1e-3)
    torch.testing.assert_close(elsewhere, elsewhere.T)
    default = dense(hessian_operator(case.objective([8, 4])))
    torch.testing.assert_close(default, at_weights, rtol=1e-10, atol=1e-10)
