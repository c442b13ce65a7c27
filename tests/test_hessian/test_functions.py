import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import hyp1f1

from hessian import ConvergenceWarning, NonFiniteError, Operator, apply_function, hessian_operator
from tests.cases import digits_network
from tests.oracles import counted, digits_hessian, function_of, random_orthogonal, with_spectrum


def phi(h):
    """The soft projector 1F1(1; 1.6; -200 h) of gRDA, clamped at zero curvature."""
    return torch.from_numpy(np.asarray(hyp1f1(1.0, 1.6, -200.0 * h.clamp(min=0).numpy())))


SMOOTH = {
    "exp": torch.exp,
    "exp(-5h)": lambda h: torch.exp(-5 * h),
    "phi": phi,
    "sqrt": lambda h: h.clamp(min=0).sqrt(),
    "rational": lambda h: 1 / (h * h + 0.1),
    "resolvent": lambda h: 1 / (h.clamp(min=0) + 0.01),
    "abs": lambda h: (h - 0.7).abs(),
    "cos": lambda h: torch.cos(6 * h),
    "cubic": lambda h: h**3 - 2 * h,
}
STEPS = {
    "sigmoid": lambda h: torch.sigmoid(30 * (h - 1)),
    "step": lambda h: (h > 1.0).double(),
}
spectra = st.one_of(
    st.builds(
        lambda n, p, top: top * torch.linspace(0, 1, n, dtype=torch.float64) ** p,
        st.integers(2, 120),
        st.floats(0.3, 6),
        st.floats(0.1, 4),
    ),
    st.lists(st.floats(0, 4), min_size=1, max_size=60).map(lambda x: torch.tensor(x).double()),
    st.builds(
        lambda n, seed: torch.randn(n, generator=torch.Generator().manual_seed(seed)).double(),
        st.integers(2, 100),
        st.integers(0, 999),
    ),
)


def run(A, f, b, **options):
    operator, products = counted(A)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = apply_function(operator, f, b, **options)
    assert found.num_products == len(products) == len(found.ritz_values)
    return found


def error_and_estimate(name, values, seed, budget, tol=1e-6):
    A = with_spectrum(values, seed)
    if name in ("sqrt", "phi", "resolvent"):
        A = A @ A  # positive semi-definite
    b = torch.randn(len(A), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = run(A, SMOOTH[name], b, max_products=budget, tol=tol)
    exact = function_of(A, SMOOTH[name]) @ b
    # The dense oracle rounds too; the square root turns 1e-16 near zero into 1e-8.
    slack = 1e-7 if name == "sqrt" else 1e-11
    error = float((found.value - exact).norm())
    return found, max(error - slack * float(b.norm()) * (1 + float(exact.norm())), 0.0)


@pytest.mark.parametrize("name", SMOOTH)
@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(
    values=spectra,
    seed=st.integers(0, 99),
    budget=st.integers(1, 120),
    tol=st.sampled_from([1e-1, 1e-2, 1e-4, 1e-6]),
)
def test_a_converged_error_is_at_most_its_own_estimate(name, values, seed, budget, tol):
    found, error = error_and_estimate(name, values, seed, budget, tol=tol)
    goal = tol * float(found.value.norm())
    if found.converged:
        assert error <= found.error <= goal * (1 + 1e-9)
    else:
        assert found.error > goal * (1 - 1e-9) or found.num_products < 10


# Measured shares: .13, .095, .05. A plain doubling of the last move gives .75, .47, .11.
@pytest.mark.parametrize(("budget", "share"), [(15, 0.25), (20, 0.2), (30, 0.1)])
def test_the_estimate_is_seldom_too_small_before_convergence(budget, share):
    # phi needs some sqrt(200 * 16) products here; its first moves are small but do not shrink.
    small = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        values = 4 * torch.rand(60, generator=generator, dtype=torch.float64)
        found, error = error_and_estimate("phi", values, seed, budget)
        assert not found.converged
        small += error > found.error
    assert small <= share * 100


def test_few_products_never_claim_convergence():
    # Below the kink f is linear, and two products would do: but the spectrum goes on.
    A = with_spectrum(3 * torch.linspace(0, 1, 113) ** 6)
    b = torch.randn(113, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for budget in range(1, 10):
        with pytest.warns(ConvergenceWarning):
            found = apply_function(
                Operator.from_matrix(A), lambda h: (h - 2.9).abs(), b, max_products=budget
            )
        assert not found.converged


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("seed", range(8))
def test_the_estimate_is_within_twice_for_steps_on_crowded_spectra(name, seed):
    generator = torch.Generator().manual_seed(seed)
    A = with_spectrum(2 * torch.rand(150, generator=generator, dtype=torch.float64), seed)
    b = torch.randn(150, generator=generator, dtype=torch.float64)
    for budget in (10, 20, 40, 80):
        found = run(A, STEPS[name], b, max_products=budget)
        error = float((found.value - function_of(A, STEPS[name]) @ b).norm())
        assert error <= 2 * found.error + 1e-11


@pytest.mark.parametrize("name", SMOOTH | STEPS)
def test_all_steps_of_the_basis_give_the_exact_function(name):
    f = (SMOOTH | STEPS)[name]
    A = with_spectrum(torch.linspace(0.05, 3, 30))
    b = torch.ones(30).double()
    found = apply_function(Operator.from_matrix(A), f, b, tol=1e-12)
    torch.testing.assert_close(found.value, function_of(A, f) @ b, rtol=0, atol=1e-9)
    assert found.converged


def test_the_filter_of_the_digits_hessian_equals_the_dense_one():
    case = digits_network()
    H = hessian_operator(case.objective([400]))
    b = case.objective([400]).weights().sign()
    found = apply_function(H, phi, b, tol=1e-3)
    exact = function_of(digits_hessian(), phi) @ b
    assert float((found.value - exact).norm()) <= found.error
    assert found.error <= 1e-3 * float(exact.norm()) * 1.01


def test_the_identity_gives_the_product():
    A = with_spectrum([3.0, -1.0, 0.5, 2.0, -4.0])
    b = torch.arange(1.0, 6.0).double()
    torch.testing.assert_close(apply_function(Operator.from_matrix(A), lambda h: h, b).value, A @ b)


@pytest.mark.parametrize("degree", range(6))
def test_polynomials_below_the_number_of_products_are_exact(degree):
    A = with_spectrum(torch.linspace(-1, 1, 40))
    b = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = run(A, lambda h: h**degree, b, max_products=degree + 1)
    exact = torch.linalg.matrix_power(A, degree) @ b
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-12)
    if degree > 1:
        short = run(A, lambda h: h**degree, b, max_products=degree)
        assert float((short.value - exact).norm()) > 1e-3
        assert float((short.value - exact).norm()) <= short.error


def test_a_zero_vector_costs_nothing():
    operator, products = counted(torch.eye(4).double())
    found = apply_function(operator, torch.exp, torch.zeros(4).double())
    assert torch.equal(found.value, torch.zeros(4).double())
    assert (found.error, found.num_products, found.converged) == (0.0, 0, True)
    assert found.value.dtype == operator.dtype
    assert len(found.ritz_values) == 0
    assert not products


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_a_start_in_few_eigenvectors_breaks_down_early_and_is_exact(pairs):
    values = torch.linspace(1, 4, 50).double()
    Q = random_orthogonal(50)
    b = Q[:, 5 : 5 + 10 * pairs : 10].sum(dim=1)
    operator, products = counted((Q * values) @ Q.T)
    found = apply_function(operator, torch.log, b)
    assert len(products) <= 10  # rounding may hide that the space is full at ``pairs``
    expected = Q[:, 5 : 5 + 10 * pairs : 10] @ values[5 : 5 + 10 * pairs : 10].log()
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-12)
    assert found.converged


def test_a_function_that_vanishes_on_the_spectrum_gives_zero():
    found = apply_function(
        Operator.from_matrix(with_spectrum(torch.linspace(0, 1, 9))),
        torch.zeros_like,
        torch.ones(9).double(),
    )
    assert torch.equal(found.value, torch.zeros(9).double())
    assert found.converged


def test_the_value_is_linear_in_b_and_knows_nothing_of_its_length():
    A = Operator.from_matrix(with_spectrum(torch.linspace(0, 2, 40)))
    b = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = apply_function(A, torch.exp, b, tol=1e-12).value
    for factor in (-3.0, 1e-30, 1e30):
        other = apply_function(A, torch.exp, factor * b, tol=1e-12).value
        torch.testing.assert_close(other / factor, one, rtol=1e-11, atol=1e-11)


def test_an_exhausted_budget_is_kept_and_said():
    A = with_spectrum(torch.linspace(0, 1, 300))
    operator, products = counted(A)
    b = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match=r"after 12 products.*Raise `max_products`"):
        found = apply_function(operator, lambda h: (h > 0.5).double(), b, max_products=12)
    assert not found.converged
    assert len(products) == found.num_products == 12


def test_float32_knows_its_own_floor():
    A = with_spectrum(torch.linspace(0, 1, 60))
    b = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = run(A.float(), torch.exp, b.float(), tol=1e-5)
    assert found.value.dtype == torch.float32
    assert found.converged
    assert float((found.value.double() - function_of(A, torch.exp) @ b).norm()) <= found.error


@pytest.mark.parametrize(
    "f",
    [
        torch.log,
        lambda h: 1 / (h - h),
        lambda h: torch.full_like(h, torch.nan),
    ],
)
def test_a_function_that_is_not_finite_on_the_spectrum_is_refused(f):
    A = Operator.from_matrix(with_spectrum([-1.0, 0.5, 2.0]))
    with pytest.raises(ValueError, match=r"`f` must map .* finite values .* some not finite"):
        apply_function(A, f, torch.ones(3).double())


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_function_that_loses_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"`f` must map .* got shape \[\]"):
        apply_function(
            Operator.from_matrix(torch.eye(3).double()), torch.sum, torch.ones(3).double()
        )


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        (torch.ones(3), {"tol": 0.0}, "`tol` must be positive"),
        (torch.ones(3), {"max_products": 0}, "`max_products` must be at least 1, got 0"),
        (torch.ones(4), {}, r"`b` must be a finite vector of length 3, got shape \[4\]\."),
        (torch.tensor([1.0, torch.nan, 0.0]), {}, "with a NaN or an infinity"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(b, options, message):
    with pytest.raises(ValueError, match=message):
        apply_function(
            Operator.from_matrix(torch.eye(3).double()), torch.exp, b.double(), **options
        )


def test_nan_from_a_product_is_an_error():
    broken = Operator(lambda v: v * torch.nan, 3, torch.float64, torch.device("cpu"))
    with pytest.raises(NonFiniteError):
        apply_function(broken, torch.exp, torch.ones(3).double())


def test_a_product_that_overflows_its_type_is_an_error_and_no_nan():
    A = Operator.from_matrix(torch.diag(torch.linspace(0.0, 100.0, 30)))
    with pytest.raises(NonFiniteError, match=r"overflows torch\.float32: \|f\| reaches"):
        apply_function(A, torch.exp, torch.ones(30))
