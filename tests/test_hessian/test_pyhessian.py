import math
import warnings

import pyhessian
import pytest
import torch

from hessian import ConvergenceWarning, Operator, hessian_operator, leading_eigenspace
from tests.cases import digits_network
from tests.oracles import counted, digits_leading, with_spectrum

pytestmark = pytest.mark.oracle


def test_real_pyhessian_and_both_backends_agree_on_the_top_eigenvalue():
    case = digits_network()
    objective = case.objective([256, 144])
    H = hessian_operator(objective)
    exact = float(digits_leading(1)[0])
    ours = leading_eigenspace(H, k=1, tol=1e-8)
    with pytest.warns(ConvergenceWarning, match="largest residual"):  # it stops on the value
        wrapped = leading_eigenspace(H, k=1, tol=1e-2, backend="pyhessian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # PyHessian works in the default type.
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            real = pyhessian.hessian(
                case.model, case.criterion, dataloader=case.batches([256, 144]), cuda=False
            )
            (value,), _ = real.eigenvalues(tol=1e-5)
        finally:
            torch.set_default_dtype(default)
            case.model.train()
            for p in case.model.parameters():
                p.grad = None
    assert float(ours.values[0]) == pytest.approx(exact, rel=1e-10)
    # PyHessian's tolerance is on the change between two iterations: some ten times off.
    assert value == pytest.approx(exact, rel=1e-3)
    assert float(wrapped.values[0]) == pytest.approx(exact, rel=1e-2)


def test_the_product_of_real_pyhessian_is_ours():
    case = digits_network()
    H = hessian_operator(case.objective([256, 144]))
    v = torch.randn(H.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = pyhessian.hessian(
        case.model, case.criterion, dataloader=case.batches([256, 144]), cuda=False
    )
    shapes = [p.shape for p in case.model.parameters()]
    parts = [t.view(s) for t, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
    found = torch.cat([t.flatten() for t in real.dataloader_hv_product(parts)[1]])
    case.model.train()
    for p in case.model.parameters():
        p.grad = None
    torch.testing.assert_close(found, H @ v, rtol=1e-10, atol=1e-12)


def test_the_backend_measures_what_pyhessian_only_hopes():
    A = with_spectrum([10.0, -8.0, 3.0, 1.0, 0.5, 0.0])
    operator, products = counted(A)
    with pytest.warns(ConvergenceWarning, match="largest residual"):
        space = leading_eigenspace(operator, k=3, tol=1e-3, backend="pyhessian")
    expected = torch.tensor([10.0, -8.0, 3.0]).double()
    torch.testing.assert_close(space.values, expected, rtol=1e-2, atol=0)
    assert not space.converged
    assert float(space.residuals.max()) > 0.01  # ten times and more its own tolerance
    R = A @ space.vectors - space.vectors * space.values
    torch.testing.assert_close(space.residuals, R.norm(dim=0), rtol=1e-8, atol=1e-13)
    assert space.num_products == len(products)
    assert math.isnan(space.gap)
    assert math.isnan(space.projector_error_bound)


def test_eigenvalues_come_leading_first_even_if_found_in_another_order():
    # Too few iterations to sort out 3.0 and 2.9.
    A = with_spectrum([3.0, 2.9, 2.8, 2.7, 2.6, -2.5, 1.0, 0.5])
    for seed in range(10):
        with pytest.warns(ConvergenceWarning):
            space = leading_eigenspace(
                Operator.from_matrix(A),
                k=4,
                tol=1e-9,
                max_products=12,
                seed=seed,
                backend="pyhessian",
            )
        magnitudes = space.values.abs()
        assert torch.equal(magnitudes, magnitudes.sort(descending=True).values)


@pytest.mark.parametrize("max_products", [4, 7, 30])
def test_the_backend_keeps_the_budget_and_says_when_it_ran_out(max_products):
    operator, products = counted(with_spectrum(torch.linspace(0.9, 1, 60)))
    with pytest.warns(ConvergenceWarning, match="PyHessian's power iteration left"):
        space = leading_eigenspace(
            operator, k=2, tol=1e-9, max_products=max_products, backend="pyhessian"
        )
    assert space.num_products == len(products) <= max_products
    assert not space.converged


def test_the_backend_repeats_its_seed_and_leaves_the_global_state():
    A = Operator.from_matrix(with_spectrum([4.0, 2.0, 1.0, 0.5]))
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    runs = []
    for seed in (1, 1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            runs += [leading_eigenspace(A, k=1, tol=1e-2, seed=seed, backend="pyhessian")]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == default
    assert torch.equal(runs[0].vectors, runs[1].vectors)
    assert not torch.equal(runs[0].vectors, runs[2].vectors)


def test_the_zero_operator_passes_through_the_backend():
    space = leading_eigenspace(
        Operator.from_matrix(torch.zeros(4, 4).double()), k=2, backend="pyhessian"
    )
    assert space.values.tolist() == [0, 0]
    assert space.converged
