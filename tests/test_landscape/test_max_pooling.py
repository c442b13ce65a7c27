"""Max pooling by slices is torch's, to the bit."""

import pytest
import torch
from torch import nn

from hessian import Objective
from landscape import Line, Plan, evaluate
from landscape.max_pooling import poolings, sliced_forwards
from landscape.stand_ins import standing_in


def images(*, height=7, width=10, nan=False):
    x = torch.randn(3, 5, height, width, generator=torch.Generator().manual_seed(0))
    if nan:
        x[0, 0, 0, 1] = torch.nan
        x[1, 1] = -torch.inf
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", [1, 2, 3, (2, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("nan", [False, True], ids=["finite", "not-finite"])
def test_maxima_are_those_of_torch(kernel, nan):
    pool, x = nn.MaxPool2d(kernel), images(nan=nan)
    expected = pool(x)
    with standing_in(sliced_forwards(pool)):
        assert "forward" in vars(pool)
        found = pool(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert "forward" not in vars(pool)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.AvgPool2d(2),
    ],
    ids=["overlap", "padding", "dilation", "ceil", "indices", "average"],
)
def test_other_poolings_are_left_to_torch(pool):
    assert poolings(pool) == []


def test_other_layouts_and_windows_larger_than_the_image_are_left_to_torch(monkeypatch):
    pool = nn.MaxPool2d(8)
    called = []
    monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, x: called.append(x.shape) or x)
    with standing_in(sliced_forwards(pool)):
        pool(images())
        pool(images(height=16, width=16).contiguous())
        assert len(called) == 2
        pool(images(height=16, width=16))
    assert len(called) == 2


def test_forward_is_put_back_after_an_error():
    pool = nn.MaxPool2d(2)
    with pytest.raises(KeyError), standing_in(sliced_forwards(pool)):
        raise KeyError
    assert "forward" not in vars(pool)


def test_a_plan_with_channels_last_pools_by_slices(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
    )
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 0, 1, 1, 0])
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    w = objective.weights()
    line = Line(w, w + 0.1)
    plain = evaluate(objective, line, [0.0, 0.5, 1.0], speed="plain")

    def refuse(self, x):
        raise AssertionError

    monkeypatch.setattr(nn.MaxPool2d, "forward", refuse)
    plan = Plan(channels_last=True, deviation=0.0)
    found = evaluate(objective, line, [0.0, 0.5, 1.0], speed=plan)
    torch.testing.assert_close(found.mean, plain.mean, rtol=1e-6, atol=0)
    with pytest.raises(AssertionError):
        evaluate(objective, line, [0.0], speed=Plan(deviation=0.0))
