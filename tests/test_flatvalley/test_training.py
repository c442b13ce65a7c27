"""The training beside ten-line loops, and what it promises about runs side by side."""

import csv

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatvalley.batches import ResidentBatches
from flatvalley.data import Dataset, load_dataset
from flatvalley.train_config import TrainConfig
from flatvalley.training import train


@pytest.fixture(scope="module")
def digits():
    found = load_dataset("digits")
    return Dataset(
        "digits",
        found.train_inputs[:300],
        found.train_labels[:300],
        found.test_inputs[:90],
        found.test_labels[:90],
        10,
    )


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


def noisy():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 10)
    )


def run(digits, make_model=network, folder=None, **settings):
    settings = {"epochs": 3, "batch_size": 32, "log_every": 4} | settings
    return train(TrainConfig(**settings), folder, make_model=make_model, data=digits)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_weights_and_losses_are_those_of_plain_loops_in_float64(digits):
    """SGD and gRDA written down once more, with the schedule and the threshold of the paper."""
    lr, c, mu, epochs, size = 0.3, 0.01, 0.7, 5, 32
    result = run(
        digits,
        runs=("sgd", f"grda:c={c},mu={mu}"),
        lr=lr,
        epochs=epochs,
        schedule="paper",
        precision="float64",
        seed=7,
    )
    x = digits.train_inputs.double()
    batches = ResidentBatches(x, digits.train_labels, size, seed=7)
    sgd, grda = network().double(), network().double()
    duals = [p.detach().clone() for p in grda.parameters()]
    threshold, losses = 0.0, {epoch: [0.0, 0.0] for epoch in range(epochs)}
    for n in range(1, epochs * len(batches) + 1):
        x, y = batches.batch(n - 1)
        epoch = (n - 1) // len(batches)
        alpha = (epoch + 1) / epochs
        rate = lr * (1 if alpha <= 0.5 else max(1 - 0.99 * (alpha - 0.5) / 0.4, 0.01))
        threshold += c * rate ** (mu + 0.5) * (n**mu - (n - 1) ** mu)
        for i, model in enumerate((sgd, grda)):
            loss = cross_entropy(model(x), y)
            losses[epoch][i] += loss.item() * len(y) / len(digits.train_labels)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for j, (p, g) in enumerate(zip(model.parameters(), grads, strict=True)):
                    if model is sgd:
                        p -= rate * g
                    else:
                        duals[j] -= rate * g
                        p.copy_(duals[j].sign() * (duals[j].abs() - threshold).clamp(min=0))
    for model, end in zip((sgd, grda), result.runs, strict=True):
        for name, p in model.named_parameters():
            torch.testing.assert_close(end.weights[name], p.detach(), rtol=1e-11, atol=1e-13)
    zeros = sum(int((p == 0).sum()) for p in grda.parameters())
    assert result.runs[1].sparsity == zeros / sum(p.numel() for p in grda.parameters())
    assert 0.05 < result.runs[1].sparsity < 0.95
    for row in result.tables["epochs"]:
        i = result.config.runs.index(row["run"])
        assert row["train_loss"] == pytest.approx(losses[row["epoch"] - 1][i], rel=1e-11)
        rates = [0.3, 0.3, 0.22575, 0.07725, 0.003]
        assert row["lr"] == pytest.approx(rates[row["epoch"] - 1])
    last = result.tables["epochs"][-1]
    assert last["threshold"] == pytest.approx(threshold, rel=1e-12)
    with torch.no_grad():
        out = grda(digits.test_inputs.double())
    assert last["test_loss"] == pytest.approx(cross_entropy(out, digits.test_labels).item())
    assert last["test_accuracy"] == (out.argmax(1) == digits.test_labels).double().mean().item()


@pytest.mark.parametrize("beside", [(), ("grda:c=0.02",), ("magnitude:target=0.5", "grda:c=0.02")])
def test_a_run_is_the_same_to_the_last_bit_whatever_stands_beside_it(digits, beside):
    alone = run(digits, noisy, runs=("sgd:momentum=0.9",))
    after = run(digits, noisy, runs=(*beside, "sgd:momentum=0.9"))
    assert same(alone["sgd:momentum=0.9"].weights, after["sgd:momentum=0.9"].weights)


def test_dropout_is_shared_by_the_runs_and_new_in_every_step(digits):
    """With c = 0 gRDA is SGD; so the two agree only if they drew the same."""
    result = run(digits, noisy, runs=("sgd", "grda:c=0"), epochs=1)
    assert same(result["sgd"].weights, result["grda:c=0"].weights)
    seen = []

    class Noted(nn.Dropout):
        def forward(self, x):
            out = super().forward(torch.ones_like(x))
            if self.training:
                seen.append(out.detach().clone())
            return out * x

    def model():
        found = noisy()
        found[3] = Noted(0.4)
        return found

    run(digits, model, runs=("sgd", "grda:c=0"), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert not torch.equal(seen[0], seen[2])
