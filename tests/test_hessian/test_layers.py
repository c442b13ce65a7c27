import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessian import (
    ConvergenceWarning,
    NonFiniteError,
    Objective,
    hessian_operator,
    layer_table,
    trace,
)
from hessian.blocks import layer_slices
from hessian.probes import SignProbes
from tests.cases import case_names, cases, digits_network, seeded
from tests.oracles import dense_derivatives, digits_hessian


def tiny():
    """A net with seven weights in two layers, and its data."""
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)))
    x = torch.tensor([[0.3], [-1.2], [0.8]]).double()
    return Objective(model, nn.MSELoss(), (x, x.sin()))


def dense(objective, w=None):
    H = hessian_operator(objective, w)
    return H @ torch.eye(objective.size, dtype=torch.float64)


def test_all_signs_average_to_the_trace_of_every_block_with_the_known_variance(monkeypatch):
    objective = tiny()
    H = dense(objective)
    rows = itertools.product([-1.0, 1.0], repeat=6)
    signs = torch.tensor([(1.0, *row) for row in rows]).double()
    left = list(signs)
    monkeypatch.setattr(
        SignProbes, "draw", lambda self, k: torch.stack([left.pop(0) for _ in range(k)], dim=1)
    )
    found = layer_table(objective, num_probes=64)
    for row, part in zip(found.rows, (slice(0, 4), slice(4, 7)), strict=True):
        block = H[part, part]
        assert row.trace == pytest.approx(float(block.trace()), rel=1e-10)
        own = 2 * float((block**2).sum() - (block.diag() ** 2).sum())
        others = float((H[part] ** 2).sum() - (block**2).sum())
        assert others > 1e-3
        assert row.standard_error**2 == pytest.approx((own + others) / 63, rel=1e-9)
    assert found.trace == pytest.approx(float(H.trace()), rel=1e-10)


@pytest.mark.parametrize("name", case_names())
def test_blocks_are_those_of_the_dense_hessian(name):
    objective = cases()[name].objective([8, 4])
    H = dense_derivatives(name)[3]
    found = layer_table(objective, num_probes=200, k=3, tol=1e-8)
    slices = layer_slices(objective)
    assert [row.name for row in found.rows] == list(slices)
    for row in found.rows:
        block = H[slices[row.name], slices[row.name]]
        assert row.size == len(block)
        exact = torch.linalg.eigvalsh(block)
        exact = exact[exact.abs().argsort(descending=True)]
        assert row.top_eigenvalue == pytest.approx(float(exact[0]), rel=1e-6, abs=1e-12)
        values = found.eigenvalues[row.name]
        assert len(values) == min(3, len(block))
        torch.testing.assert_close(
            torch.tensor(values).double().abs(), exact[: len(values)].abs(), rtol=1e-5, atol=1e-9
        )
        assert row.converged
        assert row.residual <= 1e-8 * abs(float(exact[0])) + 1e-14
        assert abs(row.trace - float(block.trace())) <= 4 * row.standard_error + 1e-12
        assert row.share == pytest.approx(row.trace / found.trace)


def test_layers_share_the_probes_of_the_whole_trace():
    objective = cases()["tanh MLP"].objective()
    found = layer_table(objective, num_probes=12, seed=5)
    whole = trace(hessian_operator(objective), num_probes=12, seed=5)
    assert found.trace == pytest.approx(whole.value, rel=1e-10)
    assert found.standard_error == pytest.approx(whole.standard_error, rel=1e-10)
    assert sum(row.trace for row in found.rows) == pytest.approx(whole.value, rel=1e-10)
    assert sum(row.share for row in found.rows) == pytest.approx(1.0)


def test_another_point_is_taken_as_asked_and_the_model_stays():
    objective = tiny()
    w = objective.weights()
    H = dense(objective, 2 * w)
    found = layer_table(objective, 2 * w, num_probes=2, tol=1e-9)
    for row, part in zip(found.rows, (slice(0, 4), slice(4, 7)), strict=True):
        values = torch.linalg.eigvalsh(H[part, part])
        assert abs(row.top_eigenvalue) == pytest.approx(float(values.abs().max()), rel=1e-7)
    assert torch.equal(objective.weights(), w)


def test_the_digits_layers_are_those_of_the_dense_hessian():
    found = layer_table(digits_network().objective([400]), num_probes=40)
    H = digits_hessian()
    for row, part in zip(found.rows, (slice(0, 1300), slice(1300, 1510)), strict=True):
        block = H[part, part]
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert row.top_eigenvalue == pytest.approx(top, rel=1e-5)  # residual squared over gap
        assert abs(row.trace - float(block.trace())) <= 3.5 * row.standard_error
        assert row.residual <= 1e-3 * top


def test_products_are_counted_and_reported():
    steps = []
    found = layer_table(tiny(), num_probes=5, progress=steps.append)
    assert found.num_products == 5 + sum(row.num_products for row in found.rows)
    assert steps[-1].products == found.num_products
    assert all(step.expected >= step.products for step in steps)


def test_the_seed_repeats_and_touches_nothing_else():
    state = torch.get_rng_state()
    one, again, other = (layer_table(tiny(), num_probes=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == again
    assert one.trace != other.trace


def test_the_table_reads_as_text_and_as_a_data_frame():
    found = layer_table(tiny(), num_probes=4)
    lines = str(found).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:2] == ["0", "4"]
    assert lines[-1].split()[:2] == ["all", "7"]
    assert len({len(line) for line in lines}) == 1
    frame = found.to_pandas()
    assert list(frame.index) == ["0", "2"]
    assert frame.loc["2", "size"] == 3
    assert frame["trace"].sum() == pytest.approx(found.trace)
    assert {"standard_error", "share", "top_eigenvalue", "residual"} < set(frame.columns)


def test_without_pandas_the_message_says_what_to_install(monkeypatch):
    import hessian.storage

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(hessian.storage, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        layer_table(tiny(), num_probes=2).to_pandas()


def test_a_layer_whose_budget_ended_is_marked():
    with pytest.warns(ConvergenceWarning, match="Raise `max_products`"):
        found = layer_table(
            digits_network().objective([400]), num_probes=2, tol=1e-9, max_products=6
        )
    assert not any(row.converged for row in found.rows)
    assert "budget ended" in str(found)
    assert str(found).splitlines()[1].endswith("*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 1}, "`num_probes` must be at least 2"),
        ({"k": 0}, "`k` must be at least 1, got 0"),
        ({"tol": 0.0}, "`tol` must be positive"),
        ({"k": 3, "max_products": 5}, "`max_products` must be at least 6"),
        ({"w": torch.zeros(3).double()}, "`w` must be a flat vector"),
    ],
)
def test_what_cannot_be_met_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer_table(tiny(), **options)


def test_a_loss_that_is_not_finite_is_an_error():
    objective = Objective(
        seeded(lambda: nn.Linear(2, 1)),
        lambda output, target: F.mse_loss(output, target) * math.nan,
        (torch.ones(3, 2).double(), torch.ones(3, 1).double()),
    )
    with pytest.raises(NonFiniteError):
        layer_table(objective)
