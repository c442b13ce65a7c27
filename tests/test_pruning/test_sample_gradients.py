import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import Objective, fisher_operator, gauss_newton_operator
from hessian.likelihoods import likelihood_of
from pruning import DenseDistance, sample_gradients
from pruning.sample_gradients import fisher_rows
from tests.cases import seeded


def dense(operator):
    return operator @ torch.eye(operator.size, dtype=operator.dtype)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(activation=None):
    middle = activation or nn.Tanh()
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 3)))


def classifier(model=None, cuts=(12,), **options):
    x, y = normal(12, 3), torch.arange(12) % 3
    batches = list(zip(x.split(list(cuts)), y.split(list(cuts)), strict=True))
    return Objective(model or mlp(), nn.CrossEntropyLoss(), batches, **options)


def matrix(objective, w=None, **options):
    w = objective.weights() if w is None else w
    rows = torch.cat(list(fisher_rows(objective, w, **options)))
    return rows.T @ rows


class Counted(nn.Module):
    """Counts its forward passes, of which a vectorised one is one."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.calls = inside, 0

    def forward(self, x):
        self.calls += 1
        return self.inside(x)


class LooksAtNumbers(nn.Module):
    """Cannot be vectorised: a branch depends on a number."""

    def forward(self, x):
        return x.tanh() if float(x.detach().sum()) > -1e9 else x


def convolutional():
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.BatchNorm2d(2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
    ).eval()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.out(self.attend(x, x, x, need_weights=False)[0].mean(dim=1))


CASES = {
    "linear layers": lambda: classifier(),
    "uneven batches": lambda: classifier(cuts=(5, 1, 6)),
    "class weights and ignored targets": lambda: Objective(
        mlp(),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=1),
        (normal(12, 3), torch.arange(12) % 3),
        batch_size=5,
    ),
    "values": lambda: Objective(mlp(), nn.MSELoss(), (normal(12, 3), normal(12, 3, seed=1))),
    "some parameters": lambda: classifier(parameters=["2.*"]),
    "convolution and batch norm": lambda: Objective(
        convolutional(), nn.CrossEntropyLoss(), (normal(6, 1, 3, 3), torch.arange(6) % 3)
    ),
    "attention": lambda: Objective(
        seeded(Attention).eval(),
        nn.CrossEntropyLoss(),
        (torch.arange(24).reshape(6, 4) % 5, torch.arange(6) % 3),
    ),
    "a model that vmap cannot take": lambda: classifier(mlp(LooksAtNumbers())),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_of_all_samples_make_the_empirical_fisher(case):
    objective = CASES[case]()
    w = objective.weights() + 0.1
    expected = dense(fisher_operator(objective, w))
    assert_close(matrix(objective, w, kind="empirical"), expected, rtol=1e-9, atol=1e-12)


def test_many_rows_take_one_forward_pass_beside_that_for_the_slopes():
    model = Counted(mlp())
    objective = classifier(model)
    model.calls = 0
    rows = list(fisher_rows(objective, objective.weights(), kind="empirical"))
    assert len(torch.cat(rows)) == 12 and model.calls == 2


def test_rows_come_by_pieces_of_a_limited_size(monkeypatch):
    objective = classifier()
    w = objective.weights()
    monkeypatch.setattr(sample_gradients, "ROW_BYTES", 5 * 8 * len(w))
    rows = list(fisher_rows(objective, w, kind="empirical"))
    assert [len(some) for some in rows] == [5, 5, 2]
    monkeypatch.setattr(sample_gradients, "ROW_BYTES", 1)
    assert_close(matrix(objective, kind="empirical"), torch.cat(rows).T @ torch.cat(rows))


@pytest.mark.parametrize(("number", "places"), [(4, [2, 5, 8, 11]), (5, [2, 4, 7, 9, 11])])
@pytest.mark.parametrize("cuts", [(12,), (5, 1, 6)])
def test_fewer_samples_are_spread_evenly_and_stand_for_all(number, places, cuts):
    objective = classifier(cuts=cuts)
    w = objective.weights()
    each = torch.cat(list(fisher_rows(objective, w, kind="empirical")))
    some = each[places] * math.sqrt(12 / number)
    found = matrix(objective, kind="empirical", num_samples=number)
    assert_close(found, some.T @ some, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("each", "groups"),
    [(3, [(0, 3), (3, 5), (5, 8), (8, 11), (11, 12)]), (12, [(0, 5), (5, 12)])],
)
def test_rows_of_several_samples_are_their_sums(each, groups):
    objective = classifier(cuts=(5, 7))
    w = objective.weights()
    single = torch.cat(list(fisher_rows(objective, w, kind="empirical")))
    sums = torch.stack([single[a:b].sum(dim=0) for a, b in groups])
    rows = torch.cat(list(fisher_rows(objective, w, kind="empirical", samples_per_row=each)))
    assert_close(rows, sums, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_drawn_rows_of_a_distance_have_the_gauss_newton_matrix_as_mean(kind, monkeypatch):
    distance = DenseDistance(mlp(), normal(7, 3), kind=kind, batch_size=4)
    w = distance.weights() + 0.1
    signs = itertools.product((0, 1), repeat=3)
    # All signs of three outputs, the same for every sample: rows are of single samples anyway.
    found = []
    for bits in signs:
        pattern = torch.tensor(bits, dtype=torch.int8)
        monkeypatch.setattr(
            torch, "randint", lambda low, high, shape, pattern=pattern, **k: pattern.expand(shape)
        )
        found.append(matrix(distance, w, kind="monte_carlo"))
        monkeypatch.undo()
    expected = dense(gauss_newton_operator(distance, w))
    assert_close(torch.stack(found).mean(dim=0), expected, rtol=1e-9, atol=1e-12)


def test_drawn_rows_of_labelled_data_have_the_gauss_newton_matrix_as_mean(monkeypatch):
    objective = classifier(cuts=(5, 7))
    w = objective.weights() + 0.1
    p = torch.cat([objective.output(w, batch) for batch in objective.batches()]).softmax(dim=1)
    total = torch.zeros(objective.size, objective.size, dtype=torch.float64)
    for label in range(3):

        def always(objective, label=label):
            likelihood = likelihood_of(objective)
            likelihood.draw = lambda z, y, generator: torch.full_like(y, label)
            return likelihood

        monkeypatch.setattr(sample_gradients, "likelihood_of", always)
        rows = torch.cat(list(fisher_rows(objective, w, kind="monte_carlo")))
        total += rows.T @ (p[:, label, None] * rows)
    expected = dense(gauss_newton_operator(objective, w))
    assert_close(total, expected, rtol=1e-9, atol=1e-12)


def test_draws_follow_their_seed_and_leave_everything_as_found():
    model = mlp()
    objective = classifier(model)
    before, state = objective.weights(), torch.get_rng_state()
    found = [matrix(objective, kind="monte_carlo", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(objective.weights(), before)
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_done_says_what_to_change(unchecked_shapes):
    objective = classifier()
    w = objective.weights()

    def refused(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            list(fisher_rows(*arguments, **{"kind": "empirical"} | options))

    refused(ValueError, "`kind` must be one of", objective, w, kind="labels")
    refused(ValueError, "`num_samples` must be from 1 to 12", objective, w, num_samples=13)
    refused(ValueError, "`num_samples` must be from 1 to 12", objective, w, num_samples=0)
    refused(ValueError, "`samples_per_row` must be at least 1", objective, w, samples_per_row=0)
    refused(ValueError, "`w` must be a flat vector with one entry", objective, w[1:])
    distance = DenseDistance(mlp(), normal(7, 3))
    refused(ValueError, '`kind` must be "monte_carlo" for a DenseDistance', distance, w)
    huber = Objective(mlp(), nn.HuberLoss(), (normal(7, 3), normal(7, 3)))
    refused(TypeError, "Targets can be drawn for cross-entropy", huber, w, kind="monte_carlo")
