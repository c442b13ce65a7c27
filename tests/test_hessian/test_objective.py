import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessian import Objective, hessian_operator
from hessian.criteria import MANY_ROWS
from tests.cases import NUM_SAMPLES, case_names, cases, seeded
from tests.oracles import dense, dense_derivatives, dense_sample_losses, flat_weights

CUTS = [[12], [6, 6], [8, 4], [11, 1]]
# Float64 rounding of a few hundred sums of order one, with room to spare.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=case_names())
def case(request):
    return cases()[request.param]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_loss_and_gradient_and_hessian_equal_dense_autograd_however_data_are_cut(case, cuts):
    w, loss, gradient, H = dense_derivatives(case.name)
    objective = case.objective(cuts)
    torch.testing.assert_close(objective.weights(), w, rtol=0, atol=0)
    assert objective.loss(w) == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(objective.gradient(w), gradient, **EXACT)
    both = objective.loss_and_gradient(w)
    assert both[0] == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(both[1], gradient, **EXACT)
    torch.testing.assert_close(dense(hessian_operator(objective)), H, **EXACT)
    loss_too, product = objective.loss_and_hessian_product(w, gradient)
    assert loss_too == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(product, H @ gradient, **EXACT)


def test_derivatives_hold_away_from_the_models_own_weights(case):
    w = flat_weights(case) + 0.3 * seeded(lambda: torch.randn(len(flat_weights(case))), 5)
    v = seeded(lambda: torch.randn(len(w)), 6)
    objective, step = case.objective([8, 4]), 1e-5
    ahead, behind = w + step * v, w - step * v
    assert objective.loss(w) == pytest.approx(
        float(dense_sample_losses(case, w).detach().mean()), rel=1e-10
    )
    slope = (objective.loss(ahead) - objective.loss(behind)) / (2 * step)
    bend = (objective.gradient(ahead) - objective.gradient(behind)) / (2 * step)
    # Central differences: step² of truncation, eps / step of rounding.
    assert float(objective.gradient(w) @ v) == pytest.approx(slope, abs=1e-7)
    torch.testing.assert_close(objective.hessian_product(w, v), bend, rtol=1e-6, atol=1e-7)


def test_gradient_equals_plain_backward_on_a_copy_of_the_model(case):
    twin = copy.deepcopy(case.model)
    batch = case.data
    if isinstance(batch, dict):
        loss = case.criterion(twin(**batch), batch)
    else:
        loss = case.criterion(twin(*batch[:-1]), batch[-1])
    if getattr(case.criterion, "reduction", "") == "sum":
        loss = loss / NUM_SAMPLES
    loss.mean().backward()
    named = dict(twin.named_parameters())
    objective = case.objective()
    expected = torch.cat([named[name].grad.flatten() for name in objective.shapes])
    torch.testing.assert_close(objective.gradient(objective.weights()), expected, **EXACT)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_sample_losses_and_standard_error_equal_direct_formulas(case, cuts):
    w = flat_weights(case)
    objective, losses = case.objective(cuts), dense_sample_losses(case, w).detach()
    if case.name == "mapping batches":
        with pytest.raises(ValueError, match="`criterion` must return one loss per sample"):
            objective.statistics(w)
        return
    torch.testing.assert_close(objective.sample_losses(w), losses, **EXACT)
    found = objective.statistics(w)
    assert found.count == NUM_SAMPLES
    assert found.mean == pytest.approx(float(losses.mean()), rel=1e-12)
    assert found.total_squares == pytest.approx(float((losses**2).sum()), rel=1e-12)
    error = float(losses.std()) / math.sqrt(NUM_SAMPLES)
    assert found.standard_error == pytest.approx(error, rel=1e-9)


def test_mapping_batches_give_sample_losses_where_the_criterion_does():
    case = cases()["mapping batches"]

    def criterion(output, batch):
        return F.cross_entropy(output["logits"], batch["labels"], reduction="none")

    objective = Objective(case.model, criterion, case.batches([8, 4]))
    w = objective.weights()
    expected = dense_sample_losses(case, w).detach()
    torch.testing.assert_close(objective.sample_losses(w), expected, **EXACT)


def test_sample_losses_of_a_criterion_without_options_come_from_batches_of_one():
    case = cases()["tanh MLP"]
    objective = Objective(case.model, lambda o, t: F.cross_entropy(o, t), case.batches([11, 1]))
    w = objective.weights()
    expected = dense_sample_losses(case, w).detach()
    torch.testing.assert_close(objective.sample_losses(w), expected, **EXACT)


def test_one_sample_has_no_standard_error():
    x, y = torch.ones(1, 3), torch.zeros(1, 2)
    objective = Objective(nn.Linear(3, 2), nn.MSELoss(), (x, y))
    assert math.isnan(objective.statistics(objective.weights()).standard_error)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_mean_sum_and_single_losses_are_the_same_function(reduction, cuts):
    case = cases()["tanh MLP"]
    w, loss, gradient, H = dense_derivatives(case.name)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    objective = Objective(case.model, criterion, case.batches(cuts))
    assert objective.loss(w) == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(objective.gradient(w), gradient, **EXACT)
    torch.testing.assert_close(objective.hessian_product(w, gradient), H @ gradient, **EXACT)
    expected = dense_sample_losses(case, w).detach()
    torch.testing.assert_close(objective.sample_losses(w), expected, **EXACT)


def test_reduction_of_a_plain_function_can_be_told():
    case = cases()["tanh MLP"]
    told = Objective(
        case.model,
        lambda o, t: F.cross_entropy(o, t, reduction="sum"),
        case.batches([8, 4]),
        reduction="sum",
    )
    w, loss, _, _ = dense_derivatives(case.name)
    assert told.loss(w) == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(told.sample_losses(w), dense_sample_losses(case, w), **EXACT)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_pair_of_tensors_is_cut_by_batch_size(as_list):
    case = cases()["tanh MLP"]
    data = list(case.data) if as_list else case.data
    objective = Objective(case.model, case.criterion, data, batch_size=5)
    assert [len(y) for _, y in objective.batches()] == [5, 5, 2]
    w, loss, gradient, _ = dense_derivatives(case.name)
    assert objective.loss(w) == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(objective.gradient(w), gradient, **EXACT)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_counts_the_samples_that_it_gives(drop_last):
    case = cases()["tanh MLP"]
    loader = DataLoader(TensorDataset(*case.data), batch_size=5, drop_last=drop_last)
    objective = Objective(case.model, case.criterion, loader)
    count = 10 if drop_last else 12
    assert objective.num_samples == count
    w = objective.weights()
    expected = float(dense_sample_losses(case, w).detach()[:count].mean())
    assert objective.loss(w) == pytest.approx(expected, rel=1e-10)


def test_batch_products_average_to_the_product():
    case = cases()["CNN with frozen batch norm"]
    objective = case.objective([8, 4])
    w = objective.weights()
    v = seeded(lambda: torch.randn(objective.size), 7)
    parts = [objective.batch_hessian_product(w, v, b) for b in objective.batches()]
    expected = (8 * parts[0] + 4 * parts[1]) / 12
    torch.testing.assert_close(objective.hessian_product(w, v), expected, **EXACT)
    means = [float(objective.batch_loss(w, b)) for b in objective.batches()]
    assert objective.loss(w) == pytest.approx((8 * means[0] + 4 * means[1]) / 12, rel=1e-12)


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("*.weight", ["0.weight", "2.weight"]),
        (["2.*", "0.bias"], ["0.bias", "2.weight", "2.bias"]),
        (lambda name, p: p.ndim == 1, ["0.bias", "2.bias"]),
    ],
)
def test_selection_takes_the_named_block_of_the_hessian_in_the_models_order(selection, names):
    case = cases()["tanh MLP"]
    objective = Objective(case.model, case.criterion, case.data, parameters=selection)
    assert list(objective.shapes) == names
    start, rows = 0, []
    for name, p in case.model.named_parameters():
        if name in names:
            rows += range(start, start + p.numel())
        start += p.numel()
    H = dense_derivatives(case.name)[3][rows][:, rows]
    torch.testing.assert_close(dense(hessian_operator(objective)), H, **EXACT)


def test_a_frozen_parameter_can_be_selected_by_name():
    case = cases()["frozen first layer"]
    objective = Objective(case.model, case.criterion, case.data, parameters="0.*")
    whole = dense_derivatives("tanh MLP")[3]  # the same weights, nothing frozen
    torch.testing.assert_close(dense(hessian_operator(objective)), whole[:25, :25], **EXACT)
    assert not case.model[0].weight.requires_grad


def test_tied_weights_count_once():
    objective = cases()["tied weights"].objective()
    assert objective.size == 4 * 4 + 4
    assert list(objective.shapes) == ["encoder.weight", "encoder.bias"]


def test_a_parameter_that_the_model_does_not_use_has_zero_derivatives():
    model = seeded(lambda: nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(2, 2)}))
    model.forward = lambda x: model["used"](x)
    x3, y2 = cases()["linear regression"].data
    objective = Objective(model, nn.MSELoss(), (x3, y2))
    w = objective.weights()
    assert torch.all(objective.unflatten(objective.gradient(w))["idle.weight"] == 0)
    product = objective.unflatten(objective.hessian_product(w, torch.ones_like(w)))
    assert torch.all(product["idle.weight"] == 0)
    assert torch.any(product["used.weight"] != 0)


def test_a_loss_linear_in_the_weights_has_zero_curvature():
    x3, y2 = cases()["linear regression"].data
    model = seeded(lambda: nn.Linear(3, 2))
    objective = Objective(model, lambda o, t: (o * t).mean(dim=1), (x3, y2))
    w = objective.weights()
    assert torch.equal(objective.hessian_product(w, torch.ones_like(w)), torch.zeros_like(w))


def test_writing_unflattening_and_reading_is_a_round_trip(case):
    objective = Objective(
        copy.deepcopy(case.model), case.criterion, case.batches(), parameters=case.parameters
    )
    before = objective.weights()
    w = before + seeded(lambda: torch.randn(objective.size), 8)
    loss = objective.loss(w)
    objective.write_(w)
    torch.testing.assert_close(objective.weights(), w, rtol=0, atol=0)
    assert objective.loss(objective.weights()) == loss
    named = dict(objective.model.named_parameters())
    for name, part in objective.unflatten(w).items():
        assert torch.equal(named[name], part)
        assert part.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    w += 1.0  # the model holds a copy
    assert not torch.equal(objective.weights(), w)


def test_weights_are_a_copy():
    model = nn.Linear(3, 1, bias=False)
    objective = Objective(model, nn.MSELoss(), (torch.ones(2, 3), torch.ones(2, 1)))
    before = model.weight.detach().clone()
    objective.weights().zero_()
    assert torch.equal(model.weight, before)


def test_float32_models_are_served_in_their_own_type():
    case = cases()["tanh MLP"]
    model = copy.deepcopy(case.model).float()
    objective = Objective(model, case.criterion, (case.data[0].float(), case.data[1]))
    w, loss, gradient, _ = dense_derivatives(case.name)
    assert objective.gradient(w.float()).dtype == torch.float32
    assert objective.loss(w.float()) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(objective.gradient(w.float()), gradient.float())
    assert objective.sample_losses(w.float()).dtype == torch.float64


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0).double(), ignore_index=2),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.NLLLoss(),
        partial(nn.functional.cross_entropy, label_smoothing=0.3),
    ],
    ids=["mean", "sum", "weights", "smoothed", "scores", "function"],
)
@pytest.mark.parametrize("num_samples", [MANY_ROWS, 300])
def test_entropies_of_few_classes_are_the_same_in_large_batches(criterion, num_samples):
    """Large batches are reordered by columns; batches of three are not."""
    generator = torch.Generator().manual_seed(num_samples)
    x = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (num_samples,), generator=generator)
    model = nn.Sequential(nn.Linear(5, 5), nn.LogSoftmax(dim=1)).double()
    large = Objective(model, criterion, (x, y))
    small = Objective(model, criterion, (x, y), batch_size=3)
    w = large.weights()
    torch.testing.assert_close(large.sample_losses(w), small.sample_losses(w), **EXACT)
