import itertools
import math

import pytest
import torch
from scipy.stats import t

from hessian import Eigenspace, NonFiniteError, Operator, hessian_operator, spectral_density
from hessian.probes import SignProbes
from tests.cases import digits_network
from tests.oracles import counted, digits_eigenvalues, random_orthogonal, with_spectrum

SPECTRA = {
    "even": torch.linspace(-1, 2, 200, dtype=torch.float64),
    "polynomial": 1 / torch.arange(1.0, 201.0, dtype=torch.float64),
    "outliers": torch.cat([torch.linspace(-0.1, 0.1, 190), torch.arange(1.0, 11.0)]).double(),
    "low rank": torch.cat([torch.zeros(190), torch.arange(1.0, 11.0)]).double(),
}


def leading(A, k, error=0.0):
    values, vectors = torch.linalg.eigh(A)
    order = values.abs().argsort(descending=True)[:k]
    residuals = torch.full((k,), error).double()
    return Eigenspace(values[order], vectors[:, order], residuals, math.nan, 0, True)


def smoothed(values, grid, sigma):
    z = (grid[:, None] - values) / sigma
    return torch.exp(-0.5 * z**2).mean(dim=1) / (sigma * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("num_steps", [2, 4])
def test_moments_over_all_signs_are_those_of_the_spectrum(num_steps, monkeypatch):
    values = torch.tensor([2.0, -1.0, 0.5, 0.1, 3.0, 1.0, -0.3]).double()
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=7))).double()[:64]
    rows = iter(signs)
    monkeypatch.setattr(SignProbes, "draw", lambda self, k: next(rows)[:, None])
    A = Operator.from_matrix(with_spectrum(values, seed=1))
    found = spectral_density(A, num_probes=64, num_steps=num_steps).moments(2 * num_steps)
    exact = torch.stack([(values**p).mean() for p in range(2 * num_steps + 1)])
    torch.testing.assert_close(found.value[:-1], exact[:-1], rtol=0, atol=1e-11)
    # One power more than the quadrature knows.
    assert abs(float(found.value[-1] - exact[-1])) > 1e-4
    assert float(found.standard_error[0]) == pytest.approx(0, abs=1e-15)
    assert float(found.standard_error[2]) > 0.01


@pytest.mark.parametrize("pairs", [0, 10])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_true_density_lies_within_the_band(name, pairs):
    values = SPECTRA[name]
    A = with_spectrum(values)
    found = spectral_density(
        Operator.from_matrix(A), num_steps=40, eigenspace=leading(A, pairs) if pairs else None
    )
    curve = found.on()
    exact = smoothed(values, curve.grid, curve.sigma)
    reach = float(t.ppf(0.99, 9)) * curve.standard_error + 3e-3 * float(exact.max())
    assert float(((curve.value - exact).abs() <= reach).double().mean()) > 0.95
    assert float(torch.trapezoid(curve.value, curve.grid)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", SPECTRA)
def test_at_the_default_width_the_quadrature_errs_less_than_the_probes(name):
    A = Operator.from_matrix(with_spectrum(SPECTRA[name]))
    short, full = (spectral_density(A, num_probes=4, num_steps=steps) for steps in (40, 200))
    curve = short.on()
    error = (full.on(curve.grid, curve.sigma).value - curve.value).abs()
    assert float(error.max()) <= 0.1 * float(curve.standard_error.max()) + 1e-9
    # A tenth of that width is finer than the steps resolve, where they do not all break down.
    fine = full.on(curve.grid, curve.sigma / 10).value
    worse = (fine - short.on(curve.grid, curve.sigma / 10).value).abs()
    if name == "even":
        assert float(worse.max()) > 10 * float(error.max())


@pytest.mark.parametrize("pairs", [0, 4])
def test_weights_are_shares_that_sum_to_one(pairs):
    A = with_spectrum(SPECTRA["polynomial"])
    space = leading(A, pairs) if pairs else None
    found = spectral_density(Operator.from_matrix(A), num_probes=3, num_steps=20, eigenspace=space)
    assert found.nodes.shape == found.weights.shape == (3, 20 + pairs)
    assert float(found.weights.min()) >= 0
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(3).double())
    assert found.nodes.dtype == found.weights.dtype == torch.float64
    if pairs:
        torch.testing.assert_close(found.outliers, space.values)
        torch.testing.assert_close(found.nodes[:, -4:], space.values.expand(3, 4))
        torch.testing.assert_close(found.weights[:, -4:], torch.full((3, 4), 1 / 200).double())
        # The probes see the rest only.
        assert float(found.nodes[:, :-4].max()) <= float(SPECTRA["polynomial"][4]) + 1e-12


def test_the_rest_is_unbiased_in_the_complement():
    values = SPECTRA["outliers"]
    A = with_spectrum(values)
    found = spectral_density(
        Operator.from_matrix(A), num_probes=400, num_steps=3, eigenspace=leading(A, 10)
    )
    moments = found.moments(5)
    exact = torch.stack([(values**p).mean() for p in range(6)])
    assert torch.all((moments.value - exact).abs() <= 3.5 * moments.standard_error + 1e-12 * exact)


def test_outliers_have_no_error_and_make_the_bulk_sharper():
    values = SPECTRA["outliers"]
    A = with_spectrum(values)
    plain, exact = (
        spectral_density(Operator.from_matrix(A), num_steps=30, eigenspace=space)
        for space in (None, leading(A, 10))
    )
    above = torch.tensor([0.5, 5.5]).double()
    share = torch.tensor([190 / 200, 195 / 200]).double()
    torch.testing.assert_close(exact.cdf(above).value, share)
    assert float(exact.cdf(above).standard_error.max()) < 1e-12
    assert float(plain.cdf(above).standard_error.min()) > 1e-3
    assert exact.default_sigma < plain.default_sigma / 20


def test_the_distribution_function_rises_from_zero_to_one():
    values = SPECTRA["even"]
    found = spectral_density(Operator.from_matrix(with_spectrum(values)), num_steps=60)
    grid = torch.linspace(-1.5, 2.5, 81, dtype=torch.float64)
    curve = found.cdf(grid)
    assert float(curve.value[0]) == 0.0
    assert float(curve.value[-1]) == pytest.approx(1.0)
    assert torch.all(curve.value.diff() >= 0)
    exact = (values[None, :] <= grid[:, None]).double().mean(dim=1)
    assert float((curve.value - exact).abs().max()) < 0.05


def test_breakdown_ends_a_probe_early_and_is_exact():
    Q = random_orthogonal(100)
    A = 3.0 * Q[:, :2] @ Q[:, :2].T - Q[:, 2:3] @ Q[:, 2:3].T
    operator, products = counted((A + A.T) / 2)
    found = spectral_density(operator, num_probes=5, num_steps=50)
    assert len(products) == found.num_products <= 5 * 5
    distance = (found.nodes[:, :, None] - torch.tensor([0.0, 3.0, -1.0])).abs().amin(dim=2)
    assert float((distance * (found.weights > 1e-12)).max()) < 1e-10
    assert float(found.on().value.max()) < math.inf


@pytest.mark.parametrize("factor", [0.0, 2.5])
def test_a_multiple_of_the_identity_has_one_node(factor):
    found = spectral_density(Operator.from_matrix(factor * torch.eye(7).double()), num_probes=2)
    assert found.num_products == 2
    torch.testing.assert_close(found.nodes, torch.full((2, 1), factor).double())
    curve = found.on()
    assert float(torch.trapezoid(curve.value, curve.grid)) == pytest.approx(1.0, abs=1e-4)


def test_all_eigenpairs_leave_nothing_to_probe():
    A = with_spectrum(torch.tensor([3.0, 1.0, -2.0]))
    operator, products = counted(A)
    found = spectral_density(operator, eigenspace=leading(A, 3))
    assert found.num_products == len(products) == 1
    cdf = found.cdf(torch.tensor([-3.0, 0.0, 2.0, 4.0]))
    torch.testing.assert_close(cdf.value, torch.tensor([0, 1 / 3, 2 / 3, 1]).double())
    assert float(found.moments(2).value[2]) == pytest.approx(14 / 3)
    assert torch.isfinite(found.on().value).all()


def test_shift_and_scale_move_the_nodes():
    A = with_spectrum(SPECTRA["polynomial"])
    one, moved = (
        spectral_density(Operator.from_matrix(B), num_steps=10)
        for B in (A, 4.0 * A + 7.0 * torch.eye(200).double())
    )
    torch.testing.assert_close((moved.nodes - 7.0) / 4.0, one.nodes, rtol=0, atol=1e-10)
    torch.testing.assert_close(moved.weights, one.weights, rtol=1e-6, atol=1e-12)
    assert moved.default_sigma == pytest.approx(4.0 * one.default_sigma)


def test_the_seed_repeats_and_changes_the_probes_and_touches_nothing_else():
    A = with_spectrum(SPECTRA["even"])
    state = torch.get_rng_state()
    for space in (None, leading(A, 3)):
        one, again, other = (
            spectral_density(Operator.from_matrix(A), num_steps=5, eigenspace=space, seed=s)
            for s in (3, 3, 4)
        )
        assert torch.equal(one.nodes, again.nodes)
        assert not torch.equal(one.nodes, other.nodes)
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_gives_the_same_density():
    A = with_spectrum(SPECTRA["polynomial"])
    double, single = (
        spectral_density(Operator.from_matrix(A.to(kind)), num_steps=12)
        for kind in (torch.float64, torch.float32)
    )
    curve = double.on()
    again = single.on(curve.grid, curve.sigma)
    assert float((again.value - curve.value).abs().max()) < 1e-4 * float(curve.value.max())
    assert again.value.dtype == torch.float64


def test_the_default_grid_resolves_every_gaussian_and_holds_all_nodes():
    A = with_spectrum(SPECTRA["outliers"])
    for space in (None, leading(A, 10)):
        found = spectral_density(Operator.from_matrix(A), num_steps=30, eigenspace=space)
        curve = found.on()
        assert torch.all(curve.grid.diff() >= 0)
        for node in found.nodes.flatten().tolist():
            near = (curve.grid - node).abs()
            assert int((near < curve.sigma).sum()) >= 4


def test_products_are_counted_and_reported():
    operator, products = counted(with_spectrum(SPECTRA["even"]))
    steps = []
    found = spectral_density(operator, num_probes=3, num_steps=7, progress=steps.append)
    assert found.num_products == len(products) == 21
    assert [step.products for step in steps] == list(range(1, 22))
    assert {step.expected for step in steps} == {21}


@pytest.mark.slow
def test_the_density_of_the_digits_hessian_holds_the_truth():
    H = hessian_operator(digits_network().objective([400]))
    curve = spectral_density(H, num_probes=6, num_steps=40).on()
    exact = smoothed(digits_eigenvalues(), curve.grid, curve.sigma)
    reach = float(t.ppf(0.99, 5)) * curve.standard_error + 1e-3 * float(exact.max())
    assert float(((curve.value - exact).abs() <= reach).double().mean()) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 1}, "`num_probes` must be at least 2"),
        ({"num_steps": 0}, "`num_steps` must be at least 1"),
        ({"eigenspace": leading(torch.eye(5).double(), 2)}, "length 200, got 5"),
    ],
)
def test_what_cannot_be_met_is_refused(options, message):
    operator, products = counted(with_spectrum(SPECTRA["even"]))
    with pytest.raises(ValueError, match=message):
        spectral_density(operator, **options)
    assert not products


@pytest.mark.parametrize("change", ["turned", "scaled"])
def test_pairs_of_another_matrix_are_refused(change):
    A = with_spectrum(SPECTRA["polynomial"])
    other = 1.01 * A if change == "scaled" else with_spectrum(SPECTRA["polynomial"], seed=1)
    with pytest.raises(ValueError, match="`eigenspace` must be one of this operator"):
        spectral_density(Operator.from_matrix(A), eigenspace=leading(other, 3))
    rough = leading(other, 3, error=2.0)
    assert spectral_density(Operator.from_matrix(A), num_steps=2, eigenspace=rough).num_products


def test_bad_points_are_refused():
    found = spectral_density(Operator.from_matrix(torch.eye(3).double()))
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`sigma` must be positive and finite"):
            found.on(sigma=sigma)
    with pytest.raises(ValueError, match="`highest` must not be negative, got -1"):
        found.moments(-1)


def test_nan_from_a_product_is_an_error():
    with pytest.raises(NonFiniteError):
        spectral_density(Operator(lambda v: v * math.nan, 9, torch.float64, torch.device("cpu")))
