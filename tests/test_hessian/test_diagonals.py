import itertools
import math

import pytest
import torch
from scipy.stats import t

from hessian import Eigenspace, NonFiniteError, Operator, diagonal, hessian_operator
from hessian.probes import SignProbes
from tests.cases import digits_network
from tests.oracles import counted, digits_hessian, with_spectrum

N = 30
A = with_spectrum(1 / torch.arange(1.0, N + 1), seed=2)
METHODS = ["hutchinson", "xdiag"]


def leading(A, k):
    values, vectors = torch.linalg.eigh(A)
    order = values.abs().argsort(descending=True)[:k]
    return Eigenspace(values[order], vectors[:, order], torch.zeros(k).double(), math.nan, 0, True)


@pytest.fixture
def given_probes(monkeypatch):
    """Let the estimators draw the columns that a test lists, in turn."""

    def give(columns):
        left = list(columns.unbind(dim=1))
        monkeypatch.setattr(
            SignProbes, "draw", lambda self, k: torch.stack([left.pop(0) for _ in range(k)], dim=1)
        )

    return give


def sign_vectors(n):
    """All signs but for an overall one, which no estimator sees."""
    rows = itertools.product([-1.0, 1.0], repeat=n - 1)
    return torch.tensor([(1.0, *row) for row in rows]).double()


@pytest.mark.parametrize("pairs", [0, 2])
def test_all_signs_average_to_the_diagonal_with_the_known_variance(pairs, given_probes):
    B = with_spectrum([4.0, -3.0, 2.0, 1.0, 0.5, 0.2])
    space = leading(B, pairs) if pairs else None
    given_probes(sign_vectors(6).T)
    found = diagonal(Operator.from_matrix(B), eigenspace=space, num_probes=32)
    torch.testing.assert_close(found.value, B.diag(), rtol=0, atol=1e-12)
    rest = B if space is None else B - (space.vectors * space.values) @ space.vectors.T
    variance = (rest**2).sum(dim=1) - rest.diag() ** 2
    torch.testing.assert_close(found.standard_error**2, variance / 31, rtol=1e-10, atol=0)


def test_xdiag_over_all_signs_averages_to_the_diagonal(given_probes):
    B = with_spectrum(torch.linspace(-1, 3, 5), seed=1)
    signs = sign_vectors(5)
    values = []
    for choice in itertools.product(range(len(signs)), repeat=2):
        given_probes(signs[list(choice)].T)
        values.append(diagonal(Operator.from_matrix(B), method="xdiag", num_probes=2).value)
    torch.testing.assert_close(torch.stack(values).mean(dim=0), B.diag(), rtol=0, atol=1e-10)
    assert float(torch.stack(values).std(dim=0).min()) > 0.1


def test_pairs_of_another_matrix_leave_it_unbiased(given_probes):
    B = with_spectrum(torch.linspace(-1, 3, 6))
    given_probes(sign_vectors(6).T)
    space = leading(with_spectrum(torch.arange(6.0), seed=9), 3)
    found = diagonal(Operator.from_matrix(B), eigenspace=space, num_probes=32)
    torch.testing.assert_close(found.value, B.diag(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_deflation_by_all_eigenvectors_is_exact(method):
    found = diagonal(Operator.from_matrix(A), method=method, eigenspace=leading(A, N), num_probes=3)
    torch.testing.assert_close(found.value, A.diag(), rtol=1e-12, atol=0)
    assert float(found.standard_error.max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_xdiag_is_exact_for_a_rank_below_the_probes(dtype):
    B = with_spectrum(torch.cat([torch.arange(1.0, 8), torch.zeros(23)]))
    found = diagonal(Operator.from_matrix(B.to(dtype)), method="xdiag", num_probes=8)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.value, B.diag(), rtol=0, atol=tolerance)
    assert float(found.standard_error.max()) < tolerance


def test_a_diagonal_matrix_is_exact_with_every_probe():
    d = torch.tensor([3.0, -1.0, 0.5, 7.0]).double()
    found = diagonal(Operator.from_matrix(torch.diag(d)), num_probes=2)
    assert torch.equal(found.value, d)
    assert torch.equal(found.standard_error, torch.zeros(4).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [True, False])
def test_exact_is_exact_and_costs_a_product_an_entry(columns, dtype):
    B = A.to(dtype)
    operator = Operator.from_matrix(B) if columns else counted(B)[0]
    found = diagonal(operator, method="exact")
    assert torch.equal(found.value, B.diag().double())
    assert float(found.standard_error.max()) == 0.0
    assert (found.num_products, found.num_probes) == (N, 0)


def test_exact_in_several_portions_is_the_same():
    B = with_spectrum(torch.linspace(0, 1, 150))
    widths = []

    def columns(X):
        widths.append(X.shape[1])
        return B @ X

    operator = Operator(lambda v: B @ v, 150, B.dtype, B.device, columns=columns)
    found = diagonal(operator, method="exact")
    torch.testing.assert_close(found.value, B.diag(), rtol=1e-13, atol=0)
    assert len(widths) > 1
    assert sum(widths) == 150


@pytest.mark.parametrize("name", ["hutchinson", "xdiag"])
def test_the_digits_diagonal_is_within_its_errors(name):
    H = hessian_operator(digits_network().objective([400]))
    exact = digits_hessian().diag()
    found = diagonal(H, method=name, num_probes=15)
    reach = float(t.ppf(0.975, 14)) * found.standard_error + 1e-12
    inside = ((found.value - exact).abs() <= reach).double().mean()
    assert float(inside) > 0.85  # the entries share their probes, so one run may be off
    # Weights of pixels that are always blank have no curvature, and no error.
    blank = exact == 0
    assert int(blank.sum()) > 0
    assert float(found.value[blank].abs().max()) < 1e-10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pairs", [0, 5])
def test_errors_cover_the_entries_as_often_as_they_say(method, pairs):
    operator, space = Operator.from_matrix(A), leading(A, pairs) if pairs else None
    inside = torch.zeros(N)
    for seed in range(200):
        found = diagonal(operator, method=method, eigenspace=space, num_probes=8, seed=seed)
        reach = float(t.ppf(0.975, 7)) * found.standard_error
        inside += (found.value - A.diag()).abs() <= reach
    assert 0.9 <= float(inside.mean()) / 200 <= 0.99


def test_the_jackknife_of_xdiag_leaves_out_one_probe_at_a_time(given_probes, monkeypatch):
    import hessian.diagonals

    signs = SignProbes(Operator.from_matrix(A), 3).draw(6)
    seen = {}

    def keep(samples, without):
        seen["without"] = without
        return samples.std(dim=0)

    given_probes(signs)
    monkeypatch.setattr(hessian.diagonals, "leave_one_out_error", keep)
    diagonal(Operator.from_matrix(A), method="xdiag", num_probes=6)
    without = seen["without"]
    for j in range(6):
        given_probes(signs[:, [i for i in range(6) if i != j]])
        part = diagonal(Operator.from_matrix(A), method="xdiag", num_probes=5)
        torch.testing.assert_close(without[j], part.value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_permuting_and_scaling_do_what_they_should(method, given_probes):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    signs = SignProbes(Operator.from_matrix(A), 0).draw(9)
    given_probes(signs)
    before = diagonal(Operator.from_matrix(A), method=method, num_probes=9)
    given_probes(signs[order])
    B = -3.0 * A[order][:, order]
    after = diagonal(Operator.from_matrix(B), method=method, num_probes=9)
    torch.testing.assert_close(after.value / -3.0, before.value[order], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        after.standard_error / 3.0, before.standard_error[order], rtol=1e-7, atol=1e-11
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_repeats_and_changes_the_probes_and_touches_nothing_else(method):
    state = torch.get_rng_state()
    one, again, other = (
        diagonal(Operator.from_matrix(A), method=method, num_probes=9, seed=s) for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.value, again.value)
    assert not torch.equal(one.value, other.value)


@pytest.mark.parametrize("method", METHODS)
def test_float32_agrees_with_float64_and_columns_with_single_products(method):
    one, single, by_columns = (
        diagonal(operator, method=method, num_probes=9)
        for operator in (counted(A)[0], counted(A.float())[0], Operator.from_matrix(A))
    )
    torch.testing.assert_close(single.value, one.value, rtol=1e-4, atol=1e-4)
    assert single.value.dtype == single.standard_error.dtype == torch.float64
    torch.testing.assert_close(by_columns.value, one.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_columns.standard_error, one.standard_error, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("method", "price"), [("hutchinson", 9), ("xdiag", 18), ("exact", N)])
def test_products_are_counted_and_reported(method, price):
    operator, products = counted(A)
    steps = []
    found = diagonal(operator, method=method, num_probes=9, progress=steps.append)
    assert found.num_products == len(products) == price
    assert [step.products for step in steps] == list(range(1, price + 1))
    assert {step.expected for step in steps} == {price}


@pytest.mark.oracle
def test_curvlinops_gives_the_same_from_the_same_probes(given_probes):
    from curvlinops import hutchinson_diag, xdiag
    from curvlinops.sampling import random_vector

    for method, theirs, products in (("hutchinson", hutchinson_diag, 9), ("xdiag", xdiag, 18)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            expected = theirs(A, products)
            torch.manual_seed(0)
            drawn = [random_vector(N, "rademacher", A.device, A.dtype) for _ in range(9)]
        given_probes(torch.stack(drawn, dim=1))
        found = diagonal(Operator.from_matrix(A), method=method, num_probes=9)
        torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 1}, "`num_probes` must be at least 2"),
        ({"method": "xdiag", "num_probes": 15}, "fewer than 30 products.* 15 cost 30"),
        ({"method": "exact", "max_products": 29}, "`max_products` must be at least 30, the price"),
        ({"eigenspace": leading(torch.eye(5).double(), 2)}, "length 30, got 5"),
    ],
)
def test_what_cannot_be_met_is_refused(options, message):
    operator, products = counted(A)
    with pytest.raises(ValueError, match=message):
        diagonal(operator, **options)
    assert not products


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r'`method` must be "hutchinson".* got "xtrace"'):
        diagonal(Operator.from_matrix(A), method="xtrace")


@pytest.mark.parametrize("method", ["hutchinson", "xdiag", "exact"])
def test_nan_from_a_product_is_an_error(method):
    broken = Operator(lambda v: v * math.nan, 9, torch.float64, torch.device("cpu"))
    with pytest.raises(NonFiniteError):
        diagonal(broken, method=method, num_probes=3)
