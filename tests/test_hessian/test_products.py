"""How a Hessian product is made: every method gives the same matrix, and the choice is sound."""

import logging
import math

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hessian import (
    ConvergenceWarning,
    NonFiniteError,
    Objective,
    SecondDerivativeError,
    gauss_newton_operator,
    hessian_operator,
)
from tests.cases import case_names, cases, seeded
from tests.oracles import dense_derivatives

CUTS = [5, 4, 3]
SMOOTH = [name for name in case_names() if "piecewise" not in name]


def directions(size, num=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, num, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("name", case_names())
def test_exact_methods_give_the_dense_hessian(name, method):
    w, _, _, H = dense_derivatives(name)
    operator = hessian_operator(cases()[name].objective(CUTS), w, method=method)
    V = directions(len(w))
    torch.testing.assert_close(operator @ V[:, 0], H @ V[:, 0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(operator @ V, H @ V, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SMOOTH)
def test_differences_come_near_the_dense_hessian(name):
    w, _, _, H = dense_derivatives(name)
    operator = hessian_operator(cases()[name].objective(CUTS), w, method="differences")
    V = directions(len(w))
    torch.testing.assert_close(operator @ V, H @ V, rtol=1e-6, atol=1e-7)


def test_differences_are_linear_in_the_length_of_the_vector():
    w, _, _, H = dense_derivatives("tanh MLP")
    operator = hessian_operator(cases()["tanh MLP"].objective(), w, method="differences")
    v = directions(len(w), 1)[:, 0]
    for length in (1e-6, 1e6):
        torch.testing.assert_close(operator @ (length * v), length * (H @ v), rtol=1e-6, atol=0)
    assert torch.equal(operator @ torch.zeros_like(v), torch.zeros_like(v))


@pytest.mark.parametrize("method", ["reverse", "forward", "differences"])
def test_the_method_is_reported(method):
    operator = hessian_operator(cases()["tanh MLP"].objective(), method=method)
    assert (
        operator.method
        == {
            "reverse": "reverse over reverse",
            "forward": "forward over reverse",
            "differences": "central differences of gradients",
        }[method]
    )


@pytest.mark.parametrize("budget", [0, 10_000, None])
def test_a_matrix_of_columns_equals_its_columns_whatever_is_kept(budget):
    case = cases()["tanh MLP"]
    operator = hessian_operator(case.objective([3] * 4), memory_budget=budget)
    V = directions(operator.size, 4)
    together = operator @ V
    for j in range(4):
        torch.testing.assert_close(together[:, j], operator @ V[:, j], rtol=1e-13, atol=1e-15)


def test_columns_share_the_graph_that_is_not_kept():
    """Each batch is evaluated once for all columns, not once for each."""
    case = cases()["tanh MLP"]
    calls = 0

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = case.model

        def forward(self, x):
            nonlocal calls
            calls += 1
            return self.inner(x)

    objective = Objective(Counting(), case.criterion, case.batches([6, 6]))
    operator = hessian_operator(objective, memory_budget=0)
    calls = 0
    operator @ directions(operator.size, 5)
    assert calls == 2


def test_how_much_is_kept_is_logged(caplog):
    operator = hessian_operator(cases()["tanh MLP"].objective(CUTS), memory_budget=10_000)
    with caplog.at_level(logging.INFO, logger="hessian"):
        operator @ torch.ones(operator.size).double()
    assert "kept" in caplog.text
    assert "budget" in caplog.text


class Once(Function):
    """sin, with a backward pass that has no backward pass but a forward derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return Slope.apply(g, ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * torch.cos(ctx.saved_tensors[0])


class Slope(Function):
    """The backward pass of sin, itself without one."""

    @staticmethod
    def forward(g, x):
        return g * torch.cos(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("no second derivative")

    @staticmethod
    def jvp(ctx, g_tangent, x_tangent):
        g, x = ctx.saved_tensors
        return g_tangent * torch.cos(x) - g * torch.sin(x) * x_tangent


class OnceOnly(Function):
    """sin, that can be differentiated once and in reverse only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * torch.cos(ctx.saved_tensors[0])


class Hidden(Function):
    """sin, whose backward pass hides from autograd what it depends on."""

    @staticmethod
    def forward(ctx, x):
        ctx.cosine = torch.cos(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.cosine.detach()


class Sine(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.function = function

    def forward(self, x):
        return torch.sin(x) if self.function is None else self.function.apply(x)


def network(function=None, last=nn.Identity):
    def build():
        return nn.Sequential(nn.Linear(4, 5), Sine(function), nn.Linear(5, 3), last())

    return seeded(build, 4)


def objective(model):
    x, y = seeded(lambda: torch.randn(6, 4), 5), torch.arange(6) % 3
    return Objective(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])


@pytest.mark.parametrize(
    ("function", "method", "tolerance"),
    [
        (Once, "forward over reverse", 1e-10),
        (OnceOnly, "central differences of gradients", 1e-6),
        (Hidden, "central differences of gradients", 1e-6),
    ],
)
def test_auto_falls_back_to_what_the_layers_allow(function, method, tolerance):
    exact = hessian_operator(objective(network()))
    assert exact.method == "reverse over reverse"
    fallen = hessian_operator(objective(network(function)))
    assert fallen.method == method
    V = directions(exact.size)
    torch.testing.assert_close(fallen @ V, exact @ V, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", [OnceOnly, Hidden])
def test_a_missing_part_of_the_hessian_is_never_silent(function):
    with pytest.raises(SecondDerivativeError, match=r"once_differentiable|is not the derivative"):
        hessian_operator(objective(network(function)), method="reverse")


def test_products_of_the_objective_are_refused_too():
    loss = objective(network(OnceOnly))
    with pytest.raises(SecondDerivativeError, match="once_differentiable"):
        loss.hessian_product(loss.weights(), loss.weights())


def test_custom_functions_that_can_be_differentiated_twice_are_taken():
    class Twice(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.sin(x)

        @staticmethod
        def backward(ctx, g):
            return g * torch.cos(ctx.saved_tensors[0])

    H = hessian_operator(objective(network(Twice)))
    assert H.method == "reverse over reverse"
    v = directions(H.size, 1)[:, 0]
    torch.testing.assert_close(H @ v, hessian_operator(objective(network())) @ v)


@pytest.mark.parametrize("kinked", [nn.ReLU, nn.Hardtanh, nn.LeakyReLU])
def test_differences_across_kinks_are_refused_unless_forced(kinked):
    loss = objective(network(OnceOnly, kinked))
    with pytest.raises(ValueError, match=r"no exact product.*kinks of .*method=\"differences\""):
        hessian_operator(loss)
    assert hessian_operator(loss, method="differences").method.startswith("central differences")


def test_differences_that_jump_over_a_kink_say_so():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3)), 6)
    model.float()
    x, y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    loss = Objective(model, nn.CrossEntropyLoss(), (x, y))
    exact = hessian_operator(loss)
    forced = hessian_operator(loss, method="differences")
    v = torch.randn(loss.size, generator=torch.Generator().manual_seed(1))
    with pytest.warns(ConvergenceWarning, match=r"off by about \d+%"):
        product = forced @ v
    assert (product - exact @ v).norm() > 0.05 * (exact @ v).norm()
    forced @ v  # warns once only


def test_the_estimated_error_of_differences_covers_the_true_one():
    from hessian.differences import CentralDifferences

    for seed in range(5):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), seed)
        loss = objective(model)
        exact, differences = hessian_operator(loss), CentralDifferences(loss, loss.weights())
        v = directions(loss.size, 1)[:, 0]
        true = float((differences.product(v) - exact @ v).norm() / (exact @ v).norm())
        assert true < 10 * differences.error < 1e-3


@pytest.mark.parametrize("method", ["reverse", "forward", "differences"])
def test_a_loss_that_is_not_finite_names_its_batch(method):
    loss = objective(network())
    w = loss.weights()
    w[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"weights hold a NaN or an infinity in `0.weight`"):
        hessian_operator(loss, w, method=method) @ torch.ones_like(w)


def test_unknown_methods_are_refused(unchecked_shapes):
    with pytest.raises(ValueError, match=r"`method` must be one of .* got 'newton'"):
        hessian_operator(objective(network()), method="newton")


def test_settings_of_torch_are_as_before_after_success_and_failure():
    before = (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.is_grad_enabled(),
    )
    for function, method in ((None, "forward"), (None, "reverse"), (OnceOnly, "forward")):
        operator = hessian_operator(objective(network(function)), method=method)
        try:
            operator @ torch.ones(operator.size).double()
        except (RuntimeError, NotImplementedError):
            assert function is OnceOnly
        assert before == (
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.is_grad_enabled(),
        )


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_forward_mode_passes_through_recurrent_layers(layer):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer(4, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    x = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(0))
    loss = Objective(seeded(Reader).float(), nn.CrossEntropyLoss(), (x, torch.arange(4) % 3))
    v = torch.randn(loss.size, generator=torch.Generator().manual_seed(1))
    forward = hessian_operator(loss, method="forward") @ v
    torch.testing.assert_close(forward, hessian_operator(loss) @ v, rtol=1e-4, atol=1e-6)


def test_forward_mode_passes_through_attention():
    layer = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True))
    x = seeded(lambda: torch.randn(3, 5, 4), 1)
    loss = Objective(layer.eval(), nn.MSELoss(), (x, x.flip(1)))
    v = directions(loss.size, 1)[:, 0]
    forward = hessian_operator(loss, method="forward") @ v
    torch.testing.assert_close(forward, hessian_operator(loss) @ v, rtol=1e-8, atol=1e-10)


class SquaredError(Function):
    """Differentiable twice; only its name has an error in it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_a_function_called_error_is_no_missing_derivative():
    model = seeded(lambda: nn.Linear(3, 1))
    data = seeded(lambda: (torch.randn(5, 3), torch.randn(5, 1)))
    plain = Objective(model, lambda z, y: ((z - y) ** 2).exp().mean(), data)
    named = Objective(model, lambda z, y: SquaredError.apply(z - y).exp().mean(), data)
    v = torch.ones_like(plain.weights())
    expected = hessian_operator(plain) @ v
    torch.testing.assert_close(hessian_operator(named, method="reverse") @ v, expected)
    torch.testing.assert_close(named.hessian_product(named.weights(), v), expected)


class CubeOnce(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_a_regulariser_without_second_derivative_is_refused():
    model = seeded(lambda: nn.Linear(3, 1))
    objective = Objective(
        model,
        nn.MSELoss(),
        seeded(lambda: (torch.randn(5, 3), torch.randn(5, 1))),
        regularizer=lambda p: sum(CubeOnce.apply(t).sum().square() for t in p.values()),
    )
    with pytest.raises(SecondDerivativeError, match="once_differentiable"):
        hessian_operator(objective) @ torch.ones_like(objective.weights())


class FusedCrossEntropy(Function):
    """Cross-entropy whose gradient is made in the forward pass, as fused kernels do."""

    @staticmethod
    def forward(ctx, z, y):
        slope = torch.softmax(z, dim=1)
        loss = -torch.log(slope[torch.arange(len(y)), y]).mean()
        slope[torch.arange(len(y)), y] -= 1.0
        ctx.save_for_backward(slope / len(y))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


@pytest.mark.parametrize("last", [nn.Identity, nn.ReLU])
def test_a_fused_loss_has_no_silent_hessian(last):
    x, y = seeded(lambda: torch.randn(6, 4), 5), torch.arange(6) % 3
    loss = Objective(network(last=last), FusedCrossEntropy.apply, [(x, y)], reduction="mean")
    w = loss.weights()
    for product in (
        lambda: hessian_operator(loss, method="reverse"),
        lambda: loss.hessian_product(w, w),
        lambda: gauss_newton_operator(loss) @ w,
    ):
        with pytest.raises(SecondDerivativeError, match="once_differentiable"):
            product()


@pytest.mark.parametrize("method", ["reverse", "forward", "differences"])
def test_inference_mode_is_refused(method):
    loss = objective(network())
    H, w = hessian_operator(loss, method=method), loss.weights()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        H @ w


def test_models_that_recompute_activations_are_refused():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            hidden = checkpoint(lambda x: self.inner(x).tanh(), x, use_reentrant=False)
            return self.head(hidden)

    with pytest.raises(ValueError, match="activation checkpointing"):
        objective(seeded(Checkpointed))


def test_samples_that_count_for_nothing_do_not_hide_a_missing_derivative():
    model = network(Hidden)
    x, y = seeded(lambda: torch.randn(6, 4), 5), torch.tensor([-100, -100, 0, 1, 2, 0])
    H = hessian_operator(Objective(model, nn.CrossEntropyLoss(), [(x, y)]))
    assert H.method == "central differences of gradients"
