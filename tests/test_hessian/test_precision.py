"""Products in fewer bits, and what torch's global settings may do to those in all bits."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from hessian import Objective, gauss_newton_operator, hessian_operator, leading_eigenspace
from hessian.batches import map_tensors
from hessian.torch_settings import float32_products, without_fused_recurrence
from tests.cases import cases, digits_network, seeded
from tests.oracles import dense_derivatives
from tests.test_hessian.test_kept_graphs import Attention, Fused, Recurrent

BFLOAT16 = 2.0**-8
"""Half the distance of bfloat16 to the next number: the rounding of one product."""
PLAIN = ("tanh MLP", "CNN with frozen batch norm", "tied weights", "mapping batches")


def in_float32(case, cuts=(12,)):
    data = [
        map_tensors(batch, lambda t: t.float() if t.is_floating_point() else t)
        for batch in case.batches(cuts)
    ]
    model = copy.deepcopy(case.model).float()
    return Objective(model, case.criterion, data, parameters=case.parameters)


def everything(operator):
    return (operator @ torch.eye(operator.size, dtype=operator.dtype)).double()


def distance(found, truth):
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", PLAIN)
def test_bfloat16_products_are_those_of_the_dense_matrix_to_the_rounding_of_bfloat16(name):
    truth = dense_derivatives(name)[3]
    objective = in_float32(cases()[name])
    fast = hessian_operator(objective, precision="bfloat16")
    assert fast.method.endswith("in bfloat16")
    assert (fast.dtype, (fast @ torch.ones(fast.size)).dtype) == (torch.float32, torch.float32)
    error = distance(everything(fast), truth)
    # Some layers' roundings, of random sign; and not one of float32, or nothing was done.
    assert 1e-4 < error < 4 * BFLOAT16
    exact = hessian_operator(objective)
    assert distance(everything(exact), truth) < 1e-5


@pytest.mark.parametrize(
    ("build", "width"),
    [(Attention, 8), (Fused, 4), (lambda: Recurrent(nn.LSTM), 4), (lambda: Recurrent(nn.GRU), 4)],
    ids=["transformer layer", "scaled_dot_product_attention", "LSTM", "GRU"],
)
def test_attention_and_recurrence_have_bfloat16_products(build, width):
    model, y = seeded(build).eval(), torch.tensor([0, 1, 2, 0, 1, 2])
    X = seeded(lambda: torch.randn(6, 5, width), seed=1)
    criterion = nn.CrossEntropyLoss()
    objective = Objective(copy.deepcopy(model).float(), criterion, (X.float(), y))
    V = torch.randn(objective.size, 5, generator=torch.Generator().manual_seed(2))
    truth = hessian_operator(Objective(model, criterion, (X, y))) @ V.double()
    found = hessian_operator(objective, precision="bfloat16") @ V
    assert 1e-4 < distance(found, truth) < 0.03


@pytest.mark.parametrize("name", PLAIN[:2])
def test_gauss_newton_products_too(name):
    truth = everything(gauss_newton_operator(cases()[name].objective()))
    fast = gauss_newton_operator(in_float32(cases()[name]), precision="bfloat16")
    assert fast.method == "Gauss-Newton by reverse mode, in bfloat16"
    assert 1e-4 < distance(everything(fast), truth) < 4 * BFLOAT16


@pytest.mark.parametrize("memory_budget", [0, None])
def test_kept_or_not_bfloat16_products_are_the_same(memory_budget):
    objective = in_float32(cases()["CNN with frozen batch norm"], [8, 4])
    v = torch.linspace(-1, 1, objective.size)
    fast = hessian_operator(objective, precision="bfloat16", memory_budget=memory_budget)
    kept = hessian_operator(objective, precision="bfloat16")
    torch.testing.assert_close(fast @ v, kept @ v, rtol=1e-5, atol=1e-6)
    assert torch.equal(fast @ v, fast @ v)
    torch.testing.assert_close(fast @ torch.stack([v, v], 1), torch.stack([kept @ v] * 2, 1))


def test_everything_in_bfloat16_is_left_as_it_was():
    objective = in_float32(cases()["CNN with frozen batch norm"])
    before = {name: t.clone() for name, t in objective.model.state_dict().items()}
    fast = hessian_operator(objective, precision="bfloat16")
    fast @ torch.ones(fast.size)
    assert not torch.is_autocast_enabled("cpu")
    for name, t in objective.model.state_dict().items():
        assert t.dtype == before[name].dtype
        assert torch.equal(t, before[name])
    assert objective.gradient(objective.weights()).dtype == torch.float32


def test_full_products_stay_full_under_autocast():
    objective = in_float32(cases()["tanh MLP"])
    v = torch.linspace(-1, 1, objective.size)
    expected = hessian_operator(objective) @ v
    inside = hessian_operator(objective)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside @ v, expected)
        assert torch.is_autocast_enabled("cpu")


def newer():
    backends = torch.backends
    return [
        *(part.fp32_precision for part in (backends.cuda.matmul, backends.cudnn.conv)),
        *(part.fp32_precision for part in (backends.cudnn.rnn, backends.mkldnn.matmul)),
        *(part.fp32_precision for part in (backends.mkldnn.conv, backends.mkldnn.rnn, backends)),
        *(backends.cudnn.enabled, backends.mkldnn.enabled),
    ]


def older():
    """Torch refuses to answer where the newer names were used."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return cuda.matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()


FULL = {"ieee", "none"}


@pytest.mark.parametrize("asked", ["highest", "medium", "newer names"])
def test_global_settings_hold_for_others_and_are_put_back(asked):
    objective = in_float32(cases()["tanh MLP"])
    seen, asked_older, inside = [], asked != "newer names", False

    def criterion(output, target):
        if inside:
            seen.append(newer()[:6])
        if inside and asked_older:
            assert older() == (False, False, "highest")
            with torch.backends.cudnn.flags(enabled=False):
                pass
        return nn.functional.cross_entropy(output, target)

    v = torch.ones(objective.size)
    if asked_older:
        torch.set_float32_matmul_precision(asked)
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        before = newer(), older() if asked_older else None
        outside = Objective(objective.model, criterion, list(objective.batches()))
        H = hessian_operator(outside, memory_budget=0)
        inside = True
        H @ v
        assert len(seen) == 1
        assert set(seen[0]) <= FULL
        assert (newer(), older() if asked_older else None) == before
        with pytest.raises(ZeroDivisionError), float32_products(tf32=True):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            assert set(newer()[1:3]) <= {"tf32", "none"}
            if asked_older:
                assert older() == (True, True, "high")
            with without_fused_recurrence(mkldnn=True):
                assert newer()[-2:] == [False, False]
                raise ZeroDivisionError
        assert (newer(), older() if asked_older else None) == before
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    assert older() == (False, True, "highest")


def test_older_versions_of_torch_have_the_older_settings():
    with mock.patch("hessian.torch_settings.hasattr", lambda *_: False, create=True):
        before = older()
        with float32_products(tf32=True):
            assert older() == (True, True, "high")
        with float32_products(tf32=False):
            assert older() == (False, False, "highest")
        assert older() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("name", PLAIN[:2])
def test_products_on_a_gpu_are_full_unless_asked_otherwise(name, precision):
    case, truth = cases()[name], dense_derivatives(name)[3]
    data = [
        map_tensors(b, lambda t: t.float() if t.is_floating_point() else t) for b in [case.data]
    ]
    objective = Objective(copy.deepcopy(case.model).float().cuda(), case.criterion, data)
    eye = torch.eye(objective.size, device="cuda")
    full = (hessian_operator(objective) @ eye).double().cpu()
    assert distance(full, truth) < 1e-5
    fast = (hessian_operator(objective, precision=precision) @ eye).double().cpu()
    assert distance(fast, truth) < 4 * BFLOAT16


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("half", {}, "`precision` must be one of .*, got 'half'"),
        ("tf32", {}, '`precision` must be "full" or "bfloat16" away from a GPU, got "tf32" on cpu'),
        (
            "bfloat16",
            {"method": "forward"},
            '`precision` must be "full" or "tf32" for forward over',
        ),
        ("bfloat16", {"method": "differences"}, '`precision` must be "full" for central diff'),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_not_to_be_had_is_refused(precision, options, message):
    with pytest.raises(ValueError, match=message):
        hessian_operator(in_float32(cases()["tanh MLP"]), precision=precision, **options)


def test_float64_weights_are_refused():
    with pytest.raises(ValueError, match=r'must be "full" for weights in torch.float64, got "bf'):
        hessian_operator(cases()["tanh MLP"].objective(), precision="bfloat16")


@pytest.fixture(scope="module")
def digits():
    """The float32 objective of a trained network, and its Hessian in float64."""
    case = digits_network()
    X, y = case.data
    objective = Objective(copy.deepcopy(case.model).float(), case.criterion, (X.float(), y))
    return objective, hessian_operator(case.objective([len(X)]))


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
def test_pairs_found_in_bfloat16_are_certified_and_made_exact(digits, tol):
    objective, truth = digits
    fast = hessian_operator(objective, precision="bfloat16")
    exact = hessian_operator(objective)
    space = leading_eigenspace(fast, k=10, tol=tol, exact=exact, multiple=False)
    V = space.vectors.double()
    residuals = (truth @ V - V * space.values).norm(dim=0)
    scale = float(space.values.abs().max())
    assert space.converged
    assert space.measured
    # Reported in float32 products: right to their rounding, a thousandth of the goal.
    torch.testing.assert_close(space.residuals, residuals, rtol=0.05, atol=2e-6 * scale)
    assert float(residuals.max()) <= 1.05 * tol * scale
    expected = leading_eigenspace(truth, k=10, tol=1e-8).values
    assert bool(((space.values - expected).abs() <= residuals + 1e-6 * scale).all())
    assert 10 <= space.num_exact <= 35
    alone = leading_eigenspace(exact, k=10, tol=tol, multiple=False)
    assert tol < 1e-3 or space.num_exact < alone.num_products
