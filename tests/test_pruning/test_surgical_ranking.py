"""The ranking of removals that are answered, against surgery with inverses made anew."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pruning import DenseDistance, KrylovSolver, compensated_prune
from pruning.saliency import kronecker_factors, kronecker_saliency
from pruning.surgical_ranking import surgical_ranking
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def surgery(A, w, slope):
    """Yield (input, cost so far) as weights of one output go, every inverse made anew."""
    left, dearest = [i for i in range(len(w)) if w[i] != 0], 0.0
    w = w.clone()
    while left:
        inverse = torch.linalg.inv(A[left][:, left])
        costs = slope * w[left].square() / inverse.diagonal()
        k = int(costs.argmin())
        dearest = max(dearest, float(costs[k]))
        yield left[k], dearest
        w[left] -= inverse[:, k] * w[left[k]] / inverse[k, k]
        del left[k]


def sparse_problem():
    model = seeded(lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)))
    distance = DenseDistance(model, normal(40, 7) @ normal(7, 7, seed=1), batch_size=16)
    w = distance.weights()
    w[torch.rand(len(w), generator=torch.Generator().manual_seed(2)) < 0.3] = 0.0
    return distance, w


def test_weights_go_as_in_surgery_of_what_is_left():
    distance, w = sparse_problem()
    factors = kronecker_factors(distance, w)
    ranks = surgical_ranking(w, factors, distance, damping=0.1)
    assert_close(ranks.sort().values, torch.arange(len(w)).double())
    parts, found = distance.unflatten(w), distance.unflatten(ranks)
    expected = []
    for layer in factors.layers:
        A = layer.inputs + 0.1 * layer.inputs.diagonal().mean() * torch.eye(len(layer.inputs))
        places = layer.rows(found)
        for r, row in enumerate(layer.rows(parts)):
            expected += [
                (cost, float(places[r, i])) for i, cost in surgery(A, row, float(layer.slopes[r]))
            ]
    # Dearer removals of any row come later; within a row, removals come in their order.
    in_rank = [cost for cost, _ in sorted(expected, key=lambda pair: pair[1])]
    assert_close(torch.tensor(in_rank), torch.tensor(sorted(in_rank)), rtol=1e-9, atol=0)
    assert len(in_rank) == int((w != 0).sum())
    # What has gone costs nothing.
    assert ranks[w == 0].max() < ranks[w != 0].min()


def test_the_first_to_go_of_a_dense_network_is_the_least_kronecker_saliency():
    distance, _ = sparse_problem()
    w = distance.weights()
    factors = kronecker_factors(distance, w)
    saliency = kronecker_saliency(w, factors, distance)
    assert surgical_ranking(w, factors, distance).argmin() == saliency.argmin()


def test_weights_that_cannot_answer_any_more_make_others_dear():
    # Three almost equal inputs: any two can answer for the third, one for the two, none for one.
    x = normal(50, 1).expand(50, 3) + 0.01 * normal(50, 3, seed=1)
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    distance = DenseDistance(model, x, kind="squared")
    factors = kronecker_factors(distance, distance.weights())
    (layer,) = factors.layers
    alone = torch.tensor([0.0, 0.0, 1.0]).double()
    # The Kronecker saliency still counts on inputs whose weights are gone.
    cheap = kronecker_saliency(alone, factors, distance, damping=1e-6)[2]
    assert cheap < 0.01 * float(layer.slopes[0] * layer.inputs[2, 2])


def test_convolutions_and_what_has_no_layer_are_in_one_ranking():
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    ).eval()
    distance = DenseDistance(model, normal(6, 2, 5, 5), kind="squared")
    w = distance.weights()
    factors = kronecker_factors(distance, w)
    ranks = surgical_ranking(w, factors, distance)
    parts = distance.unflatten(ranks)
    assert len(parts["1.weight"].unique()) == 3
    plain = w.square() * factors.diagonal
    norm = torch.cat([distance.unflatten(plain)[name] for name in ("1.weight", "1.bias")])
    order = torch.cat([parts["1.weight"], parts["1.bias"]])
    assert torch.equal(norm.argsort(stable=True), order.argsort(stable=True))


def test_layers_too_large_for_surgery_are_ranked_by_their_saliency(monkeypatch):
    distance, w = sparse_problem()
    factors = kronecker_factors(distance, w)
    monkeypatch.setattr("pruning.surgical_ranking.MOST_FLOPS", 1.0)
    ranks = surgical_ranking(w, factors, distance)
    saliency = kronecker_saliency(w, factors, distance)
    assert torch.equal(ranks.argsort(), saliency.argsort(stable=True))


@pytest.mark.parametrize("saliency", ["surgery", "kronecker", "diagonal", "magnitude"])
def test_the_solver_removes_what_its_saliency_says(saliency):
    distance, _ = sparse_problem()
    dense = distance.weights()
    solver = KrylovSolver(saliency=saliency, saliency_damping=0.1)
    pruned = compensated_prune(dense, distance, sparsity=0.4, solver=solver, stages=1)
    factors = kronecker_factors(distance, dense)
    costs = {
        "surgery": surgical_ranking(dense, factors, distance, damping=0.1),
        "kronecker": kronecker_saliency(dense, factors, distance, damping=0.1),
        "diagonal": dense.square() * factors.diagonal,
        "magnitude": dense.abs(),
    }
    gone = costs[saliency].argsort()[: int((~pruned.mask).sum())]
    assert not pruned.mask[gone].any()
    others = {name: cost.argsort()[: len(gone)] for name, cost in costs.items()}
    assert any(set(other.tolist()) != set(gone.tolist()) for other in others.values())


def test_unknown_saliency_is_refused(unchecked_shapes):
    with pytest.raises(ValueError, match="`saliency` must be one of"):
        KrylovSolver(saliency="gradient")
