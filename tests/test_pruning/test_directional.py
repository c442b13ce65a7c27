import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pruning import (
    Scores,
    directional_prune,
    first_clip,
    lambda_for_sparsity,
    soft_threshold,
)

NAN, INF = math.nan, math.inf


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def given_scores(values):
    return Scores(values, "projector", 0.0, 0, NAN)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def valley(d=12, flat=7, seed=0):
    """A quadratic ½ (u − w)ᵀ H (u − w), its exact Π₀, and the scores of w by definition."""
    Q, _ = torch.linalg.qr(normal(d, d, seed=seed))
    h = torch.cat([torch.zeros(flat, dtype=torch.float64), torch.linspace(1.0, 4.0, d - flat)])
    w = normal(d, seed=seed + 1)
    H, flat_projector = Q @ torch.diag(h.double()) @ Q.T, Q[:, :flat] @ Q[:, :flat].T
    return w, H, flat_projector, given_scores(w.sign() * (flat_projector @ w.sign()))


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.7, 2.5])
def test_closed_form_is_the_global_minimum_of_the_objective(lam):
    w = normal(60, seed=1)
    s = torch.cat([normal(40, seed=2), torch.zeros(20, dtype=torch.float64)])
    u = directional_prune(w, given_scores(s), lam).weights

    def objective(u):
        return 0.5 * (w - u) ** 2 + lam * s * u.abs()

    step = 1e-3
    grid = torch.arange(-12_000, 12_001, dtype=torch.float64)[:, None] * step
    on_grid = objective(grid)
    # A parabola's minimum lies at most half a step from the grid's best point.
    assert_close(u, grid[on_grid.argmin(dim=0), 0], atol=0.51 * step, rtol=0)
    assert torch.all(objective(u) <= on_grid.min(dim=0).values + 1e-12)


def test_no_flat_direction_leaves_the_weights_and_all_flat_is_soft_thresholding():
    w = normal(30)
    none = directional_prune(w, given_scores(torch.zeros_like(w)), 0.8)
    every = directional_prune(w, given_scores(torch.ones_like(w)), 0.8)
    assert torch.equal(none.weights, w)
    assert torch.equal(every.weights, soft_threshold(w, 0.8).weights)
    assert_close(every.weights, torch.nn.functional.softshrink(w, 0.8))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_up_to_the_first_clip_the_move_is_flat_and_costs_nothing(seed, share):
    w, H, flat_projector, scores = valley(seed=seed)
    lam = share * first_clip(w, scores)
    move = directional_prune(w, scores, lam).weights - w
    assert_close(move, -lam * (flat_projector @ w.sign()), atol=1e-14, rtol=0)
    assert float(move @ H @ move) / 2 < 1e-15  # H's zero eigenvalues are rounding


@pytest.mark.parametrize("seed", range(5))
def test_beyond_the_first_clip_the_loss_rises(seed):
    w, H, _, scores = valley(seed=seed)
    clip = first_clip(w, scores)
    losses = []
    for share in (1.0, 1.1, 1.3, 1.6):
        pruned = directional_prune(w, scores, share * clip)
        move = pruned.weights - w
        losses.append(float(move @ H @ move) / 2)
    assert directional_prune(w, scores, 1.01 * clip).sparsity > 0
    assert directional_prune(w, scores, 0.99 * clip).sparsity == 0
    assert losses[0] < 1e-15 and losses[1] > 1e-8 and losses == sorted(losses)


def test_the_paper_s_toy_walks_along_the_valley_then_along_the_axis():
    # Read off the authors' slide 7: the numbers have about two digits.
    w, along = vector(2.72, 1.10), vector(0.368, -0.930)
    scores = given_scores(w.sign() * along * (along @ w.sign()) / (along @ along))
    assert_close(scores.values, vector(-0.207, 0.523), atol=2e-3, rtol=0)
    lam = first_clip(w, scores)
    assert lam == pytest.approx(2.1, abs=0.02)
    at_axis = directional_prune(w, scores, lam * (1 + 1e-15)).weights
    assert_close(at_axis, vector(3.16, 0.0), atol=0.01, rtol=0)
    beyond = directional_prune(w, scores, lam + 1.0).weights
    assert_close(beyond, at_axis + vector(0.207, 0.0), atol=2e-3, rtol=0)


def test_first_clip_is_infinite_where_nothing_shrinks():
    assert first_clip(vector(1.0, -2.0), given_scores(vector(-0.1, 0.0))) == INF


def test_a_zero_weight_stays_zero_and_is_no_clip():
    w, scores = vector(0.0, 2.0, 0.0), given_scores(vector(-0.5, 0.5, 0.5))
    pruned = directional_prune(w, scores, 1.0)
    assert torch.equal(pruned.weights, vector(0.0, 1.5, 0.0))
    assert first_clip(w, scores) == 4.0


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=20),
    st.floats(0, 5),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_results_describe_themselves(values, lam, dtype):
    pruned = soft_threshold(vector(*values, dtype=dtype), lam)
    zeros = int((pruned.weights == 0).sum())
    assert torch.equal(pruned.mask, pruned.weights != 0)
    assert pruned.sparsity == pytest.approx(zeros / len(values), abs=1e-15)
    assert pruned.lam == lam and pruned.weights.dtype == dtype


def test_pruning_leaves_its_input_alone():
    w = vector(0.5, -1.0, 2.0)
    before = w.clone()
    scores = given_scores(torch.ones_like(w))
    for prune in (
        lambda: directional_prune(w, scores, 0.7),
        lambda: soft_threshold(w, 0.7),
        lambda: lambda_for_sparsity(w, scores, 0.5),
    ):
        prune()
        assert torch.equal(w, before)


# Few distinct values, so that zeros and ties of |w| / s are common.
coarse = st.sampled_from([-2.0, -0.7, -0.3, -0.1, 0.0, 0.1, 0.3, 0.7, 2.0])
pairs = st.lists(
    st.tuples(
        st.one_of(coarse, st.floats(-5, 5, width=32)), st.one_of(coarse, st.floats(-2, 2, width=32))
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(
    pairs,
    st.integers(0, 1000).map(lambda n: n / 1000),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_lambda_for_sparsity_is_the_smallest_that_does(pairs, sparsity, dtype):
    w, s = (vector(*column, dtype=dtype) for column in zip(*pairs, strict=True))
    scores = given_scores(s)
    goes = ((s > 0) & torch.isfinite(w / s)) | (w == 0)
    wanted = math.ceil(sparsity * len(w) - 1e-6)
    if wanted > int(goes.sum()):
        with pytest.raises(
            ValueError, match=f"`sparsity` must be at most {goes.float().mean():.4f}"
        ):
            lambda_for_sparsity(w, scores, sparsity)
        return
    lam = lambda_for_sparsity(w, scores, sparsity)

    def zeros(lam):
        return int((directional_prune(w, scores, lam).weights == 0).sum())

    assert zeros(lam) >= wanted
    if lam > 1e-30:  # below, float32 has no room for "a little smaller"
        assert zeros(lam * (1 - 1e-5)) < wanted
    else:
        assert zeros(0.0) >= wanted or float(w[w != 0].abs().min()) < 1e-29


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [0.3, 2.0])
def test_lambda_for_sparsity_reaches_the_smallest_of_floats(dtype, score):
    w = torch.full((1,), torch.finfo(dtype).smallest_normal, dtype=dtype) * torch.finfo(dtype).eps
    scores = given_scores(vector(score, dtype=dtype))
    assert w > 0
    assert directional_prune(w, scores, lambda_for_sparsity(w, scores, 1.0)).sparsity == 1.0


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_scores_of_another_precision_give_weights_of_the_weights_own(kinds):
    w, scores = (
        vector(1.0, -2.0, 3.0, dtype=kinds[0]),
        given_scores(vector(1, 1, 1, dtype=kinds[1])),
    )
    lam = lambda_for_sparsity(w, scores, 2 / 3)
    assert lam == pytest.approx(2.0)
    pruned = directional_prune(w, scores, lam)
    assert pruned.weights.dtype == kinds[0] and pruned.sparsity == pytest.approx(2 / 3)
    assert first_clip(w, scores) == 1.0


def test_growing_lambda_only_adds_zeros():
    w, _, _, scores = valley(d=40, flat=30)
    masks = [directional_prune(w, scores, lam).mask for lam in torch.linspace(0, 5, 40).tolist()]
    assert all(torch.all(less[more]) for less, more in itertools.pairwise(masks))
    assert masks[-1].sum() < masks[0].sum()


ONES = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, s: directional_prune(w, s, -0.1), "`lam` must be finite and not negative"),
        (lambda w, s: directional_prune(w, s, NAN), "`lam` must be finite and not negative"),
        (lambda w, s: soft_threshold(w, INF), "`lam` must be finite and not negative"),
        (lambda w, s: lambda_for_sparsity(w, s, -0.1), r"`sparsity` must be in \[0, 1\]"),
        (lambda w, s: soft_threshold(w * NAN, 1.0), "`w` must be finite, got 3 entries"),
        (lambda w, s: first_clip(w * NAN, s), "`w` must be finite"),
        (lambda w, s: directional_prune(w, given_scores(w * NAN), 1.0), "`scores.values` must be"),
        (lambda w, s: directional_prune(w[:2], s, 1.0), "`scores` must hold one score for each"),
        (lambda w, s: lambda_for_sparsity(w[:2], s, 0.5), "of the 2 weights, got 3"),
        (lambda w, s: first_clip(w[:2], s), "`scores` must hold one score for each"),
        (lambda w, s: soft_threshold(w.reshape(3, 1), 1.0), "`w` must be a flat floating-point"),
        (lambda w, s: soft_threshold(w[:0], 1.0), "`w` must hold at least one weight"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(ONES, given_scores(ONES))


def test_a_lambda_beyond_the_weights_precision_is_refused():
    w = vector(1.0, dtype=torch.float32)
    with pytest.raises(ValueError, match="`lam` must be finite"):
        directional_prune(w, given_scores(torch.zeros_like(w)), 1e39)
