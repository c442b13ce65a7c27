"""Our products beside those of curvlinops and PyHessian, on float32 and a ragged last batch."""

import pytest
import torch
from torch import nn

from hessian import (
    Objective,
    Operator,
    fisher_operator,
    gauss_newton_operator,
    hessian_operator,
)

pytestmark = pytest.mark.oracle
curvlinops = pytest.importorskip("curvlinops")

NUM = 19


def seeded32(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def convolutional():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding="same", bias=False),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    model[1].running_mean.normal_()
    model[4].running_var.uniform_(0.5, 2.0)
    return model.eval()


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


PROBLEMS = {
    "CNN, cross entropy": (
        convolutional,
        nn.CrossEntropyLoss(),
        lambda: (torch.randn(NUM, 1, 8, 8), torch.randint(0, 3, (NUM,))),
    ),
    "MLP, cross entropy": (
        perceptron,
        nn.CrossEntropyLoss(),
        lambda: (torch.randn(NUM, 6), torch.randint(0, 3, (NUM,))),
    ),
    "MLP, squared error": (
        perceptron,
        nn.MSELoss(),
        lambda: (torch.randn(NUM, 6), torch.randn(NUM, 3)),
    ),
}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    model, criterion, data = PROBLEMS[request.param]
    x, y = seeded32(data)
    batches = list(zip(x.split(8), y.split(8), strict=True))  # 8, 8 and 3 samples
    return seeded32(model), criterion, batches


def columns_of(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator)


def assert_agree(ours, theirs):
    V = columns_of(ours.size)
    found, expected = ours @ V, theirs @ V
    # Two float32 computations of sums of a few hundred terms.
    error = (found - expected).norm() / expected.norm()
    assert float(error) < 2e-6, float(error)


PAIRS = {
    "Hessian": (hessian_operator, "HessianLinearOperator"),
    "Gauss-Newton": (gauss_newton_operator, "GGNLinearOperator"),
    "empirical Fisher": (fisher_operator, "EFLinearOperator"),
}


@pytest.mark.parametrize("matrix", PAIRS)
def test_curvlinops_agrees(problem, matrix):
    model, criterion, batches = problem
    make, theirs = PAIRS[matrix]
    parameters = [p for p in model.parameters() if p.requires_grad]
    C = getattr(curvlinops, theirs)(model, criterion, parameters, batches)
    scale = 1.0
    if matrix == "empirical Fisher" and isinstance(criterion, nn.MSELoss):
        # Theirs are gradients of the summed squares, weighed once by the mean over three outputs;
        # ours are gradients of the loss itself.
        scale = 1 / 3
    assert_agree(make(Objective(model, criterion, batches)), scale * Operator.from_curvlinops(C))


def test_curvlinops_monte_carlo_has_our_gauss_newton_as_its_mean(problem):
    model, criterion, batches = problem
    parameters = [p for p in model.parameters() if p.requires_grad]
    C = Operator.from_curvlinops(
        curvlinops.FisherMCLinearOperator(model, criterion, parameters, batches, mc_samples=2000)
    )
    objective = Objective(model, criterion, batches)
    F = fisher_operator(objective, kind="monte_carlo", num_draws=500)
    G = gauss_newton_operator(objective)
    V = columns_of(G.size)
    for operator in (C, F):
        error = (operator @ V - G @ V).norm() / (G @ V).norm()
        assert float(error) < 0.1


def test_pyhessian_agrees(problem):
    from pyhessian import hessian

    model, criterion, batches = problem
    ours = hessian_operator(Objective(model, criterion, batches))
    V = columns_of(ours.size)
    expected = ours @ V
    theirs = Operator.from_pyhessian(hessian(model, criterion, dataloader=batches, cuda=False))
    error = (theirs @ V - expected).norm() / expected.norm()
    assert float(error) < 2e-6
