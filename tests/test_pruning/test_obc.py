import heapq
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import NonDeterministicError
from pruning import CalibrationWarning, DenseDistance, magnitude_prune
from pruning.obc import obc_traces
from pruning.pruned import wanted_zeros
from pruning.row_surgery import best_fit, removal_order
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(model, *shape, **options):
    return DenseDistance(model, normal(40, *shape), kind="squared", batch_size=17, **options)


def mlp():
    build = lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))  # noqa: E731
    return squared(seeded(build), 5)


def fit_on(H, w, kept):
    """Least squares (u − w)ᵀ H (u − w) with u zero but on a list of places: error and u."""
    root = torch.linalg.cholesky(H).T
    u = torch.zeros_like(w)
    if kept:
        u[kept] = torch.linalg.lstsq(root[:, kept], (root @ w)[:, None], driver="gelsd")[0][:, 0]
    return float((u - w) @ H @ (u - w)), u


def enumerated(H, w, may_go):
    """Greedy removal by trying every weight: places, errors after each, weights after each."""
    kept, order, errors, weights = list(range(len(w))), [], [], []
    for _ in range(len(may_go)):
        tries = {j: fit_on(H, w, [i for i in kept if i != j]) for j in kept if j in may_go}
        best = min(tries, key=lambda j: tries[j][0])
        kept.remove(best)
        order.append(best)
        errors.append(tries[best][0])
        weights.append(tries[best][1])
    return order, errors, weights


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "no bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2, stride=2, padding=1), (2, 5, 5)),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_traces_and_weights_are_those_of_enumeration(name):
    build, shape = LAYERS[name]
    distance = squared(seeded(build), *shape)
    w = distance.weights()
    traces = obc_traces(distance, damping=0.05)
    (trace,) = traces.layers
    W = trace.inputs.rows(distance.unflatten(w))
    n = W.shape[1] - (trace.inputs.bias is not None)
    groups = len(trace.inputs.moments)
    seen = []
    for r, row in enumerate(W):
        A = trace.inputs.moments[r * groups // len(W)]
        H = A + 0.05 * A.diagonal().mean() * torch.eye(len(A)).double()
        order, errors, weights = enumerated(H, row, set(range(n)))
        assert trace.order[r, :n].tolist() == order
        assert_close(
            trace.losses[r, :n].cumsum(0),
            torch.tensor(errors, dtype=torch.float64),
            rtol=1e-9,
            atol=0,
        )
        seen.append([row, *weights])
    if trace.inputs.bias is not None:
        assert torch.all(trace.order[:, n] == n) and torch.isinf(trace.losses[:, n]).all()
    for sparsity in (0.2, 0.5, 0.8):
        pruned = traces.prune(sparsity)
        rows = trace.inputs.rows(distance.unflatten(pruned.weights))
        for row, states in zip(rows, seen, strict=True):
            assert_close(row, states[int((row[:n] == 0).sum())], rtol=1e-8, atol=1e-10)


def test_pooling_takes_the_cheapest_next_removal_of_all_rows():
    distance = mlp()
    traces = obc_traces(distance)
    rows = [row for trace in traces.layers for row in trace.losses]
    assert any(torch.any(row[1:] < row[:-1]) for row in rows)  # else a sort would do
    heap = [(float(row[0]), r, 0) for r, row in enumerate(rows)]
    heapq.heapify(heap)
    gone = [0] * len(rows)
    for total in range(1, 33):
        _, r, k = heapq.heappop(heap)
        gone[r] += 1
        heapq.heappush(heap, (float(rows[r][k + 1]), r, k + 1))
        parts = distance.unflatten(traces.prune(total / distance.size).weights)
        zeros = [(parts[t.inputs.weight] == 0).sum(dim=1) for t in traces.layers]
        assert torch.cat(zeros).tolist() == gone


def test_relative_pooling_counts_errors_as_shares_of_the_output():
    distance = mlp()
    w = distance.weights()
    parts = distance.unflatten(w)
    # A layer whose outputs are 1000 times as large: only "pooled" lets it keep more for that.
    parts["0.weight"] *= 1000.0
    parts["0.bias"] *= 1000.0
    small = obc_traces(distance)
    large = obc_traces(distance, w)
    # The second layer now sees signs: take its moments from before.
    mixed = type(large)(large.w, distance, (large.layers[0], small.layers[1]), large.damping)

    def first_zeros(traces, allocation):
        return int(
            (distance.unflatten(traces.prune(0.5, allocation).weights)["0.weight"] == 0).sum()
        )

    assert first_zeros(mixed, "relative") == first_zeros(small, "relative")
    assert first_zeros(mixed, "pooled") < first_zeros(small, "pooled")


@pytest.mark.parametrize("name", LAYERS)
def test_errors_are_those_of_the_layers_outputs(name):
    build, shape = LAYERS[name]
    distance = squared(seeded(build), *shape)
    w = distance.weights()
    for damping in (1e-9, 0.05):
        pruned = obc_traces(distance, damping=damping).prune(0.6)
        outputs = [
            torch.cat([distance.output(v, batch) for batch in distance.batches()])
            for v in (w, pruned.weights)
        ]
        change = float((outputs[1] - outputs[0]).square().sum()) / 40
        (layer,) = pruned.layers
        assert layer.error == pytest.approx(change, rel=1e-9)
        if damping == 1e-9:
            assert layer.predicted_error == pytest.approx(change, rel=1e-6)
        else:
            assert layer.predicted_error > change
        whole = float(outputs[0].square().sum()) / 40
        assert layer.relative_error == pytest.approx(change / whole, rel=1e-9)
        zeros = pruned.weights[: math.prod(distance.shapes["weight"])] == 0
        assert layer.sparsity == float(zeros.double().mean())


def test_fit_on_pruned_inputs_is_least_squares_to_the_dense_outputs():
    distance = mlp()
    traces = obc_traces(distance, damping=0.05)
    plain, pruned = (traces.prune(0.6, inputs=inputs) for inputs in ("dense", "pruned"))
    assert torch.equal(plain.mask, pruned.mask)
    dense, one, both = (
        distance.unflatten(v) for v in (distance.weights(), plain.weights, pruned.weights)
    )
    assert torch.equal(one["0.weight"], both["0.weight"])  # its inputs are the same
    assert (plain.num_passes, pruned.num_passes) == (1, 5)
    x = torch.cat([batch[0] for batch in distance.batches()])
    ones = torch.ones(len(x), 1).double()
    hidden = {}
    for name, parts in (("dense", dense), ("pruned", both)):
        h = torch.tanh(x @ parts["0.weight"].T + parts["0.bias"])
        hidden[name] = torch.cat([h, ones], dim=1)
    rows = {
        name: torch.cat([parts["2.weight"], parts["2.bias"][:, None]], dim=1)
        for name, parts in (("dense", dense), ("plain", one), ("pruned", both))
    }
    a = hidden["pruned"]
    # Damping pulls to the dense weights: rows of data that ask for them.
    ridge = (0.05 * len(x) * a.square().mean()).sqrt() * torch.eye(5).double()
    targets = hidden["dense"] @ rows["dense"].T
    for r, row in enumerate(rows["pruned"]):
        kept = row.nonzero()[:, 0]
        X = torch.cat([a, ridge])[:, kept]
        y = torch.cat([targets[:, r], ridge @ rows["dense"][r]])
        assert_close(row[kept], torch.linalg.lstsq(X, y[:, None])[0][:, 0])
    before, after = (distance.loss(result.weights) for result in (plain, pruned))
    assert after < before
    assert pruned.layers[1].error == pytest.approx(3 * after, rel=1e-9)  # a mean over 3 outputs


def test_pruned_inputs_of_convolutions_are_matched_batch_by_batch():
    build = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 2, groups=2)
    )
    distance = squared(seeded(build), 2, 5, 5)
    traces = obc_traces(distance, damping=1e-9)
    plain, pruned = (traces.prune(0.5, "uniform", inputs=side) for side in ("dense", "pruned"))
    change = sum(
        float((distance.output(pruned.weights, b) - distance.output(traces.w, b)).square().sum())
        for b in distance.batches()
    )
    assert pruned.layers[1].error == pytest.approx(change / 40, rel=1e-9)
    # The last layer is fitted to just this.
    assert distance.loss(pruned.weights) < distance.loss(plain.weights)
    assert torch.equal(traces.prune(0.0, inputs="pruned").weights, traces.w)


def slow_order(H, w, keep=0):
    """Remove all but the last few, which answer."""
    M, w, order, losses = torch.linalg.inv(H), w.clone(), [], []
    left = list(range(len(w) - keep))
    while left:
        costs = w[left].square() / M.diagonal()[left]
        j = left[int(costs.argmin())]
        losses.append(float(costs.min()))
        w = w - M[:, j] * (w[j] / M[j, j])
        M = M - torch.outer(M[:, j], M[j]) / M[j, j]
        left.remove(j)
        order.append(j)
    return order, losses


@pytest.mark.parametrize("rows_at_once", [None, 1, 2])
def test_blocks_and_chunks_of_rows_change_nothing(rows_at_once):
    X = normal(90, 75) @ normal(75, 75, seed=1)
    H = X.T @ X / 90 + 0.05 * torch.eye(75).double()
    W = normal(3, 75, seed=2)
    none = torch.zeros(3, 75, dtype=torch.bool)
    order, losses = removal_order(H, W, none, rows_at_once=rows_at_once)
    for r in range(3):
        expected, costs = slow_order(H, W[r])
        assert order[r].tolist() == expected
        assert_close(losses[r], torch.tensor(costs, dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("rows_at_once", [None, 1, 2])
def test_rows_with_zeros_of_their_own_are_ordered_as_each_alone(rows_at_once):
    X = normal(90, 75) @ normal(75, 75, seed=1)
    H = X.T @ X / 90 + 0.05 * torch.eye(75).double()
    W = normal(5, 75, seed=2)
    W[torch.rand(5, 75, generator=torch.Generator().manual_seed(3)) < 0.6] = 0.0
    W[3], W[4] = 0.0, normal(75, seed=4)
    stays = torch.zeros(5, 75, dtype=torch.bool)
    stays[:, 7] = True
    order, losses = removal_order(H, W, stays, rows_at_once=rows_at_once)
    for r in range(5):
        inside = [j for j in range(75) if W[r, j] != 0 and j != 7]
        gone = 74 - len(inside)
        assert order[r].sort().values.tolist() == list(range(75))
        assert not losses[r, :gone].any() and not W[r, order[r, :gone]].any()
        # What stays answers to the end: only its own removal is never made.
        expected, costs = slow_order(H[[*inside, 7]][:, [*inside, 7]], W[r, [*inside, 7]], keep=1)
        assert order[r, gone:].tolist() == [*([*inside, 7][j] for j in expected), 7]
        assert_close(losses[r, gone:-1], torch.tensor(costs).double(), rtol=1e-7, atol=0)
        assert losses[r, -1] == math.inf


def test_inputs_that_know_nothing_of_each_other_go_by_size():
    W = normal(3, 40, seed=1)
    order, losses = removal_order(
        4.0 * torch.eye(40).double(), W, torch.zeros(3, 40, dtype=torch.bool)
    )
    expected = (4.0 * W.square()).sort(dim=1)
    assert torch.equal(order, expected.indices)
    assert_close(losses, expected.values)


def test_nearly_singular_matrices_cost_what_the_outputs_are():
    X = normal(4, 40)
    H = X.T @ X + 1e-13 * torch.eye(40).double()
    W = normal(3, 40, seed=1)
    order, losses = removal_order(H, W, torch.zeros(3, 40, dtype=torch.bool))
    assert torch.equal(order.sort(dim=1).values, torch.arange(40).expand(3, -1))
    # All gone, the error is that of no output; rounding is as large as the inverse's entries.
    assert_close(losses.sum(dim=1), (W @ H * W).sum(dim=1), rtol=0.05, atol=0)


def test_fits_of_different_sizes_in_one_chunk_are_those_of_each_alone(monkeypatch):
    X = normal(20, 6)
    H, W = X.T @ X, normal(9, 6, seed=1)
    keep = torch.rand(9, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[0], keep[1] = True, False
    together = best_fit(H, W, keep)
    for row, w, kept in zip(together, W, keep, strict=True):
        assert_close(row, fit_on(H, w, kept.nonzero()[:, 0].tolist())[1], rtol=1e-9, atol=1e-12)
    assert torch.equal(together[0], W[0])
    monkeypatch.setattr("pruning.row_surgery.CHUNK_BYTES", 1)
    assert_close(best_fit(H, W, keep), together)


def test_inputs_that_are_never_active_go_first_and_change_nothing_else():
    x = normal(30, 6)
    x[:, [1, 4]] = 0.0
    model = seeded(lambda: nn.Linear(6, 3))
    distance = DenseDistance(model, x, kind="squared")
    traces = obc_traces(distance)
    (trace,) = traces.layers
    assert trace.order[:, :2].tolist() == [[1, 4]] * 3
    assert not trace.losses[:, :2].any()
    live = seeded(lambda: nn.Linear(4, 3))
    others = [0, 2, 3, 5]
    live.weight.data.copy_(model.weight.data[:, others])
    live.bias.data.copy_(model.bias.data)
    small = obc_traces(DenseDistance(live, x[:, others], kind="squared"))
    assert_close(trace.losses[:, 2:], small.layers[0].losses)
    first = distance.unflatten(traces.prune(6 / 21).weights)["weight"]
    assert not first[:, [1, 4]].any() and torch.equal(first[:, others], live.weight.detach())
    both = distance.unflatten(traces.prune(12 / 21).weights)
    expected = small.objective.unflatten(small.prune(6 / 15).weights)
    assert_close(both["weight"][:, others], expected["weight"])
    assert_close(both["bias"], expected["bias"])


def test_zeros_stay_zero_and_count():
    distance = mlp()
    w = magnitude_prune(distance.weights(), 0.3).weights
    bias = distance.unflatten(w)["0.bias"]
    bias[1] = 0.0
    zeros = w == 0
    assert 0 < int(zeros.sum()) < 14
    traces = obc_traces(distance, w)
    reaches_end = torch.isfinite(traces.layers[0].losses).all(dim=1)
    assert torch.equal(reaches_end, bias == 0)  # a zero bias goes like any weight
    same = traces.prune(0.1)
    assert torch.equal(same.weights, w)
    assert not any(layer.error for layer in same.layers)
    for sparsity in (0.4, 0.6, 0.75):
        pruned = traces.prune(sparsity)
        assert not pruned.weights[zeros].any()
        assert int((~pruned.mask).sum()) == wanted_zeros(sparsity, distance.size)
    moved = distance.unflatten(pruned.weights)["0.bias"]
    assert torch.equal(moved != bias, bias != 0) and int((bias == 0).sum()) < 4


def test_allocations_and_exclusions_give_exact_counts():
    distance = mlp()
    traces = obc_traces(distance)
    total = wanted_zeros(0.5, distance.size)

    def zeros(*arguments, **options):
        pruned = traces.prune(*arguments, **options)
        assert int((~pruned.mask).sum()) == total
        parts = distance.unflatten(pruned.weights)
        return [int((parts[name] == 0).sum()) for name in ("0.weight", "2.weight")]

    assert zeros(0.5, "uniform") == [13, 7]  # of 20 and 12; the biases' 7 stay
    assert zeros(0.5, {"2.*": 0.25}) == [17, 3]
    assert zeros(0.5, exclude=["2.weight"]) == [20, 0]
    assert zeros(0.5) != [13, 7]


class Normed(nn.Module):
    """Words through a table, a normalisation and a layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.norm(self.table(tokens).mean(dim=1)))


def test_what_is_in_no_layer_stays_and_the_reachable_share_is_told():
    tokens = torch.arange(80).reshape(20, 4).square() % 6
    distance = DenseDistance(seeded(Normed), tokens)
    w = distance.weights()
    traces = obc_traces(distance)
    table = traces.layers[0]
    assert table.inputs.weight == "table.weight"
    costs = distance.unflatten(w)["table.weight"].square().T * table.inputs.moments
    assert_close(table.losses, costs.sort(dim=1).values)
    assert_close(costs.gather(1, table.order.long()), table.losses)
    before = distance.unflatten(w)
    for allocation in ("pooled", "relative", "uniform"):
        pruned = traces.prune(0.6, allocation)
        after = distance.unflatten(pruned.weights)
        assert int((~pruned.mask).sum()) == wanted_zeros(0.6, distance.size)
        for name in ("norm.weight", "norm.bias"):
            assert torch.equal(before[name], after[name])
        kept = after["table.weight"] != 0
        assert torch.equal(after["table.weight"][kept], before["table.weight"][kept])
        assert torch.all(after["head.bias"] != 0)
    most = (28 + 12 + 4) / distance.size  # the normalisation's biases are zero
    assert int((~traces.prune(most).mask).sum()) == 44
    with pytest.raises(ValueError, match=f"`sparsity` must be at most {most:.10g}, the share"):
        traces.prune(most + 1 / distance.size)
    with pytest.raises(ValueError, match=f"at most {16 / distance.size:.10g}"):
        traces.prune(0.5, exclude=["table.*"])


def test_everything_is_left_as_found():
    distance = mlp()
    w, state = distance.weights(), torch.get_rng_state()
    first = obc_traces(distance).prune(0.7)
    again = obc_traces(distance, w).prune(0.7)
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(distance.weights(), w) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in distance.model.parameters())
    assert math.isnan(first.lam) and first.num_passes == 1


def test_bad_input_says_what_to_do(unchecked_shapes):
    distance = mlp()
    with pytest.raises(ValueError, match=r"`damping` must be positive and finite, got 0\.0"):
        obc_traces(distance, damping=0.0)
    with pytest.raises(ValueError, match="`rows_at_once` must be at least 1, got 0"):
        obc_traces(distance, rows_at_once=0)
    with pytest.raises(ValueError, match="`w` must be finite"):
        obc_traces(distance, distance.weights() / 0.0)
    traces = obc_traces(distance)
    with pytest.raises(ValueError, match='`allocation` must be "pooled", "relative", "uniform"'):
        traces.prune(0.5, "global")
    with pytest.raises(ValueError, match='`inputs` must be "dense" or "pruned", got \'both\''):
        traces.prune(0.5, inputs="both")
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\]"):
        traces.prune(-0.1)
    with pytest.raises(ValueError, match=r'`exclude` pattern "head" matches none of 0\.weight'):
        traces.prune(0.5, exclude=["head"])
    few = DenseDistance(seeded(lambda: nn.Linear(30, 3)), normal(4, 30), kind="squared")
    with pytest.warns(CalibrationWarning, match="worst `weight` with 4 for 31"):
        obc_traces(few)
    with (
        pytest.warns(CalibrationWarning),
        pytest.raises(ValueError, match=r"`damping` must be larger, got 1e-30.*`weight` are sing"),
    ):
        obc_traces(few, damping=1e-30)
    distance.model.add_module("drop", nn.Dropout().train())
    with pytest.raises(NonDeterministicError, match="Dropout must be off"):
        obc_traces(distance)
