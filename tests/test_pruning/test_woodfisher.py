import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import NonFiniteError, Objective, fisher_operator
from pruning import DenseDistance, fisher_blocks, magnitude_prune, woodfisher, woodfisher_prune
from pruning.fisher_blocks import FisherBlocks, block_bytes, fitting_block_size
from pruning.stages import stage_counts
from tests.cases import seeded

NAN = math.nan


def dense(operator):
    return operator @ torch.eye(operator.size, dtype=operator.dtype)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def classifier(model=None):
    return Objective(model or mlp(), nn.CrossEntropyLoss(), (normal(30, 4), torch.arange(30) % 3))


def one_tensor():
    return classifier(seeded(lambda: nn.Linear(4, 3, bias=False)))


def mlp_distance(**options):
    return DenseDistance(mlp(), normal(30, 4), **options)


# Blocks of a Fisher matrix

LENGTHS = [7, 1, 12, 5]


def filled(block_size, rows, dtype=torch.float64):
    blocks = FisherBlocks(LENGTHS, block_size, len(rows), torch.empty(0, dtype=dtype))
    for some in rows.split(4):
        blocks.add(some.to(dtype))
    return blocks


def block_diagonal(F, block_size):
    """F within blocks of one tensor, zero outside."""
    if block_size is None:
        return F
    number = torch.cat([1000 * i + torch.arange(n) // block_size for i, n in enumerate(LENGTHS)])
    return F * (number[:, None] == number)


@pytest.mark.parametrize("block_size", [1, 3, 5, 12, None])
@pytest.mark.parametrize("num_rows", [2, 9, 40])
@pytest.mark.parametrize("work", [1 << 27, 400])
def test_blocks_answer_as_the_dense_matrix_does(block_size, num_rows, work, monkeypatch):
    monkeypatch.setattr(fisher_blocks, "WORK_BYTES", work)  # few blocks, and columns, at a time
    rows, v, tau = normal(num_rows, 25), normal(25, seed=1), 0.3
    F = block_diagonal(rows.T @ rows, block_size)
    blocks = filled(block_size, rows)
    damped = F + tau * torch.eye(25).double()
    inverse = torch.linalg.inv(damped)
    close = {"rtol": 1e-9, "atol": 1e-11}
    assert_close(blocks.diagonal(), F.diagonal(), **close)
    assert_close(blocks.product(v), F @ v, **close)
    assert_close(blocks.inverse_diagonal(tau), inverse.diagonal(), **close)
    assert_close(blocks.inverse_product(v, tau), inverse @ v, **close)
    for share in (0.0, 0.3, 0.9, 1.0):
        keep = torch.rand(25, generator=torch.Generator().manual_seed(2)) >= share
        found = blocks.joint_answer(torch.where(keep, 0.0, v), keep, tau)
        expected = torch.zeros_like(v)
        gone = F[keep][:, ~keep] @ v[~keep]
        expected[keep] = torch.linalg.solve(damped[keep][:, keep], gone)
        assert_close(found, expected, **close)


@pytest.mark.parametrize("block_size", [3, 12, None])
def test_the_papers_recursion_over_samples_gives_the_same_inverse(block_size):
    rows, damping = normal(9, 25), 0.05
    inverse = torch.eye(25).double() / damping
    for g in rows:
        if block_size is None:
            step = inverse @ g
            inverse = inverse - torch.outer(step, step) / (len(rows) + g @ step)
            continue
        # Every block has a recursion of its own, which sees its part of the gradient.
        for part in block_diagonal(torch.ones(25, 25).double(), block_size).unique(dim=0):
            own = part * g
            step = inverse @ own
            inverse = inverse - torch.outer(step, step) / (len(rows) + own @ step)
    blocks = filled(block_size, rows / math.sqrt(len(rows)))
    assert_close(blocks.inverse_diagonal(damping), inverse.diagonal(), rtol=1e-9, atol=1e-11)
    v = normal(25, seed=1)
    assert_close(blocks.inverse_product(v, damping), inverse @ v, rtol=1e-9, atol=1e-10)


def test_systems_are_solved_in_double_precision():
    # Samples that are almost alike: solved in float32, their inverse would have no right digit.
    rows = (torch.ones(6, 25).double() + 1e-3 * normal(6, 25)).float()
    tau = 1e-6
    exact = torch.linalg.inv(rows.double().T @ rows.double() + tau * torch.eye(25).double())
    found = filled(None, rows, torch.float32).inverse_diagonal(tau)
    # The dense matrix has a condition number of 2e8.
    assert_close(found, exact.diagonal(), rtol=1e-6, atol=0.0)


def test_memory_is_counted_as_it_is_held():
    for block_size, num_rows in itertools.product((1, 3, 12, None), (2, 9, 40)):
        blocks = FisherBlocks(LENGTHS, block_size, num_rows, torch.empty(0))
        held = [piece[1]._store for piece in blocks._pieces] + [blocks._buffer]
        held = sum(t.numel() for t in held)
        assert block_bytes(LENGTHS, block_size, num_rows, 4) == 4 * held
    for budget in (0, 500, 2000, 5000, 10**9):
        fits = fitting_block_size(LENGTHS, 9, 4, budget)
        assert fits == 0 or block_bytes(LENGTHS, fits, 9, 4) <= budget
        assert fits == 12 or block_bytes(LENGTHS, fits + 1, 9, 4) > budget


# Stages


def test_stages_grow_to_what_is_wanted():
    geometric = stage_counts(1000, zeros=0, sparsity=0.9, stages=3)
    left = [1000, *(1000 - count for count in geometric)]
    ratios = [b / a for a, b in itertools.pairwise(left)]
    assert ratios == pytest.approx([0.1 ** (1 / 3)] * 3, rel=5e-3) and geometric[-1] == 900
    cubic = stage_counts(1000, zeros=100, sparsity=0.9, stages=4, schedule="cubic")
    assert cubic == [round(900 - 800 * (1 - i / 4) ** 3) for i in range(1, 5)]
    assert stage_counts(10, zeros=0, sparsity=1.0, stages=1) == [10]
    assert stage_counts(10, zeros=6, sparsity=0.6, stages=3) == []
    assert stage_counts(10, zeros=3, sparsity=0.8, stages=[0.2, 0.5, 0.8]) == [5, 8]
    assert stage_counts(10, zeros=0, sparsity=0.8, stages=[0.5]) == [5, 8]


# The method


def explicit(objective, w, tau_share, sparsity, update):
    """Optimal Brain Surgeon with the dense empirical Fisher, from its formulas."""
    F = dense(fisher_operator(objective, w))
    tau = tau_share * float(F.diagonal().mean())
    A = F + tau * torch.eye(len(w)).double()
    P = torch.linalg.inv(A)
    order = (w.square() / P.diagonal()).argsort(stable=True)
    z = torch.zeros(len(w), dtype=torch.bool)
    z[order[: math.ceil(sparsity * len(w))]] = True
    u = w.clone()
    if update == "joint":  # the constrained minimum: w − P E (Eᵀ P E)⁻¹ Eᵀ w
        u -= P[:, z] @ torch.linalg.solve(P[z][:, z], w[z])
    else:
        for q in z.nonzero()[:, 0]:
            u -= w[q] / P[q, q] * P[:, q]
    u[z] = 0.0
    return u, z, float(0.5 * (u - w) @ F @ (u - w)), tau


@pytest.mark.parametrize("update", ["joint", "single"])
@pytest.mark.parametrize("sparsity", [1 / 12, 0.5, 0.8])
@pytest.mark.parametrize(("objective", "block_size"), [(one_tensor, 100), (classifier, None)])
def test_a_full_block_is_optimal_brain_surgeon(objective, block_size, sparsity, update):
    objective = objective()
    w = objective.weights()
    pruned = woodfisher_prune(
        w, objective, sparsity, block_size=block_size, damping=0.05, update=update
    )
    u, z, predicted, tau = explicit(objective, w, 0.05, sparsity, update)
    assert torch.equal(~pruned.mask, z)
    assert_close(pruned.weights, u, rtol=1e-8, atol=1e-10)
    assert pruned.predicted_change == pytest.approx(predicted, rel=1e-7)
    assert pruned.stages[0].tau == pytest.approx(tau, rel=1e-9)
    measured = objective.loss(pruned.weights) - objective.loss(w)
    assert pruned.measured_change == pytest.approx(measured, rel=1e-9)
    assert pruned.num_gradients == 30


def test_both_updates_agree_on_one_weight_and_not_on_many():
    objective = one_tensor()
    w = objective.weights()
    for sparsity, same in ((1 / 12, True), (0.5, False)):
        joint, single = (
            woodfisher_prune(w, objective, sparsity, update=update).weights
            for update in ("joint", "single")
        )
        assert torch.allclose(joint, single, rtol=1e-9) == same


def test_without_an_update_the_kept_weights_stay():
    objective = classifier()
    w = objective.weights()
    pruned = woodfisher_prune(w, objective, 0.5, update="none")
    assert torch.equal(pruned.weights, torch.where(pruned.mask, w, 0.0))
    moved = woodfisher_prune(w, objective, 0.5)
    assert torch.equal(moved.mask, pruned.mask) and not torch.equal(moved.weights, pruned.weights)
    assert moved.predicted_change < 0.9 * pruned.predicted_change


def test_blocks_of_one_weight_are_optimal_brain_damage():
    objective = classifier()
    w = objective.weights()
    h = dense(fisher_operator(objective, w)).diagonal()
    pruned = woodfisher_prune(w, objective, 0.5, block_size=1, damping=1e-9)
    order = (w.square() * h).argsort()
    assert not pruned.mask[order[:22]].any() and pruned.mask[order[22:]].all()
    assert_close(pruned.weights, torch.where(pruned.mask, w, 0.0))


def test_stages_take_the_fisher_anew_where_they_are():
    distance = mlp_distance()
    w = distance.weights()
    seen = []
    staged = woodfisher_prune(
        w, distance, 0.7, stages=[0.4], on_stage=lambda stage, w: seen.append((stage, w.clone()))
    )
    half = woodfisher_prune(w, distance, 0.4)
    again = woodfisher_prune(half.weights, distance, 0.7)
    assert_close(staged.weights, again.weights, rtol=1e-9, atol=1e-12)
    assert [stage for stage, _ in seen] == list(staged.stages) and len(seen) == 2
    assert torch.equal(seen[0][1], half.weights) and seen[0][0].sparsity == half.sparsity
    assert staged.stages[1].loss == pytest.approx(distance.loss(staged.weights), rel=1e-12)
    assert staged.measured_change == pytest.approx(distance.loss(staged.weights), abs=1e-12)
    assert staged.num_gradients == 60
    assert staged.predicted_change == sum(stage.predicted_change for stage in staged.stages)


@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}, {"allocation": {"0.*": 0.5}}])
@pytest.mark.parametrize("schedule", ["geometric", "cubic"])
def test_sparsity_is_met_exactly_by_any_allocation(options, schedule):
    distance = mlp_distance()
    w = distance.weights()
    w[:3] = 0.0
    found = woodfisher_prune(
        w, distance, 0.62, stages=4, schedule=schedule, exclude=["2.bias"], **options
    )
    assert int((found.weights == 0).sum()) == math.ceil(0.62 * len(w))
    assert not found.weights[:3].any() and 2 <= len(found.stages) <= 4
    parts = distance.unflatten(found.mask.double())
    assert parts["2.bias"].all()
    if options:
        zeros = [int((part == 0).sum()) for part in parts.values()]
        # uniform: 27 zeros among 20, 5 and 15; the mapping: half of 20 and of 5, up
        assert zeros == ([14, 3, 10, 0] if options["allocation"] == "uniform" else [10, 3, 14, 0])


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_compensation_keeps_the_outputs_better_than_removal_alone(kind):
    distance = mlp_distance(kind=kind)
    w = distance.weights()
    losses = [
        distance.loss(found.weights)
        for found in (
            woodfisher_prune(w, distance, 0.5, block_size=None, stages=4, damping=0.01),
            woodfisher_prune(w, distance, 0.5, block_size=None, stages=4, update="none"),
            magnitude_prune(w, 0.5),
        )
    ]
    assert losses[0] < 0.9 * losses[1] and losses[0] < 0.5 * losses[2]


def test_rows_of_several_samples_cost_fewer_gradients():
    distance = mlp_distance()
    w = distance.weights()
    found = woodfisher_prune(w, distance, 0.5, samples_per_row=4, num_samples=10)
    assert found.num_gradients == 3 and found.sparsity == pytest.approx(22 / 43)


def test_all_samples_make_about_a_thousand_rows_by_default(monkeypatch):
    monkeypatch.setattr(woodfisher, "DEFAULT_ROWS", 7)
    distance = mlp_distance(batch_size=12)
    found = woodfisher_prune(distance.weights(), distance, 0.5)
    assert found.num_gradients == 3 + 3 + 2  # fives, in batches of 12, 12 and 6
    again = woodfisher_prune(distance.weights(), distance, 0.5, samples_per_row=5)
    assert torch.equal(found.weights, again.weights)


def test_outputs_that_no_weight_moves_leave_the_ranking_by_size():
    x = torch.zeros(8, 4).double()
    distance = DenseDistance(seeded(lambda: nn.Linear(4, 3, bias=False)), x)
    w = distance.weights()
    found = woodfisher_prune(w, distance, 0.5)
    assert torch.equal(found.weights, magnitude_prune(w, 0.5).weights)


def test_model_random_state_and_arguments_are_left_as_found():
    distance = mlp_distance()
    w = distance.weights()
    before, state = w.clone(), torch.get_rng_state()
    found = [woodfisher_prune(w, distance, 0.5, stages=2, seed=s).weights for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(w, before) and torch.equal(distance.weights(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in distance.model.parameters())


def test_blocks_that_do_not_fit_are_refused_before_gradients_are_made(monkeypatch):
    distance = mlp_distance()
    w = distance.weights()
    with monkeypatch.context() as patch:
        patch.setattr(woodfisher, "fisher_rows", None)
        patch.setattr(woodfisher, "FisherBlocks", None)
        with pytest.raises(MemoryError, match="One block of all weights from 30 gradi") as refusal:
            woodfisher_prune(w, distance, 0.5, block_size=None, memory_budget=8000)
        with pytest.raises(MemoryError, match="Not even blocks of one weight fit"):
            woodfisher_prune(w, distance, 0.5, memory_budget=100)
    fits = int(str(refusal.value).split("`block_size=")[1].split("`")[0])
    assert 1 < fits < 20
    woodfisher_prune(w, distance, 0.5, block_size=fits, memory_budget=8000)
    with pytest.raises(MemoryError, match=f"Pass `block_size={fits}` or less"):
        woodfisher_prune(w, distance, 0.5, block_size=fits + 1, memory_budget=8000)


def test_gradients_that_are_not_finite_are_named():
    model = mlp()
    objective = Objective(
        model,
        lambda z, y: (z - y).square().sum(dim=1).sqrt(),  # its slope at 0 is NaN
        (normal(9, 4), model(normal(9, 4)).detach()),
    )
    with pytest.raises(NonFiniteError, match=r"diagonal of the Fisher matrix .* `0\.weight`"):
        woodfisher_prune(objective.weights(), objective, 0.5)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.1}, r"`sparsity` must be in \[0, 1\]"),
        ({"sparsity": 0.9, "exclude": ["*.weight"]}, "`sparsity` must be at most"),
        ({"block_size": 0}, "`block_size` must be at least 1"),
        ({"damping": 0.0}, "`damping` must be positive and finite"),
        ({"damping": NAN}, "`damping` must be positive and finite"),
        ({"update": "both"}, "`update` must be one of"),
        ({"kind": "empirical"}, '`kind` must be "monte_carlo" for a DenseDistance'),
        ({"num_samples": 31}, "`num_samples` must be from 1 to 30"),
        ({"samples_per_row": 0}, "`samples_per_row` must be at least 1"),
        ({"stages": 0}, "`stages` must be at least 1"),
        ({"stages": [0.4, 0.3]}, "`stages` must increase"),
        ({"stages": [0.6]}, "`stages` must increase"),
        ({"stages": [NAN]}, "`stages` must increase"),
        ({"schedule": "linear"}, "`schedule` must be one of"),
        ({"memory_budget": -1}, "`memory_budget` must be at least 1"),
        ({"exclude": ["conv"]}, '`exclude` pattern "conv" matches none'),
        ({"w": torch.full((43,), NAN, dtype=torch.float64)}, "`w` must be finite"),
        ({"w": torch.ones(3, dtype=torch.float64)}, "one entry for each of the 43"),
    ],
)
def test_bad_input_is_refused_before_gradients_are_made(options, message, monkeypatch):
    monkeypatch.setattr(woodfisher, "fisher_rows", None)
    distance = mlp_distance()
    options = {"w": distance.weights(), "sparsity": 0.5} | options
    with pytest.raises(ValueError, match=message):
        woodfisher_prune(options.pop("w"), distance, options.pop("sparsity"), **options)
