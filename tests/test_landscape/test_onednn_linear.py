"""Linear layers by oneDNN: the same function, taken only where it fits."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import Objective
from landscape import Line, Plan, evaluate
from landscape.onednn_linear import onednn_forwards
from landscape.stand_ins import standing_in

ONEDNN = Plan(onednn_linear=True)
POINTS = [0.0, 0.5, 1.0]


def problem(dtype=torch.float32, model=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 30, generator=generator, dtype=dtype)
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(30, 20), nn.Tanh(), nn.Flatten(), nn.Linear(60, 10, bias=False)
        )
    objective = Objective(model.to(dtype), nn.MSELoss(), (x, torch.ones(50, 10, dtype=dtype)))
    w = objective.weights()
    return objective, Line(w, -0.5 * w)


@pytest.mark.parametrize("shape", [(30,), (7, 30), (2, 7, 30), (2, 3, 4, 30), (0, 30)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_those_of_torch(shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 20, bias=bias), torch.randn(shape)
    expected = layer.double()(x.double())
    layer.float()
    objective = Objective(layer, nn.MSELoss(), (torch.ones(1, 30), torch.ones(1, 20)))
    with torch.no_grad(), standing_in(onednn_forwards(objective)):
        assert "forward" in vars(layer)
        found = layer(x)
    assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_losses_are_those_of_the_plain_way():
    objective, line = problem()
    plain = evaluate(objective, line, POINTS, speed="plain")
    found = evaluate(objective, line, POINTS, speed=ONEDNN)
    assert_close(found.mean, plain.mean, rtol=1e-6, atol=0)
    assert found.provenance["plan"]["onednn_linear"]
    assert all("forward" not in vars(module) for module in objective.model.modules())


def test_every_batch_goes_through_onednn(monkeypatch):
    objective, line = problem()
    seen, real = [], torch.Tensor.to_mkldnn
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda x: seen.append(tuple(x.shape)) or real(x))
    evaluate(objective, line, [0.0, 1.0], speed=Plan(onednn_linear=True, deviation=0.0))
    assert seen == 2 * [(50, 3, 30), (50, 60)]
    evaluate(objective, line, [0.0], speed=Plan(deviation=0.0))
    assert len(seen) == 4


def test_what_onednn_does_not_take_is_left_to_torch(monkeypatch):
    with pytest.warns(UserWarning, match="zero-element"):
        layers = nn.Linear(30, 20), nn.Linear(0, 4), nn.Linear(3, 3)
    layers[2].forward = lambda x: 2 * x
    model = nn.Sequential(layers[0])
    objective = Objective(model, nn.MSELoss(), (torch.ones(1, 30), torch.ones(1, 20)))
    model.extend(layers[1:])
    forwards = onednn_forwards(objective)
    assert list(forwards) == [layers[0]]
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", None)
    x = torch.randn(1, 1, 2, 1, 2, 30)
    with torch.no_grad(), standing_in(forwards):
        assert layers[0](x).shape == (1, 1, 2, 1, 2, 20)
        assert layers[0](input=x[0]).shape == (1, 2, 1, 2, 20)
        with pytest.raises(RuntimeError, match="dtype"):
            layers[0](x[0].bfloat16())


@pytest.mark.parametrize("kind", ["double", "no linear layer", "bfloat16"])
def test_where_it_does_not_fit_it_is_refused(kind):
    objective, line = problem(
        torch.float64 if kind == "double" else torch.float32,
        nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 90)), nn.Conv1d(1, 1, 81), nn.Flatten())
        if kind == "no linear layer"
        else None,
    )
    precision = "bfloat16" if kind == "bfloat16" else "full"
    plan = Plan(onednn_linear=True, precision=precision)
    with pytest.raises(ValueError, match="`speed` must be a plan that fits"):
        evaluate(objective, line, POINTS, speed=plan, precision=precision)
