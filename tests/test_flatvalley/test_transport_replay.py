"""Transport scores of a replayed training: explicit Hessians, gRDA itself, and what is refused."""

import json
import math
import os
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from flatvalley.batches import ResidentBatches
from flatvalley.data import Dataset, load_dataset
from flatvalley.dense_network import load_dense
from flatvalley.models.mlp import digits_mlp
from flatvalley.pruners import pruner
from flatvalley.pruning_problem import PruningProblem
from flatvalley.studies.compare_rows import parse_row
from flatvalley.studies.prune_sources import from_train_run
from flatvalley.train_config import TrainConfig
from flatvalley.training import train
from flatvalley.transport_replay import TransportReplay
from tests.program import flatvalley, rows

MU = 0.7


def samples(*shape, classes=3):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(52, *shape, generator=generator, dtype=torch.float64)
    y = x.flatten(1)[:, :classes].argmax(1)
    return Dataset("small", x[:40], y[:40], x[40:], y[40:], classes)


def started(build):
    def make():
        torch.manual_seed(3)
        return build()

    return make


class Warming(nn.Module):
    """Grows with its own count of the steps it saw, which a replay must not disturb."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count += 1
        return x * (1 + 0.05 * self.count)


@started
def smooth():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@started
def noisy():
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.BatchNorm1d(8),
        Warming(),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(8, 3),
    )


@started
def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 3, 3),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


CASES = {
    "smooth": (smooth, (5,), {"schedule": "step:at=1/3,factor=0.3"}),
    "noisy": (noisy, (5,), {"schedule": "cosine", "warmup": 1.0}),
    "convolutional": (convolutional, (2, 6, 6), {"augment": "crop-flip", "channels_last": True}),
}


def settings(**changed):
    given = {"epochs": 4, "batch_size": 12, "lr": 0.2, "precision": "float64", "threads": 1}
    return TrainConfig(**given | {"runs": ("sgd",), "seed": 2} | changed)


@pytest.fixture(scope="module", params=CASES)
def trained(request):
    """SGD beside a gRDA whose threshold is as good as infinitesimal, and the replay."""
    make, shape, changed = CASES[request.param]
    data, runs = samples(*shape), ("sgd", f"grda:c=1e-7,mu={MU}")
    result = train(settings(**changed, runs=runs), make_model=make, data=data)
    sgd, grda = (run.vector(make()) for run in result.runs)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    replayed = TransportReplay(settings(**changed), make, data).run(sgd, mu=MU)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    return sgd, grda, float(result.runs[1].row["threshold"]), replayed


def test_the_replay_ends_at_the_weights_bit_for_bit_and_counts_what_it_took(trained):
    *_, replayed = trained
    assert replayed.miss == 0.0
    assert replayed.num_steps == 4 * 4
    assert replayed.scores.num_products == 4 * 4 - 1
    assert replayed.scores.form == "transport"


def test_scores_are_the_derivative_of_grda_with_respect_to_its_threshold(trained):
    """Of the optimizer itself, with its schedule, batch statistics, dropout and augmentation."""
    sgd, grda, threshold, replayed = trained
    assert threshold > 0
    expected = -sgd.sign() * (grda - sgd) / threshold
    # Differences of weights round at 1e-16 over a threshold near 1e-7.
    assert_close(replayed.scores.values, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - 1).abs().max()) > 0.05  # not the soft threshold's


def test_scores_are_those_of_explicit_hessians():
    make, shape, changed = CASES["smooth"]
    data, config = samples(*shape), settings(**changed)
    batches = ResidentBatches(data.train_inputs, data.train_labels, 12, seed=2)
    parts = list(make().double().parameters())
    sizes, shapes = [p.numel() for p in parts], [p.shape for p in parts]
    w = torch.cat([p.detach().flatten() for p in parts])
    e, g = torch.zeros_like(w), 0.0
    for n in range(1, 17):
        x, y = batches.batch(n - 1)

        def loss(w, x=x, y=y):
            W1, b1, W2, b2 = (p.view(q) for p, q in zip(w.split(sizes), shapes, strict=True))
            return cross_entropy(torch.tanh(x @ W1.T + b1) @ W2.T + b2, y)

        lr = 0.2 * 0.3 ** ((n > 4) + (n > 12))
        e = e - lr * torch.func.hessian(loss)(w) @ (e - g * w.sign())
        g += lr ** (MU + 0.5) * (n**MU - (n - 1) ** MU)
        w = w - lr * torch.func.grad(loss)(w)
    replayed = TransportReplay(config, make, data).run(w, mu=MU)
    assert_close(replayed.scores.values, -w.sign() * (e - g * w.sign()) / g, rtol=0, atol=1e-12)
    assert 0 < replayed.miss < 1e-14


@pytest.fixture
def squares(monkeypatch):
    module = types.ModuleType("own_squares")
    module.mean = lambda: lambda output, target: ((output[:, 0] - target) ** 2).mean()
    monkeypatch.setitem(sys.modules, "own_squares", module)
    return "own_squares:mean"


def test_on_a_quadratic_the_replay_predicts_grda_exactly(squares):
    """No weight clips or changes its sign, which is what the transport leaves out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    slopes = torch.tensor([2.0, -3.0, 1.5, 2.5, -2.0, 1.0], dtype=torch.float64)
    y = (x @ slopes).round().long()
    data = Dataset("plane", x[:50], y[:50], x[50:], y[50:], 0)

    def make():
        model = nn.Linear(6, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, 1.0]]))
        return model

    changed = {"criterion": squares, "lr": 0.05, "schedule": "paper", "epochs": 10}
    config = settings(**changed, runs=("sgd", f"grda:c=0.05,mu={MU}"))
    result = train(config, make_model=make, data=data)
    sgd, grda = (run.vector(make()) for run in result.runs)
    g = float(result.runs[1].row["threshold"])
    replayed = TransportReplay(settings(**changed), make, data).run(sgd, mu=MU)
    predicted = sgd - g * replayed.scores.values * sgd.sign()
    assert float((grda - sgd).norm()) > 1e-3
    np.testing.assert_allclose(predicted.numpy(), grda.numpy(), atol=1e-13, rtol=0)


def test_steps_are_reported_to_the_end():
    make, shape, changed = CASES["smooth"]
    data, config = samples(*shape), settings(**changed)
    w = train(config, make_model=make, data=data).runs[0].vector(make())
    seen = []
    TransportReplay(config, make, data).run(w, progress=lambda *steps: seen.append(steps))
    assert seen == [(n, 16) for n in range(1, 17)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w * 1.01, r"ends 0\.0099 of their norm away from them, farthest in 0\.weight"),
        (lambda w: w[:-1], "must have 39 entries like the training, got 38"),
        (lambda w: w * math.nan, "ends nan of their norm away"),
    ],
)
def test_other_weights_than_those_of_the_training_are_refused(change, message):
    make, shape, changed = CASES["smooth"]
    data, config = samples(*shape), settings(**changed)
    w = train(config, make_model=make, data=data).runs[0].vector(make())
    with pytest.raises(ValueError, match=message):
        TransportReplay(config, make, data).run(change(w))


def test_weights_off_by_rounding_are_taken_and_the_miss_is_told():
    make, shape, changed = CASES["smooth"]
    data, config = samples(*shape), settings(**changed)
    w = train(config, make_model=make, data=data).runs[0].vector(make())
    assert TransportReplay(config, make, data).run(w * (1 + 1e-4)).miss == pytest.approx(
        1e-4, rel=1e-3
    )


@pytest.mark.parametrize(
    "run",
    ["sgd:momentum=0.9", "sgd:weight_decay=0.001", "grda:c=0.1", "magnitude:target=0.5"],
)
def test_trainings_that_the_theory_does_not_cover_are_refused(run):
    with pytest.raises(ValueError, match=r"plain sgd.*trained by " + run) as caught:
        TransportReplay(settings(runs=(run,))).require()
    assert "dp-filter and dp-projector" in str(caught.value)
    TransportReplay(settings(runs=("sgd:momentum=0.0,weight_decay=0.0,lr=0.3",))).require()


@pytest.mark.parametrize("mu", [0.5, 1.0, -1.0, math.nan])
def test_exponents_outside_the_theory_are_refused(mu):
    with pytest.raises(ValueError, match="`mu` must be between 1/2 and 1"):
        pruner(f"dp-transport:mu={mu}")
    with pytest.raises(ValueError, match="`mu` must be between 1/2 and 1"):
        TransportReplay(settings()).run(torch.ones(3), mu=mu)


def test_a_network_without_a_known_training_is_refused_with_what_works():
    data = samples(5)
    problem = PruningProblem(
        smooth().double().eval(), cross_entropy, [(data.train_inputs, data.train_labels)]
    )
    with pytest.raises(ValueError, match=r"needs the training.*Use dp-filter and dp-projector"):
        pruner("dp-transport").prune(problem, [0.5])


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_of_runs_side_by_side_the_one_that_is_pruned_is_replayed(tmp_path):
    config = TrainConfig(
        model="digits-mlp",
        data="digits",
        runs=("grda:c=0.01", "sgd:lr=0.2", "sgd"),
        epochs=1,
        train_samples=300,
        threads=1,
    )
    train(config, tmp_path)
    for name in ("sgd", "sgd:lr=0.2"):
        source = from_train_run(tmp_path, name)
        dense = load_dense(source.config, source.weights, trained=source.trained, calibration=50)
        assert dense.replay.config.runs == (name,)
        assert dense.replay.run(dense.problem().w).miss == 0.0


def test_compare_prunes_by_the_scores_of_the_replay(tmp_path, monkeypatch):
    monkeypatch.setattr("flatvalley.commands.compare.draw_comparison", lambda findings, run: [])
    out = tmp_path / "out"
    status, _, errors = flatvalley(
        "compare",
        "--epochs=3",
        "--seeds=1",
        "--sparsities=0.3,0.6",
        "--methods=dp-transport:mu=0.7",
        "--methods=soft-threshold",
        "--workers=1",
        f"--out={out}",
    )
    assert status == 0, errors
    data = load_dataset("digits")
    steps = 3 * math.ceil(len(data.train_labels) / 32)
    model = digits_mlp(seed=1)
    model.load_state_dict(
        load_file(out / "trainings" / "sgd_seed1" / "sgd" / "weights.safetensors")
    )
    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    config = TrainConfig(
        model="digits-mlp", data="digits", runs=("sgd",), epochs=3, batch_size=32, seed=1, threads=1
    )
    s = TransportReplay(config).run(w, mu=0.7).scores.values
    level = torch.where(s > 0, w.abs() / s, math.inf)
    cells = [row for row in rows(out / "tables" / "cells.csv") if "transport" in row["row"]]
    assert len(cells) == 2
    for cell in cells:
        lam = level.sort().values[math.ceil(float(cell["wanted"]) * len(w)) - 1]
        u = torch.where(level <= lam, 0.0, w.sign() * (w.abs() - lam * s))
        nn.utils.vector_to_parameters(u, model.parameters())
        with torch.no_grad():
            loss = cross_entropy(model(data.test_inputs), data.test_labels)
        assert float(cell["test_loss"]) == pytest.approx(float(loss), rel=1e-4)
        assert int(cell["products"]) == steps - 1
        assert int(cell["gradients"]) == steps
    assert "the training" in (out / "report.html").read_text()
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    assert parse_row("dp-transport").sees == "training"
    assert not parse_row("dp-transport").retrains


def test_compare_refuses_what_cannot_be_replayed_before_anything_is_trained(tmp_path):
    status, _, errors = flatvalley(
        "compare",
        "--dense=sgd:momentum=0.9",
        "--methods=dp-transport",
        f"--out={tmp_path / 'out'}",
    )
    assert status == 2
    assert "trained by sgd:momentum=0.9" in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
