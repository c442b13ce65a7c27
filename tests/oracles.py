"""The truth by slow and plain means, sharing no code with the packages under test."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessian import Operator
from tests.cases import Case, cases, cut, digits_network, outputs


def selected(case: Case) -> dict[str, nn.Parameter]:
    """Return the parameters that make up w, tied ones once, in the model's order."""
    named = dict(case.model.named_parameters())
    chosen = case.parameters
    if chosen is None:
        return {name: p for name, p in named.items() if p.requires_grad}
    if callable(chosen):
        return {name: p for name, p in named.items() if chosen(name, p)}
    prefixes = [chosen] if isinstance(chosen, str) else chosen
    starts = tuple(prefix.removesuffix("*") for prefix in prefixes)
    return {name: p for name, p in named.items() if name.startswith(starts)}


def flat_weights(case: Case) -> Tensor:
    return torch.cat([p.detach().flatten() for p in selected(case).values()])


def dense_sample_losses(case: Case, w: Tensor) -> Tensor:
    """Return the losses, taken one sample at a time by the formula of the case."""
    weights = by_name(case, w)
    losses = []
    for sample in cut(case.data, [1] * num_samples(case)):
        target = sample if isinstance(sample, dict) else sample[-1]
        losses.append(case.sample_loss(outputs(case, weights, sample), target))
    return torch.stack(losses)


def num_samples(case: Case) -> int:
    parts = case.data.values() if isinstance(case.data, dict) else case.data
    return len(next(iter(parts)))


def by_name(case: Case, w: Tensor) -> dict[str, Tensor]:
    weights, start = {}, 0
    for name, p in selected(case).items():
        weights[name] = w[start : start + p.numel()].reshape(p.shape)
        start += p.numel()
    return weights


def dense_loss(case: Case, w: Tensor) -> Tensor:
    """The losses' sum over the number of samples, or over what the case divides by."""
    return dense_sample_losses(case, w).sum() / (case.divisor or num_samples(case))


def plain_hessian(case: Case, w: Tensor) -> Tensor:
    """Return the Hessian row by row, by plain automatic differentiation of one sample each."""
    w = w.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        loss = dense_loss(case, w)
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        rows = [
            torch.autograd.grad(g, w, retain_graph=True, materialize_grads=True)[0]
            for g in gradient
        ]
    H = torch.stack(rows)
    return (H + H.T) / 2


def plain_gauss_newton(case: Case, w: Tensor) -> Tensor:
    """Return Σ Jᵀ (∇²_z ℓ) J, with J and the loss's Hessian written out for one sample each."""
    w = w.detach().requires_grad_()
    total = torch.zeros(len(w), len(w), dtype=w.dtype)
    for sample in cut(case.data, [1] * num_samples(case)):
        target = sample if isinstance(sample, dict) else sample[-1]
        z = outputs(case, by_name(case, w), sample)
        rows = [
            torch.autograd.grad(entry, w, retain_graph=True, materialize_grads=True)[0]
            for entry in z.flatten()
        ]
        J = torch.stack(rows)

        def loss(flat: Tensor, shape: Any = z.shape, target: Any = target) -> Tensor:
            return case.sample_loss(flat.view(shape), target)

        bend = torch.autograd.functional.hessian(loss, z.detach().flatten())
        total += J.T @ bend @ J
    return total / (case.divisor or num_samples(case))


def differences_of_gradients(case: Case, w: Tensor, v: Tensor, step: float = 1e-3) -> Tensor:
    """Return H v from four gradients, without any second derivative; error of order step⁴."""

    def gradient(shift: float) -> Tensor:
        leaf = (w + shift * v).detach().requires_grad_()
        return torch.autograd.grad(dense_loss(case, leaf), leaf)[0]

    near = gradient(step) - gradient(-step)
    far = gradient(2 * step) - gradient(-2 * step)
    return (8 * near - far) / (12 * step)


@lru_cache
def dense_derivatives(name: str) -> tuple[Tensor, float, Tensor, Tensor]:
    """Return (w, L(w), gradient, Hessian) of a case by dense automatic differentiation."""
    case = cases()[name]
    w = flat_weights(case)
    loss = dense_loss(case, w.requires_grad_())
    gradient = torch.autograd.grad(loss, w, create_graph=True)[0]
    rows = [torch.autograd.grad(g, w, retain_graph=True)[0] for g in gradient]
    H = torch.stack(rows).detach()
    return w.detach(), float(loss.detach()), gradient.detach(), (H + H.T) / 2


@lru_cache
def digits_hessian() -> Tensor:
    """Return the dense Hessian, 1510 x 1510, of the digits network by ``torch.func``."""
    case = digits_network()
    shapes = [(name, p.shape) for name, p in case.model.named_parameters()]
    X, y = case.data

    def loss(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for _, shape in shapes])
        (a, b, c, d) = (part.view(shape) for part, (_, shape) in zip(parts, shapes, strict=True))
        return F.cross_entropy((X @ a.T + b).tanh() @ c.T + d, y)

    H = jacrev(grad(loss), chunk_size=64)(flat_weights(case)).detach()
    return (H + H.T) / 2


def digits_eigenvalues() -> Tensor:
    """Return the eigenvalues of the digits Hessian, ascending."""
    return _digits_eigh()[0]


@lru_cache
def _digits_eigh() -> tuple[Tensor, Tensor]:
    return torch.linalg.eigh(digits_hessian())


def digits_leading(k: int) -> tuple[Tensor, Tensor]:
    """Return the k eigenpairs of the digits Hessian that lead by magnitude."""
    values, vectors = _digits_eigh()
    order = values.abs().argsort(descending=True)[:k]
    return values[order], vectors[:, order]


def dense(operator: Operator) -> Tensor:
    """Return the matrix of an operator, column by column."""
    eye = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    return torch.stack([operator.product(e) for e in eye], dim=1)


def random_orthogonal(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draw)[0]


def with_spectrum(values: Any, seed: int = 0) -> Tensor:
    """Return a dense symmetric matrix with these eigenvalues and random eigenvectors."""
    d = torch.as_tensor(values, dtype=torch.float64)
    Q = random_orthogonal(len(d), seed)
    A = (Q * d) @ Q.T
    return (A + A.T) / 2


def counted(A: Tensor) -> tuple[Operator, list[int]]:
    """Return an operator for A, and a list that grows by one entry with every product."""
    products: list[int] = []

    def product(v: Tensor) -> Tensor:
        products.append(1)
        return A @ v

    return Operator(product, len(A), A.dtype, A.device), products


def function_of(A: Tensor, f: Any) -> Tensor:
    """Return the dense f(A) by eigendecomposition."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * f(values)) @ vectors.T
