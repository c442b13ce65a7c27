import itertools
import math

import pytest
import torch
from scipy.stats import t

from hessian import (
    ConvergenceWarning,
    Eigenspace,
    NonFiniteError,
    Operator,
    hessian_operator,
    leading_eigenspace,
    spectral_density,
    trace,
)
from hessian.probes import CHUNK_BYTES, CountedProducts, SignProbes, chunk_columns
from hessian.progress import report_progress
from hessian.sketches import RangeBasis, leave_one_out_traces
from hessian.trace_estimators import ESTIMATORS
from tests.cases import digits_network
from tests.oracles import counted, digits_hessian, digits_leading, with_spectrum

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


# Methods other than plain Hutchinson.

METHODS = ["hutchinson", "hutch++", "xtrace"]
POLYNOMIAL = 1 / torch.arange(1.0, 101.0, dtype=torch.float64)
STEP = torch.cat([torch.ones(25), 1e-3 * torch.ones(75)]).double()


def leading(A, k):
    values, vectors = torch.linalg.eigh(A)
    order = values.abs().argsort(descending=True)[:k]
    return Eigenspace(values[order], vectors[:, order], torch.zeros(k).double(), math.nan, 0, True)


@pytest.fixture
def given_probes(monkeypatch):
    """Let the estimators draw the columns that a test lists, in turn."""

    def give(columns):
        left = list(columns.unbind(dim=1))

        def draw(self, count):
            taken = [left.pop(0) for _ in range(count)]
            return torch.stack(taken, dim=1) if taken else columns[:, :0]

        monkeypatch.setattr(SignProbes, "draw", draw)

    return give


def estimator(method, A, growing=False):
    counted_products = CountedProducts(Operator.from_matrix(A), lambda *a, **k: None, 0)
    return ESTIMATORS[method](
        counted_products, SignProbes(Operator.from_matrix(A), 0), growing=growing
    )


def sign_vectors(n):
    """All signs but for an overall one, which no estimator sees."""
    rows = itertools.product([-1.0, 1.0], repeat=n - 1)
    return torch.tensor([(1.0, *row) for row in rows]).double()


@pytest.mark.parametrize(("n", "count"), [(5, 2), (4, 3), (3, 3)])
def test_xtrace_over_all_signs_averages_to_the_trace(n, count, given_probes):
    # Among them are equal probes, whose sketch has fewer directions than columns.
    B = with_spectrum(torch.linspace(-1, 3, n), seed=1)
    signs = sign_vectors(n)
    values = []
    for choice in itertools.product(range(len(signs)), repeat=count):
        given_probes(signs[list(choice)].T)
        found = estimator("xtrace", B)
        found.grow(count)
        values.append(found.outcome()[0])
    means = torch.stack(values).mean(dim=0)
    torch.testing.assert_close(means, B.trace().expand(count), rtol=0, atol=1e-10)
    assert float(torch.stack(values).std()) > 0.1


def test_hutch_plus_plus_over_all_signs_averages_to_the_trace(given_probes):
    B = with_spectrum(torch.linspace(-1, 3, 4), seed=1)
    signs = sign_vectors(4)
    values = []
    for choice in itertools.product(range(len(signs)), repeat=3):
        given_probes(signs[list(choice)].T)
        found = estimator("hutch++", B)
        found.grow(3)
        values.append(found.outcome()[0])
    means = torch.stack(values).mean(dim=0)
    torch.testing.assert_close(means, B.trace().expand(2), rtol=0, atol=1e-10)
    assert float(torch.stack(values).std()) > 0.1


def test_deflation_by_the_pairs_of_another_matrix_is_unbiased_too(given_probes):
    B, other = with_spectrum(torch.linspace(-1, 3, 6)), with_spectrum(torch.ones(6), seed=9)
    given_probes(sign_vectors(6).T)
    found = trace(Operator.from_matrix(B), eigenspace=leading(2.0 * other, 3), num_probes=32)
    assert found.value == pytest.approx(float(B.trace()), abs=1e-12)
    assert found.standard_error > 0.1


@pytest.mark.parametrize("pairs", [0, 3])
def test_the_variance_is_that_of_the_matrix_without_the_pairs(pairs, given_probes):
    B = with_spectrum([4.0, -3.0, 2.0, 1.0, 0.5, 0.2])
    space = leading(B, pairs) if pairs else None
    given_probes(sign_vectors(6).T)
    found = trace(Operator.from_matrix(B), eigenspace=space, num_probes=32)
    rest = B if space is None else B - (space.vectors * space.values) @ space.vectors.T
    variance = 2 * float((rest**2).sum() - (rest.diag() ** 2).sum())
    assert float(found.samples.var(correction=0)) == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_deflation_by_all_eigenvectors_is_exact(method):
    operator, products = counted(A)
    space = leading(A, N)
    found = trace(operator, method=method, eigenspace=space, num_probes=3)
    assert found.value == pytest.approx(float(A.trace()), rel=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    assert (
        found.num_products == len(products) == {"hutchinson": 3, "hutch++": 4, "xtrace": 6}[method]
    )


@pytest.mark.parametrize(("method", "rank"), [("hutch++", 5), ("xtrace", 9), ("xtrace", 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rank_within_the_sketch_is_exact(method, rank, dtype):
    B = with_spectrum(torch.cat([torch.arange(1.0, rank + 1), torch.zeros(40 - rank)]))
    found = trace(Operator.from_matrix(B.to(dtype)), method=method, num_probes=10)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert found.value == pytest.approx(float(B.trace()), rel=tolerance)
    assert found.standard_error < tolerance


def test_xtrace_with_one_probe_less_than_the_rank_is_not_exact():
    B = with_spectrum(torch.cat([torch.arange(1.0, 11), torch.zeros(30)]))
    found = trace(Operator.from_matrix(B), method="xtrace", num_probes=10)
    assert abs(found.value - 55.0) > 1e-3
    assert found.standard_error > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_the_zero_matrix_has_the_trace_zero(method):
    found = trace(Operator.from_matrix(torch.zeros(20, 20).double()), method=method, num_probes=5)
    assert (found.value, found.standard_error) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_permuting_coordinates_and_probes_changes_nothing(method, given_probes):
    B = with_spectrum(POLYNOMIAL[:30])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    signs = SignProbes(Operator.from_matrix(B), 0).draw(10)
    given_probes(signs)
    before = trace(Operator.from_matrix(B), method=method, num_probes=10)
    given_probes(signs[order])
    after = trace(Operator.from_matrix(B[order][:, order]), method=method, num_probes=10)
    torch.testing.assert_close(after.samples, before.samples, rtol=1e-10, atol=1e-10)
    assert after.standard_error == pytest.approx(before.standard_error, rel=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [-3.0, 1e-9, 1e9])
def test_a_multiple_has_the_multiple_of_the_trace(method, factor):
    B = with_spectrum(POLYNOMIAL[:40])
    one, other = (
        trace(Operator.from_matrix(c * B), method=method, num_probes=12) for c in (1.0, factor)
    )
    torch.testing.assert_close(other.samples / factor, one.samples, rtol=1e-10, atol=1e-10)
    assert other.standard_error / abs(factor) == pytest.approx(one.standard_error, rel=1e-8)


def test_a_shift_adds_its_trace_and_no_error():
    B = with_spectrum(POLYNOMIAL[:40])
    one, other = (trace(Operator.from_matrix(B + c * torch.eye(40).double())) for c in (0.0, 5.0))
    torch.testing.assert_close(other.samples - 200.0, one.samples, rtol=0, atol=1e-11)
    assert other.standard_error == pytest.approx(one.standard_error, rel=1e-10)


def test_the_samples_without_a_probe_are_those_of_a_run_without_it(given_probes):
    B = with_spectrum(POLYNOMIAL[:40])
    signs = SignProbes(Operator.from_matrix(B), 3).draw(7)
    given_probes(signs)
    whole = estimator("xtrace", B)
    whole.grow(7)
    W = signs.T @ whole.basis.Q
    _, without = leave_one_out_traces(whole.H, whole.basis.R, W.T, whole.forms)
    for j in range(7):
        given_probes(signs[:, [i for i in range(7) if i != j]])
        part = estimator("xtrace", B)
        part.grow(6)
        assert float(without[j]) == pytest.approx(float(part.outcome()[0].mean()), rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_probes_in_several_portions_give_what_one_portion_gives(method, given_probes):
    B = with_spectrum(POLYNOMIAL)
    signs = SignProbes(Operator.from_matrix(B), 0).draw(24)
    given_probes(signs)
    grown = estimator(method, B, growing=True)
    for count in (5, 12, 7):
        grown.grow(count)
    if method == "hutch++":
        # Portions alternate between sketch and samples: 2 + 3, 6 + 6, 4 + 3.
        sketch = [0, 1, 5, 6, 7, 8, 9, 10, 17, 18, 19, 20]
        signs = signs[:, sketch + [i for i in range(24) if i not in sketch]]
    given_probes(signs)
    once = estimator(method, B)
    once.grow(24)
    for ours, expected in zip(grown.outcome(), once.outcome(), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-9, atol=1e-11
        )
    assert grown.A.spent == once.A.spent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "pairs", "num_probes"),
    [
        ("hutchinson", 0, 36),
        ("hutchinson", 8, 36),
        ("hutch++", 0, 24),
        ("hutch++", 4, 10),
        ("xtrace", 0, 18),
        ("xtrace", 4, 8),
    ],
)
@pytest.mark.parametrize("spectrum", [POLYNOMIAL, STEP], ids=["polynomial", "step"])
def test_intervals_cover_the_truth_as_often_as_they_say(method, pairs, num_probes, spectrum):
    B = with_spectrum(spectrum)
    operator, space = Operator.from_matrix(B), leading(B, pairs) if pairs else None
    inside = 0
    for seed in range(200):
        found = trace(operator, method=method, eigenspace=space, num_probes=num_probes, seed=seed)
        low, high = found.interval(0.95)
        inside += low <= float(B.trace()) <= high
    assert 0.9 <= inside / 200 <= 0.99


def test_the_spread_of_xtrace_samples_alone_would_not_cover():
    # 25 equal eigenvalues and 24 probes: the basis misses one of them, whichever probe is left out.
    B = with_spectrum(STEP)
    plain = corrected = 0
    for seed in range(200):
        found = trace(Operator.from_matrix(B), method="xtrace", num_probes=24, seed=seed)
        error = abs(found.value - float(B.trace()))
        plain += error <= 2.07 * float(found.samples.std()) / math.sqrt(24)
        corrected += error <= 2.07 * found.standard_error
    assert plain / 200 < 0.7
    assert 0.9 <= corrected / 200 <= 0.99


def test_the_interval_is_that_of_student_and_grows_with_the_level():
    found = trace(Operator.from_matrix(A), num_probes=5)
    low, high = found.interval(0.95)
    assert (low + high) / 2 == pytest.approx(found.value)
    assert (high - low) / 2 == pytest.approx(2.776445 * found.standard_error, rel=1e-6)
    assert found.interval(0.5)[1] < high < found.interval(0.99)[1]
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="`level` must lie between 0 and 1"):
            found.interval(level)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", [POLYNOMIAL, STEP], ids=["polynomial", "step"])
def test_stopping_at_a_tolerance_is_not_early(method, spectrum):
    B = with_spectrum(spectrum)
    exact, rtol = float(B.trace()), 0.06
    runs = [
        trace(Operator.from_matrix(B), method=method, num_probes=20, rtol=rtol, seed=s)
        for s in range(200)
    ]
    assert all(run.converged for run in runs)
    # The exact trace was not the way out.
    assert sum(run.standard_error > 0 for run in runs) > 190
    assert all(run.standard_error <= rtol * abs(run.value) for run in runs)
    inside = sum(
        run.standard_error == 0 or run.interval()[0] <= exact <= run.interval()[1] for run in runs
    )
    assert inside / 200 >= 0.9
    # What counts: the errors that really occur are of the size that was asked for.
    within = sum(abs(run.value - exact) <= 2 * rtol * exact for run in runs)
    assert within / 200 >= 0.95


@pytest.mark.slow
def test_a_stop_at_the_first_small_spread_would_be_early():
    """One large eigenvalue: half of the probes hardly see it, and then the spread is small."""
    B = with_spectrum(torch.cat([torch.ones(1), torch.full((299,), 1 / 299)]))
    exact, rtol = float(B.trace()), 0.1
    needed = 2 * float((B**2).sum() - (B.diag() ** 2).sum()) / (rtol * exact) ** 2
    runs = [trace(Operator.from_matrix(B), num_probes=20, rtol=rtol, seed=s) for s in range(200)]
    early = sum(len(run.samples) < 0.7 * needed for run in runs) / 200
    covered = sum(run.interval()[0] <= exact <= run.interval()[1] for run in runs) / 200
    assert early <= 0.05
    assert covered >= 0.9
    # The same probes, stopped where their plain standard error first falls below the goal.
    naive_early = naive_covered = 0.0
    for seed in range(200):
        samples = trace(Operator.from_matrix(B), num_probes=100, seed=seed).samples
        m = 2
        while float(samples[:m].std()) / math.sqrt(m) > rtol * abs(float(samples[:m].mean())):
            m += 1
        naive_early += (m < 0.7 * needed) / 200
        reach = float(t.ppf(0.975, m - 1)) * float(samples[:m].std()) / math.sqrt(m)
        naive_covered += (abs(float(samples[:m].mean()) - exact) <= reach) / 200
    assert naive_early >= 0.5
    assert naive_covered <= 0.8


@pytest.mark.parametrize("method", METHODS)
def test_an_exhausted_budget_is_kept_and_said(method):
    operator, products = counted(with_spectrum(torch.linspace(-1, 1.1, 200)))
    with pytest.warns(ConvergenceWarning, match=r"Raise `max_products` or `rtol`"):
        found = trace(operator, method=method, num_probes=20, rtol=1e-3, max_products=100)
    assert not found.converged
    assert 95 < len(products) == found.num_products <= 100


@pytest.mark.parametrize(
    ("method", "most"), [("hutchinson", 80), ("hutch++", 118), ("xtrace", 118)]
)
@pytest.mark.parametrize("pairs", [0, 4])
def test_where_the_exact_trace_is_cheaper_it_is_taken(method, most, pairs):
    B = with_spectrum(torch.linspace(-1, 1.1, 60))
    operator, products = counted(B)
    space = leading(B, pairs) if pairs else None
    found = trace(operator, method=method, eigenspace=space, num_probes=20, rtol=1e-4)
    assert found.value == pytest.approx(float(B.trace()), rel=1e-11)
    assert (found.standard_error, found.converged) == (0.0, True)
    assert found.num_products == len(products) <= most


def test_a_diagonal_matrix_stops_at_the_first_look():
    operator, products = counted(torch.diag(torch.arange(1.0, 101.0).double()))
    found = trace(operator, num_probes=20, rtol=1e-12)
    assert found.converged
    assert len(products) == 20


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pairs", [0, 5])
def test_float32_agrees_with_float64(method, pairs):
    B = with_spectrum(POLYNOMIAL)
    space = leading(B, pairs) if pairs else None
    double, single = (
        trace(Operator.from_matrix(B.to(kind)), method=method, eigenspace=space, num_probes=9)
        for kind in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(single.samples, double.samples, rtol=1e-4, atol=1e-4)
    assert single.samples.dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
def test_matrix_products_give_the_same_as_products_one_by_one(method):
    B = with_spectrum(POLYNOMIAL)
    widths = []

    def columns(X):
        widths.append(X.shape[1])
        return B @ X

    together = Operator(lambda v: B @ v, 100, B.dtype, B.device, columns=columns)
    one, other = (trace(op, method=method, num_probes=20) for op in (counted(B)[0], together))
    torch.testing.assert_close(one.samples, other.samples, rtol=1e-10, atol=1e-12)
    assert max(widths) >= 10
    assert sum(widths) == other.num_products == one.num_products


def test_a_chunk_of_columns_fits_into_its_memory():
    for size in (10, 10**6, 10**9):
        operator = Operator(
            lambda v: v, size, torch.float32, torch.device("cpu"), columns=lambda X: X
        )
        width = chunk_columns(operator)
        assert width == 1 or 4 * size * width <= CHUNK_BYTES
        assert width >= 1


def test_progress_counts_products_and_knows_error_and_goal():
    steps = []
    found = trace(
        counted(with_spectrum(POLYNOMIAL))[0],
        num_probes=20,
        rtol=0.04,
        progress=steps.append,
    )
    assert [step.products for step in steps] == list(range(1, found.num_products + 1))
    assert steps[0].expected == 20
    assert steps[-1].goal == pytest.approx(0.04 * abs(found.value), rel=0.5)
    assert all(step.expected >= step.products for step in steps)


@pytest.mark.slow
def test_deflation_by_ten_pairs_leaves_less_than_half_of_the_spread_on_digits():
    H = digits_hessian()
    values, vectors = digits_leading(10)
    space = Eigenspace(values, vectors, torch.zeros(10).double(), math.nan, 0, True)
    plain, deflated = (
        torch.tensor(
            [
                trace(Operator.from_matrix(H), eigenspace=pairs, num_probes=50, seed=seed).value
                for seed in range(40)
            ]
        )
        for pairs in (None, space)
    )
    assert float(deflated.std() / plain.std()) <= 0.45
    assert float(deflated.mean()) == pytest.approx(float(H.trace()), rel=0.01)


@pytest.mark.oracle
def test_curvlinops_gives_the_same_from_the_same_probes(given_probes):
    from curvlinops import hutchinson_trace, hutchpp_trace, xtrace
    from curvlinops.sampling import random_vector

    B = with_spectrum(POLYNOMIAL[:60])
    for method, theirs, probes, products in (
        ("hutchinson", hutchinson_trace, 12, 12),
        ("hutch++", hutchpp_trace, 12, 18),
        ("xtrace", xtrace, 12, 24),
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            expected = float(theirs(B, products))
            torch.manual_seed(0)
            drawn = [random_vector(60, "rademacher", B.device, B.dtype) for _ in range(probes)]
        given_probes(torch.stack(drawn, dim=1))
        found = trace(Operator.from_matrix(B), method=method, num_probes=probes)
        assert found.value == pytest.approx(expected, rel=1e-10)
        assert found.num_products == products


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "xtrace", "num_probes": 1}, "`num_probes` must be at least 2"),
        ({"method": "hutch++", "num_probes": 2}, "`num_probes` must be at least 3"),
        ({"method": "xtrace", "num_probes": 4}, "fewer than 8 products.* 4 cost 8"),
        ({"method": "hutch++", "num_probes": 6}, "fewer than 8 products.* 6 cost 9"),
        ({"rtol": 0.0}, "`rtol` must be positive, got 0.0"),
        ({"rtol": math.nan}, "`rtol` must be positive, got nan"),
        ({"rtol": 0.1, "num_probes": 19}, "`num_probes` must be at least 20 with `rtol`, got 19"),
        ({"rtol": 0.1, "max_products": 29}, "`max_products` must be at least 30"),
    ],
)
def test_what_cannot_be_met_is_refused(options, message):
    operator, products = counted(A)
    with pytest.raises(ValueError, match=message):
        trace(operator, **options)
    assert not products


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r'`method` must be "hutchinson".* got "hutch"'):
        trace(Operator.from_matrix(A), method="hutch")


def test_an_eigenspace_of_another_length_is_refused():
    with pytest.raises(ValueError, match="length 8, got 5"):
        trace(Operator.from_matrix(A), eigenspace=leading(torch.eye(5).double(), 2))


def test_the_pace_counts_every_column_of_the_first_product():
    steps = []
    with report_progress(steps.append, "test") as update:
        A = Operator.from_matrix(torch.eye(20, dtype=torch.float64))
        A = Operator(A.product, A.size, A.dtype, A.device, A.product)
        counted = CountedProducts(A, update, 64)
        counted @ torch.ones(20, 16, dtype=torch.float64)
    made = steps[0].products
    assert made > 1
    assert steps[0].seconds_left == pytest.approx(steps[0].seconds / made * (64 - made))


def test_another_default_device_changes_nothing():
    A = Operator.from_matrix(torch.diag(torch.tensor([1.0, 2.0, 5.0])))
    expected = trace(A, num_probes=4).value, leading_eigenspace(A, k=1).values
    with torch.device("meta"):
        found = trace(A, num_probes=4).value, leading_eigenspace(A, k=1).values
        spectral_density(A, num_probes=2)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_a_range_basis_takes_entries_whose_squares_overflow():
    Y = torch.eye(4)[:, :2] * 1e20
    assert RangeBasis(Y).add(Y).shape == (4, 2)
