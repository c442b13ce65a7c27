"""What batch norm normalises by at a point, against networks moved there by hand."""

import copy
import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close

from hessian import Objective
from landscape import BatchNorm, BatchNormWarning, Line, Plane, evaluate, grid, sweep
from tests.cases import seeded


def build(seed):
    layers = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
        ),
        seed,
    )
    model = layers.double().eval()
    generator = torch.Generator().manual_seed(seed)
    model[1].running_mean += torch.randn(3, generator=generator, dtype=torch.float64)
    model[1].running_var *= 1 + torch.rand(3, generator=generator, dtype=torch.float64)
    return model


@pytest.fixture
def ends():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 1, 6, 6, generator=generator, dtype=torch.float64) + 0.7
    y = torch.randint(0, 2, (40,), generator=generator)
    models = build(1), build(2)
    criterion = nn.CrossEntropyLoss()
    objectives = [Objective(model, criterion, (x, y), batch_size=16) for model in models]
    line = Line(*(objective.weights() for objective in objectives))
    return objectives[0], models, line, x, y


def moved(objective, w):
    """A copy of the model with these weights."""
    model = copy.deepcopy(objective.model)
    nn.utils.vector_to_parameters(w, model.parameters())
    return model


def loss_of(model, x, y):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y)


def test_recomputed_statistics_are_those_of_the_point(ends):
    objective, _, line, x, y = ends
    found = evaluate(objective, line, [0.0, 0.3, 1.0], batch_norm=BatchNorm(num_samples=40)).mean
    for t, value in zip([0.0, 0.3, 1.0], found, strict=True):
        model = moved(objective, line(t))
        with torch.no_grad():
            arriving = model[0](x)
        model[1].running_mean.copy_(arriving.mean(dim=(0, 2, 3)))
        model[1].running_var.copy_(arriving.transpose(0, 1).flatten(1).var(dim=1))
        assert_close(value, loss_of(model, x, y))


def test_the_subset_is_random_fixed_and_recorded(ends):
    objective, _, line, x, y = ends
    one, same, other = (
        evaluate(objective, line, [0.3], batch_norm=BatchNorm(num_samples=10, seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.total, same.total) and not torch.equal(one.total, other.total)
    assert one.provenance["batch norm"] == "recompute on 10 samples, seed 0"
    # Sorted data are not cut off: a test that the first ten samples are not the subset.
    first = Objective(objective.model, nn.CrossEntropyLoss(), (x[:10], y[:10]))
    cut = BatchNorm(num_samples=10, data=first)
    assert not torch.equal(one.total, evaluate(objective, line, [0.3], batch_norm=cut).total)


def test_the_cut_of_the_data_does_not_matter_to_recomputed_statistics(ends):
    objective, _, line, x, y = ends
    whole = Objective(objective.model, nn.CrossEntropyLoss(), (x, y))
    policy = BatchNorm(num_samples=25)
    assert_close(
        evaluate(whole, line, [0.3], batch_norm=policy).mean,
        evaluate(objective, line, [0.3], batch_norm=policy).mean,
    )


def test_large_subsets_are_averaged_by_samples(ends, monkeypatch):
    """40 samples in pieces of 13, 13 and 14."""
    monkeypatch.setattr("landscape.batch_norm.BATCH", 15)
    objective, _, line, x, y = ends
    found = evaluate(objective, line, [0.3], batch_norm=BatchNorm(num_samples=40)).mean
    model = moved(objective, line(0.3))
    with torch.no_grad():
        parts = [model[0](part) for part in x.split([13, 13, 14])]
    shares = [len(part) / 40 for part in parts]
    model[1].running_mean.copy_(
        sum(s * part.mean(dim=(0, 2, 3)) for s, part in zip(shares, parts, strict=True))
    )
    model[1].running_var.copy_(
        sum(
            s * part.transpose(0, 1).flatten(1).var(dim=1)
            for s, part in zip(shares, parts, strict=True)
        )
    )
    assert_close(found[0], loss_of(model, x, y))


def test_test_loss_is_normalised_by_training_images(ends):
    objective, _, line, x, y = ends
    train = Objective(objective.model, nn.CrossEntropyLoss(), (x[:30], y[:30]))
    test = Objective(objective.model, nn.CrossEntropyLoss(), (x[30:], y[30:]))
    both = sweep({"train": train, "test": test}, line, [0.0, 0.6])
    alone = evaluate(test, line, [0.0, 0.6], batch_norm=BatchNorm(data=train))
    assert torch.equal(both["test", "loss"].total, alone.total)
    assert not torch.equal(alone.total, evaluate(test, line, [0.0, 0.6]).total)


def test_interpolated_statistics_are_those_of_both_ends_and_their_mean(ends):
    objective, models, line, x, y = ends
    policy = BatchNorm("interpolated", ends=tuple(model.state_dict() for model in models))
    found = evaluate(objective, line, [0.0, 0.5, 1.0], batch_norm=policy).mean
    assert_close(found[0], loss_of(models[0], x, y))
    assert_close(found[2], loss_of(models[1], x, y))
    middle = moved(objective, line(0.5))
    for name in ("running_mean", "running_var"):
        a, b = (getattr(model[1], name) for model in models)
        getattr(middle[1], name).copy_((a + b) / 2)
    assert_close(found[1], loss_of(middle, x, y))


@pytest.mark.filterwarnings("ignore:The model has running statistics")
def test_frozen_statistics_are_the_models_own(ends):
    objective, models, line, x, y = ends
    found = evaluate(objective, line, [0.0, 1.0], batch_norm="frozen").mean
    assert_close(found[0], loss_of(models[0], x, y))
    assert_close(found[1], loss_of(moved(objective, line(1.0)), x, y))


def test_batch_statistics_follow_the_cut(ends):
    objective, _, line, x, y = ends
    model = moved(objective, line(0.4)).train()
    expected = sum(
        len(part) * loss_of(model, part, z)
        for part, z in zip(x.split(16), y.split(16), strict=True)
    )
    assert_close(evaluate(objective, line, [0.4], batch_norm="batch").mean[0], expected / 40)


def trained_on_digits(seed, x, y):
    def layers():
        hidden = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU()
        again = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()
        return nn.Sequential(*hidden, *again, nn.Linear(32, 10))

    model = seeded(layers, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(150):
        index = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


def test_between_two_trainings_frozen_is_above_interpolated_is_above_recomputed():
    """Of 512 samples, where all 1,797 give the same barrier within a few per cent."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16 - 0.3)
    y = torch.tensor(digits.target)
    highest = torch.zeros(4, dtype=torch.float64)
    for seeds in ((4, 5), (6, 7), (8, 9)):
        a, b = (trained_on_digits(seed, x, y) for seed in seeds)
        objective = Objective(a, nn.CrossEntropyLoss(), (x, y))
        line = Line(*(nn.utils.parameters_to_vector(m.parameters()).detach() for m in (a, b)))
        policies = (
            BatchNorm("frozen"),
            BatchNorm("interpolated", ends=(a.state_dict(), b.state_dict())),
            BatchNorm("recompute"),
            BatchNorm("recompute", num_samples=len(x)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BatchNormWarning)
            for k, policy in enumerate(policies):
                found = evaluate(objective, line, torch.linspace(0, 1, 9), batch_norm=policy)
                highest[k] += found.mean.max()
    frozen, interpolated, few, all_samples = highest.tolist()
    assert frozen > 1.1 * interpolated > 1.5 * few
    assert few == pytest.approx(all_samples, rel=0.05)


@pytest.mark.parametrize("kind", ["recompute", "batch", "interpolated", "frozen"])
@pytest.mark.filterwarnings("ignore:The model has running statistics")
def test_the_model_keeps_buffers_modes_and_momenta(ends, kind):
    objective, models, line, _, _ = ends
    ends_of = tuple(m.state_dict() for m in models) if kind == "interpolated" else None
    layer = objective.model[1]
    before = {k: v.clone() for k, v in objective.model.state_dict().items()}
    identities = [id(b) for b in objective.model.buffers()]
    evaluate(objective, line, [0.0, 0.7], batch_norm=BatchNorm(kind, ends=ends_of))
    after = objective.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert identities == [id(b) for b in objective.model.buffers()]
    assert not layer.training and layer.momentum == 0.1


def test_derivatives_are_taken_with_the_statistics_of_the_point(ends):
    objective, _, line, x, y = ends
    found = sweep(
        objective, line, [0.3], metrics=("gradient_norm",), batch_norm=BatchNorm(num_samples=40)
    )
    model = moved(objective, line(0.3))
    with torch.no_grad():
        arriving = model[0](x)
    model[1].running_mean.copy_(arriving.mean(dim=(0, 2, 3)))
    model[1].running_var.copy_(arriving.transpose(0, 1).flatten(1).var(dim=1))
    nn.functional.cross_entropy(model(x), y).backward()
    norm = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm()
    assert_close(found["objective", "gradient_norm"].mean[0], norm)


def test_instance_norm_is_frozen_under_every_policy_and_warned_about():
    model = nn.Sequential(
        nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3), nn.Flatten()
    )
    x = torch.ones(6, 3, 4).double()
    objective = Objective(model.double().eval(), lambda o, t: (o**2).mean(dim=1), (x, x))
    w = objective.weights()
    with pytest.warns(BatchNormWarning, match="running statistics in `0`. They"):
        evaluate(objective, Line(w, w + 1), [0.5])


def test_bad_policies_are_named(ends):
    objective, models, line, _, _ = ends
    with pytest.raises(ValueError, match="`num_samples` must be at least 2"):
        BatchNorm(num_samples=1)
    with pytest.raises(ValueError, match="`ends` must be the state dicts of both end models"):
        BatchNorm("interpolated")
    states = models[0].state_dict(), {}
    with pytest.raises(ValueError, match=r"`ends\[1\]` .* `1.running_mean` is missing"):
        evaluate(objective, line, [0.5], batch_norm=BatchNorm("interpolated", ends=states))
    w = objective.weights()
    plane = Plane(w, torch.ones_like(w), torch.linspace(-1, 1, len(w), dtype=w.dtype))
    policy = BatchNorm("interpolated", ends=(states[0], states[0]))
    with pytest.raises(ValueError, match="needs a path with two ends, got a plane"):
        evaluate(objective, plane, grid([0.0], [0.0]), batch_norm=policy)
    with pytest.raises(
        ValueError, match='`metrics` must be loss or error with `batch_norm="batch"'
    ):
        sweep(objective, line, [0.5], metrics=("gradient_norm",), batch_norm="batch")
