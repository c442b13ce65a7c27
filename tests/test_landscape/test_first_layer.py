"""The first layer's output, combined instead of computed: where it holds, and where it must not."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm
from torch.testing import assert_close

from hessian import Objective
from landscape import BezierCurve, Line, Plan, Plane, evaluate, grid
from landscape.combinations import combine_
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


class Skips(nn.Module):
    """Shows the first layer's outputs to something else too, by a weight that is 0 at first."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 3, 3), nn.MaxPool2d(2)
        self.share = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        nn.init.zeros_(self.share.weight)

    def forward(self, x):
        c = self.conv(x)
        return (self.pool(c) + self.share(c)[..., ::2, ::2]).flatten(1)


class Changed(nn.Module):
    """Changes the first layer's outputs before a pooling; in place only where they are low."""

    def __init__(self, inplace):
        super().__init__()
        self.conv, self.pool, self.inplace = nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), inplace
        self.relu = nn.ReLU()

    def forward(self, x):
        c = self.conv(x)
        c = c.masked_fill_(c < -4, 9.0) if self.inplace else c.abs()
        return self.pool(self.relu(c)).flatten(1)


class OnePooling(nn.Module):
    """Pools twice with one module, the first layer's outputs first or the images."""

    def __init__(self, images=False):
        super().__init__()
        self.conv, self.pool, self.images = nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), images
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.pool(x) if self.images else x
        x = self.pool(self.relu(self.conv(x)))
        return (x if self.images else self.pool(torch.tanh(x))).flatten(1)


class Looks(nn.Module):
    """Does something with the first layer's outputs beside pooling them."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.pool, self.what = nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), what

    def forward(self, x):
        c = self.conv(x)
        if self.what == "counts":
            return self.pool(c).flatten(1) + (c < -4).sum()
        if self.what == "knows the size":
            assert c.shape[-1] == 4
        if self.what == "uses the size":
            return self.pool(c).flatten(1) * c.shape[-1]
        return self.pool(input=c).flatten(1)


class Shared(nn.Module):
    """Uses the first layer's matrix again, as a tied decoder."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(36, 5, bias=False)

    def forward(self, x):
        return torch.tanh(self.layer(x.flatten(1))) @ self.layer.weight


def hooked(i):
    """A chain in which something else runs after a layer."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model[i].register_forward_hook(lambda _, __, out: torch.where(out > 4, 0.0, out))
    return model


def patched(i):
    """A chain in which a layer has a forward of its own."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    real = model[i].forward
    model[i].forward = lambda x: torch.sin(real(x))
    return model


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
    "pooled, odd": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.MaxPool2d((2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)
    ),
    "relu, pooled": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    ),
    "inplace, pooled": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU6(inplace=True), nn.MaxPool2d(2), nn.Flatten()
    ),
    "tanh, pooled": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()
    ),
    "one pooling": OnePooling,
    "images pooled too": lambda: OnePooling(images=True),
    "skips": Skips,
    "counts": lambda: Looks("counts"),
    "knows the size": lambda: Looks("knows the size"),
    "uses the size": lambda: Looks("uses the size"),
    "by name": lambda: Looks("by name"),
    "hooked": lambda: hooked(1),
    "patched": lambda: patched(1),
    "changed": lambda: Changed(inplace=False),
    "changed in place": lambda: Changed(inplace=True),
}  # fmt: skip
POOLED = {"pooled, odd", "relu, pooled", "inplace, pooled", "one pooling"}
"""Those of them in which only a max pooling sees the first layer's outputs."""
DOES_NOT = {
    "spectral norm": lambda: nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(36, 4))),
    "hooked first": lambda: hooked(0),
    "patched first": lambda: patched(0),
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
@pytest.mark.parametrize("channels_last", [False, True], ids=["usual", "channels last"])
def test_combined_outputs_give_the_same_loss(kind, shape, channels_last):
    objective, w = build(kind)
    u, v = torch.randn(2, len(w), generator=torch.Generator().manual_seed(2), dtype=w.dtype)
    path, points = {
        "plane": (Plane(w, u, v), GRID),
        "line": (Line(w, u), [0.0, 0.3, 1.0, 1.5]),
        "bezier": (BezierCurve(torch.stack([w, u, v])), [0.0, 0.3, 1.0]),
    }[shape]
    before = [dict(vars(m)) for m in objective.model.modules()]
    plain = evaluate(objective, path, points, speed="plain")
    plan = replace(REUSE, channels_last=channels_last)
    found = evaluate(objective, path, points, speed=plan)
    assert_close(found.total, plain.total, rtol=1e-12, atol=1e-12)
    assert_close(found.total_squares, plain.total_squares, rtol=1e-12, atol=1e-12)
    assert [dict(vars(m)) for m in objective.model.modules()] == before


@pytest.mark.parametrize("kind", DOES_NOT)
def test_layers_that_are_not_affine_in_the_weights_alone_are_left_to_the_model(kind):
    objective, _ = build(kind)
    assert find_first_layer(objective, next(objective.batches()), objective.weights()) is None


@pytest.mark.parametrize("kind", SUITS)
def test_weights_that_something_else_uses_are_known(kind):
    objective, _ = build(kind)
    layer = find_first_layer(objective, next(objective.batches()), objective.weights())
    assert layer.alone == (kind != "shared")


@pytest.mark.parametrize("kind", SUITS)
def test_outputs_that_only_a_max_pooling_sees_are_known(kind):
    objective, _ = build(kind)
    layer = find_first_layer(objective, next(objective.batches()), objective.weights())
    assert (layer.pooling is not None) == (kind in POOLED)


def test_a_frozen_first_layer_is_left_to_the_model():
    x = torch.ones(4, 36).double()
    model = build("mlp")[0].model
    objective = Objective(model, lambda o, t: (o**2).mean(dim=1), (x, x), parameters="3.*")
    assert find_first_layer(objective, (x, x), objective.weights()) is None


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


def test_hooks_see_what_they_always_see():
    objective, w = build("relu, pooled")
    shapes = set()
    objective.model[1].register_forward_hook(lambda _, __, out: shapes.add(tuple(out.shape[1:])))
    evaluate(objective, Line(w, 2 * w), [0.0, 1.0], speed=REUSE)
    assert shapes == {(3, 4, 4)}


def test_along_a_row_only_the_last_vector_is_added(monkeypatch):
    objective, w = build("relu, pooled")
    u, v = torch.randn(2, len(w), generator=torch.Generator().manual_seed(2), dtype=w.dtype)
    fronts = []

    def noted(out, vectors, coefficients):
        fronts.append(coefficients)
        return combine_(out, vectors, coefficients)

    monkeypatch.setattr("landscape.reused_outputs.combine_", noted)
    plan = replace(REUSE, deviation=0.0)
    evaluate(objective, Plane(w, u, v), GRID, speed=plan)
    num_batches, places, rows = 3, 4, 3
    assert len(fronts) == num_batches * places * rows


def test_outputs_that_are_not_finite_are_not_combined():
    objective, w = build("mlp")
    end = w.clone()
    end[0] = torch.inf
    points = [0.0, 0.5]
    plain = evaluate(objective, Line(w, end), points, speed="plain")
    assert plain.mean[0].isfinite() and plain.num_nonfinite == 1
    with pytest.raises(ValueError, match="`speed` must be a plan that fits"):
        evaluate(objective, Line(w, end), points, speed=REUSE)
