import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian import (
    ConvergenceWarning,
    NonFiniteError,
    Operator,
    hessian_operator,
    leading_eigenspace,
)
from tests.cases import digits_network
from tests.oracles import (
    counted,
    digits_eigenvalues,
    digits_hessian,
    digits_leading,
    with_spectrum,
)

WHICH = ["magnitude", "largest", "smallest"]
repeatable = settings(derandomize=True, deadline=None, max_examples=30, database=None)


def order(values, which):
    keys = {"magnitude": -values.abs(), "largest": -values, "smallest": values}
    return keys[which].argsort(stable=True)


def orthonormality(V):
    V = V.double()
    return float((V.T @ V - torch.eye(V.shape[1]).double()).abs().max())


def overlap(V, W):
    """Cosine of the largest angle between two subspaces."""
    return float(torch.linalg.svdvals(V.T @ W).min())


@pytest.fixture(scope="module")
def digits():
    calls = []
    H = hessian_operator(digits_network().objective([256, 144]))

    def product(v):
        calls.append(1)
        return H.product(v)

    operator = Operator(product, H.size, H.dtype, H.device)
    return leading_eigenspace(operator, k=10, tol=1e-8), len(calls)


def test_ten_eigenpairs_of_the_digits_hessian_equal_dense_ones(digits):
    space, _ = digits
    values, vectors = digits_leading(10)
    assert space.converged
    torch.testing.assert_close(space.values, values, rtol=1e-6, atol=0)
    assert overlap(space.vectors, vectors) > 1 - 1e-10
    for v, u in zip(space.vectors.T, vectors.T, strict=True):
        assert abs(float(v @ u)) > 1 - 1e-8
    assert orthonormality(space.vectors) < 1e-10


def test_residuals_are_those_of_the_dense_hessian_and_small(digits):
    space, _ = digits
    R = digits_hessian() @ space.vectors - space.vectors * space.values
    # The products themselves agree with the dense matrix to 1e-14 or so.
    torch.testing.assert_close(space.residuals, R.norm(dim=0), rtol=1e-3, atol=1e-12)
    assert float(space.residuals.max()) <= 1e-8 * float(space.values.abs().max())


def test_products_reported_are_products_made(digits):
    space, calls = digits
    assert space.num_products == calls
    assert calls < 150


def test_gap_of_the_digits_hessian_is_the_distance_to_the_eleventh_eigenvalue(digits):
    space, _ = digits
    values = digits_eigenvalues()
    ordered = values[order(values, "magnitude")]
    exact = float((ordered[:10, None] - ordered[None, 10:]).abs().min())
    assert space.gap == pytest.approx(exact, rel=1e-2)
    assert space.projector_error_bound < 1e-4


@repeatable
@given(
    values=st.lists(st.floats(-10, 10), min_size=2, max_size=25, unique_by=lambda x: round(x, 2)),
    which=st.sampled_from(WHICH),
    k=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_any_spectrum_gives_its_leading_eigenvalues_with_true_evidence(values, which, k, seed):
    A = with_spectrum(values, seed)
    k = min(k, len(A))
    operator, products = counted(A)
    space = leading_eigenspace(operator, k=k, which=which, tol=1e-9, seed=seed)
    assert space.num_products == len(products)
    exact = torch.linalg.eigvalsh(A)
    scale = float(exact.abs().max())
    expected = exact[order(exact, which)][:k]
    key = (lambda x: x.abs()) if which == "magnitude" else (lambda x: x)
    # ± pairs of one magnitude may come in either order.
    torch.testing.assert_close(key(space.values), key(expected), rtol=0, atol=1e-8 * scale + 1e-14)
    R = A @ space.vectors - space.vectors * space.values
    torch.testing.assert_close(space.residuals, R.norm(dim=0), rtol=1e-6, atol=1e-13 * scale)
    assert orthonormality(space.vectors) < 1e-10
    assert space.converged


@repeatable
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(12, 40),
    k=st.integers(1, 5),
    budget=st.integers(0, 20),
    which=st.sampled_from(WHICH),
)
def test_davis_kahan_bound_holds_on_random_matrices(seed, n, k, budget, which):
    generator = torch.Generator().manual_seed(seed)
    A = with_spectrum(torch.randn(n, generator=generator, dtype=torch.float64), seed)
    operator, products = counted(A)
    budget += 2 * k
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        space = leading_eigenspace(operator, k=k, which=which, max_products=budget, seed=seed)
    assert len(products) == space.num_products <= budget
    values, vectors = torch.linalg.eigh(A)
    # The exact eigenspace nearest to the one found, and the exact distance to all the others.
    near = (vectors.T @ space.vectors).norm(dim=1).argsort(descending=True)
    inside, outside = near[:k], near[k:]
    gap = float((space.values[:, None] - values[outside][None, :]).abs().min())
    exact = vectors[:, inside] @ vectors[:, inside].T
    error = float(torch.linalg.matrix_norm(space.vectors @ space.vectors.T - exact, ord=2))
    assert error <= float(space.residuals.norm()) / gap + 1e-10
    if space.gap <= gap * (1 + 1e-9):
        assert error <= space.projector_error_bound + 1e-10
    assert space.converged == bool((space.residuals <= 1e-6 * values.abs().max()).all())


def test_projector_error_bound_holds_with_the_estimated_gap_once_converged():
    for seed in range(20):
        A = with_spectrum(torch.linspace(0, 1, 40) ** 3, seed)
        space = leading_eigenspace(Operator.from_matrix(A), k=4, tol=1e-3, seed=seed)
        V = torch.linalg.eigh(A)[1][:, -4:]
        error = float(torch.linalg.matrix_norm(space.vectors @ space.vectors.T - V @ V.T, ord=2))
        # The gap is an estimate from above; at these residuals it is within a tenth.
        assert error <= 1.1 * space.projector_error_bound + 1e-12


@pytest.mark.parametrize("which", WHICH)
def test_gap_is_exact_once_the_basis_holds_the_whole_spectrum(which):
    values = torch.tensor([5.0, -4.0, 3.5, 1.0, 0.25, -0.5, 0.0]).double()
    A = with_spectrum(values)
    ordered = values[order(values, which)]
    for k in range(1, 7):
        space = leading_eigenspace(Operator.from_matrix(A), k=k, which=which, tol=1e-13)
        exact = float((ordered[:k, None] - ordered[None, k:]).abs().min())
        assert space.gap == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        ([2.0] * 5, 3, [2, 2, 2]),
        ([2.0] * 5, 5, [2] * 5),
        ([-2.0] * 5, 2, [-2, -2]),
        ([5.0, 5, 5, 1, 1, 1, 1], 3, [5, 5, 5]),
        ([5.0, 5, 5, 1, 1, 1, 1], 5, [5, 5, 5, 1, 1]),
        ([7.0, 7, 5, 5, 5, 1, 1, 1, 1, 1], 4, [7, 7, 5, 5]),
        ([-7.0, 7, -7, 7, 1, 1, 1, 1], 4, [7, 7, 7, 7]),
        ([3.0, 3, 2, 1, 0, 0, 0, 0], 4, [3, 3, 2, 1]),
        ([1.0, 1, 1, 1] + 16 * [0.0], 4, [1, 1, 1, 1]),  # a projector
        ([1.0, 1, 1, 1] + 16 * [0.0], 6, [1, 1, 1, 1, 0, 0]),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_multiple_eigenvalues_are_found_as_often_as_they_occur(values, k, expected, seed):
    A = with_spectrum(values, seed)
    for matrix in (A, torch.diag(torch.tensor(values).double())):
        space = leading_eigenspace(Operator.from_matrix(matrix), k=k, seed=seed)
        found = space.values if min(expected) < 0 else space.values.abs()
        torch.testing.assert_close(found, torch.tensor(expected).double())
        assert space.converged
        assert orthonormality(space.vectors) < 1e-10


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_zero_operator_has_zero_eigenvalues(k):
    operator, products = counted(torch.zeros(6, 6).double())
    space = leading_eigenspace(operator, k=k)
    assert torch.equal(space.values, torch.zeros(k).double())
    assert torch.equal(space.residuals, torch.zeros(k).double())
    assert space.converged
    assert orthonormality(space.vectors) < 1e-10
    assert space.num_products == len(products)
    assert space.gap == (math.inf if k == 6 else 0.0)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_operators_give_their_eigenvalues_and_then_zeros(rank):
    values = torch.zeros(200).double()
    values[:rank] = torch.tensor([9.0, -4.0, 1.0])[:rank]
    A = with_spectrum(values)
    operator, products = counted(A)
    space = leading_eigenspace(operator, k=5)
    torch.testing.assert_close(space.values, values[:5], rtol=1e-9, atol=1e-9)
    assert space.converged
    assert len(products) < 40


@pytest.mark.parametrize("which", WHICH)
def test_negative_spectra_lead_by_what_was_asked_for(which):
    values = -torch.linspace(1, 10, 30).double()
    space = leading_eigenspace(Operator.from_matrix(with_spectrum(values)), k=3, which=which)
    expected = values[order(values, which)][:3]
    torch.testing.assert_close(space.values, expected, rtol=1e-5, atol=0)


def test_all_eigenpairs_rebuild_the_matrix():
    A = with_spectrum([4.0, -3.0, 2.5, 0.0, 1e-3, -1e-3, 7.0])
    space = leading_eigenspace(Operator.from_matrix(A), k=7, tol=1e-12)
    torch.testing.assert_close((space.vectors * space.values) @ space.vectors.T, A)
    assert space.gap == math.inf
    assert space.projector_error_bound == 0.0


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0])
def test_a_matrix_of_one_entry(value):
    space = leading_eigenspace(Operator.from_matrix(torch.tensor([[value]]).double()), k=1)
    assert space.values.tolist() == [value]
    assert space.vectors.tolist() == [[1.0]]
    assert space.num_products == 2
    assert space.converged


@pytest.mark.parametrize("max_products", [4, 5, 9, 15])
def test_an_exhausted_budget_is_kept_and_said(max_products):
    A = with_spectrum(torch.linspace(0, 1, 300))
    operator, products = counted(A)
    with pytest.warns(ConvergenceWarning, match="largest residual of .*Raise `max_products`"):
        space = leading_eigenspace(operator, k=2, tol=1e-10, max_products=max_products)
    assert not space.converged
    assert space.num_products == len(products) == max_products
    R = A @ space.vectors - space.vectors * space.values
    torch.testing.assert_close(space.residuals, R.norm(dim=0), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("which", [*WHICH, "both"])
@pytest.mark.parametrize("max_basis", [None, 13])
@pytest.mark.parametrize("multiple", [False, True])
def test_residuals_that_are_not_measured_are_those_that_would_have_been(which, max_basis, multiple):
    A = with_spectrum(torch.cat([torch.tensor([2.0, -1.5]), torch.linspace(-1, 1, 98) ** 3]))
    options = {"k": 4, "tol": 1e-6, "which": which, "max_basis": max_basis, "multiple": multiple}
    whole = leading_eigenspace(counted(A)[0], **options)
    operator, products = counted(A)
    space = leading_eigenspace(operator, measure=False, **options)
    assert space.num_products == len(products) == whole.num_products - 4
    assert (space.measured, whole.measured) == (False, True)
    assert space.first(2).measured is False
    assert space.converged
    assert torch.equal(space.vectors, whole.vectors)
    torch.testing.assert_close(space.values, whole.values, rtol=0, atol=1e-14)
    exact = (A @ space.vectors - space.vectors * space.values).norm(dim=0)
    if multiple:  # after the search two directions lead out of the basis: a bound
        assert torch.all(space.residuals >= exact - 1e-14)
        assert float(space.residuals.max()) <= 1e-6 * 2
    else:
        torch.testing.assert_close(space.residuals, exact, rtol=0, atol=1e-14)
        assert float(exact.max()) > 1e-9  # far above rounding, so that they say something
    assert (space.gap, space.which) == (whole.gap, which)


@pytest.mark.parametrize("max_products", [2, 3, 9])
def test_without_measuring_the_whole_budget_spans_pairs(max_products):
    A = with_spectrum(torch.linspace(0, 1, 300))
    operator, products = counted(A)
    expected = []
    with pytest.warns(ConvergenceWarning, match="largest residual of .*Raise `max_products`"):
        space = leading_eigenspace(
            operator,
            k=2,
            tol=1e-10,
            max_products=max_products,
            measure=False,
            progress=lambda step: expected.append(step.expected),
        )
    assert space.num_products == len(products) == max_products
    assert max(expected) == expected[-1] == max_products
    assert not space.converged
    R = A @ space.vectors - space.vectors * space.values
    torch.testing.assert_close(space.residuals, R.norm(dim=0), rtol=1e-10, atol=1e-14)


def test_float32_says_that_it_cannot_reach_further():
    A = with_spectrum(torch.linspace(0, 1, 100)).float()
    operator, products = counted(A)
    with pytest.warns(ConvergenceWarning, match="Rounding lets it .* work in float64"):
        space = leading_eigenspace(operator, k=2, tol=1e-9, max_products=300)
    assert len(products) == space.num_products <= 300
    assert not space.converged
    # It measured, was disappointed, tried once more with lower estimates, and gave up then.
    assert len(products) < 100
    # What float32 can do: a few hundred roundings of 6e-8.
    assert float(space.residuals.max()) < 1e-5
    assert space.values.dtype == torch.float64
    assert space.vectors.dtype == torch.float32
    assert leading_eigenspace(operator, k=2, tol=1e-4).converged


def test_ghosts_do_not_appear_on_a_spectrum_that_breeds_them():
    values = torch.cat([torch.tensor([1e3, 1e2]), torch.linspace(0, 1, 298)]).double()
    space = leading_eigenspace(
        Operator.from_matrix(with_spectrum(values)), k=6, tol=1e-9, max_products=320
    )
    expected = values.sort(descending=True).values[:6]
    torch.testing.assert_close(space.values, expected, rtol=1e-9, atol=1e-9)


def test_the_seed_repeats_the_run_and_does_not_change_the_answer():
    A = Operator.from_matrix(with_spectrum(torch.linspace(0, 1, 60) ** 4))
    first, again, other = (leading_eigenspace(A, k=3, tol=1e-10, seed=s) for s in (5, 5, 6))
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.values, again.values)
    torch.testing.assert_close(first.values, other.values, rtol=1e-9, atol=0)
    # One sign convention, so that even the vectors agree.
    torch.testing.assert_close(first.vectors, other.vectors, rtol=0, atol=1e-8)
    assert not torch.equal(first.vectors, other.vectors)


def test_shift_scale_sign_and_permutation_carry_over():
    values = torch.linspace(0.1, 2, 50).double() ** 3
    A = with_spectrum(values)
    P = torch.randperm(50, generator=torch.Generator().manual_seed(0))

    def lead(matrix, which="largest"):
        return leading_eigenspace(Operator.from_matrix(matrix), k=3, tol=1e-11, which=which)

    plain = lead(A)
    shifted = lead(A + 4 * torch.eye(50).double())
    torch.testing.assert_close(shifted.values, plain.values + 4, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shifted.vectors, plain.vectors, rtol=0, atol=1e-8)
    assert shifted.gap == pytest.approx(plain.gap, rel=1e-6)
    for factor in (1e-12, 1e12):
        scaled = lead(factor * A)
        torch.testing.assert_close(scaled.values, factor * plain.values, rtol=1e-10, atol=0)
        assert scaled.gap == pytest.approx(factor * plain.gap, rel=1e-6)
        assert scaled.converged
    negated = lead(-A, which="smallest")
    torch.testing.assert_close(negated.values, -plain.values, rtol=1e-12, atol=1e-12)
    permuted = lead(A[P][:, P])
    torch.testing.assert_close(permuted.vectors, plain.vectors[P], rtol=0, atol=1e-8)


def test_start_in_an_invariant_subspace_does_not_hide_the_rest():
    # Two blocks: a product never leaves its block, as with layers that do not interact.
    A = torch.block_diag(with_spectrum([1.0, 2.0, 3.0]), with_spectrum([3.0, 2.0, 9.0], seed=1))
    space = leading_eigenspace(Operator.from_matrix(A), k=3)
    torch.testing.assert_close(space.values, torch.tensor([9.0, 3.0, 3.0]).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be between 1 and 5.*got 0"),
        ({"k": 6}, "`k` must be between 1 and 5.*got 6"),
        ({"k": 2, "tol": 0.0}, "`tol` must be positive, got 0.0"),
        ({"k": 2, "tol": float("nan")}, "`tol` must be positive, got nan"),
        ({"k": 2, "max_products": 3}, "`max_products` must be at least 4: 2 to .* 2 to .*got 3"),
        ({"k": 2, "max_products": 1, "measure": False}, "must be at least 2: 2 to .* pairs, got 1"),
        ({"k": 2, "measure": False, "backend": "pyhessian"}, "`measure` must be True for PyHess"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        leading_eigenspace(Operator.from_matrix(torch.eye(5).double()), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "biggest"}, '`which` must be .* got "biggest"'),
        ({"backend": "arpack"}, '`backend` must be "lanczos" or "pyhessian", got "arpack"'),
        ({"backend": "pyhessian", "which": "largest"}, '`which` must be "magnitude" for PyHessian'),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        leading_eigenspace(Operator.from_matrix(torch.eye(5).double()), k=1, **options)


def test_nan_from_a_product_is_an_error_and_not_an_answer():
    calls = []

    def product(v):
        calls.append(1)
        return v * (math.nan if len(calls) > 3 else torch.arange(20.0).double())

    with pytest.raises(NonFiniteError):
        leading_eigenspace(Operator(product, 20, torch.float64, torch.device("cpu")), k=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_eigenpairs_of_the_cpu():
    A = with_spectrum(torch.linspace(0, 1, 200) ** 4)
    on_cpu = leading_eigenspace(Operator.from_matrix(A), k=3, tol=1e-10)
    on_gpu = leading_eigenspace(Operator.from_matrix(A.cuda()), k=3, tol=1e-10)
    torch.testing.assert_close(on_gpu.values.cpu(), on_cpu.values, rtol=1e-10, atol=0)
    torch.testing.assert_close(on_gpu.vectors.cpu(), on_cpu.vectors, rtol=0, atol=1e-7)
