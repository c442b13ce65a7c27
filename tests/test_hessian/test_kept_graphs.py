import pytest
import torch
from torch import nn

from hessian import NonDeterministicError, Objective, hessian_operator
from hessian.memory import free_memory
from hessian.reverse_mode import ReverseOverReverse
from tests.cases import cases, seeded
from tests.oracles import dense_derivatives

CUTS = [[12], [6, 6], [8, 4], [11, 1]]


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("memory_budget", [0, None])
def test_kept_or_not_the_matrix_is_the_dense_one(name, cuts, memory_budget):
    w, _, _, expected = dense_derivatives(name)
    H = hessian_operator(cases()[name].objective(cuts), w, memory_budget=memory_budget)
    dense = H @ torch.eye(len(w), dtype=w.dtype)
    torch.testing.assert_close(dense, expected, rtol=1e-9, atol=1e-10)


@pytest.fixture
def objective():
    return cases()["tanh MLP"].objective([4, 4, 4])


def graph_of(objective, memory_budget):
    graph = ReverseOverReverse(objective, objective.weights(), memory_budget)
    v = torch.linspace(-1, 1, objective.size, dtype=objective.dtype)
    return graph, graph.product(v), v


def test_as_many_batches_are_kept_as_the_budget_allows(objective):
    everything, expected, _ = graph_of(objective, None)
    assert everything.complete
    assert everything.num_kept == 3
    one = everything.bytes // 3
    for budget, kept in [(0, 0), (one - 1, 0), (one, 1), (3 * one - 1, 2), (3 * one + 2, 3)]:
        graph, product, _ = graph_of(objective, budget)
        assert graph.num_kept == kept, budget
        assert graph.bytes <= max(budget, 0)
        torch.testing.assert_close(product, expected, rtol=1e-13, atol=1e-14)


def test_estimated_size_is_of_the_order_of_what_the_layers_need():
    """A batch of n needs inputs and activations forward, and about as much again backward."""
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 1)))
    data = seeded(lambda: (torch.randn(1000, 50), torch.randn(1000, 1)))
    graph, _, _ = graph_of(Objective(model, nn.MSELoss(), data), None)
    least = 8 * 1000 * (50 + 40)
    assert least < graph.bytes < 6 * least


def test_later_products_make_no_pass_over_the_data():
    case = cases()["tanh MLP"]
    passes = 0

    class Counting:
        def __iter__(self):
            nonlocal passes
            passes += 1
            return iter(case.batches([6, 6]))

    objective = Objective(case.model, case.criterion, Counting())
    graph, first, v = graph_of(objective, None)
    passes = 0
    assert torch.equal(graph.product(v), first)
    assert passes == 0


def test_the_operator_stays_where_it_was_built(objective):
    H = hessian_operator(objective)
    v = torch.ones(objective.size, dtype=objective.dtype)
    before = H @ v
    w = objective.weights()
    try:
        objective.write_(w + 1.0)
        assert torch.equal(H @ v, before)
    finally:
        objective.write_(w)


def test_data_changed_in_place_are_noticed():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    X, y = seeded(lambda: (torch.randn(5, 3), torch.randn(5, 1)))
    H = hessian_operator(Objective(model, nn.MSELoss(), (X, y)))
    v = torch.ones(H.size, dtype=H.dtype)
    H @ v
    X += 1.0
    with pytest.raises(NonDeterministicError, match="changed in place since the first product"):
        H @ v


def test_negative_budget_is_refused(objective):
    with pytest.raises(ValueError, match="`memory_budget` must not be negative, got -1 bytes"):
        hessian_operator(objective, memory_budget=-1)


def test_free_memory_is_between_a_megabyte_and_a_petabyte():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


class Attention(nn.Module):
    """A transformer layer with torch's default attention, and a token-wise output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(dim=1))


class Fused(nn.Module):
    """The attention function that Hugging Face models call."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.mean(dim=1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    ("build", "width"),
    [
        (Attention, 8),
        (Fused, 4),
        (lambda: Recurrent(nn.LSTM), 4),
        (lambda: Recurrent(nn.GRU), 4),
    ],
    ids=["transformer layer", "scaled_dot_product_attention", "LSTM", "GRU"],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("memory_budget", [0, None])
def test_attention_and_recurrence_have_their_second_derivatives(build, width, mode, memory_budget):
    model = getattr(seeded(build), mode)()
    X = seeded(lambda: torch.randn(6, 5, width), seed=1)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    objective = Objective(model, nn.CrossEntropyLoss(), (X, y), batch_size=4)
    w = objective.weights()
    v = torch.randn(len(w), dtype=w.dtype, generator=torch.Generator().manual_seed(0))
    product = hessian_operator(objective, memory_budget=memory_budget) @ v
    # Central differences of the gradient: right to O(h^2) and the rounding over h.
    h = 1e-5
    differences = (objective.gradient(w + h * v) - objective.gradient(w - h * v)) / (2 * h)
    torch.testing.assert_close(product, differences, rtol=1e-5, atol=1e-7)


def test_global_attention_settings_are_left_alone(objective):
    backends = torch.backends.cuda
    before = backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled()
    hessian_operator(objective) @ objective.weights()
    objective.hessian_product(objective.weights(), objective.weights())
    assert (backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled()) == before


def test_long_texts_are_estimated_by_their_own_length():
    """Attention needs memory quadratic in the length, so short texts say nothing about long."""
    model = seeded(Attention).eval()
    criterion = nn.CrossEntropyLoss()
    short, long = (
        seeded(lambda length=length: (torch.randn(16, length, 8), torch.arange(16) % 3))
        for length in (4, 64)
    )
    alone, _, _ = graph_of(Objective(model, criterion, [long]), None)
    both, _, _ = graph_of(Objective(model, criterion, [short, long]), None)
    assert alone.bytes < both.bytes < 1.5 * alone.bytes
    within, _, _ = graph_of(Objective(model, criterion, [short, long]), alone.bytes)
    assert within.num_kept == 1


def test_a_beginning_without_targets_does_not_hide_the_size_of_the_rest():
    model = seeded(lambda: nn.Linear(5, 3))
    X = seeded(lambda: torch.randn(32, 5))
    y = torch.arange(32) % 3
    full, _, _ = graph_of(Objective(model, nn.CrossEntropyLoss(), (X, y)), None)
    hidden = y.clone()
    hidden[:8] = -100
    nothing = torch.full_like(y, -100)
    for batches in [[(X, hidden)], [(X, nothing), (X, y)]]:
        graph, _, _ = graph_of(Objective(model, nn.CrossEntropyLoss(), batches), None)
        assert graph.bytes > 0.5 * full.bytes


def test_bytes_are_those_of_the_products_that_did_not_fail(objective):
    expected, _, v = graph_of(objective, None)
    graph = ReverseOverReverse(objective, objective.weights(), None)
    build, calls = graph._build, []

    def fails_once(place, batch):
        calls.append(place)
        if place == 2 and calls.count(2) == 1:
            raise RuntimeError("out of memory")
        return build(place, batch)

    graph._build = fails_once
    with pytest.raises(RuntimeError, match="out of memory"):
        graph.product(v)
    graph.product(v)
    assert graph.bytes == expected.bytes
