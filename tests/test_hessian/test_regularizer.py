import copy

import pytest
import torch
from torch import nn

from hessian import NonFiniteError, Objective, hessian_operator
from tests.cases import cases, seeded
from tests.oracles import dense, dense_derivatives, flat_weights

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def quartic(parameters):
    """Return Σ c Σ p⁴, with a coefficient c of its own for each parameter."""
    return sum(0.1 * i * (p**4).sum() for i, p in enumerate(parameters.values(), 1))


def quartic_derivatives(case, w):
    """Value, gradient and diagonal of the Hessian of the quartic, by formula."""
    named = case.model.named_parameters()
    sizes = [p.numel() for name, p in named if case.parameters is None or name.startswith("2.")]
    c = torch.cat([torch.full((n,), 0.1 * i, dtype=torch.float64) for i, n in enumerate(sizes, 1)])
    return float((c * w**4).sum()), 4 * c * w**3, 12 * c * w**2


@pytest.mark.parametrize("name", ["tanh MLP", "CNN with frozen batch norm", "one layer by pattern"])
@pytest.mark.parametrize("cuts", [[12], [8, 4], [1] * 12], ids=len)
def test_it_is_added_once_to_loss_gradient_and_hessian(name, cuts):
    case = cases()[name]
    w, loss, gradient, H = dense_derivatives(name)
    value, slope, bend = quartic_derivatives(case, w)
    objective = Objective(
        case.model,
        case.criterion,
        case.batches(cuts),
        parameters=case.parameters,
        regularizer=quartic,
    )
    v = seeded(lambda: torch.randn(len(w)), 1)
    assert objective.loss(w) == pytest.approx(loss + value, rel=1e-12)
    assert float(objective.regularization(w)) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(objective.gradient(w), gradient + slope, **EXACT)
    torch.testing.assert_close(objective.hessian_product(w, v), H @ v + bend * v, **EXACT)
    assert objective.loss_and_hessian_product(w, v)[0] == objective.loss(w)
    for memory_budget in (None, 0):
        operator = hessian_operator(objective, memory_budget=memory_budget)
        torch.testing.assert_close(dense(operator), H + torch.diag(bend), **EXACT)


def test_sample_losses_and_their_mean_are_those_of_the_data():
    case = cases()["tanh MLP"]
    plain = Objective(case.model, case.criterion, case.batches([8, 4]))
    with_penalty = Objective(case.model, case.criterion, case.batches([8, 4]), regularizer=quartic)
    w = plain.weights()
    assert torch.equal(with_penalty.sample_losses(w), plain.sample_losses(w))
    assert with_penalty.statistics(w) == plain.statistics(w)


REGULARIZERS = {
    "weight decay": (lambda p: 0.5 * sum(t.square().sum() for t in p.values()), 1.0, None),
    "of some": (lambda p: p["2.bias"].square().sum(), None, [40, 41, 42]),
    "linear": (lambda p: p["0.bias"].sum(), 0.0, None),
    "constant": (lambda p: torch.tensor(3.0), 0.0, None),
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_curvature_that_is_constant_or_zero_is_right(name):
    regularizer, scale, places = REGULARIZERS[name]
    case = cases()["tanh MLP"]
    w, _, _, H = dense_derivatives(case.name)
    added = torch.zeros(len(w)).double()
    if places is None:
        added += scale
    else:
        added[places] = 2.0
    objective = Objective(case.model, case.criterion, case.data, regularizer=regularizer)
    value = regularizer(objective.unflatten(w.clone().requires_grad_()))
    expected = dense_derivatives(case.name)[2].clone()
    if value.requires_grad:
        leaf = w.clone().requires_grad_()
        expected += torch.autograd.grad(regularizer(objective.unflatten(leaf)), leaf)[0]
    torch.testing.assert_close(objective.gradient(w), expected, **EXACT)
    H_too = torch.stack([objective.hessian_product(w, e) for e in torch.eye(len(w)).double()])
    torch.testing.assert_close(H_too, H + torch.diag(added), **EXACT)
    torch.testing.assert_close(dense(hessian_operator(objective)), H_too, **EXACT)


def test_without_one_it_is_zero_and_can_be_differentiated():
    case = cases()["tanh MLP"]
    w = flat_weights(case).requires_grad_()
    value = case.objective().regularization(w)
    (gradient,) = torch.autograd.grad(value, w)
    assert float(value.detach()) == 0.0
    assert torch.equal(gradient, torch.zeros_like(w))


@pytest.mark.parametrize(
    ("regularizer", "cause"),
    [
        (lambda p: p["2.bias"].square(), r"must return a scalar .* got a Tensor of shape \[3\]"),
        (lambda p: 0.5, "must return a scalar tensor .* got a float"),
    ],
)
def test_a_regularizer_that_is_no_scalar_is_refused(regularizer, cause):
    case = cases()["tanh MLP"]
    with pytest.raises(TypeError, match=cause):
        Objective(case.model, case.criterion, case.data, regularizer=regularizer)


def test_a_regularizer_that_overflows_is_named():
    case = cases()["tanh MLP"]
    objective = Objective(
        case.model,
        case.criterion,
        case.data,
        regularizer=lambda p: (1e200 * p["2.bias"]).exp().sum(),
    )
    w = objective.weights().abs()
    with pytest.raises(NonFiniteError, match="`regularizer` is inf at finite weights"):
        objective.loss(w)


def test_a_regularizer_that_fails_leaves_the_model_as_it_was():
    case = cases()["tanh MLP"]
    model = copy.deepcopy(case.model)
    state = {name: (id(p), p.clone(), p._version) for name, p in model.named_parameters()}
    calls = []

    def fails_later(parameters):
        calls.append(1)
        if len(calls) > 1:
            raise ZeroDivisionError("planned")
        return parameters["2.bias"].sum()

    objective = Objective(model, nn.CrossEntropyLoss(), case.data, regularizer=fails_later)
    with pytest.raises(ZeroDivisionError, match="planned"):
        objective.gradient(objective.weights())
    assert torch.is_grad_enabled()
    for name, p in model.named_parameters():
        assert (id(p), p._version) == (state[name][0], state[name][2])
        assert torch.equal(p, state[name][1])
        assert p.grad is None
