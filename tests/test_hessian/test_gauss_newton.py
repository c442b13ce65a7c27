import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from hessian import NonDeterministicError, Objective, gauss_newton_operator, hessian_operator
from tests.cases import seeded

X = seeded(lambda: torch.randn(12, 5), seed=1)
LABELS = torch.arange(12) % 3
TARGETS = seeded(lambda: torch.randn(12, 3), seed=2)


def network():
    return seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


def dense(operator):
    return operator @ torch.eye(operator.size, dtype=operator.dtype)


def jacobian(model, w, x):
    """J of shape [n, outputs, d], by reverse mode over the flat weights."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def outputs(flat):
        parts = torch.split(flat, [s.numel() for s in shapes.values()])
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        return functional_call(model, named, (x,))

    return jacrev(outputs)(w), outputs(w)


def softmax_gauss_newton(model, w):
    """Mean over samples of Jᵀ (diag(p) − p pᵀ) J, the formula for cross-entropy."""
    J, z = jacobian(model, w, X)
    p = z.softmax(dim=1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nod,nop,npe->de", J, H, J) / len(X)


@pytest.mark.parametrize("cuts", [None, 6, 5, 1])
def test_cross_entropy_gives_the_softmax_formula_however_data_are_cut(cuts):
    objective = Objective(network(), nn.CrossEntropyLoss(), (X, LABELS), batch_size=cuts)
    expected = softmax_gauss_newton(network(), objective.weights())
    torch.testing.assert_close(
        dense(gauss_newton_operator(objective)), expected, rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squared_error_gives_twice_the_gram_matrix_of_the_jacobian(reduction):
    objective = Objective(network(), nn.MSELoss(reduction=reduction), (X, TARGETS))
    J, _ = jacobian(network(), objective.weights(), X)
    per_sample = torch.einsum("nod,noe->de", J, J) * 2 / len(X)
    expected = per_sample / 3 if reduction == "mean" else per_sample
    torch.testing.assert_close(
        dense(gauss_newton_operator(objective)), expected, rtol=1e-9, atol=1e-11
    )


def test_linear_model_has_its_hessian():
    model = seeded(lambda: nn.Linear(5, 3))
    objective = Objective(model, nn.CrossEntropyLoss(), (X, LABELS))
    torch.testing.assert_close(
        dense(gauss_newton_operator(objective)), dense(hessian_operator(objective))
    )


def test_fitted_targets_leave_only_the_gauss_newton_part():
    model = network()
    objective = Objective(model, nn.MSELoss(), (X, model(X).detach()))
    torch.testing.assert_close(
        dense(gauss_newton_operator(objective)),
        dense(hessian_operator(objective)),
        rtol=1e-9,
        atol=1e-12,
    )


def test_it_is_symmetric_and_has_no_negative_eigenvalue():
    G = dense(gauss_newton_operator(Objective(network(), nn.CrossEntropyLoss(), (X, LABELS))))
    torch.testing.assert_close(G, G.T)
    assert float(torch.linalg.eigvalsh(G).min()) > -1e-12


def test_another_point_may_be_named():
    objective = Objective(network(), nn.CrossEntropyLoss(), (X, LABELS))
    w = objective.weights() + 0.5
    torch.testing.assert_close(
        dense(gauss_newton_operator(objective, w)), softmax_gauss_newton(network(), w)
    )


def test_attention_is_linearised_too():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(5, 15)

        def forward(self, x):
            q, k, v = self.qkv(x.view(2, 6, 5)).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v).reshape(12, 5)

    model = seeded(Attend)
    objective = Objective(model, nn.CrossEntropyLoss(), (X, LABELS))
    w = objective.weights()
    v = torch.randn(len(w), dtype=w.dtype, generator=torch.Generator().manual_seed(0))

    def outputs(flat):
        return objective.output(flat, (X, LABELS)).detach()

    h = 1e-6  # J v by central differences, then the softmax formula and a real Jᵀ
    pushed = (outputs(w + h * v) - outputs(w - h * v)) / (2 * h)
    p = outputs(w).softmax(dim=1)
    bent = (p * pushed - p * (p * pushed).sum(dim=1, keepdim=True)) / len(X)
    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective.output(leaf, (X, LABELS)), leaf, bent)
    torch.testing.assert_close(gauss_newton_operator(objective) @ v, expected, rtol=1e-6, atol=1e-9)


def test_loss_linear_in_the_output_has_none():
    objective = Objective(network(), lambda z, t: (z * t).sum(dim=1), (X, TARGETS))
    G = gauss_newton_operator(objective)
    assert torch.equal(G @ objective.weights(), torch.zeros(G.size, dtype=G.dtype))


def test_output_that_is_no_tensor_is_refused_with_the_cure():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(x), x

    objective = Objective(seeded(Pair), lambda out, y: F.cross_entropy(out[0], y), (X, LABELS))
    with pytest.raises(TypeError, match=r"returns one tensor, got tuple\. Wrap"):
        gauss_newton_operator(objective) @ objective.weights()


def test_model_set_to_training_later_is_refused():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))).eval()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, LABELS))
    G = gauss_newton_operator(objective)
    model.train()
    with pytest.raises(NonDeterministicError, match="`1`"):
        G @ objective.weights()
