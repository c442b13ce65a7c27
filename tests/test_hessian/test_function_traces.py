import itertools
import math
import warnings

import pytest
import torch

from hessian import (
    ConvergenceWarning,
    Eigenspace,
    NonFiniteError,
    Operator,
    function_trace,
    hessian_operator,
    leading_eigenspace,
    logdet,
)
from hessian.probes import SignProbes
from tests.cases import digits_network
from tests.oracles import counted, digits_hessian, function_of, with_spectrum

SPECTRA = {
    "even": torch.linspace(0, 2, 100, dtype=torch.float64),
    "polynomial": 1 / torch.arange(1.0, 101.0, dtype=torch.float64),
}
FUNCTIONS = {
    "exp": torch.exp,
    "log": lambda h: (h + 0.01).log(),
    "inverse": lambda h: 1 / (h + 0.1),
    "cos": lambda h: torch.cos(6 * h),
    "step": lambda h: (h > 0.1).double(),
}


def leading(A, k, error=0.0):
    values, vectors = torch.linalg.eigh(A)
    order = values.abs().argsort(descending=True)[:k]
    residuals = torch.full((k,), error).double()
    return Eigenspace(values[order], vectors[:, order], residuals, math.nan, 0, True)


@pytest.mark.parametrize("name", ["exp", "log", "inverse"])
def test_all_signs_average_to_the_trace(name, monkeypatch):
    A, f = with_spectrum([2.0, 1.0, 0.5, 0.1, 3.0, 0.3, 0.7], seed=1), FUNCTIONS[name]
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=7))).double()[:64]
    rows = iter(signs)
    monkeypatch.setattr(SignProbes, "draw", lambda self, k: next(rows)[:, None])
    found = function_trace(Operator.from_matrix(A), f, num_probes=64)
    fA = function_of(A, f)
    torch.testing.assert_close(found.samples, ((signs @ fA) * signs).sum(dim=1))
    assert found.value == pytest.approx(float(fA.trace()), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spectrum", "name", "num_steps", "pairs"),
    [
        ("even", "exp", 6, 0),
        ("even", "log", 6, 0),
        ("even", "log", 20, 8),
        ("even", "step", 6, 0),
        ("polynomial", "log", 6, 0),
        ("polynomial", "inverse", 6, 8),
        ("polynomial", "cos", 20, 8),
        ("polynomial", "step", 20, 0),
    ],
)
def test_errors_cover_the_truth(spectrum, name, num_steps, pairs):
    values, f = SPECTRA[spectrum], FUNCTIONS[name]
    A = with_spectrum(values)
    operator, space = Operator.from_matrix(A), leading(A, pairs) if pairs else None
    exact, inside = float(f(values).sum()), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for seed in range(50):
            found = function_trace(
                operator, f, num_probes=8, num_steps=num_steps, eigenspace=space, seed=seed
            )
            low, high = found.interval()
            inside += low - 1e-9 <= exact <= high + 1e-9
    assert inside / 50 >= 0.88  # 95 % less two standard deviations of 50 runs


def test_a_polynomial_below_twice_the_steps_has_no_quadrature_error():
    A = with_spectrum(SPECTRA["even"])
    with pytest.warns(ConvergenceWarning):
        found = function_trace(Operator.from_matrix(A), lambda h: h**7 - 40 * h, num_steps=4)
    signs = SignProbes(Operator.from_matrix(A), 0).draw(10)
    P = function_of(A, lambda h: h**7 - 40 * h)
    torch.testing.assert_close(found.samples, ((P @ signs) * signs).sum(dim=0))


def test_the_trace_itself_is_that_of_hutchinson():
    A = with_spectrum(SPECTRA["polynomial"])
    found = function_trace(Operator.from_matrix(A), lambda h: h, num_probes=12, num_steps=10)
    signs = SignProbes(Operator.from_matrix(A), 0).draw(12)
    torch.testing.assert_close(found.samples, ((A @ signs) * signs).sum(dim=0))
    spread = float(found.samples.std()) / math.sqrt(12)
    assert found.standard_error == pytest.approx(spread, rel=1e-9)
    assert found.converged


@pytest.mark.parametrize("num_steps", [2, 5, 12])
def test_too_few_steps_are_said_and_the_error_holds_the_truth(num_steps):
    values = torch.logspace(-6, 0, 100).double()
    A = Operator.from_matrix(with_spectrum(values))
    exact = float((values + 1e-7).log().sum())
    for seed in range(5):
        with pytest.warns(ConvergenceWarning, match=r"from its quadratures.*Raise `num_steps`"):
            found = logdet(A, shift=1e-7, num_steps=num_steps, num_probes=20, seed=seed)
        assert not found.converged
        # The probes alone would be far off.
        assert abs(found.value - exact) > 4 * float(found.samples.std()) / math.sqrt(20)
        low, high = found.interval()
        assert low <= exact <= high


def test_fewer_than_ten_steps_are_never_believed():
    A = Operator.from_matrix(with_spectrum(SPECTRA["even"]))
    with pytest.warns(ConvergenceWarning, match="should be 10 at least"):
        assert not function_trace(A, torch.exp, num_steps=9).converged
    assert function_trace(A, torch.exp, num_steps=10).converged


def test_enough_steps_are_quiet_and_the_error_is_that_of_the_probes():
    A = Operator.from_matrix(with_spectrum(SPECTRA["even"]))
    found = function_trace(A, torch.exp, num_steps=20)
    assert found.converged
    spread = float(found.samples.std()) / math.sqrt(10)
    assert found.standard_error == pytest.approx(spread, rel=1e-6)


def test_breakdown_is_exact():
    A = with_spectrum(torch.cat([torch.zeros(37), torch.tensor([1.0, 2.0, 5.0])]))
    operator, products = counted(A)
    found = function_trace(operator, torch.exp, num_probes=200, num_steps=30)
    assert len(products) == found.num_products <= 200 * 5
    exact = 37 + math.e + math.e**2 + math.e**5
    assert abs(found.value - exact) <= 3 * found.standard_error


@pytest.mark.parametrize("function", [torch.exp, torch.ones_like])
def test_all_eigenpairs_are_exact(function):
    A = with_spectrum([3.0, 1.0, -2.0])
    found = function_trace(Operator.from_matrix(A), function, eigenspace=leading(A, 3))
    assert found.value == pytest.approx(
        float(function(torch.tensor([3.0, 1.0, -2.0]).double()).sum())
    )
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    assert found.num_products == 1


def test_pairs_at_hand_take_their_part_of_the_error_away():
    A = with_spectrum(SPECTRA["polynomial"])
    plain, deflated = (
        function_trace(Operator.from_matrix(A), torch.exp, eigenspace=space, num_steps=15)
        for space in (None, leading(A, 8))
    )
    exact = float(SPECTRA["polynomial"].exp().sum())
    assert deflated.standard_error < 0.2 * plain.standard_error
    assert abs(deflated.value - exact) <= 3 * deflated.standard_error


def test_rough_pairs_enlarge_the_error_and_are_named():
    values = torch.cat([torch.tensor([10.0]), torch.full((99,), 1.0)]).double()
    A = with_spectrum(values)
    with pytest.warns(ConvergenceWarning, match="converge the eigenspace further"):
        found = function_trace(
            Operator.from_matrix(A), torch.exp, num_steps=5, eigenspace=leading(A, 1, error=0.1)
        )
    moved = 2 * (math.exp(10.1) - math.exp(10.0))
    assert found.standard_error >= moved * 0.999


@pytest.mark.parametrize("shift", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_log_determinant_is_the_dense_one(spectrum, shift):
    A = with_spectrum(SPECTRA[spectrum])
    found = logdet(Operator.from_matrix(A), shift=shift, num_probes=20, num_steps=60)
    exact = float(torch.linalg.slogdet(A + shift * torch.eye(100).double())[1])
    low, high = found.interval(0.99)
    assert low <= exact <= high
    assert found.converged
    assert found.standard_error < 5.0


def test_the_log_determinant_of_a_multiple_of_the_identity_has_no_error():
    found = logdet(Operator.from_matrix(2.0 * torch.eye(9).double()), shift=1.0)
    assert found.value == pytest.approx(9 * math.log(3.0))
    assert found.standard_error == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_the_digits_log_determinant_is_the_dense_one():
    H = hessian_operator(digits_network().objective([400]))
    exact = float(torch.linalg.slogdet(digits_hessian() + 0.1 * torch.eye(1510))[1])
    space = leading_eigenspace(H, k=10, tol=1e-4)
    for pairs in (None, space):
        found = logdet(H, shift=0.1, num_probes=8, num_steps=40, eigenspace=pairs)
        low, high = found.interval(0.99)
        assert low <= exact <= high


def test_an_indefinite_matrix_names_the_shift_that_is_needed():
    A = Operator.from_matrix(with_spectrum(torch.linspace(-0.5, 2, 60)))
    with pytest.raises(ValueError, match=r"`shift` must make A \+ shift I positive definite, got"):
        logdet(A, shift=0.3)
    with pytest.raises(ValueError, match=r"Choose a shift above 0\.5"):
        logdet(A, shift=-3.0 + 2.9)
    assert logdet(A, shift=0.6).value < math.inf


def test_the_seed_repeats_and_changes_the_probes_and_touches_nothing_else():
    A = Operator.from_matrix(with_spectrum(SPECTRA["even"]))
    state = torch.get_rng_state()
    one, again, other = (logdet(A, shift=1.0, num_steps=10, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.value == again.value != other.value


def test_float32_agrees_with_float64():
    A = with_spectrum(SPECTRA["even"])
    double, single = (
        logdet(Operator.from_matrix(A.to(kind)), shift=0.5, num_steps=20)
        for kind in (torch.float64, torch.float32)
    )
    assert single.value == pytest.approx(double.value, rel=1e-4)
    assert single.standard_error == pytest.approx(double.standard_error, rel=1e-2)


def test_products_are_counted_and_reported():
    operator, products = counted(with_spectrum(SPECTRA["even"]))
    steps = []
    found = logdet(operator, shift=1.0, num_probes=3, num_steps=11, progress=steps.append)
    assert found.num_products == len(products) == 33
    assert [step.products for step in steps] == list(range(1, 34))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 1}, "`num_probes` must be at least 2"),
        ({"num_steps": 0}, "`num_steps` must be at least 1"),
        ({"shift": math.nan}, "`shift` must be finite, got nan"),
        ({"eigenspace": leading(2 * with_spectrum(SPECTRA["even"]), 2)}, "one of this operator"),
    ],
)
def test_what_cannot_be_met_is_refused(options, message):
    A = Operator.from_matrix(with_spectrum(SPECTRA["even"]))
    with pytest.raises(ValueError, match=message):
        logdet(A, **({"shift": 1.0} | options))


def test_a_function_that_is_not_finite_on_the_spectrum_is_refused():
    with pytest.raises(ValueError, match=r"`f` must map .* finite values"):
        function_trace(Operator.from_matrix(with_spectrum([-1.0, 0.5, 2.0])), torch.log)


def test_nan_from_a_product_is_an_error():
    broken = Operator(lambda v: v * math.nan, 9, torch.float64, torch.device("cpu"))
    with pytest.raises(NonFiniteError):
        function_trace(broken, torch.exp)
