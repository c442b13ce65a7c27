import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from hessian import Objective
from pruning import DenseDistance, magnitude_prune, wanda_prune
from pruning.pruned import wanted_zeros
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network():
    """A convolution, grouped, and two linear layers, with their inputs' norms by hand."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 2, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 5),
            nn.Tanh(),
            nn.Linear(5, 3, bias=False),
        )
    )
    x = normal(20, 4, 3, 3) * torch.tensor([0.1, 1.0, 3.0, 10.0]).double()[:, None, None]
    with torch.no_grad():
        # Channels 0 and 1 feed the first three outputs, 2 and 3 the others.
        patches = F.unfold(x, 2).square().sum(dim=(0, 2)).sqrt().view(2, 8)
        norms = [
            patches.repeat_interleave(3, dim=0),
            model[:3](x).norm(dim=0).expand(5, -1),
            model[:5](x).norm(dim=0).expand(3, -1),
        ]
    objective = Objective(model, nn.MSELoss(), (x, torch.zeros(20, 3).double()), batch_size=7)
    return objective, {f"{i}.weight": n for i, n in zip((0, 3, 5), norms, strict=True)}


def layer_masks(objective, weights, names):
    parts = objective.unflatten(weights)
    return [(parts[name].reshape(len(parts[name]), -1) != 0) for name in names]


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.8, 183 / 194])
@pytest.mark.parametrize("per", ["output", "layer", "global"])
def test_lowest_products_of_size_and_norm_go(per, sparsity):
    objective, norms = network()
    w = objective.weights()
    pruned = wanda_prune(w, objective, sparsity, per=per)
    total = wanted_zeros(sparsity, objective.size)
    assert int((~pruned.mask).sum()) == total
    assert torch.equal(pruned.weights[pruned.mask], w[pruned.mask])  # nothing moves
    parts = objective.unflatten(w)
    scores = [parts[name].reshape(n.shape).abs() * n for name, n in norms.items()]
    masks = layer_masks(objective, pruned.weights, norms)
    if per == "global":
        contests = [
            (torch.cat([s.flatten() for s in scores]), torch.cat([m.flatten() for m in masks]))
        ]
    elif per == "layer":
        contests = [(s.flatten(), m.flatten()) for s, m in zip(scores, masks, strict=True)]
    else:
        contests = [
            pair for s, m in zip(scores, masks, strict=True) for pair in zip(s, m, strict=True)
        ]
    share = total / sum(len(s) for s, _ in contests)
    for s, kept in contests:
        gone = int((~kept).sum())
        assert torch.equal(kept, s >= s.sort().values[gone]) if gone < len(s) else not kept.any()
        assert abs(gone - share * len(s)) <= 1.0


def test_biases_and_norms_stay_and_the_reachable_share_is_told():
    objective, _ = network()
    with pytest.raises(ValueError, match=r"`sparsity` must be at most 0\.9432989691, the share"):
        wanda_prune(objective.weights(), objective, 0.95)
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    distance = DenseDistance(model, normal(20, 4))
    parts = distance.unflatten(wanda_prune(distance.weights(), distance, 0.6).weights)
    for name, p in model.named_parameters():
        assert torch.equal(parts[name], p) == (not name.endswith("weight") or name[0] == "1")


def test_excluded_layers_stay_and_zeros_do_not_come_back():
    objective, _ = network()
    dense = objective.weights()
    w = magnitude_prune(dense, 0.2).weights
    zeros = w == 0
    for per in ("output", "layer", "global"):
        pruned = wanda_prune(w, objective, 0.4, per=per, exclude=["5.*", "3.bias"])
        assert int((~pruned.mask).sum()) == wanted_zeros(0.4, objective.size)
        assert not pruned.weights[zeros].any()
        before, after = (objective.unflatten(v)["5.weight"] for v in (w, pruned.weights))
        assert torch.equal(before, after)
        assert torch.equal(wanda_prune(w, objective, 0.1, per=per).weights, w)
    assert torch.equal(objective.weights(), dense) and torch.any(zeros)


def test_inputs_of_one_norm_leave_magnitude_pruning():
    model = seeded(lambda: nn.Linear(6, 8, bias=False))
    distance = DenseDistance(model, torch.eye(6).double(), kind="squared")
    w = distance.weights()
    found = wanda_prune(w, distance, 0.6, per="global").weights
    assert_close(found, magnitude_prune(w, 0.6).weights)


def test_tables_go_by_how_often_a_row_is_looked_up():
    model = seeded(lambda: nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(12, 2)))
    tokens = torch.arange(40).reshape(10, 4).square() % 6
    distance = DenseDistance(model, tokens)
    pruned = wanda_prune(distance.weights(), distance, 9 / 44, exclude=["2.*"])
    scores = model[0].weight.detach() * tokens.flatten().bincount(minlength=6).sqrt()[:, None]
    lowest = scores.abs().argsort(dim=0)[:3]  # of the 6 weights of each of the 3 outputs
    table = distance.unflatten(pruned.weights)["0.weight"]
    assert not table.gather(0, lowest).any() and int((table == 0).sum()) == 9


def test_bad_input_says_what_to_do(unchecked_shapes):
    objective, _ = network()
    w = objective.weights()
    with pytest.raises(ValueError, match=r"`per` must be one of \('output', 'layer', 'global'\)"):
        wanda_prune(w, objective, 0.5, per="row")
    with pytest.raises(
        ValueError, match=r"`sparsity` must be in \[0, 1\], the share of zeros, got 2"
    ):
        wanda_prune(w, objective, 2.0)
    with pytest.raises(ValueError, match="`w` must be finite"):
        wanda_prune(w * torch.nan, objective, 0.5)
    with pytest.raises(ValueError, match="one entry for each of the 194"):
        wanda_prune(w[1:], objective, 0.5)
    with pytest.raises(ValueError, match='`exclude` pattern "head" matches none'):
        wanda_prune(w, objective, 0.5, exclude=["head"])
