import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pruning import recalibrate_batch_norm_
from tests.cases import seeded


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network():
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.2), nn.Dropout(), nn.Linear(4, 2)
        )
    ).eval()


def test_statistics_are_the_average_over_batches_of_what_arrives():
    model = network()
    batches = [normal(10, 3), normal(6, 3, seed=1)]
    assert recalibrate_batch_norm_(model, batches) == 1
    arriving = [model[0](x).detach() for x in batches]
    assert_close(model[1].running_mean, sum(a.mean(0) for a in arriving) / 2)
    assert_close(model[1].running_var, sum(a.var(0) for a in arriving) / 2)


def test_everything_else_is_left_as_found():
    model = network()
    model[3].train()
    weights, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    recalibrate_batch_norm_(model, [(normal(10, 3),)])
    assert not model.training and not model[1].training and model[3].training
    assert model[1].momentum == 0.2
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_statistics_come_back_after_an_exception():
    model = network()
    recalibrate_batch_norm_(model, [normal(10, 3)])
    before = model[1].running_mean.clone()
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm_(model, [normal(10, 3, seed=4), normal(10, 5)])
    assert torch.equal(model[1].running_mean, before) and model[1].num_batches_tracked == 1
    assert not model[1].training and model[1].momentum == 0.2
    with pytest.raises(ValueError, match="`inputs` must give at least one batch"):
        recalibrate_batch_norm_(model, [])
    assert torch.equal(model[1].running_mean, before)


def test_networks_without_batch_norm_are_none_of_its_business():
    assert recalibrate_batch_norm_(nn.Linear(3, 2), [normal(4, 3)]) == 0
