import itertools
import math

import pytest
import torch

from hessian import NonFiniteError, Operator, hessian_operator, trace
from tests.cases import digits_network
from tests.oracles import counted, digits_hessian, with_spectrum

N = 8
A = with_spectrum(torch.linspace(-1, 3, N), seed=4)


def test_a_diagonal_matrix_is_exact_with_every_probe():
    d = torch.tensor([3.0, -1.0, 0.5, 7.0]).double()
    found = trace(Operator.from_matrix(torch.diag(d)), num_probes=2)
    assert found.value == pytest.approx(9.5, rel=1e-14)
    assert found.samples.tolist() == pytest.approx([9.5, 9.5])
    assert found.standard_error == pytest.approx(0, abs=1e-14)


def test_samples_are_signed_sums_and_all_signs_average_to_the_trace():
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=N))).double()
    forms = ((signs @ A) * signs).sum(dim=1)
    assert float(forms.mean()) == pytest.approx(float(A.trace()), rel=1e-12)
    variance = 2 * float((A**2).sum() - (A.diag() ** 2).sum())
    assert float(forms.var(correction=0)) == pytest.approx(variance, rel=1e-12)
    found = trace(Operator.from_matrix(A), num_probes=4000)
    # Every sample is one of the 2^8 forms, and all of them turn up about equally often.
    which = (found.samples[:, None] - forms[None, :]).abs().argmin(dim=1)
    torch.testing.assert_close(found.samples, forms[which], rtol=0, atol=1e-12)
    # A sign vector and its negative give one form, so half of the rows are named.
    assert len(which.unique()) == 2 ** (N - 1)
    assert float(found.samples.var()) == pytest.approx(variance, rel=0.1)


def test_the_probes_are_plain_independent_signs():
    seen = []

    def product(v):
        seen.append(v.clone())
        return v

    trace(Operator(product, 50, torch.float64, torch.device("cpu")), num_probes=200)
    V = torch.stack(seen)
    assert torch.all(V.abs() == 1)
    # Means of 200 signs: five standard errors.
    assert float(V.mean(dim=0).abs().max()) < 5 / math.sqrt(200)
    assert float((V.T @ V / 200 - torch.eye(50)).abs().max()) < 5 / math.sqrt(200)


def test_the_digits_trace_is_within_three_standard_errors():
    H = hessian_operator(digits_network().objective([400]))
    found = trace(H, num_probes=30)
    exact = float(digits_hessian().trace())
    assert abs(found.value - exact) <= 3 * found.standard_error
    off = digits_hessian() - torch.diag(digits_hessian().diag())
    assert found.standard_error == pytest.approx(math.sqrt(2 * float((off**2).sum()) / 30), rel=0.5)


def test_value_and_error_are_the_formulas_of_the_samples():
    operator, products = counted(A)
    found = trace(operator, num_probes=17)
    mean = sum(found.samples.tolist()) / 17
    spread = sum((s - mean) ** 2 for s in found.samples.tolist()) / 16
    assert found.value == pytest.approx(mean, rel=1e-13)
    assert found.standard_error == pytest.approx(math.sqrt(spread / 17), rel=1e-12)
    assert found.num_products == len(products) == len(found.samples) == 17


def test_the_standard_error_covers_as_often_as_it_should():
    exact = float(A.trace())
    runs = [trace(Operator.from_matrix(A), num_probes=40, seed=s) for s in range(200)]
    inside = sum(abs(r.value - exact) <= 2 * r.standard_error for r in runs)
    assert 0.9 <= inside / 200 <= 0.99  # 95 % for a normal mean


def test_the_seed_repeats_and_changes_the_probes_and_touches_nothing_else():
    state = torch.get_rng_state()
    first, again, other = (trace(Operator.from_matrix(A), seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.samples, again.samples)
    assert not torch.equal(first.samples, other.samples)


def test_float32_gives_the_same_probes():
    double, single = (trace(Operator.from_matrix(A.to(t))) for t in (torch.float64, torch.float32))
    torch.testing.assert_close(single.samples, double.samples, rtol=1e-5, atol=1e-5)
    assert single.samples.dtype == torch.float64


@pytest.mark.parametrize("num_probes", [1, 0, -3])
def test_too_few_probes_says_what_to_change(num_probes):
    with pytest.raises(ValueError, match=f"`num_probes` must be at least 2 .* got {num_probes}"):
        trace(Operator.from_matrix(A), num_probes=num_probes)


def test_nan_from_a_product_is_an_error():
    with pytest.raises(NonFiniteError):
        trace(Operator(lambda v: v * math.nan, 3, torch.float64, torch.device("cpu")))
