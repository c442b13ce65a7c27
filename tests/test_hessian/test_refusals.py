import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from hessian import (
    NonDeterministicError,
    NonFiniteError,
    Objective,
    block_diagonal_operator,
    fisher_operator,
    gauss_newton_operator,
    hessian_operator,
    leading_eigenspace,
)
from tests.cases import Reiterable, cases, seeded

X, Y = cases()["tanh MLP"].data
F64 = torch.float64
CRITERION = nn.CrossEntropyLoss()


def mlp(*extra: nn.Module) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), *extra, nn.Linear(5, 3)))


class Functional(nn.Module):
    """Wraps a function of (model, hidden units) into the forward pass."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("count", torch.zeros(()))
        self.middle = middle

    def forward(self, x):
        return self.second(self.middle(self, self.first(x)))


def counts_in_place(model, h):
    model.count.add_(1)
    return h


def counts_by_assignment(model, h):
    model.count = model.count + 1
    return h


class WithOptions(nn.Module):
    """A weighted mean of another name, which can also list its losses."""

    reduction = "mean"

    def forward(self, output, target):
        losses = F.cross_entropy(output, target, reduction="none")
        weights = torch.tensor([0.5, 1.0, 3.0]).double()[target]
        if self.reduction == "none":
            return weights * losses
        return (weights * losses).sum() / weights.sum()


def batches_of(x, y):
    return [(x[:6], y[:6]), (x[6:], y[6:])]


def shuffled():
    rows = torch.randperm(12)
    return batches_of(X[rows], Y[rows])


def mirrored():
    return batches_of(X.flip(1) if torch.rand(()) < 0.5 else X, Y)


def noisy():
    return batches_of(X + 0.1 * torch.randn_like(X), Y)


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (mlp(nn.Dropout(0.1)), r"Dropout .* `1` \(Dropout\) is in training mode"),
        (mlp(nn.AlphaDropout(0.1)), r"`1` \(AlphaDropout\) is in training mode"),
        (mlp(nn.RReLU()), r"`1` \(RReLU\) is in training mode"),
        (mlp(nn.BatchNorm1d(5, dtype=F64)), r"`1` \(BatchNorm1d\) is in training mode.*model.eval"),
        (
            mlp(nn.BatchNorm1d(5, dtype=F64, track_running_stats=False)).eval(),
            r"`1` \(BatchNorm1d\) keeps none \(track_running_stats=False\)",
        ),
        (
            mlp(
                nn.Unflatten(1, (1, 5)),
                nn.InstanceNorm1d(1, track_running_stats=True, dtype=F64),
                nn.Flatten(),
            ),
            r"`2` \(InstanceNorm1d\) is in training mode and would renew",
        ),
        (
            Functional(lambda m, h: F.dropout(h, 0.5, training=True)).double().eval(),
            "draws random numbers in its forward pass",
        ),
        (Functional(counts_in_place).double().eval(), "writes its buffer `count`"),
        (Functional(counts_by_assignment).double().eval(), "writes its buffer `count`"),
    ],
)
def test_a_model_whose_loss_would_change_is_refused_by_name_and_left_alone(model, cause):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(NonDeterministicError, match=cause):
        Objective(model, CRITERION, (X, Y))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(5, dtype=F64)])
def test_a_model_set_to_training_later_is_refused_by_every_method(layer):
    objective = Objective(mlp(layer).eval(), CRITERION, (X, Y))
    w = objective.weights()
    objective.model.train()
    batch = next(objective.batches())
    for call in (
        lambda: objective.loss(w),
        lambda: objective.gradient(w),
        lambda: objective.hessian_product(w, w),
        lambda: objective.batch_hessian_product(w, w, batch),
        lambda: objective.sample_losses(w),
        lambda: hessian_operator(objective) @ w,
    ):
        with pytest.raises(NonDeterministicError, match=r"`1`"):
            call()


def test_layers_that_only_look_random_are_accepted():
    model = mlp(nn.Dropout(0.0), nn.Tanh(), nn.LayerNorm(5, dtype=F64)).train()
    assert Objective(model, CRITERION, (X, Y)).num_samples == 12


def scaled(rows):
    return torch.stack([x for x, _ in rows]) * torch.rand(()), torch.stack([y for _, y in rows])


PAIRS = TensorDataset(X, Y)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (
            DataLoader(PAIRS, batch_size=6, shuffle=True),
            r"shuffles \(RandomSampler\). Build it with `shuffle=False`",
        ),
        (
            DataLoader(PAIRS, batch_size=6, sampler=WeightedRandomSampler(X[:, 0].exp(), 12)),
            r"shuffles \(WeightedRandomSampler\)",
        ),
        (Reiterable(shuffled), "same samples in another order: the loader shuffles"),
        (DataLoader(PAIRS, batch_size=6, collate_fn=scaled), "other samples .* augments"),
        (Reiterable(noisy), "other samples in the second pass: the loader augments"),
        (Reiterable(mirrored), "other samples in the second pass: the loader augments"),
        (
            Reiterable(lambda: batches_of(X, Y)[: 1 + int(torch.rand(()) < 0.5)]),
            "other samples in the second pass",
        ),
    ],
)
def test_data_that_change_between_passes_are_refused_with_the_cause(data, cause):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with pytest.raises(NonDeterministicError, match=cause):
            for _ in range(20):  # a coin may show the same side twice
                Objective(mlp(), CRITERION, data)
                torch.rand(())


def test_repeatable_iterables_are_accepted():
    data = Reiterable(lambda: batches_of(X, Y))
    assert Objective(mlp(), CRITERION, data).num_samples == 12


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ((b for b in batches_of(X, Y)), "iterable more than once.*one-pass generator"),
        (iter(batches_of(X, Y)), "one-pass list_iterator"),
        (7, "pair of tensors .* or an iterable of batches, got int"),
        ((X, X, Y), r"A batch must be a tuple `\(\*inputs, target\)` .* got a Tensor"),
        ([(0.5, "label")], "at least one tensor whose first dimension counts the samples"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_data_of_the_wrong_kind_are_refused(data, cause):
    with pytest.raises(TypeError, match=cause):
        Objective(mlp(), CRITERION, data)


@pytest.mark.parametrize(
    ("data", "options", "cause"),
    [
        ((X[:0], Y[:0]), {}, "at least one sample, got none"),
        ([], {}, "at least one sample, got none"),
        ((X, Y[:5]), {}, "as many targets as inputs, got 12 inputs and 5 targets"),
        ((X, Y), {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ([(X, Y)], {"batch_size": 4}, "`batch_size` .* Leave `batch_size` out"),
        ((X, Y), {"reduction": "max"}, '`reduction` must be "mean" or "sum", got "max"'),
    ],
)
def test_data_that_do_not_fit_are_refused(data, options, cause):
    with pytest.raises(ValueError, match=cause):
        Objective(mlp(), CRITERION, data, **options)


def with_parameter(p: nn.Parameter) -> nn.Module:
    model = mlp()
    model.register_parameter("extra", p)
    return model


@pytest.mark.parametrize(
    ("model", "selection", "cause"),
    [
        (nn.Tanh(), None, "at least one parameter, got none of the model's 0.$"),
        (mlp().requires_grad_(False), None, "none of the model's 4 .all are frozen"),
        (mlp(), lambda name, p: False, "none of the model's 4.$"),
        (mlp(), "conv*", 'pattern "conv\\*" matches none of 0.weight, 0.bias'),
        (mlp(), ["0.*", "conv"], 'pattern "conv" matches none'),
        (
            with_parameter(nn.Parameter(torch.zeros(2, dtype=torch.float32))),
            None,
            "share one type and device .* got torch.float32 on cpu, torch.float64 on cpu",
        ),
        (
            with_parameter(nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)),
            "*",
            "real floating-point, `extra` is torch.int64",
        ),
        (
            with_parameter(nn.Parameter(torch.zeros(2, dtype=torch.complex128))),
            None,
            "real floating-point, `extra` is torch.complex128",
        ),
    ],
)
def test_parameters_that_form_no_vector_are_refused(model, selection, cause):
    with pytest.raises(ValueError, match=cause):
        Objective(model, CRITERION, (X, Y), parameters=selection)


WEIGHTED = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 3.0]).double())
ONE_CLASS_FIRST = Y.argsort(stable=True)


@pytest.mark.parametrize(
    ("criterion", "options", "kind"),
    [
        (nn.CrossEntropyLoss(), {"reduction": "sum"}, "per-sample losses"),
        (WithOptions(), {}, "per-sample losses"),
        (lambda o, t: WEIGHTED(o, t), {}, "parts"),
        (lambda o, t: F.cross_entropy(o, t, ignore_index=2), {}, "parts"),
        (lambda o, t: (o.logsumexp(1) ** 2).sum().sqrt(), {}, "parts"),
    ],
)
@pytest.mark.parametrize("first", [12, 4, 1])
def test_a_mean_that_weights_samples_unevenly_is_refused(criterion, options, kind, first):
    # Sorted by class, the first batches of four or less hold one class: no later one may pass.
    x, y = X[ONE_CLASS_FIRST], Y[ONE_CLASS_FIRST]
    with pytest.raises(ValueError, match=rf"samples? of a batch alike.*{kind}.*`count=lambda"):
        Objective(
            mlp(),
            criterion,
            [(x[:first], y[:first]), (x[first:], y[first:])][: 13 - first],
            **options,
        )


def test_losses_of_another_number_than_the_samples_are_refused():
    with pytest.raises(ValueError, match=r"got shape \[5\] for a batch of 12"):
        Objective(mlp(), lambda o, t: o[:5, 0], (X, Y))


VECTOR_CALLS = {
    "loss": lambda o, v: o.loss(v),
    "gradient": lambda o, v: o.gradient(v),
    "hessian_product w": lambda o, v: o.hessian_product(v, o.weights()),
    "hessian_product v": lambda o, v: o.hessian_product(o.weights(), v),
    "batch_hessian_product": lambda o, v: o.batch_hessian_product(v, v, next(o.batches())),
    "sample_losses": lambda o, v: o.sample_losses(v),
    "write_": lambda o, v: o.write_(v),
    "hessian_operator": lambda o, v: hessian_operator(o, v),
}


@pytest.mark.parametrize("call", VECTOR_CALLS.values(), ids=VECTOR_CALLS)
@pytest.mark.usefixtures("unchecked_shapes")
def test_vectors_of_the_wrong_length_or_type_are_refused(call):
    objective = Objective(mlp(), CRITERION, (X, Y))
    for wrong in (torch.zeros(3).double(), objective.weights()[:, None]):
        with pytest.raises(
            ValueError, match=r"flat vector .* each of the 43 selected weights, got"
        ):
            call(objective, wrong)
    with pytest.raises(ValueError, match=r"must be torch.float64 on cpu .* got torch.float32"):
        call(objective, objective.weights().float())


@pytest.mark.usefixtures("unchecked_shapes")
def test_unflattening_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"each of the 43 selected weights, got shape \[44\]"):
        Objective(mlp(), CRITERION, (X, Y)).unflatten(torch.zeros(44).double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["loss", "gradient", "sample_losses"])
def test_nan_in_the_weights_names_the_parameter(bad, method):
    objective = Objective(mlp(), CRITERION, (X, Y), batch_size=5)
    w = objective.weights()
    objective.unflatten(w)["1.weight"][0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"NaN or an infinity in `1.weight`"):
        getattr(objective, method)(w)
    with pytest.raises(NonFiniteError, match=r"`1.weight`"):
        hessian_operator(objective, w) @ objective.weights()


@pytest.mark.parametrize("as_loader", [False, True])
@pytest.mark.parametrize("row", [0, 7])
def test_nan_in_the_data_names_the_batch(as_loader, row):
    x = X.clone()
    x[row, 1] = float("nan")
    data = [(x[:6], Y[:6]), (x[6:], Y[6:])]
    if as_loader:
        data = DataLoader(TensorDataset(x, Y), batch_size=6)
    objective = Objective(mlp(), CRITERION, data)
    w = objective.weights()
    for call in (objective.loss, objective.gradient, objective.statistics):
        with pytest.raises(NonFiniteError, match=rf"first in batch {row // 6} of 2"):
            call(w)
    with pytest.raises(NonFiniteError, match=rf"first in batch {row // 6} of 2"):
        objective.hessian_product(w, w)


OPERATORS = {
    "Hessian": hessian_operator,
    "Gauss-Newton": gauss_newton_operator,
    "Fisher": fisher_operator,
    "Monte Carlo Fisher": lambda o, w=None: fisher_operator(o, w, kind="monte_carlo"),
    "blocks": block_diagonal_operator,
}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_every_operator_names_the_batch_or_the_parameter_of_a_nan(make):
    x = X.clone()
    x[7, 1] = float("nan")
    objective = Objective(mlp(), CRITERION, (x, Y), batch_size=6)
    with pytest.raises(NonFiniteError, match="first in batch 1 of 2"):
        make(objective) @ objective.weights()
    objective = Objective(mlp(), CRITERION, (X, Y), batch_size=6)
    w = objective.weights()
    objective.unflatten(w)["1.weight"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or an infinity in `1\.weight`"):
        make(objective, w) @ objective.weights()


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.usefixtures("unchecked_shapes")
def test_every_operator_refuses_other_vectors_and_a_mode_that_changed(make):
    objective = Objective(mlp(nn.Dropout(0.5)).eval(), CRITERION, (X, Y))
    with pytest.raises(ValueError, match="each of the 43 selected weights"):
        make(objective, torch.zeros(3).double())
    operator = make(objective)
    with pytest.raises(ValueError, match="A vector of length 43"):
        operator @ torch.zeros(3).double()
    objective.model.train()
    with pytest.raises(NonDeterministicError, match="Dropout must be off"):
        operator @ objective.weights()


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_more_pairs_than_weights_are_refused(make):
    operator = make(Objective(mlp(), CRITERION, (X, Y)))
    with pytest.raises(ValueError, match=r"`k` must be between 1 and 43.*got 44"):
        leading_eigenspace(operator, k=44)


def test_infinite_derivatives_at_a_finite_loss_name_the_parameter():
    model = nn.Linear(1, 1, bias=False).double()
    objective = Objective(model, lambda o, t: o.abs().sqrt().sum(dim=1), (X[:, :1], Y))
    with pytest.raises(NonFiniteError, match=r"gradient is not finite, first in `weight`"):
        objective.gradient(torch.zeros(1).double())


@pytest.mark.parametrize("memory_budget", [0, None])
def test_an_operator_whose_loss_changes_between_products_is_refused(memory_budget):
    case = cases()["CNN with frozen batch norm"]
    objective = Objective(copy.deepcopy(case.model), case.criterion, case.data)
    H = hessian_operator(objective, memory_budget=memory_budget)
    v = objective.weights()
    H @ v
    objective.model[1].running_mean += 0.1
    with pytest.raises(NonDeterministicError, match=r"`1.running_mean`, .* has changed since"):
        H @ v


def test_data_that_change_in_place_are_refused_by_the_operator():
    x = X.clone()
    H = hessian_operator(Objective(mlp(), CRITERION, (x, Y)))
    v = torch.ones(43).double()
    H @ v
    x[3] += 1e-3
    with pytest.raises(NonDeterministicError, match=r"different matrices"):
        H @ v


def test_a_data_set_or_arrays_in_place_of_data_say_what_to_do():
    with pytest.raises(TypeError, match=r"the data set TensorDataset\. Wrap it: `DataLoader"):
        Objective(mlp(), CRITERION, TensorDataset(X, Y))
    with pytest.raises(TypeError, match=r"Convert them with `torch\.from_numpy`"):
        Objective(mlp(), CRITERION, (X.numpy(), Y.numpy()))


def test_data_of_another_type_than_the_weights_say_what_to_convert():
    model = nn.Linear(X.shape[1], 2)  # float32
    with pytest.raises(ValueError, match=r"`data` holds torch\.float64, the model's weights are"):
        Objective(model, nn.MSELoss(), (X, torch.zeros(len(X), 2)))


def test_an_error_of_the_model_itself_arrives_as_it_is():
    model = seeded(lambda: nn.Linear(X.shape[1] + 1, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Objective(model, nn.MSELoss(), (X, torch.zeros(len(X), 2).double()))
