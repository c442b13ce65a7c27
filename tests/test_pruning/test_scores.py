import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hessian import ConvergenceWarning, Eigenspace, Operator, leading_eigenspace
from pruning import (
    Scores,
    Transport,
    directional_scores,
    flat_response,
    schedule_response,
)

F64 = torch.float64
NAN = math.nan


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def orthogonal(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def symmetric(eigenvalues, seed=0):
    h = torch.as_tensor(eigenvalues, dtype=F64)
    Q = orthogonal(len(h), seed)
    A = Q @ torch.diag(h) @ Q.T
    return (A + A.T) / 2


def exact_space(V, gap=1.0, residuals=None):
    """The eigenspace spanned by the columns of V, as a perfect solver would give it."""
    k = V.shape[1]
    residuals = torch.zeros(k, dtype=F64) if residuals is None else residuals
    return Eigenspace(torch.linspace(2, 1, k, dtype=F64), V, residuals, gap, 0, True)


# --- projector ---------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    d=st.integers(1, 12), k=st.integers(0, 12), seed=st.integers(0, 10**6), zeros=st.integers(0, 2)
)
def test_projector_scores_obey_the_algebra(d, k, seed, zeros):
    k = min(k, d)
    w = normal(d, seed=seed + 1)
    w[:zeros] = 0.0
    V = orthogonal(d, seed)[:, :k]
    flat = (torch.eye(d, dtype=F64) - V @ V.T) @ w.sign()
    scores = directional_scores(w, exact_space(V))
    s = scores.values
    assert_close(s, w.sign() * flat, atol=1e-13, rtol=0)
    assert float(s.sum()) == pytest.approx(float(flat @ flat), abs=1e-12)
    assert -1e-14 <= scores.mean <= 1 + 1e-14
    assert torch.all(s >= (1 - math.sqrt(d)) / 2 - 1e-12)
    assert torch.all(s <= (1 + math.sqrt(d)) / 2 + 1e-12)
    assert torch.all(s[w == 0] == 0)


@pytest.mark.parametrize("d", [2, 5, 100])
@pytest.mark.parametrize("side", [+1.0, -1.0])
def test_the_bounds_of_a_score_are_reached(d, side):
    # Extreme value of a₁ (a · 1) over unit vectors a: eigenvectors of (e₁ 1ᵀ + 1 e₁ᵀ) / 2.
    a = torch.full((d,), side, dtype=F64)
    a[0] += math.sqrt(d)
    a /= a.norm()
    V = torch.linalg.svd(a[None, :]).Vh[1:].T  # everything but a is sharp
    s = directional_scores(torch.ones(d, dtype=F64), exact_space(V)).values
    assert float(s[0]) == pytest.approx((1 + side * math.sqrt(d)) / 2, abs=1e-12)


def test_everything_flat_gives_ones_and_nothing_flat_gives_zeros():
    w, Q = normal(9), orthogonal(9)
    assert_close(directional_scores(w, exact_space(Q[:, :0])).values, torch.ones(9, dtype=F64))
    nothing = directional_scores(w, exact_space(Q)).values
    assert_close(nothing, torch.zeros(9, dtype=F64), atol=1e-14, rtol=0)


def test_scores_depend_on_signs_only_and_move_with_the_weights_order():
    w, V, order = normal(9), orthogonal(9, seed=3)[:, :4], torch.randperm(9)
    s = directional_scores(w, exact_space(V)).values
    assert torch.equal(s, directional_scores(7.0 * w, exact_space(V)).values)
    assert torch.equal(s, directional_scores(-w, exact_space(V)).values)
    assert_close(s[order], directional_scores(w[order], exact_space(V[order])).values)


@pytest.mark.parametrize("amount", [1e-8, 1e-3, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_projector_error_bound_holds_for_wrong_eigenvectors(amount, seed):
    h = torch.cat([torch.zeros(12), torch.tensor([2.0, 3.0, 5.0])]).double()
    H, Q = symmetric(h, seed), orthogonal(15, seed)
    V, _ = torch.linalg.qr(Q[:, 12:] + amount * normal(15, 3, seed=seed + 9) / math.sqrt(15))
    values, inner = torch.linalg.eigh(V.T @ H @ V)
    V = V @ inner
    residuals = (H @ V - V * values).norm(dim=0)
    gap = float(values.min()) - 0.0  # from the pairs at hand to the rest of the exact spectrum
    w = normal(15, seed=seed + 5)
    found = directional_scores(w, Eigenspace(values, V, residuals, gap, 0, True))
    exact = directional_scores(w, exact_space(Q[:, 12:]))
    error = float((found.values - exact.values).norm())
    assert error <= found.error
    assert found.error <= 2 * math.sqrt(15)  # and it says something


def test_projector_scores_of_a_loose_eigensolver_stay_within_their_bound():
    h = torch.cat([torch.linspace(0, 0.1, 50), torch.tensor([2.0, 3.0, 5.0])])
    H, w = symmetric(h), normal(53, seed=1)
    space = leading_eigenspace(Operator.from_matrix(H), k=3, tol=1e-2)
    V = torch.linalg.eigh(H).eigenvectors[:, -3:]
    found = directional_scores(w, space)
    error = float((found.values - directional_scores(w, exact_space(V)).values).norm())
    assert error <= found.error < 1.0
    assert found.num_products == space.num_products
    assert found.lowest_eigenvalue == pytest.approx(2.0, abs=1e-3)


def test_an_unknown_gap_is_an_unknown_error():
    assert math.isnan(directional_scores(normal(4), exact_space(orthogonal(4)[:, :1], NAN)).error)


# --- filter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("t", [0.1, 3.0, 50.0])
def test_filter_scores_are_the_dense_matrix_function(seed, t):
    w = normal(40, seed=seed)
    w[3] = 0.0
    H = symmetric(torch.cat([torch.zeros(20), torch.rand(20) * 4]), seed)
    h, Q = torch.linalg.eigh(H)
    phi = torch.tensor(
        [float(mpmath.hyp1f1(1, 1.6, -t * max(x, 0.0))) for x in h.tolist()], dtype=F64
    )
    expected = w.sign() * (Q @ (phi * (Q.T @ w.sign())))
    scores = directional_scores(
        w, Operator.from_matrix(H), response=flat_response(mu=0.6, t=t), tol=1e-10
    )
    assert_close(scores.values, expected, atol=1e-9, rtol=0)
    assert scores.num_products <= 40 and scores.form == "filter"


def test_a_filter_that_cuts_hard_is_the_projector():
    H = symmetric([0.0] * 9 + [1.0, 2.0, 4.0])
    w = normal(12)
    V = torch.linalg.eigh(H).eigenvectors[:, -3:]
    scores = directional_scores(
        w, Operator.from_matrix(H), response=lambda h: (h < 0.5).double(), tol=1e-8
    )
    assert_close(scores.values, directional_scores(w, exact_space(V)).values)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
def test_filter_error_estimate_covers_the_error(tol):
    H, w = symmetric(torch.linspace(0, 3, 120) ** 3), normal(120, seed=1)
    response = flat_response(mu=0.6, t=20.0)
    h, Q = torch.linalg.eigh(H)
    exact = w.sign() * (Q @ (response(h) * (Q.T @ w.sign())))
    scores = directional_scores(w, Operator.from_matrix(H), response=response, tol=tol)
    assert float((scores.values - exact).norm()) <= scores.error
    assert scores.error <= tol * math.sqrt(120)
    assert scores.num_products < 120


def test_a_negative_eigenvalue_counts_as_flat_and_is_reported():
    w = torch.ones(3, dtype=F64)
    H = Operator.from_matrix(torch.diag(torch.tensor([-2.0, 0.0, 1e9], dtype=F64)))
    scores = directional_scores(w, H, response=flat_response(mu=0.6, t=100.0))
    assert_close(scores.values, torch.tensor([1.0, 1.0, 0.0], dtype=F64))
    assert scores.lowest_eigenvalue == pytest.approx(-2.0)


def test_a_small_budget_warns_and_says_how_far_it_came():
    H = Operator.from_matrix(symmetric(torch.linspace(0, 9, 80)))
    with pytest.warns(ConvergenceWarning, match="max_products"):
        scores = directional_scores(
            normal(80), H, response=flat_response(mu=0.6, t=50.0), tol=1e-9, max_products=6
        )
    assert scores.num_products == 6 and scores.error > 1e-9


def test_float32_weights_with_a_float64_hessian_are_scored():
    H = Operator.from_matrix(symmetric([0.0, 1.0, 2.0, 3.0]))
    scores = directional_scores(normal(4).float(), H, response=flat_response(mu=0.6, t=1.0))
    exact = directional_scores(normal(4), H, response=flat_response(mu=0.6, t=1.0))
    assert_close(scores.values, exact.values, check_dtype=False)


# --- transport ---------------------------------------------------------------------------------


def test_transport_scores_are_the_difference_over_the_threshold():
    w, h = torch.tensor([2.0, -3.0, 0.0], dtype=F64), torch.tensor([1.0, 0.5, 0.0], dtype=F64)
    transport = Transport(w)
    for threshold in (0.1, 0.3, 0.4):
        transport.step(lambda v: h * v, w, lr=0.2, threshold=threshold)
    scores = directional_scores(w, transport)
    assert_close(scores.values, -w.sign() * transport.difference(w) / 0.4)
    assert scores.values[2] == 0.0
    assert math.isnan(scores.error) and scores.num_products == 2 == transport.num_products


# --- flat_response -----------------------------------------------------------------------------


def test_flat_response_has_the_published_values():
    x = [0.01, 0.1, 0.5, 1, 2, 5, 10, 50, 100]
    table = [0.994, 0.940, 0.740, 0.561, 0.346, 0.134, 0.063, 0.012, 0.006]
    found = flat_response(mu=0.6, t=1.0)(torch.tensor(x, dtype=F64))
    assert_close(found, torch.tensor(table, dtype=F64), atol=5.1e-4, rtol=0)


@pytest.mark.parametrize("mu", [0.501, 0.6, 0.7, 0.9, 0.999])
def test_flat_response_is_kummer_s_function(mu):
    x = np.concatenate([[0.0], np.logspace(-8, 6, 60), np.linspace(10, 60, 40)])
    with mpmath.workdps(40):
        exact = [float(mpmath.hyp1f1(1, 1 + mpmath.mpf(mu), -mpmath.mpf(v))) for v in x.tolist()]
    found = flat_response(mu=mu, t=1.0)(torch.from_numpy(x))
    assert_close(found, torch.tensor(exact, dtype=F64), rtol=1e-10, atol=0)


@pytest.mark.parametrize("mu", [0.55, 0.8])
def test_flat_response_is_the_average_of_decays(mu):
    # μ ∫₀¹ y^(μ−1) exp(−x (1 − y)) dy; y = u^(1/μ) takes the singularity away.
    u = (np.arange(200_000) + 0.5) / 200_000
    for x in (0.3, 4.0, 30.0):
        integral = float(np.mean(np.exp(-x * (1 - u ** (1 / mu)))))
        found = float(flat_response(mu=mu, t=x)(torch.ones(1, dtype=F64)))
        assert found == pytest.approx(integral, rel=1e-7)


def test_flat_response_falls_from_one_like_a_share_of_the_horizon():
    response = flat_response(mu=0.6, t=200.0)
    h = torch.cat([torch.zeros(1), torch.logspace(-7, 4, 2000)]).double()
    phi = response(h)
    assert phi[0] == 1.0 and torch.all(phi.diff() < 0)
    assert_close(phi[-1], torch.tensor(0.6 / (1e4 * 200), dtype=F64), rtol=1e-5, atol=0)
    assert_close(response(h), flat_response(mu=0.6, t=1.0)(200.0 * h), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mu", "t"), [(0.0, 1.0), (0.6, 0.0), (-1.0, 1.0), (NAN, 1.0)])
def test_flat_response_refuses_what_is_not_positive(mu, t):
    with pytest.raises(ValueError, match="`mu` and `t` must be positive"):
        flat_response(mu=mu, t=t)


@pytest.mark.parametrize(("mu", "t"), [(math.inf, 1.0), (0.6, math.inf)])
def test_flat_response_refuses_what_is_not_finite(mu, t):
    with pytest.raises(ValueError, match="`mu` and `t` must be positive and finite"):
        flat_response(mu=mu, t=t)


# --- schedule_response -------------------------------------------------------------------------


def thresholds_of(rates, c=0.3, mu=0.6):
    n = np.arange(1, len(rates) + 1.0)
    return np.cumsum(c * np.asarray(rates) ** (mu + 0.5) * (n**mu - (n - 1) ** mu)).tolist()


def test_schedule_response_is_the_sum_over_steps():
    rates = np.random.default_rng(0).uniform(0.0, 0.4, 60).tolist()
    g = thresholds_of(rates)
    h = np.array([0.0, 0.01, 0.5, 2.0, 4.9])
    brute = np.zeros_like(h)
    for k in range(60):
        decay = np.ones_like(h)
        for j in range(k + 1, 60):
            decay = decay * (1 - rates[j] * h)
        brute += (g[k] - (g[k - 1] if k else 0.0)) * decay
    found = schedule_response(rates, g)(torch.from_numpy(h))
    assert_close(found, torch.from_numpy(brute / g[-1]), rtol=1e-12, atol=1e-14)
    assert float(found[0]) == pytest.approx(1.0, abs=1e-14)


def test_schedule_response_tends_to_flat_response_at_first_order():
    h, errors = torch.tensor([0.02, 0.3, 1.0, 3.0], dtype=F64), []
    for steps in (100, 200, 400, 800):
        rates = [10.0 / steps] * steps
        discrete = schedule_response(rates, thresholds_of(rates))(h)
        errors.append((discrete - flat_response(mu=0.6, t=10.0)(h)).abs())
    for coarse, fine in itertools.pairwise(errors):
        assert_close(coarse / fine, torch.full_like(h, 2.0), atol=0.15, rtol=0)
    assert torch.all(errors[-1] < 0.01)


def test_schedule_response_takes_negative_eigenvalues_for_flat():
    found = schedule_response([0.1, 0.1], [0.2, 0.3])(torch.tensor([-5.0, 0.0]))
    assert_close(found, torch.ones(2, dtype=F64))


@pytest.mark.parametrize(
    ("rates", "thresholds", "message"),
    [
        ([0.1], [0.1, 0.2], "one positive length, got 1 and 2"),
        ([], [], "one positive length, got 0 and 0"),
        ([0.1], [0.0], "`thresholds` must end above 0, got 0.0"),
        ([0.1], [NAN], "`thresholds` must end above 0"),
    ],
)
def test_schedule_response_names_what_does_not_fit(rates, thresholds, message):
    with pytest.raises(ValueError, match=message):
        schedule_response(rates, thresholds)


# --- dispatch ----------------------------------------------------------------------------------

W = torch.ones(3, dtype=F64)
MATRIX = torch.eye(3, dtype=F64)


def stepped(size):
    transport = Transport(torch.ones(size, dtype=F64))
    transport.step(lambda v: v, torch.ones(size, dtype=F64), lr=0.1, threshold=0.1)
    return transport


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: directional_scores(W, Operator.from_matrix(MATRIX)),
            ValueError,
            "`response` must",
        ),
        (
            lambda: directional_scores(W, exact_space(MATRIX), response=torch.exp),
            ValueError,
            "`response` belongs to the filter form.*Eigenspace",
        ),
        (
            lambda: directional_scores(W, stepped(3), response=torch.exp),
            ValueError,
            "`response` belongs to the filter form.*Transport",
        ),
        (lambda: directional_scores(W, MATRIX), TypeError, "Eigenspace, an Operator or a Tran"),
        (
            lambda: directional_scores(W, Transport(W)),
            ValueError,
            "after 0 steps.*Take steps first",
        ),
        (lambda: directional_scores(W[:2], stepped(3)), ValueError, "3 entries.*got 2"),
        (lambda: directional_scores(W[:2], exact_space(MATRIX)), ValueError, "3 entries.*got 2"),
        (
            lambda: directional_scores(W[:2], Operator.from_matrix(MATRIX), response=torch.exp),
            ValueError,
            "3 entries.*got 2",
        ),
        (
            lambda: directional_scores(W * NAN, exact_space(MATRIX)),
            ValueError,
            "`w` must be finite",
        ),
        (lambda: directional_scores(W.long(), exact_space(MATRIX)), ValueError, "floating-point"),
        (lambda: directional_scores(MATRIX, exact_space(MATRIX)), ValueError, "flat"),
        (lambda: directional_scores(W[:0], exact_space(MATRIX)), ValueError, "at least one weight"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_scores_know_their_mean():
    assert Scores(torch.tensor([1.0, 0.0]), "filter", 0.0, 1, 0.0).mean == 0.5
