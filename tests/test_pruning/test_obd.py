import math

import pytest
import torch
from torch import nn

from hessian import Objective, diagonal, fisher_operator, hessian_operator
from pruning import DenseDistance, obd_prune
from tests.cases import seeded

NAN = math.nan


def dense(operator):
    return operator @ torch.eye(operator.size, dtype=operator.dtype)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def classifier():
    return Objective(mlp(), nn.CrossEntropyLoss(), (normal(20, 4), torch.arange(20) % 3))


def separable():
    """A squared distance with a diagonal Hessian: orthogonal inputs and one output."""
    x = torch.linalg.qr(normal(9, 6))[0] * torch.linspace(0.2, 3.0, 6).double()
    return DenseDistance(seeded(lambda: nn.Linear(6, 1, bias=False)), x, kind="squared")


def lowest(scores, count):
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[scores.argsort(stable=True)[:count]] = False
    return keep


def test_the_smallest_products_of_curvature_and_square_go():
    objective = classifier()
    w = objective.weights()
    h = dense(fisher_operator(objective, w)).diagonal()
    pruned = obd_prune(w, objective, 0.4, kind="empirical")
    keep = lowest(h * w.square(), math.ceil(0.4 * len(w)))
    assert torch.equal(pruned.mask, keep)
    assert torch.equal(pruned.weights, torch.where(keep, w, 0.0))
    predicted = float(0.5 * (h * w.square())[~keep].sum())
    assert pruned.predicted_change == pytest.approx(predicted, rel=1e-9)
    measured = objective.loss(pruned.weights) - objective.loss(w)
    assert pruned.measured_change == pytest.approx(measured, rel=1e-12)
    assert pruned.num_gradients == 20 and pruned.sparsity == pytest.approx(18 / 43)


def test_prediction_is_exact_where_the_hessian_is_diagonal_and_constant():
    distance = separable()
    w = distance.weights()
    pruned = obd_prune(w, distance, 0.5)
    assert pruned.predicted_change == pytest.approx(pruned.measured_change, rel=1e-9)
    # No other three weights are cheaper to remove.
    losses = [
        distance.loss(w * torch.tensor([(i >> j) & 1 for j in range(6)]).double())
        for i in range(64)
        if bin(i).count("1") == 3
    ]
    assert pruned.measured_change == pytest.approx(min(losses), rel=1e-9)


def test_any_diagonal_can_be_passed_and_negative_curvature_counts_as_none():
    objective = classifier()
    w = objective.weights()
    h = diagonal(hessian_operator(objective, w), method="exact").value
    assert (h < 0).any()
    pruned = obd_prune(w, objective, 0.4, diagonal=h)
    assert torch.equal(pruned.mask, lowest(h.clamp(min=0.0) * w.square(), 18))
    assert pruned.num_gradients == 0
    ones = obd_prune(w, objective, 0.4, diagonal=torch.ones_like(w))
    assert torch.equal(ones.mask, lowest(w.abs(), 18))


def test_labels_matter_for_the_empirical_diagonal_only():
    x, y = normal(20, 4), torch.arange(20) % 3
    changes = {}
    for kind in ("monte_carlo", "empirical"):
        for shift in (0, 1):
            objective = Objective(mlp(), nn.CrossEntropyLoss(), (x, (y + shift) % 3))
            pruned = obd_prune(objective.weights(), objective, 0.4, kind=kind)
            changes[kind, shift] = pruned.predicted_change
    assert changes["monte_carlo", 0] == changes["monte_carlo", 1]
    assert changes["empirical", 0] != pytest.approx(changes["empirical", 1], rel=1e-3)


def test_a_distance_needs_no_labels_and_weights_that_nothing_enters_go_first():
    x = normal(20, 4)
    x[:, 2] = 0.0
    distance = DenseDistance(mlp(), x)
    pruned = obd_prune(distance.weights(), distance, 5 / 43, num_samples=10)
    assert not distance.unflatten(pruned.weights)["0.weight"][:, 2].any()
    assert pruned.measured_change == pytest.approx(0.0, abs=1e-15)
    assert pruned.num_gradients == 10


def test_parameters_can_have_shares_of_their_own_or_stay():
    distance = DenseDistance(mlp(), normal(20, 4))
    w = distance.weights()
    pruned = obd_prune(w, distance, 0.5, allocation="uniform", exclude=["*.bias"])
    parts = distance.unflatten(pruned.mask.double())
    assert parts["0.bias"].all() and parts["2.bias"].all()
    assert int(parts["0.weight"].sum()) == 7 and int(parts["2.weight"].sum()) == 6


def test_model_random_state_and_arguments_are_left_as_found():
    distance = DenseDistance(mlp(), normal(20, 4))
    w = distance.weights()
    before, state = w.clone(), torch.get_rng_state()
    first, again = (obd_prune(w, distance, 0.5, seed=3) for _ in range(2))
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(w, before) and torch.equal(distance.weights(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_refused_before_gradients_are_made(unchecked_shapes, monkeypatch):
    distance = DenseDistance(mlp(), normal(20, 4))
    w = distance.weights()
    monkeypatch.setattr("pruning.obd.fisher_rows", None)

    def refused(message, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            obd_prune(*arguments, **options)

    refused("`w` must be finite", w * NAN, distance, 0.5)
    refused("`w` must be a flat vector with one entry for each of the 43", w[1:], distance, 0.5)
    refused(r"`sparsity` must be in \[0, 1\]", w, distance, -0.1)
    refused("`sparsity` must be at most", w, distance, 0.9, exclude=["*.weight"])
    refused('`exclude` pattern "conv" matches none', w, distance, 0.5, exclude=["conv"])
    refused("`num_samples` must be from 1 to 20", w, distance, 0.5, num_samples=21)
    refused('`kind` must be "monte_carlo" for', w, distance, 0.5, kind="empirical")
    refused("`diagonal` must be finite", w, distance, 0.5, diagonal=w * NAN)
    refused("`diagonal` must hold one entry for each of the 43", w, distance, 0.5, diagonal=w[1:])
