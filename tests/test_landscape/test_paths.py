import math

import pytest
import torch

from landscape import BezierCurve, Line, PolyChain

INSIDE = [0.0, 1e-9, 0.1, 0.3, 0.5, 0.8, 1.0]
TS = [-0.7, *INSIDE, 1.3]


def random_points(count, d=50, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_ends_are_exact_bit_for_bit(dtype, order):
    points = random_points(order + 1, dtype=dtype) * 10.0 ** torch.arange(-25, 25).to(dtype)
    points[0, 0], points[-1, 1], points[1, 0], points[0, 1] = -0.0, -0.0, 3.0, 3.0
    for path in (BezierCurve(points), Line(points[0], points[-1])):
        for t, expected in ((0.0, points[0]), (1.0, points[-1])):
            assert path(t).numpy().tobytes() == expected.numpy().tobytes()
            assert path(t).dtype == dtype


def test_ends_are_copies():
    points = random_points(3)
    before = points.clone()
    for path in (BezierCurve(points), Line(points[0], points[-1])):
        path(0.0).zero_()
        path(1.0).zero_()
    assert torch.equal(points, before)


@pytest.mark.parametrize("t", TS)
def test_line_is_the_formula(t):
    start, end = random_points(2)
    torch.testing.assert_close(Line(start, end)(t), (1 - t) * start + t * end)


@pytest.mark.parametrize("t", INSIDE)
def test_line_does_not_move_what_both_ends_share(t):
    start, end = random_points(2, dtype=torch.float32)
    end[::2] = start[::2]
    start[:10] = end[:10] = 0.0
    assert torch.equal(Line(start, end)(t)[::2], start[::2])
    assert torch.all(Line(start, end)(t)[:10] == 0)


@pytest.mark.parametrize("t", TS)
@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_bezier_of_equally_spaced_collinear_points_is_the_line(order, t):
    start, end = random_points(2)
    line = Line(start, end)
    curve = BezierCurve(torch.stack([line(k / order) for k in range(order + 1)]))
    # Coefficients outside [0, 1] reach (1 + 2·0.7)^6 = 191, and so does the rounding.
    torch.testing.assert_close(curve(t), line(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", TS)
@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_bezier_is_de_casteljaus_construction(order, t):
    points = random_points(order + 1)
    rest = points
    while len(rest) > 1:
        rest = (1 - t) * rest[:-1] + t * rest[1:]
    torch.testing.assert_close(BezierCurve(points)(t), rest[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", TS)
def test_quadratic_coefficients_are_the_published_ones(t):
    coefficients = BezierCurve(random_points(3)).coefficients(t)
    assert coefficients.dtype == torch.float64
    expected = torch.tensor([(1 - t) ** 2, 2 * t * (1 - t), t**2], dtype=torch.float64)
    torch.testing.assert_close(coefficients, expected)
    assert math.isclose(float(coefficients.sum()), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.3, 1.0])
def test_derivative_in_a_control_point_is_its_coefficient(t):
    points = random_points(4).requires_grad_()
    BezierCurve(points)(t).sum().backward()
    expected = BezierCurve(points.detach()).coefficients(t)[:, None].expand(4, 50)
    torch.testing.assert_close(points.grad, expected)


def test_reversed_points_give_the_reversed_curve():
    points = random_points(4)
    torch.testing.assert_close(BezierCurve(points)(0.3), BezierCurve(points.flip(0))(0.7))


def test_sizes():
    points = random_points(3, d=7)
    assert (BezierCurve(points).size, BezierCurve(points).order) == (7, 2)
    assert Line(points[0], points[1]).size == 7


def test_ends_of_different_type_say_so():
    with pytest.raises(ValueError, match=r"`start` and `end` must be .* got \[3\] torch.float32"):
        Line(torch.zeros(3), torch.zeros(3, dtype=torch.float64))


def test_one_control_point_is_too_few():
    with pytest.raises(ValueError, match=r"`control_points` must have shape .* got \[1, 3\]"):
        BezierCurve(torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8])
def test_chain_visits_its_points_exactly_and_runs_straight_between(dtype, segments):
    points = random_points(segments + 1, dtype=dtype)
    chain = PolyChain(points)
    assert chain.num_segments == segments
    for k in range(segments + 1):
        assert torch.equal(chain(k / segments), points[k])
    for k in range(segments):
        middle = (points[k] + points[k + 1]) / 2
        torch.testing.assert_close(chain((k + 0.5) / segments), middle)


@pytest.mark.parametrize("t", TS)
def test_chain_is_the_sum_of_its_hats(t):
    """Weights max(0, 1 − |t m − k|), and the line through the last two points outside [0, 1]."""
    points = random_points(4)
    chain = PolyChain(points)
    if 0 <= t <= 1:
        hats = torch.tensor([max(0.0, 1 - abs(3 * t - k)) for k in range(4)], dtype=torch.float64)
        torch.testing.assert_close(chain.coefficients(t), hats)
    torch.testing.assert_close(chain(t), chain.coefficients(t) @ points)
    assert float(chain.coefficients(t).sum()) == pytest.approx(1)
    ends = points[:2] if t < 0 else points[2:]
    if not 0 <= t <= 1:
        expected = Line(*ends)(3 * t if t < 0 else 3 * t - 2)
        torch.testing.assert_close(chain(t), expected)


def test_chain_of_two_points_is_the_line():
    start, end = random_points(2)
    for t in TS:
        assert torch.equal(PolyChain(torch.stack([start, end]))(t), Line(start, end)(t))


def test_a_chain_of_one_point_is_refused():
    with pytest.raises(ValueError, match=r"`control_points` must have shape \[m \+ 1, d\]"):
        PolyChain(torch.zeros(1, 3))
