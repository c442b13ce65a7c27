"""The first layer's output, combined instead of computed: where it holds, and where it must not."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import Objective
from landscape import BezierCurve, Line, Plan, Plane, evaluate, grid
from landscape.first_layer import find_first_layer
from tests.cases import seeded

REUSE = Plan(reuse_first_layer=True)
GRID = grid(torch.linspace(0, 1, 3), torch.linspace(-1, 1, 4))


class Positions(nn.Module):
    """Adds weights of its own to the input before the first layer sees it."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1, 6, 6))
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.conv(x + self.shift).flatten(1)


class Twice(nn.Module):
    """Runs its first layer two times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(36, 36)

    def forward(self, x):
        return self.layer(torch.relu(self.layer(x.flatten(1))))


class Shared(nn.Module):
    """Uses the first layer's matrix again, as a tied decoder."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(36, 5, bias=False)

    def forward(self, x):
        return torch.tanh(self.layer(x.flatten(1))) @ self.layer.weight


SUITS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 2)),
    "inplace": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)
    ),
    "cnn": lambda: nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(1, 3, 2, padding=1, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(48, 2),
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    ),
    "shared": Shared,
}  # fmt: skip
DOES_NOT = {
    "weights before": Positions,
    "twice": Twice,
    "batch norm first": lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.Flatten()),
    "recurrent": lambda: nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (6, 6)), nn.RNN(6, 2, batch_first=True)
    ),
}


def build(kind):
    x = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = seeded((SUITS | DOES_NOT)[kind]).eval()
    objective = Objective(
        model, lambda o, t: (first(o).flatten(1) ** 2).mean(dim=1), (x, x), batch_size=4
    )
    return objective, objective.weights()


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("kind", SUITS)
@pytest.mark.parametrize("shape", ["plane", "line", "bezier"])
def test_combined_outputs_give_the_same_loss(kind, shape):
    objective, w = build(kind)
    u, v = torch.randn(2, len(w), generator=torch.Generator().manual_seed(2), dtype=w.dtype)
    path, points = {
        "plane": (Plane(w, u, v), GRID),
        "line": (Line(w, u), [0.0, 0.3, 1.0, 1.5]),
        "bezier": (BezierCurve(torch.stack([w, u, v])), [0.0, 0.3, 1.0]),
    }[shape]
    before = dict(vars(objective.model))
    plain = evaluate(objective, path, points, speed="plain")
    found = evaluate(objective, path, points, speed=REUSE)
    assert_close(found.total, plain.total, rtol=1e-12, atol=1e-12)
    assert_close(found.total_squares, plain.total_squares, rtol=1e-12, atol=1e-12)
    assert vars(objective.model) == before
    assert all(
        "forward" not in vars(m) and not m._forward_pre_hooks for m in objective.model.modules()
    )


@pytest.mark.parametrize("kind", DOES_NOT)
def test_layers_that_are_not_affine_in_the_weights_alone_are_left_to_the_model(kind):
    objective, _ = build(kind)
    assert find_first_layer(objective, next(objective.batches())) is None


@pytest.mark.parametrize("kind", SUITS)
def test_weights_that_something_else_uses_are_known(kind):
    objective, _ = build(kind)
    layer = find_first_layer(objective, next(objective.batches()))
    assert layer.alone == (kind != "shared")


def test_a_frozen_first_layer_is_left_to_the_model():
    x = torch.ones(4, 36).double()
    model = build("mlp")[0].model
    objective = Objective(model, lambda o, t: (o**2).mean(dim=1), (x, x), parameters="3.*")
    assert find_first_layer(objective, (x, x)) is None


def test_the_layer_comes_back_after_an_exception():
    objective, w = build("mlp")

    class Stops:
        calls = 0

        def __call__(self, output, target):
            self.calls += 1
            if self.calls > 4:
                raise ZeroDivisionError("planned")
            return (output**2).mean(dim=1)

    x = torch.ones(4, 36).double()
    failing = Objective(objective.model, Stops(), (x, x))
    with pytest.raises(ZeroDivisionError):
        evaluate(failing, Line(w, 2 * w), [0.0, 0.5, 1.0], speed=REUSE)
    assert all("forward" not in vars(module) for module in objective.model.modules())


@pytest.mark.parametrize(
    ("option", "words"),
    [({"batch_size": 0}, "`batch_size` must be at least 1"), ({"threads": -1}, "`threads` must")],
)
def test_plans_out_of_range_are_refused(option, words):
    with pytest.raises(ValueError, match=words):
        Plan(**option)
