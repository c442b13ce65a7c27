import pytest
import torch
from torch import nn
from torch.nn import functional

from hessian.double_backward import differentiable_twice, graph_nodes
from hessian.rectifiers import relu

CALLS = {
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "functional.relu": functional.relu,
    "nn.ReLU": nn.ReLU(),
    "in place": lambda x: functional.relu(x.clone(), inplace=True),
    "in place by position": lambda x: functional.relu(x.clone(), True),
}


def two_derivatives(activation, x, v):
    x = x.clone().requires_grad_()
    # The slope of the loss in the output of ReLU changes where that is 0, too.
    loss = ((activation(x.sin()) + 1.0) ** 2 * x.exp()).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (product,) = torch.autograd.grad(gradient, x, v)
    return loss.detach(), gradient.detach(), product


@pytest.mark.parametrize("name", CALLS)
def test_values_and_two_derivatives_are_torchs_to_the_bit(name):
    x = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)  # 0, where torch's slope is 0, included
    v = torch.linspace(1.0, 3.0, 41, dtype=torch.float64)
    expected = two_derivatives(torch.relu, x, v)
    with differentiable_twice():
        found = two_derivatives(CALLS[name], x, v)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_a_module_is_given_our_rectifier_unless_it_works_in_place(name):
    with differentiable_twice():
        out = CALLS[name](torch.ones(3, requires_grad=True))
    nodes = {node.name() for node in graph_nodes(out)}
    assert ("_ReLUBackward" in nodes) == (not name.startswith("in place"))


def test_nan_passes_as_through_torch():
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    out = relu(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, torch.relu(x), equal_nan=True)
    assert gradient.tolist() == [1.0, 1.0]  # as torch has it


def test_a_result_changed_in_place_is_refused_as_by_torch():
    x = torch.ones(3, requires_grad=True)
    out = relu(x)
    out.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_zeros_are_added_for_the_mask():
    """Torch's own derivative of the mask is a tensor of zeros for every layer."""
    x = torch.ones(7, 5, requires_grad=True)
    v = torch.ones(7, 5)

    def zeros_made(activation):
        (gradient,) = torch.autograd.grad(activation(x).square().sum(), x, create_graph=True)
        with torch.profiler.profile() as profile:
            torch.autograd.grad(gradient, x, v)
        return sum(e.count for e in profile.key_averages() if e.key == "aten::zeros_like")

    assert zeros_made(relu) == 0
    assert zeros_made(torch.relu) > 0, "torch no longer does: this module can go"
