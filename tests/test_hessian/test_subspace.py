import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian import Eigenspace, Operator, leading_eigenspace
from tests.oracles import random_orthogonal, with_spectrum


def space_of(values, *, gap=math.inf, residuals=None, n=6):
    k = len(values)
    return Eigenspace(
        torch.tensor(values, dtype=torch.float64),
        random_orthogonal(n)[:, :k],
        torch.tensor(residuals or [0.0] * k, dtype=torch.float64),
        gap,
        7,
        True,
    )


def test_sharp_and_flat_parts_add_up_are_orthogonal_and_stay():
    space = space_of([3.0, 2.0])
    x = torch.arange(6.0).double()
    sharp, flat = space.project_sharp(x), space.project_flat(x)
    torch.testing.assert_close(sharp + flat, x, rtol=0, atol=1e-14)
    assert float(sharp @ flat) == pytest.approx(0, abs=1e-13)
    torch.testing.assert_close(space.project_sharp(sharp), sharp, rtol=0, atol=1e-14)
    torch.testing.assert_close(space.project_flat(flat), flat, rtol=0, atol=1e-14)
    torch.testing.assert_close(space.vectors.T @ flat, torch.zeros(2).double(), rtol=0, atol=1e-14)


def test_float32_projects_a_long_vector_with_one_large_entry_as_float64_does():
    n = 4_000_000
    v = torch.full((n,), 1e-4, dtype=torch.float64)
    v[0] = 1.0
    v /= v.norm()
    x = torch.ones(n, dtype=torch.float64)
    x[0] = 1e4
    values = torch.ones(1).double()
    space = Eigenspace(values, v.float()[:, None], 0 * values, math.nan, 0, True)
    exact = v * (v @ x)
    found = space.project_sharp(x.float()).double()
    # Summed in float32, the small products are rounded away after the large one: 4 %. Summed in
    # chunks, this happens in one of them.
    assert float((found - exact).norm() / exact.norm()) < 1e-3


def test_one_space_of_all_directions_leaves_nothing_flat():
    space = space_of([6.0, 5, 4, 3, 2, 1])
    x = torch.arange(6.0).double()
    torch.testing.assert_close(space.project_flat(x), torch.zeros(6).double(), rtol=0, atol=1e-13)


def test_first_keeps_the_leading_pairs_with_their_evidence():
    space = space_of([3.0, 2.0, 1.0], gap=0.5, residuals=[0.1, 0.2, 0.3])
    two = space.first(2)
    assert two.values.tolist() == [3, 2]
    assert two.residuals.tolist() == [0.1, 0.2]
    assert torch.equal(two.vectors, space.vectors[:, :2])
    assert (two.num_products, two.converged) == (7, True)
    assert space.first(3) is space


@pytest.mark.parametrize(
    ("values", "gap", "k", "expected"),
    [
        ([10.0, 9.0, 1.0], 0.5, 1, 1.0),  # a crowd behind the third is no matter to the first
        ([10.0, 9.0, 1.0], 0.5, 2, 8.0),
        ([10.0, -9.5, 1.0], 0.5, 1, 9.0),  # something in [-1, 1] may follow; -9.5 is far
        ([10.0, -9.5], 0.2, 1, 0.5),  # 9.5 could follow, on the other side
        ([10.0, -9.5], 3.0, 1, 3.0),  # but nothing is nearer than the gap
        ([5.0, 5.0, 1.0], 0.5, 1, 0.0),
        ([5.0, -5.0], math.inf, 1, 10.0),  # nothing else exists
        ([5.0, 3.0], math.nan, 1, 2.0),  # PyHessian knows no gap, the order tells
        ([5.0, -4.9], math.nan, 1, 0.1),
        ([-1.0, 4.0, 5.0], 0.5, 1, 5.0),  # the smallest first: the rest are above 5
        ([4.0, 1.0, -5.0], 0.5, 1, 3.0),  # the largest first
    ],
)
def test_the_gap_of_the_first_pairs_is_what_is_known_for_sure(values, gap, k, expected):
    found = space_of(values, gap=gap).first(k).gap
    if values in ([-1.0, 4.0, 5.0], [4.0, 1.0, -5.0]):
        assert 0 < found <= expected  # a bound from below, whatever the order was
    else:
        assert found == pytest.approx(expected)


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(
    values=st.lists(
        st.integers(-40, 40).map(float), min_size=3, max_size=12, unique_by=lambda x: abs(x)
    ),
    which=st.sampled_from(["magnitude", "largest", "smallest"]),
    data=st.data(),
)
def test_the_gap_of_the_first_pairs_never_promises_too_much(values, which, data):
    k = data.draw(st.integers(2, len(values)))
    j = data.draw(st.integers(1, k - 1))
    A = Operator.from_matrix(with_spectrum(values))
    space = leading_eigenspace(A, k=k, which=which, tol=1e-12)
    exact = torch.tensor(values).double()
    keys = {"magnitude": -exact.abs(), "largest": -exact, "smallest": exact}[which]
    exact = exact[keys.argsort()]
    true = float((exact[:j, None] - exact[None, j:]).abs().min())
    found = space.first(j).gap
    assert found <= true + 1e-9
    assert found >= min(true, space.gap) - 1e-9


@pytest.mark.parametrize("k", [0, 4, -1])
def test_first_refuses_more_pairs_than_there_are(k):
    with pytest.raises(ValueError, match=f"`k` must be between 1 and 3.*got {k}"):
        space_of([3.0, 2.0, 1.0]).first(k)


@pytest.mark.parametrize(
    ("gap", "bound"), [(0.5, 1.0), (10.0, 0.05), (0.0, 1.0), (math.inf, 0.0), (-1.0, 1.0)]
)
def test_projector_error_bound_is_residual_over_gap_at_most_one(gap, bound):
    space = space_of([3.0, 2.0], gap=gap, residuals=[0.3, 0.4])
    assert space.projector_error_bound == pytest.approx(bound)


def test_no_bound_is_claimed_without_a_gap():
    assert math.isnan(space_of([1.0], gap=math.nan, residuals=[0.1]).projector_error_bound)
