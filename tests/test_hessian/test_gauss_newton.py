import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from hessian import (
    NonDeterministicError,
    Objective,
    SecondDerivativeError,
    gauss_newton_operator,
    hessian_operator,
)
from hessian.likelihoods import likelihood_of
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


IGNORING = torch.tensor([0, -100, 2, 1, 1, -100, 0, 0, 2, 2, -100, 1])
FORMULAS = {
    "cross entropy": (nn.CrossEntropyLoss(), LABELS),
    "cross entropy summed": (nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "cross entropy, single": (nn.CrossEntropyLoss(reduction="none"), LABELS),
    "functional": (F.cross_entropy, LABELS),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.3), LABELS),
    "some ignored": (nn.CrossEntropyLoss(), IGNORING),
    "others ignored": (nn.CrossEntropyLoss(ignore_index=1, reduction="sum"), LABELS),
    "class weights": (nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 3.0]).double()), LABELS),
    "probabilities": (nn.CrossEntropyLoss(), TARGETS.softmax(dim=1) + 0.1),
    "squared error": (nn.MSELoss(), TARGETS),
    "squared error summed": (nn.MSELoss(reduction="sum"), TARGETS),
    "coins": (nn.BCEWithLogitsLoss(), TARGETS.sigmoid()),
    "weighted coins": (
        nn.BCEWithLogitsLoss(torch.tensor([0.5, 1.0, 3.0]).double()),
        TARGETS.sigmoid(),
    ),
    "Huber": (nn.HuberLoss(), TARGETS),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("cuts", [12, 5])
def test_formulas_of_the_losses_equal_automatic_differentiation(name, cuts, monkeypatch):
    criterion, target = FORMULAS[name]
    objective = Objective(network(), criterion, (X, target), batch_size=cuts)
    found = dense(gauss_newton_operator(objective))
    monkeypatch.setattr("hessian.gauss_newton.likelihood_of", lambda objective: None)
    expected = dense(gauss_newton_operator(objective))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_common_losses_take_their_formulas():
    taken = {
        name
        for name, (criterion, target) in FORMULAS.items()
        if (o := Objective(network(), criterion, (X, target)))
        and (likelihood := likelihood_of(o))
        and likelihood.fits(TARGETS, target)
    }
    left = {"class weights", "probabilities", "weighted coins", "Huber"}
    assert taken == FORMULAS.keys() - left


@pytest.mark.parametrize("ignored", [[0, 1, 2, 3, 4], list(range(12))])
def test_batches_without_any_label_add_nothing(ignored):
    labels = LABELS.clone()
    labels[ignored] = -100
    data = [(X[:5], labels[:5]), (X[5:], labels[5:])]
    if len(ignored) == 12:
        data.append((X, LABELS))
    objective = Objective(network(), nn.CrossEntropyLoss(), data)
    kept = Objective(network(), nn.CrossEntropyLoss(), data[1:] if len(data) == 2 else data[2:])
    torch.testing.assert_close(
        dense(gauss_newton_operator(objective)), dense(gauss_newton_operator(kept))
    )


def test_the_regulariser_enters_by_its_hessian():
    def quartic(named):
        return sum((p**4).sum() for p in named.values()) / 12

    plain = Objective(network(), nn.CrossEntropyLoss(), (X, LABELS))
    objective = Objective(network(), nn.CrossEntropyLoss(), (X, LABELS), regularizer=quartic)
    w = objective.weights()
    expected = softmax_gauss_newton(network(), w) + torch.diag(w**2)
    G = gauss_newton_operator(objective)
    torch.testing.assert_close(dense(G), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(G @ w, expected @ w, rtol=1e-9, atol=1e-11)
    linear = Objective(
        network(),
        nn.CrossEntropyLoss(),
        (X, LABELS),
        regularizer=lambda named: named["0.bias"].sum(),
    )
    torch.testing.assert_close(
        dense(gauss_newton_operator(linear)), dense(gauss_newton_operator(plain))
    )


def test_a_count_weights_the_batches():
    counts = {7: 1.0, 5: 3.0}
    objective = Objective(
        network(),
        lambda z, y: F.cross_entropy(z, y),
        [(X[:7], LABELS[:7]), (X[7:], LABELS[7:])],
        count=lambda batch: counts[len(batch[0])],
    )
    J, z = jacobian(network(), objective.weights(), X)
    p = z.softmax(dim=1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    weights = torch.tensor([1.0 / 7] * 7 + [3.0 / 5] * 5, dtype=torch.float64) / 4
    expected = torch.einsum("n,nod,nop,npe->de", weights, J, H, J)
    torch.testing.assert_close(
        dense(gauss_newton_operator(objective)), expected, rtol=1e-9, atol=1e-11
    )


def products_of(operator):
    return operator.product.__wrapped__.__self__


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_the_budget_decides_how_many_batches_are_kept_and_changes_no_number(kept):
    objective = Objective(network(), nn.CrossEntropyLoss(), (X, LABELS), batch_size=4)
    whole = gauss_newton_operator(objective)
    expected = softmax_gauss_newton(network(), objective.weights())
    torch.testing.assert_close(dense(whole), expected, rtol=1e-9, atol=1e-11)
    assert products_of(whole).num_kept == 3
    one = products_of(whole)._measure(next(objective.batches()))
    some = gauss_newton_operator(objective, memory_budget=int(one * (kept + 0.5)))
    torch.testing.assert_close(dense(some), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(some @ expected[0], expected @ expected[0], rtol=1e-9, atol=1e-11)
    assert products_of(some).num_kept == kept
    assert products_of(some).complete == (kept == 3)


def test_nothing_is_run_again_for_kept_batches_and_once_for_all_columns():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    objective = Objective(seeded(lambda: Counting(5, 3)), nn.CrossEntropyLoss(), (X, LABELS))
    kept, fresh = (gauss_newton_operator(objective, memory_budget=b) for b in (None, 0))
    V = torch.eye(18).double()
    for operator in (kept, fresh):
        operator @ V
    calls.clear()
    kept @ V
    kept @ V[0]
    assert calls == []
    fresh @ V
    assert calls == [12]


def test_a_budget_below_zero_is_refused():
    objective = Objective(network(), nn.CrossEntropyLoss(), (X, LABELS))
    with pytest.raises(ValueError, match="`memory_budget` must not be negative, got -1 bytes"):
        gauss_newton_operator(objective, memory_budget=-1)


def test_a_layer_that_hides_its_derivative_is_refused():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return Hidden.apply(self.layer(x))

    objective = Objective(seeded(Model), nn.CrossEntropyLoss(), (X, LABELS))
    with pytest.raises(SecondDerivativeError, match="once_differentiable"):
        gauss_newton_operator(objective) @ objective.weights()


def test_weights_without_part_in_the_output_have_no_gauss_newton():
    model = seeded(lambda: nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(2, 2)}))
    model.forward = model["used"].forward
    data = seeded(lambda: (torch.randn(5, 3), torch.randn(5, 1)))
    G = gauss_newton_operator(Objective(model, nn.MSELoss(), data, parameters="unused.*"))
    v = torch.ones(G.size, dtype=G.dtype)
    assert torch.equal(G @ v, torch.zeros_like(v))


def test_targets_so_large_that_one_is_lost_beside_them():
    model = seeded(lambda: nn.Linear(3, 1)).float()
    inputs = seeded(lambda: torch.randn(5, 3)).float()
    v = torch.ones(4, dtype=torch.float32)
    products = []
    for target in (0.0, 1e8, -1e8):
        data = inputs, torch.full((5, 1), target, dtype=torch.float32)
        products.append(gauss_newton_operator(Objective(model, nn.MSELoss(), data)) @ v)
    torch.testing.assert_close(products[1], products[0])
    torch.testing.assert_close(products[2], products[0])
