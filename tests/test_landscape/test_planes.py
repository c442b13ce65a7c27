import pytest
import torch

from landscape import Directions, Plane, grid


def random_points(count, d=40, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_points_have_the_coordinates_of_their_triangle(dtype):
    a, b, c = random_points(3, dtype=dtype)
    plane = Plane.through(a, b, c)
    sides = [float((p.double() - q.double()).norm()) for p, q in ((b, a), (c, a), (c, b))]
    x = (sides[0] ** 2 + sides[1] ** 2 - sides[2] ** 2) / (2 * sides[0])  # law of cosines
    expected = {a: (0.0, 0.0), b: (sides[0], 0.0), c: (x, (sides[1] ** 2 - x**2) ** 0.5)}
    tolerance = 20 * torch.finfo(dtype).eps * sides[0]
    for point, (px, py) in expected.items():
        assert plane.coordinates(point) == pytest.approx((px, py, 0), abs=tolerance)
        torch.testing.assert_close(plane(px, py), point, rtol=0, atol=tolerance)


def test_round_trip_and_residual():
    a, b, c, other = random_points(4)
    plane = Plane.through(a, b, c)
    assert plane.coordinates(plane(0.3, -1.7)) == pytest.approx((0.3, -1.7, 0), abs=1e-13)
    normal = other - torch.dot(plane.u, other) * plane.u - torch.dot(plane.v, other) * plane.v
    off = plane(0.3, -1.7) + 2.5 * normal / normal.norm()
    assert plane.coordinates(off) == pytest.approx((0.3, -1.7, 2.5), abs=1e-12)


def test_origin_is_exact():
    a, b, c = random_points(3, dtype=torch.float32)
    assert torch.equal(Plane.through(a, b, c)(0.0, 0.0), a)


def test_a_nearly_flat_triangle_keeps_orthonormal_axes():
    a, b, c = random_points(3)
    plane = Plane.through(a, b, a + 0.4 * (b - a) + 1e-9 * (c - a))
    assert abs(float(torch.dot(plane.u, plane.v))) < 1e-14
    assert float(plane.v.norm()) == pytest.approx(1, abs=1e-14)
    assert plane.is_orthonormal


def test_sums_run_in_float64():
    """Float32 sums would put the second point of a million weights off the x axis."""
    a, b, c = random_points(3, d=1_000_000, dtype=torch.float32)
    c = b + 1e-3 * c
    plane = Plane.through(a, b, c)
    side = float((b.double() - a.double()).norm())
    x, y, residual = plane.coordinates(b)
    assert x == pytest.approx(side, rel=1e-9)
    # What is left is the rounding of every entry of u and v, not of the sums.
    assert abs(y) < 1e-9 * side
    assert residual < 1e-7 * side


def test_a_tensor_of_coordinates_is_the_same_as_two_numbers():
    plane = Plane.through(*random_points(3))
    assert torch.equal(plane(torch.tensor([0.25, -3.0])), plane(0.25, -3.0))
    with pytest.raises(ValueError, match="`y` must be given along with `x`"):
        plane(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ((0, 0, 1), "`a` and `b` must differ"),
        ((0, 1, 0), "`a` and `c` must differ"),
        ((0, 1, 1), "`b` and `c` must differ"),
        ((0, 1, 2), "`a`, `b` and `c` must not lie on one line"),
    ],
)
def test_degenerate_triangles_are_named(dtype, pick, message):
    a, b = random_points(2, dtype=dtype)
    points = [a, b, torch.lerp(a, b, 0.3)]
    with pytest.raises(ValueError, match=message):
        Plane.through(*(points[i] for i in pick))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [90.0, 60.0, 5.0])
def test_coordinates_count_multiples_of_axes_of_any_length_and_angle(dtype, angle):
    """Against lstsq. A length along each axis would be (9.9, -4.1) for axes of length 14."""
    origin, a, b, other = random_points(4)
    a, b = torch.linalg.qr(torch.stack([a, b], dim=1))[0].T
    radians = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
    u, v = 14.2 * a, 14.1 * (torch.cos(radians) * a + torch.sin(radians) * b)
    plane = Plane(origin.to(dtype), u.to(dtype), v.to(dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert plane.coordinates(plane(0.7, -0.3)) == pytest.approx((0.7, -0.3, 0), abs=tolerance)
    x, y, residual = plane.coordinates(other.to(dtype))
    D = torch.stack([u, v], dim=1)
    solution = torch.linalg.lstsq(D, (other - origin)[:, None]).solution[:, 0]
    assert [x, y] == pytest.approx(solution.tolist(), abs=tolerance)
    assert residual == pytest.approx(float((D @ solution - other + origin).norm()), rel=1e-5)
    assert plane.lengths == pytest.approx((14.2, 14.1), rel=1e-6)
    assert plane.cosine == pytest.approx(float(torch.cos(radians)), abs=1e-6)
    assert not plane.is_orthonormal


def test_a_plane_along_directions_has_their_names_and_lengths():
    origin, u, v = random_points(3)
    plane = Plane.along(origin, Directions(torch.stack([3 * u, v]), "mine", ("steep", "flat")))
    assert plane.labels == ("steep", "flat")
    assert torch.equal(plane(1.0, 0.0), origin + 3 * u)
    assert torch.equal(plane(0.0, 1.0), origin + v)


def test_directions_that_do_not_fit_the_origin_are_named():
    origin, u, v = random_points(3)
    two = Directions(torch.stack([u, v]), "mine", ("a", "b"))
    with pytest.raises(ValueError, match="`directions` must have 30 entries"):
        Plane.along(origin[:30], two)
    with pytest.raises(ValueError, match="`directions` must hold two to span a plane, got 1"):
        Plane.along(origin, Directions(u[None], "mine", ("a",)))


def test_axes_that_span_no_plane_are_refused():
    e = torch.eye(3)
    with pytest.raises(ValueError, match=r"parallel: their cosine is -1"):
        Plane(e[0], e[1], -2 * e[1])
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive, finite length"):
            Plane(e[0], bad * e[1], e[2])


def test_grid_is_in_ij_order_and_need_not_be_square():
    xs, ys = [-1.0, 0.0, 2.0], torch.tensor([0.0, 5.0])
    points = grid(xs, ys)
    assert points.shape == (3, 2, 2)
    assert points.dtype == torch.float64
    for i, x in enumerate(xs):
        for j, y in enumerate(ys.tolist()):
            assert points[i, j].tolist() == [x, y]


@pytest.mark.parametrize("bad", [[], [0.0, float("nan")], [float("inf")]])
def test_an_empty_or_infinite_axis_is_named(bad):
    with pytest.raises(ValueError, match="`ys` must hold at least one value, all finite"):
        grid([0.0], bad)


def test_axes_of_another_length_or_type_are_refused():
    """Past the annotations, which only these tests check."""
    w = random_points(1)[0]
    for name, u, v, got in (
        ("u", w[1:], w, r"shape \[39\] in torch.float64"),
        ("v", w.flip(0), w[1:], r"shape \[39\] in torch.float64"),
        ("u", w[1:], w[1:], r"shape \[39\] in torch.float64"),
        ("v", w.flip(0), w.float(), r"shape \[40\] in torch.float32"),
    ):
        plane = object.__new__(Plane)
        for field, value in (("origin", w), ("u", u), ("v", v)):
            object.__setattr__(plane, field, value)
        with pytest.raises(ValueError, match=rf"`{name}` must be a flat vector like .* got {got}"):
            plane.__post_init__()
