from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessian import (
    NonDeterministicError,
    NonFiniteError,
    Objective,
    gauss_newton_operator,
    hessian_operator,
)
from hessian.fisher import fisher_operator
from hessian.likelihoods import likelihood_of
from tests.cases import Tagger, case_names, cases, seeded
from tests.oracles import by_name, cut, flat_weights, num_samples, outputs

F64 = torch.float64
X = seeded(lambda: torch.randn(5, 3), 1)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def dense(operator):
    return operator @ torch.eye(operator.size, dtype=operator.dtype)


def net(outputs=2):
    return seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, outputs)))


def gradients(case):
    """Every sample's gradient, one row each, from batches of one."""
    w = flat_weights(case).requires_grad_()
    rows = []
    for sample in cut(case.data, [1] * num_samples(case)):
        target = sample if isinstance(sample, dict) else sample[-1]
        loss = case.sample_loss(outputs(case, by_name(case, w), sample), target)
        rows.append(torch.autograd.grad(loss, w)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("name", [name for name in case_names() if name != "mapping batches"])
@pytest.mark.parametrize("budget", [None, 0])
def test_empirical_fisher_is_the_mean_outer_product_of_gradients(name, budget):
    case = cases()[name]
    g = gradients(case)
    # The objective weights these by class or token, over their number or weight.
    scale = {"class weights, summed": 1.0, "token losses": 6.0}.get(name, 1.0)
    expected = scale * g.T @ g / len(g)
    operator = fisher_operator(case.objective([7, 5]), memory_budget=budget)
    torch.testing.assert_close(dense(operator), expected, **EXACT)
    v = flat_weights(case)
    torch.testing.assert_close(operator @ v, expected @ v, **EXACT)


def by_enumeration(objective, batch, labels):
    """E[F] over labels drawn from the model, as a sum over all of them with their chances."""
    w = objective.weights().requires_grad_()
    z = objective.output(w, batch)
    p = z.softmax(dim=1)
    total = torch.zeros(len(w), len(w), dtype=F64)
    for place in product(*(range(n) for n in batch[-1].shape)):
        i, rest = place[0], place[1:]
        for label in range(labels):
            logits = z[(i, slice(None), *rest)]
            loss = torch.logsumexp(logits, 0) - logits[label]
            (g,) = torch.autograd.grad(loss, w, retain_graph=True)
            total += p[(i, label, *rest)].detach() * torch.outer(g, g)
    return total / batch[-1].numel()


TOKENS = seeded(lambda: torch.randint(0, 5, (3, 4)), 3)


@pytest.mark.parametrize(
    ("model", "data", "labels"),
    [
        (net(3), (X, torch.tensor([0, 1, 2, 0, 1])), 3),
        (seeded(Tagger), (TOKENS, TOKENS % 4), 4),
    ],
    ids=["labels", "tokens"],
)
def test_gauss_newton_is_the_fisher_of_all_labels_with_their_chances(model, data, labels):
    objective = Objective(model, nn.CrossEntropyLoss(), data)
    expected = by_enumeration(objective, data, labels)
    torch.testing.assert_close(dense(gauss_newton_operator(objective)), expected, **EXACT)


@pytest.fixture
def all_labels(monkeypatch):
    """Replace the draws: label k in draw k, each as often as its chance (one sample)."""

    def install(objective, chances):
        likelihood = likelihood_of(objective)
        drawn = [label for label, count in enumerate(chances) for _ in range(count)]
        calls = iter(drawn)

        def draw(self, z, y, generator):
            del z, generator
            return torch.full_like(y, next(calls))

        monkeypatch.setattr(type(likelihood), "draw", draw)
        return len(drawn)

    return install


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_draws_in_the_proportion_of_their_chances_give_gauss_newton_exactly(all_labels, reduction):
    # Logits log 1, log 2, log 5: eight draws can have the exact proportions.
    model = nn.Linear(1, 3, dtype=F64)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 2.0, 5.0], dtype=F64).log())
    data = torch.ones(1, 1, dtype=F64), torch.tensor([0])
    objective = Objective(model, nn.CrossEntropyLoss(reduction=reduction), data)
    num = all_labels(objective, [1, 2, 5])
    operator = fisher_operator(objective, kind="monte_carlo", num_draws=num, memory_budget=0)
    expected = dense(gauss_newton_operator(objective))
    torch.testing.assert_close(dense(operator), expected, **EXACT)


CRITERIA = {
    "cross entropy": (nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 0, 1])),
    "cross entropy summed": (nn.CrossEntropyLoss(reduction="sum"), torch.tensor([0, 1, 2, 0, 1])),
    "functional": (F.cross_entropy, torch.tensor([0, 1, 2, 0, 1])),
    "ignored labels": (nn.CrossEntropyLoss(), torch.tensor([0, -100, 2, 0, -100])),
    "squared error": (nn.MSELoss(), seeded(lambda: torch.randn(5, 3), 8)),
    "squared error summed": (nn.MSELoss(reduction="sum"), seeded(lambda: torch.randn(5, 3), 8)),
    "squared error, single": (nn.MSELoss(reduction="none"), seeded(lambda: torch.randn(5, 3), 8)),
    "coins": (nn.BCEWithLogitsLoss(), seeded(lambda: torch.rand(5, 3), 8)),
    "coins summed": (nn.BCEWithLogitsLoss(reduction="sum"), seeded(lambda: torch.rand(5, 3), 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CRITERIA)
def test_monte_carlo_fisher_approaches_gauss_newton_as_draws_grow(name):
    criterion, target = CRITERIA[name]
    objective = Objective(net(3), criterion, (X, target), batch_size=3)
    G = dense(gauss_newton_operator(objective))

    def error(num_draws):
        F = fisher_operator(objective, kind="monte_carlo", num_draws=num_draws, seed=5)
        return float((dense(F) - G).norm() / G.norm())

    few, many = error(5), error(500)
    # The standard deviation falls tenfold; both are draws, so a factor of three is let.
    assert many < 0.15
    assert few / 30 < many < few / 3


@pytest.mark.parametrize("name", ["cross entropy", "squared error", "coins"])
def test_draws_follow_the_models_distribution(name):
    criterion, target = CRITERIA[name]
    objective = Objective(net(3), criterion, (X, target))
    likelihood = likelihood_of(objective)
    z = objective.output(objective.weights(), (X, target)).expand(4000, 5, 3).reshape(20000, 3)
    y = target.expand(4000, *target.shape).reshape(20000, *target.shape[1:])
    drawn = likelihood.draw(z, y, torch.Generator().manual_seed(0)).reshape(4000, *target.shape)
    z = z[:5]
    if name == "cross entropy":
        found = F.one_hot(drawn, 3).double().mean(dim=0)
        expected = z.softmax(dim=1)
    elif name == "coins":
        found, expected = drawn.mean(dim=0), z.sigmoid()
    else:
        found, expected = drawn.mean(dim=0), z
        variance = torch.full_like(z, 0.5)
        torch.testing.assert_close(drawn.var(dim=0), variance, rtol=0.1, atol=0)
    # Five standard errors of 4000 draws with variance at most 1/2.
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * (0.5 / 4000) ** 0.5)


def test_a_class_of_chance_zero_is_never_drawn():
    objective = Objective(net(3), nn.CrossEntropyLoss(), (X, torch.zeros(5).long()))
    z = torch.tensor([[-1e4, 0.0, -1e4]], dtype=F64).expand(2000, 3)
    y = torch.zeros(2000, dtype=torch.long)
    drawn = likelihood_of(objective).draw(z, y, torch.Generator().manual_seed(1))
    assert torch.all(drawn == 1)


def operator(seed=0, budget=None, cuts=3, **options):
    objective = Objective(
        net(3), nn.CrossEntropyLoss(), (X, torch.tensor([0, 1, 2, 0, 1])), batch_size=cuts
    )
    return fisher_operator(
        objective, kind="monte_carlo", seed=seed, memory_budget=budget, **options
    )


def test_draws_are_those_of_the_seed_and_one_matrix():
    state = torch.get_rng_state()
    first = operator(3)
    A = dense(first)
    assert torch.equal(dense(first), A)
    assert torch.equal(dense(operator(3)), A)
    torch.testing.assert_close(dense(operator(3, budget=0)), A, **EXACT)
    assert not torch.allclose(dense(operator(4)), A)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(A, A.T, **EXACT)
    assert float(torch.linalg.eigvalsh(A).min()) > -1e-12


@pytest.mark.parametrize("length", [8, 20, 40])
@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.CrossEntropyLoss()])
def test_draws_belong_to_whole_batches_where_graphs_are_measured_on_parts(criterion, length):
    inputs = seeded(lambda: torch.randn(length, 3), 2)
    wanted = isinstance(criterion, nn.CrossEntropyLoss)
    y = torch.arange(length) % 3 if wanted else torch.zeros(length, 3)
    objective = Objective(net(3), criterion, (inputs, y))
    kept = fisher_operator(objective, kind="monte_carlo", num_draws=2)
    anew = fisher_operator(objective, kind="monte_carlo", num_draws=2, memory_budget=0)
    torch.testing.assert_close(dense(kept), dense(anew), **EXACT)


def test_draws_of_a_neighbouring_seed_are_no_shifted_copy():
    def targets(seed):
        objective = Objective(
            net(3),
            nn.MSELoss(),
            (X[:1].expand(6, 3), torch.zeros(6, 3, dtype=F64)),
            batch_size=2,
        )
        A = fisher_operator(objective, kind="monte_carlo", seed=seed)
        A @ objective.weights()
        return torch.stack([drawn[0] for drawn in _targets_of(A).values()])

    here, there = targets(0), targets(1)
    assert not any(torch.allclose(a, b) for a in here for b in there)


def _targets_of(A):
    return A.product.__wrapped__.__self__._part.__self__._targets


def test_own_draws_serve_any_criterion():
    def criterion(z, y):
        return (z - y).cosh().log().sum(dim=1)

    y = seeded(lambda: torch.randn(5, 3), 9)
    objective = Objective(net(3), criterion, (X, torch.zeros(5, 3, dtype=F64)), batch_size=3)
    rows = iter(y.split(3))
    A = fisher_operator(
        objective, kind="monte_carlo", draw_targets=lambda z, generator: next(rows), memory_budget=0
    )
    again = Objective(net(3), criterion, (X, y))
    torch.testing.assert_close(dense(A), dense(fisher_operator(again)), **EXACT)


def test_own_draws_of_the_same_distribution_agree_with_ours():
    target = seeded(lambda: torch.randn(5, 3), 8)
    objective = Objective(net(3), nn.MSELoss(reduction="sum"), (X, target))

    def draw(z, generator):
        return z + torch.randn(z.shape, generator=generator, dtype=F64) / 2**0.5

    A = fisher_operator(objective, kind="monte_carlo", num_draws=500, draw_targets=draw)
    G = dense(gauss_newton_operator(objective))
    assert float((dense(A) - G).norm() / G.norm()) < 0.2


def test_a_regulariser_is_no_part_of_the_fisher_but_can_be_added():
    data = X, torch.tensor([0, 1, 2, 0, 1])
    plain = Objective(net(3), nn.CrossEntropyLoss(), data)
    decayed = Objective(
        net(3),
        nn.CrossEntropyLoss(),
        data,
        regularizer=lambda named: 0.5 * sum(p.square().sum() for p in named.values()),
    )
    A = dense(fisher_operator(plain))
    assert torch.equal(dense(fisher_operator(decayed)), A)
    shifted = fisher_operator(decayed) + (hessian_operator(decayed) - hessian_operator(plain))
    torch.testing.assert_close(dense(shifted), A + torch.eye(len(A), dtype=F64), **EXACT)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(torch.ones(3).double(), reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.SmoothL1Loss(),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3).double()),
        lambda z, y: (z - y).square().mean(),
    ],
)
def test_criteria_that_are_no_likelihood_say_what_to_pass(criterion):
    entropy = isinstance(criterion, nn.CrossEntropyLoss)
    target = torch.tensor([0, 1, 2, 0, 1]) if entropy else torch.zeros(5, 3, dtype=F64)
    objective = Objective(net(3), criterion, (X, target))
    name = getattr(criterion, "__name__", type(criterion).__name__)
    with pytest.raises(TypeError, match=rf"got {name}\. Pass `draw_targets=`"):
        fisher_operator(objective, kind="monte_carlo")


def test_targets_of_another_form_say_what_to_pass():
    objective = Objective(net(3), nn.CrossEntropyLoss(), (X, torch.rand(5, 3, dtype=F64)))
    A = fisher_operator(objective, kind="monte_carlo")
    with pytest.raises(TypeError, match=r"output \[5, 3\] and torch.float64 targets \[5, 3\]"):
        A @ objective.weights()


def test_mapping_batches_are_refused_for_draws_and_scalar_criteria_for_samples():
    case = cases()["mapping batches"]
    objective = case.objective()
    with pytest.raises(ValueError, match="`criterion` must return one loss per sample"):
        fisher_operator(objective) @ objective.weights()
    A = fisher_operator(objective, kind="monte_carlo", draw_targets=lambda z, g: z)
    with pytest.raises(TypeError, match=r"batches `\(\*inputs, target\)`.*got a dict"):
        A @ objective.weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "true"}, "`kind` must be one of .* got 'true'"),
        ({"kind": "monte_carlo", "num_draws": 0}, "`num_draws` must be at least 1, got 0"),
        ({"num_draws": 2}, 'are for `kind="monte_carlo"`'),
        ({"draw_targets": lambda z, g: z}, 'are for `kind="monte_carlo"`'),
        ({"memory_budget": -1}, "`memory_budget` must not be negative, got -1"),
        ({"w": torch.zeros(3)}, "flat vector with one entry for each of the 17"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_options_out_of_range_are_refused(options, message):
    objective = Objective(net(3), nn.CrossEntropyLoss(), (X, torch.tensor([0, 1, 2, 0, 1])))
    with pytest.raises(ValueError, match=message):
        fisher_operator(objective, **options)


def test_nan_in_the_data_names_the_batch():
    x = X.clone()
    x[4, 0] = float("nan")
    objective = Objective(
        net(3), nn.CrossEntropyLoss(), (x, torch.tensor([0, 1, 2, 0, 1])), batch_size=3
    )
    for A in (fisher_operator(objective), gauss_newton_operator(objective)):
        with pytest.raises(NonFiniteError, match="first in batch 1 of 2"):
            A @ objective.weights()


@pytest.mark.parametrize("budget", [None, 0])
def test_data_that_change_between_products_are_refused(budget):
    x = X.clone()
    objective = Objective(net(3), nn.CrossEntropyLoss(), (x, torch.tensor([0, 1, 2, 0, 1])))
    for make in (fisher_operator, gauss_newton_operator):
        A = make(objective, memory_budget=budget)
        A @ objective.weights()
        x += 0.1
        with pytest.raises(NonDeterministicError, match="belong to"):
            A @ objective.weights()
