"""Confidence in the maximum of a noisy curve, against its definition and repeated sampling."""

import math

import pytest
import torch
from torch.testing import assert_close

from landscape import simultaneous_band


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_point_has_the_ordinary_interval():
    x = normal(1, 200)
    band = simultaneous_band(x)
    assert band.factor == pytest.approx(1.96, abs=0.04)
    assert_close(band.standard_error[0], x.std() / math.sqrt(200))
    assert_close(band.low, x.mean(dim=1) - band.factor * band.standard_error)


def test_independent_points_have_the_factor_of_sidak():
    band = simultaneous_band(normal(20, 20_000))
    expected = float(torch.special.ndtri(torch.tensor((1 + 0.95 ** (1 / 20)) / 2).double()))
    assert band.factor == pytest.approx(expected, abs=0.05)  # 3.02


def test_points_that_move_together_count_as_one():
    x = normal(1, 500)
    assert simultaneous_band(x * torch.linspace(1, 5, 30).double()[:, None]).factor == (
        pytest.approx(1.96, abs=0.04)
    )


def test_the_true_maximum_is_held_as_often_as_promised():
    """A flat curve of 15 points; its highest mean alone is above zero almost always."""
    held = naive = 0
    for seed in range(200):
        band = simultaneous_band(normal(15, 100, seed=seed))
        held += bool(band.low.max() <= 0 <= band.high.max())
        best = band.mean.argmax()
        naive += bool(band.mean[best] - 1.96 * band.standard_error[best] > 0)
    assert held >= 184  # 95 % of 200, less two standard errors
    assert naive >= 40  # what the selection does to an interval that ignores it


def test_points_without_spread_have_no_error_and_one_sample_has_none_at_all():
    x = normal(3, 50)
    x[1] = 0.1
    band = simultaneous_band(x)
    assert band.standard_error[1] == 0 and band.factor == pytest.approx(2.24, abs=0.06)
    assert simultaneous_band(torch.ones(2, 9).double()).factor == 0
    assert math.isnan(simultaneous_band(normal(4, 1)).factor)
