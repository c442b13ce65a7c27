import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.parallel import DataParallel
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

from hessian import Objective, gauss_newton_operator, hessian_operator
from tests.cases import cases, cut, seeded
from tests.oracles import dense
from tests.test_hessian.rank_worker import MASKED, masked_tokens

CUTS = [[12], [3, 1, 2, 6], [1] * 12]  # in the last ones, some batches are all masked
EXACT = {"rtol": 1e-10, "atol": 1e-12}
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0, 0.2]).double()


def of_the_whole(model, loss_of_weights):
    """Return the loss at the model's weights, its gradient and its Hessian, by ``torch.func``."""
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in named.values()])

    def loss(w):
        parts = w.split([p.numel() for p in named.values()])
        weights = {n: v.view_as(p) for (n, p), v in zip(named.items(), parts, strict=True)}
        return loss_of_weights(weights)

    w = flat.clone().requires_grad_()
    value = loss(w)
    (gradient,) = torch.autograd.grad(value, w)
    return float(value.detach()), gradient, hessian(loss)(flat)


def assert_is(objective, expected):
    loss, gradient, H = expected
    w = objective.weights()
    assert objective.loss(w) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(objective.gradient(w), gradient, **EXACT)
    torch.testing.assert_close(objective.hessian_product(w, gradient), H @ gradient, **EXACT)
    torch.testing.assert_close(dense(hessian_operator(objective)), H, **EXACT)
    torch.testing.assert_close(dense(hessian_operator(objective, memory_budget=0)), H, **EXACT)


@pytest.mark.parametrize("cuts", CUTS, ids=["whole", "ragged", "single"])
def test_masked_tokens_count_for_nothing_and_the_others_once(cuts):
    model, tokens, targets = masked_tokens()
    kept = [(i, t) for i in range(12) for t in range(6) if targets[i, t] != MASKED]

    def by_hand(weights):
        logits = functional_call(model, weights, (tokens,))
        scores = [logits[i, :, t].logsumexp(0) - logits[i, targets[i, t], t] for i, t in kept]
        return torch.stack(scores).mean()

    objective = Objective(model, nn.CrossEntropyLoss(), cut((tokens, targets), cuts))
    assert objective.normalizer == len(kept) == 31
    assert objective.num_samples == 12
    assert_is(objective, of_the_whole(model, by_hand))


CRITERIA = {
    "class weights": nn.CrossEntropyLoss(CLASS_WEIGHTS),
    "another mask": nn.CrossEntropyLoss(ignore_index=2),
    "smoothed": nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=2, label_smoothing=0.1),
    "functional": F.cross_entropy,
    "partial": partial(F.cross_entropy, weight=CLASS_WEIGHTS, ignore_index=2),
    "log-likelihood": nn.NLLLoss(CLASS_WEIGHTS),
    "partial log-likelihood": partial(F.nll_loss, weight=CLASS_WEIGHTS),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("cuts", CUTS, ids=["whole", "ragged", "single"])
def test_a_weighted_mean_is_torchs_mean_over_all_targets_however_data_are_cut(name, cuts):
    model, tokens, targets = masked_tokens()
    if "another" in name or "smoothed" in name or name == "partial":
        targets = targets.where(targets != MASKED, 2)
    criterion = CRITERIA[name]
    expected = of_the_whole(
        model, lambda weights: criterion(functional_call(model, weights, (tokens,)), targets)
    )
    objective = Objective(model, criterion, cut((tokens, targets), cuts))
    assert_is(objective, expected)
    w = objective.weights()
    assert float(objective.sample_losses(w).mean()) == pytest.approx(expected[0], rel=1e-12)
    G = gauss_newton_operator(objective)
    once = gauss_newton_operator(Objective(model, criterion, (tokens, targets)))
    torch.testing.assert_close(G @ w, once @ w, **EXACT)


def test_a_samples_part_is_its_tokens_losses_over_the_mean_number_of_tokens():
    model, tokens, targets = masked_tokens()
    objective = Objective(model, nn.CrossEntropyLoss(), cut((tokens, targets), [3, 1, 2, 6]))
    with torch.no_grad():
        losses = F.cross_entropy(model(tokens), targets, reduction="none")
    expected = losses.sum(dim=1) / (31 / 12)
    w = objective.weights()
    torch.testing.assert_close(objective.sample_losses(w), expected, **EXACT)
    assert objective.statistics(w).mean == pytest.approx(objective.loss(w), rel=1e-12)


def test_probabilities_as_targets_count_by_sample():
    case = cases()["tanh MLP"]
    soft = seeded(lambda: torch.rand(12, 3).softmax(dim=1), 5)
    criterion = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 3.0]).double())
    objective = Objective(case.model, criterion, cut((case.data[0], soft), [7, 5]))
    assert objective.normalizer == 12
    expected = float(criterion(case.model(case.data[0]), soft).detach())
    assert objective.loss(objective.weights()) == pytest.approx(expected, rel=1e-12)


def num_kept(batch):
    return (batch[-1] != MASKED).sum()


TOLD = {
    "mean": (lambda o, t: F.cross_entropy(o, t), {}),
    "sum": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), {"reduction": "sum"}),
    "listed": (lambda o, t: F.cross_entropy(o, t, reduction="none"), {}),
    "with options": (
        lambda o, t, reduction="mean": F.cross_entropy(o, t, reduction=reduction),
        {},
    ),
}


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize("cuts", CUTS, ids=["whole", "ragged", "single"])
def test_a_count_weights_means_and_divides_sums(kind, cuts):
    model, tokens, targets = masked_tokens()
    criterion, options = TOLD[kind]
    data = cut((tokens, targets), cuts)
    told = Objective(model, criterion, data, count=num_kept, **options)
    found_out = Objective(model, nn.CrossEntropyLoss(), data)
    w = told.weights()
    v = seeded(lambda: torch.randn(told.size), 1)
    assert told.normalizer == 31
    assert told.loss(w) == pytest.approx(found_out.loss(w), rel=1e-12)
    torch.testing.assert_close(told.gradient(w), found_out.gradient(w), **EXACT)
    expected = found_out.hessian_product(w, v)
    torch.testing.assert_close(told.hessian_product(w, v), expected, **EXACT)
    torch.testing.assert_close(hessian_operator(told) @ v, expected, **EXACT)
    torch.testing.assert_close(told.sample_losses(w), found_out.sample_losses(w), **EXACT)


@pytest.mark.parametrize("count", [None, num_kept, lambda batch: 3.0 * len(batch[0])])
def test_totals_and_batch_losses_make_up_the_loss(count):
    model, tokens, targets = masked_tokens()
    objective = Objective(
        model,
        nn.CrossEntropyLoss(),
        cut((tokens, targets), [3, 1, 8]),
        count=count,
        regularizer=lambda p: 0.1 * p["head.bias"].square().sum(),
    )
    w, batches = objective.weights(), list(objective.batches())
    penalty = 0.1 * float(model.head.bias.detach().square().sum())
    assert float(objective.regularization(w).detach()) == pytest.approx(penalty, rel=1e-12)
    total = float(sum(objective.batch_total(w, batch).detach() for batch in batches))
    assert objective.loss(w) == pytest.approx(total / objective.normalizer + penalty, rel=1e-12)
    shares = [float((count or num_kept)(batch)) / objective.normalizer for batch in batches]
    losses = [objective.batch_loss(w, batch).detach() for batch in batches]
    mean = float(sum(a * b for a, b in zip(shares, losses, strict=True)))
    assert objective.loss(w) == pytest.approx(mean, rel=1e-12)
    v = seeded(lambda: torch.randn(objective.size), 1)
    products = [objective.batch_hessian_product(w, v, batch) for batch in batches]
    mean_product = sum(a * b for a, b in zip(shares, products, strict=True))
    torch.testing.assert_close(objective.hessian_product(w, v), mean_product, **EXACT)


def test_a_batch_that_counts_for_nothing_is_not_computed():
    model, tokens, targets = masked_tokens()
    objective = Objective(model, nn.CrossEntropyLoss(), cut((tokens, targets), [4, 2, 6]))
    w = objective.weights()
    masked = list(objective.batches())[1]
    model.forward = None
    total = objective.batch_total(w.requires_grad_(), masked)
    (gradient,) = torch.autograd.grad(total, w)
    assert float(total.detach()) == 0.0
    assert torch.equal(gradient, torch.zeros_like(w))
    assert torch.equal(objective.batch_hessian_product(w, w, masked), torch.zeros_like(w))


class Spy(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), lambda o, t: ((o - t) ** 2).mean(), nn.CrossEntropyLoss()]
)
def test_the_criterion_is_checked_without_running_the_model_on_every_batch(criterion):
    """It runs on the first batch, and on two samples of it to see that nothing is recomputed."""
    model = seeded(Spy)
    x = cases()["tanh MLP"].data[0]
    Objective(model, criterion, (x, x[:, :3].softmax(dim=1)), batch_size=3)
    assert model.calls == 2


def in_batch(output, target):
    """A contrastive loss: every sample is compared with all others of its batch."""
    return F.cross_entropy(output @ target.T, torch.arange(len(output)))


def test_a_loss_of_the_batch_as_a_whole_is_taken_as_it_is_with_a_count():
    case = cases()["tanh MLP"]
    data = cut((case.data[0], case.data[0][:, :3]), [7, 5])
    with pytest.raises(ValueError, match=r"the mean of its parts .*`count=lambda batch"):
        Objective(case.model, in_batch, data)
    objective = Objective(case.model, in_batch, data, count=lambda batch: len(batch[0]))
    losses = [float(in_batch(case.model(x), t).detach()) for x, t in data]
    expected = (7 * losses[0] + 5 * losses[1]) / 12
    assert objective.loss(objective.weights()) == pytest.approx(expected, rel=1e-12)


def test_a_mean_over_nothing_in_a_part_of_a_batch_is_refused():
    model, tokens, targets = masked_tokens()
    order = torch.tensor([4, 5, 0, 1, 2, 3])  # the first two have no targets
    data = tokens[order], targets[order]
    with pytest.raises(ValueError, match=r"the mean of its parts nan .*`count=lambda batch"):
        Objective(model, lambda o, t: F.cross_entropy(o, t), data)


def test_sample_losses_that_a_count_contradicts_are_refused():
    model, tokens, targets = masked_tokens()
    objective = Objective(model, nn.CrossEntropyLoss(), (tokens, targets), count=lambda batch: 5.0)
    with pytest.raises(ValueError, match="they do not add up to the mean times `count`"):
        objective.sample_losses(objective.weights())


@pytest.mark.parametrize(
    ("count", "error", "cause"),
    [
        (lambda batch: -1, ValueError, "`count` must be at least 0 for every batch, got -1"),
        (lambda batch: math.nan, ValueError, "`count` must be at least 0 .* got nan"),
        (lambda batch: batch[-1] != MASKED, TypeError, r"got a Tensor of shape \[12, 6\]"),
        (lambda batch: None, TypeError, "one number for a batch, got a NoneType"),
        (lambda batch: 0, ValueError, "`count` must not be 0 for all of the data"),
    ],
)
def test_counts_that_are_no_counts_are_refused(count, error, cause):
    model, tokens, targets = masked_tokens()
    with pytest.raises(error, match=cause):
        Objective(model, nn.CrossEntropyLoss(), (tokens, targets), count=count)


def test_targets_that_are_all_masked_are_refused():
    model, tokens, targets = masked_tokens()
    with pytest.raises(ValueError, match="`count` must not be 0 for all of the data"):
        Objective(model, nn.CrossEntropyLoss(), (tokens, torch.full_like(targets, MASKED)))


@pytest.fixture(scope="module")
def language_model():
    """A GPT-2 of random weights, and sentences padded on the right."""
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = seeded(lambda: GPT2LMHeadModel(config)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 10.0  # as unlike each other as a trained model's tokens
    tokens = seeded(lambda: torch.randint(1, 11, (6, 7)), 4)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 2, 7, 4])[:, None]
    data = {
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "labels": tokens.where(mask, MASKED),
    }
    return model, BatchEncoding(data)


def own_loss(output, batch):
    return output.loss


def num_predicted(batch):
    return (batch["labels"][:, 1:] != MASKED).sum()


@pytest.mark.parametrize("cuts", [[6], [4, 2], [1, 2, 3]], ids=str)
def test_a_hugging_face_model_with_padding_counts_every_token_once(language_model, cuts):
    model, whole = language_model
    batches = [BatchEncoding(part) for part in cut(dict(whole), cuts)]
    objective = Objective(model, own_loss, batches, count=num_predicted)
    assert objective.normalizer == 22
    w = objective.weights()
    loss = model(**whole).loss
    loss.backward()
    named = dict(model.named_parameters())
    gradient = torch.cat([named[name].grad.flatten() for name in objective.shapes])
    model.zero_grad()
    # The library takes logits to float32 before the loss, whatever the model's type.
    assert objective.loss(w) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(objective.gradient(w), gradient, rtol=1e-5, atol=1e-6)
    v = seeded(lambda: torch.randn(objective.size), 1)
    whole_batch = Objective(model, own_loss, [whole], count=num_predicted)
    expected_product = whole_batch.hessian_product(w, v)
    product = hessian_operator(objective) @ v
    torch.testing.assert_close(product, expected_product, rtol=1e-5, atol=1e-5)


def test_padding_without_a_count_is_refused(language_model):
    model, whole = language_model
    with pytest.raises(ValueError, match=r"must weight every sample of a batch alike.*`count=lamb"):
        Objective(model, own_loss, [whole])


def test_one_mapping_of_tensors_is_data_and_cut_by_batch_size(language_model):
    model, whole = language_model
    objective = Objective(model, own_loss, whole, batch_size=4, count=num_predicted)
    assert [len(batch["labels"]) for batch in objective.batches()] == [4, 2]
    expected = float(model(**whole).loss.detach())
    assert objective.loss(objective.weights()) == pytest.approx(expected, rel=1e-6)


def test_a_mapping_of_unequal_tensors_is_refused(language_model):
    model, whole = language_model
    with pytest.raises(ValueError, match=r"must hold tensors of one length, got {.*'labels': 5}"):
        Objective(model, own_loss, {**whole, "labels": whole["labels"][:5]})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        DataParallel,
        lambda model: torch.compile(DataParallel(model), backend="eager"),
    ],
    ids=["compiled", "data-parallel", "both"],
)
def test_wrappers_are_taken_off(wrap):
    case = cases()["tanh MLP"]
    wrapped = Objective(wrap(case.model), case.criterion, case.data, parameters="*.weight")
    plain = Objective(case.model, case.criterion, case.data, parameters="*.weight")
    assert wrapped.model is case.model
    assert list(wrapped.shapes) == ["0.weight", "2.weight"]
    w = plain.weights()
    assert torch.equal(wrapped.hessian_product(w, w), plain.hessian_product(w, w))


def test_a_scalar_criterion_that_contradicts_its_count_has_no_sample_losses():
    def scalar(output, target):
        return (output - target).square().mean()

    data = seeded(lambda: (torch.randn(5, 2), torch.randn(5, 1)))
    model = seeded(lambda: nn.Linear(2, 1))
    objective = Objective(model, scalar, data, count=lambda batch: 3.0)
    with pytest.raises(ValueError, match="do not add up to the mean times `count`"):
        objective.sample_losses(objective.weights())


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.CrossEntropyLoss()], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_adds_nothing(criterion, first):
    X = seeded(lambda: torch.randn(4, 3, dtype=torch.float64))
    y = X[:, :2].clone() if isinstance(criterion, nn.MSELoss) else torch.arange(4) % 2
    model = seeded(lambda: nn.Linear(3, 2).double())
    full = Objective(model, criterion, [(X, y)])
    batches = [(X[:0], y[:0]), (X, y)] if first else [(X, y), (X[:0], y[:0])]
    objective, w = Objective(model, criterion, batches), full.weights()
    assert objective.num_samples == 4
    assert objective.loss(w) == full.loss(w)
    assert torch.equal(objective.gradient(w), full.gradient(w))
    assert torch.equal(objective.sample_losses(w), full.sample_losses(w))
    for build in (hessian_operator, gauss_newton_operator):
        assert torch.equal(dense(build(objective, w)), dense(build(full, w)))
