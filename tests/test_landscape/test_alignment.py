"""Moved units compute the same function, and networks that are permutations of each other meet."""

import copy
import itertools

import jaxtyping
import pytest
import torch
from torch import nn

from flatvalley.models.lenet import lenet_5
from flatvalley.models.resnet import resnet20, resnet50
from hessian import Objective
from landscape import Line, Permutations, align, barrier
from tests.cases import seeded


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Flatten(),
        nn.BatchNorm1d(24), nn.Linear(24, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Branches that share a permutation, one through a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 6, 3, padding=1)
        self.skip = nn.Conv2d(6, 6, 1)
        self.head, self.last = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        for _ in range(2):
            x = torch.relu(self.outer(torch.relu(self.inner(x))) + self.skip(x))
        x = x[:, :, ::2, ::2].mean(dim=(2, 3))
        return self.last(torch.tanh(self.head(x)).view(x.size(0), -1))


class Odd(nn.Module):
    """Operations that no permutation of hidden units survives."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.d, self.e = nn.Linear(6, 6), nn.Linear(6, 2)
        self.grouped = nn.Conv1d(6, 6, 1, groups=2)

    def forward(self, x):
        x = torch.relu(self.a(x.flatten(1)[:, :4]))
        x = torch.cumsum(self.b(x), dim=1)
        x = torch.relu(self.c(x))
        x = nn.functional.linear(x, self.d.weight)  # not through the module
        x = self.grouped(torch.relu(self.d(x))[:, :, None]).flatten(1)
        return self.e(x)


INPUTS = {
    mlp: (5, 3, 2, 2),
    cnn: (5, 3, 10, 10),
    Residual: (5, 3, 6, 6),
    Odd: (5, 3, 2, 2),
    lambda: lenet_5(seed=0): (2, 1, 28, 28),
    lambda: resnet20(seed=0): (2, 3, 16, 16),
}
MODELS = [pytest.param(build, shape, id=str(i)) for i, (build, shape) in enumerate(INPUTS.items())]


@pytest.fixture(autouse=True)
def untyped_calls():
    """The tracer passes stand-ins for tensors, which checks of annotations would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def trained_like(build, seed):
    """A model in float64 with nothing at its initial value, running statistics included."""
    model = seeded(build, seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.add_(noise, alpha=0.1)
    return model


def shuffled(model, seed=0):
    """The same function with all hidden units that can move moved at random."""
    groups = Permutations.of(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    generator = torch.Generator().manual_seed(seed)
    orders = {g: torch.randperm(n, generator=generator) for g, n in groups.sizes(tensors).items()}
    other = copy.deepcopy(model)
    mine = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        for name, tensor in groups.permuted(tensors, orders).items():
            mine[name].copy_(tensor)
    return other


@pytest.mark.parametrize(("build", "shape"), MODELS)
def test_moving_units_does_not_change_the_function(build, shape):
    model = trained_like(build, 1)
    other = shuffled(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-9, atol=1e-9)


def test_groups_of_an_mlp():
    assert Permutations.of(seeded(mlp)).axes == {
        "1.weight": ("p0", None), "1.bias": ("p0",),
        "3.weight": ("p1", "p0"), "3.bias": ("p1",),
        "5.weight": (None, "p1"), "5.bias": (None,),
    }  # fmt: skip


def test_groups_of_branches_that_are_added_are_one():
    axes = Permutations.of(seeded(Residual)).axes
    stream = axes["stem.weight"][0]
    assert stream is not None
    assert axes["norm.running_var"] == (stream,)
    assert axes["skip.weight"][:2] == (stream, stream)
    assert axes["outer.weight"][0] == stream
    assert axes["inner.weight"][1] == stream
    assert axes["inner.weight"][0] == axes["outer.weight"][1] != stream
    assert axes["head.weight"] == (axes["last.weight"][1], stream)
    assert axes["last.weight"][0] is None


def test_units_in_unknown_operations_stay():
    axes = Permutations.of(seeded(Odd)).axes
    assert axes["a.weight"] == (axes["b.weight"][1], None)
    assert axes["a.weight"][0] is not None
    fixed = [n for n, groups in axes.items() if not n.startswith("a.") and n != "b.weight"]
    assert all(not any(axes[name]) for name in fixed), axes


def test_most_units_of_a_residual_network_move():
    with torch.device("meta"):  # the graph needs no numbers
        model = resnet50(seed=0)
    axes = Permutations.of(model).axes
    moving = [n for n, groups in axes.items() if n.endswith("weight") and groups[0] is not None]
    total = [n for n in axes if n.endswith("weight")]
    assert len(moving) == len(total) - 1  # all but the classes


@pytest.mark.parametrize("build", [mlp, cnn, Residual])
def test_a_shuffled_copy_comes_back_exactly(build):
    model = trained_like(build, 3)
    other = shuffled(model, seed=4)
    found = align(model, other)
    assert found.converged
    assert found.distance_before > 1
    assert found.distance == pytest.approx(0, abs=1e-12)
    back = found.apply(other)
    for name, tensor in back.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


def test_one_hidden_layer_gets_the_best_of_all_orders():
    """By enumeration of all 120 orders."""
    build = lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))  # noqa: E731
    a, b = seeded(build, 0), seeded(build, 1)
    groups = Permutations.of(a)
    flat = [torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (a, b)]
    best = min(
        float(
            torch.cat(
                [
                    (p - q).reshape(-1)
                    for p, q in zip(
                        a.parameters(),
                        groups.permuted(
                            dict(b.named_parameters()), {"p0": torch.tensor(order)}
                        ).values(),
                        strict=True,
                    )
                ]
            )
            .detach()
            .norm()
        )
        for order in itertools.permutations(range(5))
    )
    found = align(a, b)
    assert found.distance == pytest.approx(best, rel=1e-12)
    assert found.distance_before == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-12)
    moved = found.apply(flat[1])
    assert float((moved - flat[0]).norm()) == pytest.approx(best, rel=1e-12)


def test_the_ridge_between_permuted_networks_is_gone(permuted_nets):
    objective, start, end = permuted_nets
    moved = align(objective, end, at=start).apply(end)
    torch.testing.assert_close(moved, start)
    assert barrier(objective, Line(start, end)).excess_over_chord.value > 0.05
    assert abs(barrier(objective, Line(start, moved)).excess_over_chord.value) < 1e-12


def test_distance_never_grows_and_seeds_only_change_the_way():
    a, b = trained_like(cnn, 5), trained_like(cnn, 6)
    found = [align(a, b, seed=s) for s in (0, 0, 1)]
    assert found[0].distance == found[1].distance < found[0].distance_before
    one = align(a, b, max_sweeps=1)
    assert not one.converged
    assert one.distance >= found[0].distance * (1 - 1e-12)


def test_sparsity_and_everything_else_is_left_as_found():
    a, b = trained_like(cnn, 5), trained_like(cnn, 6)
    with torch.no_grad():
        b[0].weight[b[0].weight.abs() < 0.1] = 0
    before = [t.clone() for m in (a, b) for t in m.state_dict().values()]
    state = torch.get_rng_state()
    moved = align(a, b).apply(b)
    after = [t for m in (a, b) for t in m.state_dict().values()]
    assert all(torch.equal(s, t) for s, t in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert int((moved[0].weight == 0).sum()) == int((b[0].weight == 0).sum())


def test_units_with_frozen_weights_stay_in_a_flat_vector():
    model = trained_like(mlp, 0)
    x = torch.ones(2, 12, dtype=torch.float64)
    objective = Objective(model, nn.MSELoss(), (x, x[:, :3]), parameters=["3.*", "5.*"])
    w = objective.weights()
    found = align(objective, w.flip(0))
    assert set(found.orders) == {"p1"}  # those of p0 come from layer 1, which is not in the vector


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match=r"`1.weight` has shape \[7, 12\] in `a` and none in `b`"):
        align(seeded(mlp), seeded(lambda: nn.Sequential(nn.Linear(12, 8))))
    with pytest.raises(ValueError, match="one entry for each of the"):
        align(seeded(mlp), torch.zeros(3).double())


def test_a_model_that_cannot_be_traced_says_what_to_do():
    class Branching(nn.Linear):
        def forward(self, x):
            return x if x.sum() > 0 else super().forward(x)

    with pytest.raises(ValueError, match="Write down its `Permutations` by hand"):
        Permutations.of(nn.Sequential(Branching(2, 2)))


def test_groups_written_by_hand_must_fit():
    model = seeded(mlp)
    wrong = Permutations({"1.weight": ("h", None), "3.weight": ("h", None)})
    with pytest.raises(ValueError, match=r"group h has 5 channels and 1\.weight, axis 0 has 7"):
        align(model, model, permutations=wrong)
    with pytest.raises(ValueError, match="`permutations` names `x`, which the model does not have"):
        align(model, model, permutations=Permutations({"x": ("h",)}))
