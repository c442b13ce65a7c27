import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessian import (
    Objective,
    apply_function,
    gauss_newton_operator,
    hessian_operator,
    leading_eigenspace,
    trace,
)
from tests.cases import Reiterable, cases, frozen_batch_norm_cnn, seeded

CASE = cases()["CNN with frozen batch norm"]


def mixed_mode_model() -> nn.Module:
    """A network in training mode but for its batch norm, with one frozen bias and gradients."""
    model = seeded(frozen_batch_norm_cnn).train()
    model[1].eval()
    model[5].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    model[0].weight.grad = None
    return model


@dataclass
class FailsLater:
    """Cross entropy that raises in one of its calls."""

    at: int = -1
    calls: int = 0
    reduction: str = field(default="mean")

    def __call__(self, output, target, reduction="mean"):
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("planned")
        return F.cross_entropy(output, target, reduction=reduction)


def everything(model: nn.Module) -> list[object]:
    """Return all state that a call could leave changed."""
    state: list[object] = [torch.is_grad_enabled(), torch.get_default_dtype()]
    state += [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002
    state += [(name, m.training) for name, m in model.named_modules()]
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if t.grad is None else (id(t.grad), t.grad.tolist())
        state += [(name, id(t), t.tolist(), t.requires_grad, t.dtype, grad, t._version)]
    return state


def first(o):
    return next(o.batches())


CALLS = {
    "Objective": lambda o, w: Objective(o.model, FailsLater(), o._data),
    "weights": lambda o, w: o.weights(),
    "unflatten": lambda o, w: o.unflatten(w),
    "require_vector": lambda o, w: o.require_vector(w, "w"),
    "batches": lambda o, w: list(o.batches()),
    "output": lambda o, w: o.output(w, first(o)),
    "batch_loss": lambda o, w: o.batch_loss(w, first(o)),
    "loss": lambda o, w: o.loss(w),
    "gradient": lambda o, w: o.gradient(w),
    "loss_and_gradient": lambda o, w: o.loss_and_gradient(w),
    "hessian_product": lambda o, w: o.hessian_product(w, w),
    "loss_and_hessian_product": lambda o, w: o.loss_and_hessian_product(w, w),
    "batch_hessian_product": lambda o, w: o.batch_hessian_product(w, w, first(o)),
    "sample_losses": lambda o, w: o.sample_losses(w),
    "statistics": lambda o, w: o.statistics(w),
    "hessian_operator": lambda o, w: hessian_operator(o, w) @ torch.stack([w, w], 1),
    "gauss_newton_operator": lambda o, w: gauss_newton_operator(o, w) @ w,
    "to_scipy": lambda o, w: hessian_operator(o).to_scipy() @ w.numpy(),
    "leading_eigenspace": lambda o, w: leading_eigenspace(hessian_operator(o), k=2),
    "pyhessian": lambda o, w: leading_eigenspace(
        hessian_operator(o), k=1, tol=0.1, backend="pyhessian"
    ),
    "apply_function": lambda o, w: apply_function(hessian_operator(o), torch.exp, w),
    "trace": lambda o, w: trace(hessian_operator(o), num_probes=2),
}
WITHOUT_CRITERION = {"weights", "unflatten", "require_vector", "batches", "output"}


def data(kind: str):
    if kind == "loader":
        return DataLoader(TensorDataset(*CASE.data), batch_size=8)
    batches = CASE.batches([8, 4])
    return Reiterable(lambda: batches) if kind == "iterable" else batches


@pytest.mark.parametrize("kind", ["list", "loader", "iterable"])
@pytest.mark.parametrize("mode", ["plain", "no_grad", "exception"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("unchecked_shapes")  # the checker draws from Python's generator
def test_every_call_leaves_everything_as_it_was(call, mode, kind):
    model = mixed_mode_model()
    criterion = FailsLater()
    objective = Objective(model, criterion, data(kind))
    w = objective.weights()
    kept = w.clone()
    before = everything(model)
    if mode == "exception" and call not in WITHOUT_CRITERION | {"Objective"}:
        # The second batch, or the first where a call sees no other.
        criterion.at = criterion.calls + (1 if call.startswith("batch_") else 2)
        with pytest.raises(ZeroDivisionError, match="planned"):
            CALLS[call](objective, w)
    elif mode == "no_grad":
        with torch.no_grad():
            CALLS[call](objective, w)
            assert not torch.is_grad_enabled()
    else:
        CALLS[call](objective, w)
    assert everything(model) == before
    assert torch.equal(w, kept)
    assert not w.requires_grad
    assert w.grad is None


def test_a_layer_that_is_registered_twice_keeps_its_parameters():
    layer = seeded(lambda: nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.Tanh(), layer, seeded(lambda: nn.Linear(4, 3)))
    model[3].bias = nn.Parameter(layer.bias.detach()[:3].clone())
    kept = dict(model.named_parameters())
    X, y = seeded(lambda: torch.randn(6, 4)), torch.arange(6) % 3
    for selection in (None, "0.*", "3.*"):
        objective = Objective(model, nn.CrossEntropyLoss(), (X, y), parameters=selection)
        w = objective.weights()
        objective.write_(w)
        product = hessian_operator(objective) @ w
        now = dict(model.named_parameters())
        assert now.keys() == kept.keys()
        assert all(now[name] is p for name, p in kept.items())
        h = 1e-5
        slopes = objective.gradient(w + h * w) - objective.gradient(w - h * w)
        torch.testing.assert_close(product, slopes / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_construction_that_fails_leaves_everything_as_it_was(at):
    model = mixed_mode_model()
    before = everything(model)
    with pytest.raises(ZeroDivisionError):
        Objective(model, FailsLater(at=at), data("loader"))
    assert everything(model) == before


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_refusal_of_random_data_or_models_puts_the_random_state_back():
    model = mixed_mode_model()
    before = everything(model)
    x, y = CASE.data
    with pytest.raises(ValueError, match="augments"):
        Objective(model, FailsLater(), Reiterable(lambda: [(x + torch.rand(()), y)]))
    with pytest.raises(ValueError, match="draws random numbers"):
        Objective(model, lambda o, t: F.cross_entropy(F.dropout(o), t), (x, y))
    assert everything(model) == before


def test_gradients_under_no_grad_are_the_same():
    objective = CASE.objective([8, 4])
    w = objective.weights()
    v = torch.ones_like(w)
    with torch.no_grad():
        inside = objective.gradient(w), objective.hessian_product(w, v)
    assert torch.equal(inside[0], objective.gradient(w))
    assert torch.equal(inside[1], objective.hessian_product(w, v))


def test_results_carry_no_graph_even_if_w_does():
    objective = CASE.objective()
    w = objective.weights().requires_grad_()
    for result in (
        objective.gradient(w),
        objective.hessian_product(w, w),
        objective.sample_losses(w),
    ):
        assert not result.requires_grad
    assert objective.batch_loss(w, first(objective)).requires_grad
    assert w.grad is None


def test_write_changes_the_selected_weights_and_nothing_else():
    model = mixed_mode_model()
    objective = Objective(model, FailsLater(), data("list"), parameters="0.*")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    objective.write_(objective.weights() + 1)
    for name, t in model.state_dict().items():
        change = 1.0 if name.startswith("0.") else 0.0
        torch.testing.assert_close(t - before[name], torch.full_like(t, change))
    assert model[5].weight.grad is not None
    assert model[0].weight.requires_grad
