import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian import ConvergenceWarning, Operator, leading_eigenspace
from hessian.lanczos import KrylovBasis
from hessian.leading_values import leading_order, merit
from hessian.missed_eigenvalues import Search
from hessian.progress import Step
from hessian.thick_restart import random_direction
from hessian.vector_rows import VectorRows
from tests.oracles import counted, digits_hessian, digits_leading, with_spectrum

WHICH = ["magnitude", "largest", "smallest", "both"]
repeatable = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def led_by(values, which, k):
    """The k leading of some values, by sorting and nothing else; magnitudes if those lead."""
    up = sorted(float(x) for x in values)
    down = up[::-1]
    if which == "magnitude":
        return sorted((abs(x) for x in up), reverse=True)[:k]
    if which == "both":
        return [(down if i % 2 == 0 else up)[i // 2] for i in range(k)]
    return (down if which == "largest" else up)[:k]


def comparable(space):
    return space.values.abs() if space.which == "magnitude" else space.values


def orthonormality(V):
    V = V.double()
    return float((V.T @ V - torch.eye(V.shape[1]).double()).abs().max())


def normal(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The basis ---------------------------------------------------------------------------------------


def relation(basis, A):
    """Largest entry of A Q − Q T − Σ p cᵀ, and of Qᵀ Q − 1."""
    Q = torch.stack([basis.rows[i] for i in range(len(basis))], dim=1)
    left = A @ Q - Q @ torch.from_numpy(basis.T.copy())
    for remainder in [basis.current, *basis.abandoned]:
        if remainder is not None:
            left -= torch.outer(remainder.vector, torch.from_numpy(remainder.couplings))
    return float(left.abs().max()), orthonormality(Q)


def test_what_a_maps_out_of_the_basis_is_known_through_all_that_happens_to_it():
    A = with_spectrum(normal(60))
    basis = KrylovBasis(Operator.from_matrix(A), normal(60, 1))
    rng = np.random.default_rng(0)
    for step in range(200):
        basis.extend()
        values, vectors = basis.ritz()
        lead = vectors[:, leading_order(values, "magnitude")]
        if len(basis) >= 25:
            basis.compress(lead[:, : int(rng.integers(3, 12))])
            lead = np.eye(len(basis))
        if step % 13 == 5:
            basis.restart(normal(60, step + 2))
        if step % 7 == 3:
            basis.follow_largest(lead[:, :3])
        off, skew = relation(basis, A)
        assert off < 1e-12
        assert skew < 1e-13
        C = np.linalg.qr(rng.standard_normal((len(basis), 2)))[0]
        Y = basis.combine(C)
        exact = (A @ Y - basis.combine(basis.T @ C)).norm(dim=0).numpy()
        bound = basis.residuals(C)
        assert np.all(exact <= bound + 1e-12)
        if not basis.abandoned:
            np.testing.assert_allclose(exact, bound, rtol=1e-9, atol=1e-12)


def test_the_basis_stays_orthonormal_where_one_pass_of_gram_schmidt_would_not_do():
    A = with_spectrum(torch.cat([torch.tensor([1e8, -1e4]), torch.linspace(0, 1, 78)]).double())
    basis = KrylovBasis(Operator.from_matrix(A), normal(80))
    for i in range(60):
        if basis.exhausted:
            basis.restart(normal(80, i + 1))
        basis.extend()
    # With one pass the rows are copies of each other: 1.0.
    assert orthonormality(torch.stack([basis.rows[i] for i in range(60)], dim=1)) < 1e-14


def test_a_direction_that_lies_nearly_in_the_basis_takes_a_second_pass():
    basis = KrylovBasis(Operator.from_matrix(with_spectrum(normal(60))), normal(60))
    for _ in range(10):
        basis.extend()
    assert basis.restart(basis.rows[3] + 1e-7 * normal(60, 1))
    basis.extend()
    # One pass leaves the rounding of what it took away: 1e-9.
    assert orthonormality(torch.stack([basis.rows[i] for i in range(11)], dim=1)) < 1e-14


def test_one_pass_is_made_where_one_is_enough(monkeypatch):
    passes = []
    coefficients = VectorRows.coefficients

    def counting(self, v):
        passes.append(len(self))
        return coefficients(self, v)

    monkeypatch.setattr(VectorRows, "coefficients", counting)
    basis = KrylovBasis(Operator.from_matrix(with_spectrum(normal(100))), normal(100))
    for _ in range(60):
        basis.extend()
    assert passes == list(range(1, 61))
    assert orthonormality(torch.stack([basis.rows[i] for i in range(60)], dim=1)) < 1e-14


def test_float32_stays_orthonormal_over_many_entries_behind_a_few_large_ones():
    # Sharp directions in ten weights of a million: the small rest of a dot product counts, too.
    n, top = 1_000_000, torch.arange(10, 0, -1) ** 1.5 + 3
    bulk = torch.linspace(0, 0.8, n) ** 2

    def product(v):
        out = v * bulk
        out[:10] += top * v[:10]
        return out

    space = leading_eigenspace(
        Operator(product, n, torch.float32, torch.device("cpu")), k=10, tol=1e-4, multiple=False
    )
    assert space.converged
    # Summed in float32 it is 6e-5, and 1e-3 for ten million, where residuals stall at that.
    assert orthonormality(space.vectors) < 1e-5
    torch.testing.assert_close(space.values, top.double() + bulk[:10].double(), rtol=1e-5, atol=0)


def test_a_basis_that_is_rotated_holds_the_same_vectors_combined():
    # More entries than a slab, more rows than a block, and neither a multiple.
    n = 40_001
    d = torch.linspace(0, 1, n).double()
    basis = KrylovBasis(Operator(lambda v: d * v, n, d.dtype, d.device), normal(n))
    for _ in range(19):
        basis.extend()
    C = np.linalg.qr(np.random.default_rng(0).standard_normal((19, 11)))[0]
    expected = basis.combine(C)
    basis.compress(C)
    found = torch.stack([basis.rows[i] for i in range(11)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert len(basis) == 11


def test_a_product_that_returns_its_argument_does_no_harm():
    space = leading_eigenspace(Operator(lambda v: v, 9, torch.float64, torch.device("cpu")), k=3)
    assert space.values.tolist() == pytest.approx([1.0, 1.0, 1.0], rel=1e-14)
    assert orthonormality(space.vectors) < 1e-14


# Restarts ----------------------------------------------------------------------------------------


@repeatable
@given(
    n=st.integers(30, 70),
    k=st.integers(1, 5),
    room=st.integers(6, 14),
    which=st.sampled_from(WHICH),
    multiple=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_small_basis_gives_the_same_pairs(n, k, room, which, multiple, seed):
    A = with_spectrum(normal(n, seed) ** 3, seed)
    operator, products = counted(A)
    space = leading_eigenspace(
        operator,
        k=k,
        which=which,
        tol=1e-8,
        max_basis=k + room,
        multiple=multiple,
        seed=seed,
        max_products=4000,
    )
    exact = torch.tensor(led_by(torch.linalg.eigvalsh(A), which, k), dtype=torch.float64)
    scale = float(torch.linalg.eigvalsh(A).abs().max())
    assert space.converged
    assert space.num_products == len(products)
    torch.testing.assert_close(comparable(space), exact, rtol=0, atol=1e-7 * scale)
    R = A @ space.vectors - space.vectors * space.values
    torch.testing.assert_close(space.residuals, R.norm(dim=0), rtol=1e-5, atol=1e-13 * scale)
    assert orthonormality(space.vectors) < 1e-10


@pytest.mark.parametrize("max_basis", [16, 20, 30])
def test_restarts_lose_little_of_the_digits_hessian(max_basis):
    A = Operator.from_matrix(digits_hessian())
    whole = leading_eigenspace(A, k=10, tol=1e-6)
    small = leading_eigenspace(A, k=10, tol=1e-6, max_basis=max_basis)
    assert small.converged
    torch.testing.assert_close(small.values, digits_leading(10)[0], rtol=1e-9, atol=0)
    # Thick restarts without the couplings, or from one vector, take several times as many.
    assert small.num_products <= 1.5 * whole.num_products


def test_the_basis_never_grows_beyond_what_was_asked_for(monkeypatch):
    largest = 0
    extend = KrylovBasis.extend

    def watched(self):
        nonlocal largest
        extend(self)
        largest = max(largest, len(self) + len(self.abandoned))

    monkeypatch.setattr(KrylovBasis, "extend", watched)
    A = Operator.from_matrix(with_spectrum(torch.linspace(0, 1, 200) ** 2))
    leading_eigenspace(A, k=5, max_basis=17)
    assert largest == 17


# Multiple eigenvalues ----------------------------------------------------------------------------


def clustered(seed):
    """Up to 8 leading values of up to 4 copies, and 40 small ones; and how many are asked for."""
    rng = np.random.default_rng(seed)
    groups = [(rng.uniform(-10, 10), int(rng.integers(1, 5))) for _ in range(rng.integers(3, 9))]
    values = [x for x, copies in groups for _ in range(copies)]
    return torch.tensor([*values, *rng.uniform(-1, 1, 40)]).double(), int(rng.integers(1, 7))


@pytest.mark.parametrize("seed", range(12))
def test_a_basis_without_room_goes_on_where_most_is_left(seed):
    # What a search leaves open is to be followed, or a small basis never settles.
    d, k = clustered(seed)
    operator = Operator(lambda v: d * v, len(d), d.dtype, d.device)
    space = leading_eigenspace(operator, k=k, tol=1e-8, max_basis=k + 6, seed=seed)
    exact = torch.tensor(led_by(d, "magnitude", k), dtype=torch.float64)
    torch.testing.assert_close(comparable(space), exact, rtol=0, atol=1e-7 * float(exact[0]))
    assert space.converged
    assert space.num_products <= 300


clusters = st.lists(
    st.tuples(
        st.floats(-10, 10, allow_subnormal=False),
        st.integers(1, 4),
        st.sampled_from([0.0, 0.0, 1e-12, 1e-5]),
    ),
    min_size=2,
    max_size=12,
)


@repeatable
@given(
    groups=clusters,
    tiny=st.integers(0, 20),
    which=st.sampled_from(WHICH),
    k=st.integers(1, 6),
    tol=st.sampled_from([1e-4, 1e-8]),
    seed=st.integers(0, 1000),
)
def test_copies_clusters_and_tiny_values_are_counted(groups, tiny, which, k, tol, seed):
    values = [x * (1 + i * spread) for x, count, spread in groups for i in range(count)]
    values += [1e-9 * (-1) ** i * i for i in range(tiny)]
    A = with_spectrum(values, seed)
    k = min(k, len(A))
    operator, products = counted(A)
    space = leading_eigenspace(operator, k=k, which=which, tol=tol, seed=seed)
    exact = torch.linalg.eigvalsh(A)
    scale = float(exact.abs().max())
    assert space.converged
    assert space.num_products == len(products)
    assert space.missed <= 1e-3
    expected = torch.tensor(led_by(exact, which, k), dtype=torch.float64)
    torch.testing.assert_close(
        comparable(space), expected, rtol=0, atol=2 * tol * scale + 1e-14 * scale
    )
    R = A @ space.vectors - space.vectors * space.values
    torch.testing.assert_close(space.residuals, R.norm(dim=0), rtol=1e-5, atol=1e-13 * scale)
    assert orthonormality(space.vectors) < 1e-10


@pytest.mark.parametrize("max_basis", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_four_copies_among_many_other_values_are_all_found(dtype, max_basis):
    leading = torch.tensor([10.0, 10, 10, 10, 8])
    d = torch.cat([leading, torch.linspace(-3, 3, 4995)]).to(dtype)
    operator = Operator(lambda v: d * v, len(d), d.dtype, d.device)
    space = leading_eigenspace(operator, k=5, tol=1e-4, max_basis=max_basis)
    torch.testing.assert_close(space.values, leading.double(), rtol=0, atol=1e-3)
    assert space.converged
    assert space.missed <= 1e-3 or max_basis is not None
    # One Krylov space sees one copy.
    single = leading_eigenspace(operator, k=2, tol=1e-3, multiple=False)
    torch.testing.assert_close(single.values, leading[3:].double(), rtol=0, atol=1e-2)
    assert math.isnan(single.missed)


def test_a_search_costs_little_on_the_digits_hessian():
    A = Operator.from_matrix(digits_hessian())
    for seed in range(3):
        plain = leading_eigenspace(A, k=10, tol=1e-3, multiple=False, seed=seed)
        searched = leading_eigenspace(A, k=10, tol=1e-3, seed=seed)
        assert plain.num_products <= 10 + 25
        assert plain.num_products < searched.num_products <= plain.num_products + 10
        torch.testing.assert_close(plain.values, searched.values, rtol=1e-4, atol=0)
        assert math.isnan(plain.missed)
        assert searched.missed <= 1e-3


def test_the_mass_bound_is_kept_by_every_eigenvalue_and_reached_by_none_seen():
    values = torch.cat([torch.tensor([2.5]), torch.linspace(-1, 1, 79)]).double()
    A = with_spectrum(values)
    z = normal(80, 3)
    z /= z.norm()
    masses = (torch.linalg.eigh(A)[1].T @ z) ** 2
    exact = torch.linalg.eigh(A)[0]
    basis = KrylovBasis(Operator.from_matrix(A), z)
    search = Search([float(x) for x in exact], 0.0, 0.0, 80)
    for m in range(1, 15):  # later, rounding grows at the values that are already seen
        basis.extend()
        search.step(float(basis.T[m - 1, m - 1]), basis.beta)
        bound = 1 / torch.tensor(search.sums).double()
        assert torch.all(masses <= bound * (1 + 1e-9) + 1e-20)
    # The outlier's mass is all that is left at its place once its Ritz vector has converged.
    assert float(bound[-1]) == pytest.approx(float(masses[-1]), rel=1e-6)


def test_the_chance_of_a_miss_is_the_chance_of_a_small_mass():
    # Whatever the bound on the mass, a random direction goes below it that often.
    n, draws = 400, 20_000
    z = torch.randn(draws, n, generator=torch.Generator().manual_seed(0))
    masses = (z[:, 0] / z.norm(dim=1)) ** 2
    for mass in (1e-5, 1e-6):
        search = Search([1.0], 0.0, 0.0, n, sums=[1 / mass], last=[1.0], before=[0.0])
        share = float((masses < mass).double().mean())
        assert share == pytest.approx(search.chance, abs=4 * math.sqrt(share / draws))


def test_a_budget_that_ends_the_search_is_said():
    A = Operator.from_matrix(digits_hessian())
    needed = leading_eigenspace(A, k=10, tol=1e-3, multiple=False).num_products
    with pytest.warns(ConvergenceWarning, match="before the search for further copies"):
        space = leading_eigenspace(A, k=10, tol=1e-3, max_products=needed + 3)
    assert space.converged
    assert space.num_products == needed + 3
    assert 1e-3 < space.missed <= 1


# Which, start, progress --------------------------------------------------------------------------


def test_both_ends_come_in_turn_and_the_first_of_them_are_both_ends_again():
    A = with_spectrum([9.0, 8, 7, 0, 0.5, -0.5, -4, -6.5, -11])
    space = leading_eigenspace(Operator.from_matrix(A), k=5, which="both", tol=1e-10)
    expected = torch.tensor([9.0, -11, 8, -6.5, 7]).double()
    torch.testing.assert_close(space.values, expected, rtol=1e-9, atol=0)
    assert space.which == "both"
    assert space.gap == pytest.approx(2.5)  # −4 is next to −6.5
    first = space.first(3)
    torch.testing.assert_close(first.values, expected[:3], rtol=1e-9, atol=0)
    # To −6.5 from −11 it would be 4.5 and to 7 from 8 it is 1.
    assert first.gap == pytest.approx(1.0)
    # To 8 from 9 it is 1; the next to −11 is at −6.5.
    assert space.first(2).gap == pytest.approx(1.0)


@pytest.mark.parametrize("which", WHICH)
def test_leading_values_have_the_largest_merit_of_all_subspaces(which):
    values = np.sort(np.random.default_rng(0).standard_normal(9))
    best = merit(values[leading_order(values, which)[:4]], which)
    A = with_spectrum(values)
    for seed in range(200):
        V = torch.linalg.qr(normal(36, seed).reshape(9, 4))[0]
        inside = torch.linalg.eigvalsh(V.T @ A @ V).numpy()
        assert merit(inside[leading_order(inside, which)], which) <= best + 1e-12


def drifted(A, size, seed):
    E = normal(A.numel(), seed).reshape(A.shape)
    E = (E + E.T) / 2
    return A + size * float(torch.linalg.matrix_norm(A, 2) / torch.linalg.matrix_norm(E, 2)) * E


def test_an_eigenspace_of_a_nearby_matrix_saves_products():
    A = digits_hessian()
    for size, saved in ((1e-3, 4), (1e-5, 7)):
        B = drifted(A, size, seed=3)
        old = leading_eigenspace(Operator.from_matrix(A), k=10, tol=1e-3, multiple=False)
        operator = Operator.from_matrix(B)
        cold = leading_eigenspace(operator, k=10, tol=1e-3, multiple=False)
        warm = leading_eigenspace(operator, k=10, tol=1e-3, multiple=False, start=old)
        assert warm.converged
        assert warm.num_products <= cold.num_products - saved
        torch.testing.assert_close(warm.values, cold.values, rtol=1e-3, atol=0)


def test_a_vector_can_be_the_start_and_what_it_does_not_see_is_found():
    d = torch.cat([torch.tensor([7.0, 5.0, 4.0]), torch.linspace(0, 1, 97)]).double()
    operator = Operator(lambda v: d * v, 100, d.dtype, d.device)
    blind = torch.ones(100).double()
    blind[0] = 0.0
    space = leading_eigenspace(operator, k=2, start=blind)
    torch.testing.assert_close(space.values, torch.tensor([7.0, 5.0]).double())
    unseen = leading_eigenspace(operator, k=2, start=blind, multiple=False)
    torch.testing.assert_close(unseen.values, torch.tensor([5.0, 4.0]).double())


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (torch.ones(4).double(), ValueError, "`start` must belong to an operator of size 5"),
        (torch.zeros(5).double(), ValueError, "`start` must be finite and not zero"),
        (torch.full((5,), math.nan).double(), ValueError, "`start` must be finite"),
        ([1.0] * 5, TypeError, "`start` must be an Eigenspace or a tensor .*got list"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_start_that_does_not_fit_is_refused(start, error, message):
    with pytest.raises(error, match=message):
        leading_eigenspace(Operator.from_matrix(torch.eye(5).double()), k=1, start=start)


def test_progress_tells_every_product_and_expects_what_it_takes():
    steps: list[Step] = []
    A = Operator.from_matrix(with_spectrum(torch.linspace(0, 1, 400) ** 3))
    space = leading_eigenspace(A, k=4, tol=1e-8, multiple=False, progress=steps.append)
    counts = [step.products for step in steps]
    assert counts[:-1] == list(range(1, len(counts)))
    assert counts[-1] == space.num_products
    assert all(step.expected <= 1000 for step in steps)
    assert steps[-1].expected == space.num_products
    # In the second half the end is in sight.
    late = steps[len(steps) // 2 : -1]
    assert all(0.5 <= step.expected / space.num_products <= 2 for step in late)
    assert steps[-1].error <= steps[-1].goal


def test_the_first_direction_is_the_seed_s_and_the_same_in_parts():
    operator = Operator.from_matrix(torch.eye(1000).double())
    expected = torch.randn(1000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(random_direction(operator, 5), expected)


def test_the_default_is_never_restarted_on_small_problems(monkeypatch):
    monkeypatch.setattr(KrylovBasis, "compress", None)
    A = Operator.from_matrix(with_spectrum(torch.linspace(0, 1, 300)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        leading_eigenspace(A, k=3, tol=1e-9, max_products=200)
