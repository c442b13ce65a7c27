"""An exact operator behind a fast one: what it certifies, what it costs, what it shows up."""

import pytest
import torch

from hessian import (
    ConvergenceWarning,
    Operator,
    leading_eigenspace,
    load_eigenspace,
    save,
)
from tests.cases import seeded


def symmetric(n=120, seed=0):
    """A matrix with a few eigenvalues outside a bulk, of both signs."""
    Q = seeded(lambda: torch.linalg.qr(torch.randn(n, n)).Q, seed)
    d = torch.cat([torch.tensor([9.0, -7.0, 6.0, 4.0, -3.0]), torch.linspace(-1, 1, n - 5)])
    return (Q * d) @ Q.T


def near(A, size, seed=1):
    E = seeded(lambda: torch.randn(A.shape), seed)
    E = E + E.T
    return A + size * torch.linalg.matrix_norm(A, 2) / torch.linalg.matrix_norm(E, 2) * E


def counted(A, by_columns=False):
    calls = []

    def product(V):
        calls.append(V.shape[1] if V.ndim == 2 else 1)
        return A @ V

    columns = product if by_columns else None
    return Operator(product, len(A), A.dtype, A.device, columns), calls


def true_residuals(A, space):
    return (A @ space.vectors - space.vectors * space.values).norm(dim=0)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest", "both"])
@pytest.mark.parametrize("size", [0.0, 1e-3, 3e-2])
def test_residuals_and_counts_are_those_of_the_exact_matrix(size, which, by_columns):
    A = symmetric()
    fast, fast_calls = counted(near(A, size))
    exact, exact_calls = counted(A, by_columns)
    space = leading_eigenspace(fast, k=4, tol=1e-8, which=which, exact=exact)
    assert space.num_products == len(fast_calls) + space.num_exact
    assert sum(exact_calls) == space.num_exact
    assert space.converged
    assert space.measured
    torch.testing.assert_close(space.residuals, true_residuals(A, space), rtol=1e-6, atol=1e-12)
    assert float(space.residuals.max()) <= 1e-8 * 9.0 * (1 + 1e-9)
    expected = leading_eigenspace(exact, k=4, tol=1e-10, which=which)
    torch.testing.assert_close(space.values, expected.values, rtol=0, atol=1e-7)
    orthogonal = space.vectors.T @ space.vectors
    torch.testing.assert_close(orthogonal, torch.eye(4).double(), rtol=0, atol=1e-12)


def test_a_perfect_fast_operator_costs_k_exact_products_and_no_more():
    A = symmetric()
    exact, calls = counted(A)
    space = leading_eigenspace(counted(A)[0], k=4, tol=1e-8, exact=exact)
    assert space.num_exact == len(calls) == 4


def test_errors_in_the_flat_directions_go_in_one_round():
    """As for rounding: what the fast product mixes in lies where A is small."""
    n = 200
    d = torch.zeros(n).double()
    d[:3] = torch.tensor([5.0, 4.0, 3.0])
    d[3:] = 1e-4 * torch.linspace(-1, 1, n - 3)
    A = torch.diag(d)
    exact, calls = counted(A)
    space = leading_eigenspace(counted(near(A, 1e-2))[0], k=3, tol=1e-5, exact=exact)
    assert space.converged
    assert space.num_exact == len(calls) == 6


def test_a_wrong_fast_operator_is_shown_up():
    A, other = symmetric(), symmetric(seed=7)
    exact, calls = counted(A)
    message = r"after 40 products, \d+ of them exact, .* pass the exact operator alone, if the oth"
    with pytest.warns(ConvergenceWarning, match=message):
        space = leading_eigenspace(
            counted(other)[0], k=4, tol=1e-6, max_products=40, exact=exact, multiple=False
        )
    assert not space.converged
    assert len(calls) == space.num_exact
    assert space.num_products == 40
    torch.testing.assert_close(space.residuals, true_residuals(A, space), rtol=1e-6, atol=1e-12)
    assert float(space.residuals.max()) > 1e-6 * 9


def test_with_budget_the_exact_operator_finds_the_pairs_by_itself_in_a_small_space():
    A = symmetric()
    exact, _ = counted(A)
    space = leading_eigenspace(
        counted(symmetric(seed=7))[0], k=4, tol=1e-8, exact=exact, max_basis=24, multiple=False
    )
    assert space.converged
    expected = leading_eigenspace(exact, k=4, tol=1e-10)
    torch.testing.assert_close(space.values, expected.values, rtol=0, atol=1e-7)


def test_rounding_ends_the_refinement():
    A = symmetric().float()
    exact, calls = counted(A)
    with pytest.warns(ConvergenceWarning, match="Rounding lets it fall no further") as caught:
        space = leading_eigenspace(
            counted(near(symmetric(), 1e-3).float())[0], k=4, tol=1e-9, exact=exact
        )
    assert "`max_products`" not in str(caught[-1].message)
    assert space.num_exact == len(calls) < 100
    assert float(space.residuals.max()) < 1e-4


def test_the_budget_is_one_for_both_and_never_exceeded():
    A = symmetric()
    for budget in (8, 11, 20, 31):
        fast, fast_calls = counted(near(A, 1e-2))
        exact, exact_calls = counted(A)
        with pytest.warns(ConvergenceWarning):
            space = leading_eigenspace(fast, k=4, tol=1e-9, max_products=budget, exact=exact)
        assert len(fast_calls) + len(exact_calls) == space.num_products <= budget
        assert len(exact_calls) >= 4


def test_all_pairs_of_a_small_matrix():
    A = symmetric(8)
    space = leading_eigenspace(counted(near(A, 1e-2))[0], k=8, exact=counted(A)[0])
    torch.testing.assert_close(
        space.values.sort().values, torch.linalg.eigvalsh(A), rtol=0, atol=1e-9
    )
    assert space.num_exact == 8


def test_the_count_is_written_with_the_result(tmp_path):
    A = symmetric()
    space = leading_eigenspace(counted(A)[0], k=2, exact=counted(A)[0])
    assert load_eigenspace(save(space, tmp_path / "pairs.safetensors")).num_exact == 2


@pytest.mark.parametrize(
    ("exact", "options", "message"),
    [
        (symmetric(119), {}, "`exact` must have the size, .*, 120 x 120, .* got 119 x 119"),
        (symmetric().float(), {}, "`exact` must have .* torch.float64 on cpu, got .* torch.float3"),
        (symmetric(), {"measure": False}, "`measure` must be True with `exact`"),
        (symmetric(), {"backend": "pyhessian"}, "`exact` must be left out for PyHessian"),
    ],
)
def test_what_does_not_fit_is_refused(exact, options, message):
    with pytest.raises(ValueError, match=message):
        leading_eigenspace(counted(symmetric())[0], k=2, exact=counted(exact)[0], **options)
