"""What may change between two products, in other threads, or in parts that are not selected."""

import threading

import pytest
import torch
from torch import nn

from hessian import (
    NonDeterministicError,
    Objective,
    block_diagonal_operator,
    fisher_operator,
    gauss_newton_operator,
    hessian_operator,
)
from hessian.reverse_mode import ReverseOverReverse
from tests.cases import cases, frozen_batch_norm_cnn, seeded

CNN = cases()["CNN with frozen batch norm"]
OPERATORS = {
    "kept": hessian_operator,
    "anew": lambda objective: hessian_operator(objective, memory_budget=0),
    "forward": lambda objective: hessian_operator(objective, method="forward"),
    "differences": lambda objective: hessian_operator(objective, method="differences"),
    "Gauss-Newton": gauss_newton_operator,
    "Fisher": fisher_operator,
    "blocks": block_diagonal_operator,
}


def head_only(model):
    return Objective(model, CNN.criterion, CNN.data, parameters="5.*")


CHANGES = {
    "0.weight": lambda model: model[0].weight.data.mul_(1.5),
    "1.bias": lambda model: model[1].bias.data[0].neg_(),
    "1.running_var": lambda model: model[1].running_var.data.add_(1e-12),
    "1.num_batches_tracked": lambda model: model[1].num_batches_tracked.data.add_(1),
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("changed", CHANGES)
def test_writes_past_autograd_to_what_is_not_selected_are_noticed(kind, changed):
    model = seeded(frozen_batch_norm_cnn)
    A = OPERATORS[kind](head_only(model))
    v = torch.linspace(-1, 1, A.size, dtype=A.dtype)
    first = A @ v
    assert torch.equal(A @ v, first)
    CHANGES[changed](model)
    with pytest.raises(NonDeterministicError, match=f"`{changed}`, which is not among the sel"):
        A @ v


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_selected_weights_of_the_model_may_change(kind):
    model = seeded(frozen_batch_norm_cnn)
    A = OPERATORS[kind](head_only(model))
    v = torch.linspace(-1, 1, A.size, dtype=A.dtype)
    before = A @ v
    model[5].weight.data.mul_(2.0)
    assert torch.equal(A @ v, before)


def test_weights_that_are_not_selected_keep_no_activations():
    model = seeded(lambda: nn.Sequential(*[nn.Linear(40, 40), nn.Tanh()] * 2, nn.Linear(40, 3)))
    X, y = seeded(lambda: torch.randn(300, 40)), torch.arange(300) % 3
    sizes = {}
    for trains in (True, False):
        model[:4].requires_grad_(trains)
        objective = Objective(model, nn.CrossEntropyLoss(), (X, y), parameters="4.*")
        graph = ReverseOverReverse(objective, objective.weights(), None)
        graph.product(objective.weights())
        sizes[trains] = graph.bytes
        assert all(p.requires_grad == trains for p in model[:4].parameters())
    assert sizes[True] == sizes[False] > 0


def everything_set():
    cuda, backends = torch.backends.cuda, torch.backends
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.get_float32_matmul_precision(),
        backends.cudnn.allow_tf32,
        backends.cudnn.enabled,
        backends.mkldnn.enabled,
    )


class TwoThreads:
    """Runs a call in two threads: the first stops inside until the second has come as far.

    The first one then leaves first. Where the second has to wait outside, both go on alone.
    """

    def __init__(self):
        self.reached = [threading.Event(), threading.Event()]
        self.done = threading.Event()

    def stop(self):
        """Call this inside; in other threads, and for the second time, it does nothing."""
        name = threading.current_thread().name
        if name == "first" and not self.reached[0].is_set():
            self.reached[0].set()
            self.reached[1].wait(timeout=0.3)
        elif name == "second" and not self.reached[1].is_set():
            self.reached[1].set()
            self.done.wait(timeout=0.3)

    def run(self, first, second):
        found = {}

        def call(name, function):
            if name == "second":
                assert self.reached[0].wait(timeout=60)
            found[name] = function()
            if name == "first":
                self.done.set()

        calls = {"first": first, "second": second}
        threads = [threading.Thread(target=call, args=one, name=one[0]) for one in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return found["first"], found["second"]


def threaded_objective(threads, at, dtype):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).to(dtype)
    X, y = seeded(lambda: torch.randn(12, 4)).to(dtype), torch.arange(12) % 3

    def criterion(output, target):
        if at == "criterion":
            threads.stop()
        return nn.functional.cross_entropy(output, target)

    def regularizer(parameters):
        if at == "regularizer":
            threads.stop()
        return 1e-2 * parameters["0.bias"].sum() ** 2

    return Objective(model, criterion, (X, y), regularizer=regularizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", ["criterion", "regularizer"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_threads_get_their_products_and_leave_the_settings(shared, at, dtype, precision):
    if precision == "bfloat16" and dtype == torch.float64:
        pytest.skip("there are no such products")
    threads = TwoThreads()
    objective = threaded_objective(threads, at, dtype)
    v = torch.linspace(-1, 1, objective.size, dtype=dtype)
    full = hessian_operator(objective) @ v
    torch.set_float32_matmul_precision("high")
    try:
        before = everything_set()
        H = hessian_operator(objective, precision=precision)
        other = H if shared else hessian_operator(objective)
        expected = hessian_operator(objective, precision=precision) @ v, full
        found = threads.run(lambda: H @ v, lambda: other @ v)
        assert everything_set() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[0 if shared else 1])


def test_a_first_batch_without_samples_is_passed_over():
    """A model that cannot run on it is not asked to; the criterion is checked on the next one."""
    case = cases()["tanh MLP"]

    def no_empty(output, target):
        assert len(output) > 0
        return nn.functional.cross_entropy(output, target)

    X, y = case.data
    batches = [(X[:0], y[:0])] * 2 + [(X[:8], y[:8]), (X[8:], y[8:]), (X[:0], y[:0])]
    objective = Objective(case.model, no_empty, batches)
    expected = case.objective()
    w = objective.weights()
    assert objective.num_samples == len(X)
    assert objective.loss(w) == pytest.approx(expected.loss(w), rel=1e-13)
    torch.testing.assert_close(hessian_operator(objective) @ w, hessian_operator(expected) @ w)
    weighted = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 3.0]).double())
    with pytest.raises(ValueError, match="`criterion` must weight every sample"):
        Objective(case.model, lambda o, t: weighted(o, t), batches)


@pytest.mark.filterwarnings("ignore")  # torch's own, on being compiled
@pytest.mark.parametrize("kind", ["wrapped", "in place", "inside", "a function"])
def test_compiled_models_have_exact_products(kind):
    """Graphs of ``torch.compile`` have no second derivative: they run as they were written."""
    case = cases()["tanh MLP"]
    plain = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    X, y = case.data
    expected = hessian_operator(Objective(plain, nn.CrossEntropyLoss(), (X, y)))
    v = torch.linspace(-1, 1, expected.size, dtype=torch.float64)
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    if kind == "wrapped":
        model = torch.compile(model, backend="aot_eager")
    elif kind == "in place":
        model.compile(backend="aot_eager")
    elif kind == "inside":
        model[2] = torch.compile(model[2], backend="aot_eager")
    else:
        model[1].forward = torch.compile(lambda x: x.clamp(min=0.0), backend="aot_eager")
    objective = Objective(model, nn.CrossEntropyLoss(), (X, y))
    for method, budget in [("auto", None), ("auto", 0), ("forward", None)]:
        H = hessian_operator(objective, method=method, memory_budget=budget)
        assert (
            H.method
            == hessian_operator(
                Objective(plain, nn.CrossEntropyLoss(), (X, y)), method=method
            ).method
        )
        torch.testing.assert_close(H @ v, expected @ v, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
