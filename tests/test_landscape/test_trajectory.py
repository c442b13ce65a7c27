import math

import pytest
import torch

from landscape import (
    project_trajectory,
    random_share,
    random_share_interval,
    share_in_subspace,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_projection_is_least_squares(monkeypatch, block):
    """Oblique columns of very different length, against a dense solver."""
    monkeypatch.setattr("landscape.trajectory.BLOCK", block)
    basis = normal(60, 3) * torch.tensor([1.0, 1e-5, 300.0]).double()
    points, center = normal(5, 60, seed=1), normal(60, seed=2)
    found = project_trajectory(points, basis, center)
    difference = points - center
    expected = torch.linalg.lstsq(basis, difference.T).solution.T
    torch.testing.assert_close(found.coordinates, expected, rtol=1e-9, atol=0)
    rest = difference - expected @ basis.T
    torch.testing.assert_close(found.residuals, rest.norm(dim=1))
    torch.testing.assert_close(found.distances, difference.norm(dim=1))
    fraction = 1 - rest.square().sum(dim=1) / difference.square().sum(dim=1)
    torch.testing.assert_close(found.explained_fraction, fraction)


def test_points_in_the_subspace_come_back(formula_objective):
    """Oblique directions: ⟨w, d⟩/‖d‖ would draw (0.7, −0.3) somewhere else."""
    basis, center = normal(50, 2) * 14.0 + 3.0, normal(50, seed=1)
    coordinates = torch.tensor([[0.7, -0.3], [0.0, 2.0]]).double()
    found = project_trajectory(center + coordinates @ basis.T, basis, center)
    torch.testing.assert_close(found.coordinates, coordinates, rtol=0, atol=1e-12)
    assert found.residuals.max() < 1e-12
    torch.testing.assert_close(found.explained_fraction, torch.ones(2).double())


def test_the_center_has_no_explained_fraction():
    found = project_trajectory(
        torch.ones(1, 4).double(), torch.eye(4, 2).double(), torch.ones(4).double()
    )
    assert found.residuals.tolist() == [0.0]
    assert math.isnan(found.explained_fraction[0])


def test_float32_sums_run_in_float64():
    basis = normal(200_000, 2).float()
    point = 1000 + normal(1, 200_000, seed=1).float()
    found = project_trajectory(point, basis, torch.full((200_000,), 1000.0))
    expected = torch.linalg.lstsq(basis.double(), (point.double() - 1000).T).solution.T
    torch.testing.assert_close(found.coordinates, expected, rtol=1e-9, atol=1e-12)


def test_dependent_directions_are_refused_with_their_condition_number():
    basis = normal(30, 2)
    basis[:, 1] = basis[:, 0] + 1e-4 * basis[:, 1]
    with pytest.raises(ValueError, match=r"`basis` .* condition number [\d.]+e\+08, above 1e\+06"):
        project_trajectory(normal(1, 30), basis, torch.zeros(30).double())
    with pytest.raises(ValueError, match="condition number"):
        share_in_subspace(normal(30), basis)


def test_a_zero_direction_is_named():
    basis = torch.eye(4, 3).double()
    basis[:, 1] = 0
    with pytest.raises(ValueError, match=r"got 0\.0 in column 1"):
        share_in_subspace(torch.ones(4).double(), basis)


def test_share_is_the_length_of_the_projection():
    Q, R = torch.linalg.qr(normal(40, 4))
    delta = normal(40, seed=1)
    expected = float((Q.T @ delta).norm() / delta.norm())
    assert share_in_subspace(delta, Q) == pytest.approx(expected, rel=1e-12)
    assert share_in_subspace(1e-7 * delta, Q @ R) == pytest.approx(expected, rel=1e-12)
    assert share_in_subspace(Q @ delta[:4], Q) == pytest.approx(1, rel=1e-12)


def test_a_tiny_share_keeps_its_digits():
    delta = torch.zeros(10).double()
    delta[0], delta[9] = 1e-12, 1.0
    assert share_in_subspace(delta, torch.eye(10, 2).double()) == pytest.approx(1e-12, rel=1e-9)


def test_zero_delta_has_no_share():
    with pytest.raises(ValueError, match="`delta` must not be zero"):
        share_in_subspace(torch.zeros(3), torch.eye(3, 1))


@pytest.mark.parametrize(("k", "d"), [(1, 5), (3, 20), (10, 1000)])
def test_random_share_is_the_root_mean_square_and_the_interval_covers(k, d):
    num = 4000
    directions = normal(num, d, seed=k)
    shares = directions[:, :k].norm(dim=1) / directions.norm(dim=1)
    squares = shares.square()
    error = float(squares.std()) / num**0.5
    assert abs(float(squares.mean()) - random_share(k, d) ** 2) < 4 * error
    for level in (0.5, 0.95):
        low, high = random_share_interval(k, d, level=level)
        # Four standard errors of a proportion; each tail by itself.
        slack = 4 * math.sqrt(level * (1 - level) / num)
        assert abs(float(((shares > low) & (shares < high)).double().mean()) - level) < slack
        assert abs(float((shares <= low).double().mean()) - (1 - level) / 2) < slack


def test_shares_measured_on_random_directions_fall_on_the_floor():
    Q = torch.linalg.qr(normal(100, 5)).Q
    shares = torch.tensor([share_in_subspace(normal(100, seed=s), Q) for s in range(200)])
    low, high = random_share_interval(5, 100)
    assert 0.9 < float(((shares > low) & (shares < high)).float().mean()) <= 1


def test_the_whole_space_has_share_one():
    assert random_share(7, 7) == 1
    assert random_share_interval(7, 7) == (1.0, 1.0)


def test_bad_dimensions_and_levels_are_named():
    with pytest.raises(ValueError, match="`k` must be between 1 and d = 5, got 6"):
        random_share(6, 5)
    with pytest.raises(ValueError, match="`k` must be between 1 and d = 5, got 0"):
        random_share_interval(0, 5)
    with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\), got 1"):
        random_share_interval(1, 5, level=1.0)
