"""One step of gRDA on a list of plain tensors, in the forms between which ``GRDA`` chooses."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from hessian.unsharded import is_sharded

FEW = 1 << 16
"""Elements of a tensor below which, on CUDA, a launch costs more than five passes over it."""


def local(t: Any) -> Tensor:
    """Return the part of a tensor that this rank holds, sharing its memory."""
    part: Tensor = t.to_local() if is_sharded(t) else t
    return part


def local_gradient(p: Any, grad: Any) -> Tensor:
    """Return the gradient of this rank's part of p."""
    if is_sharded(p) and is_sharded(grad) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local(grad)


def step_one_by_one(
    params: list[Tensor],
    duals: list[Tensor],
    grads: list[Tensor],
    lr: float,
    threshold: float,
) -> None:
    """Make the step tensor by tensor, in place."""
    for p, v, grad in zip(params, duals, grads, strict=True):
        v.add_(grad, alpha=-lr)
        _threshold([p], [v], threshold)


def step_together(
    params: list[Tensor],
    duals: list[Tensor],
    grads: list[Tensor],
    lr: float,
    threshold: float,
) -> None:
    """Make the step with as few calls as its memory traffic allows, in place."""
    torch._foreach_add_(duals, grads, alpha=-lr)
    _threshold(params, duals, threshold)


def step_on_device(
    params: list[Tensor],
    duals: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    threshold: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Make the step with lr and threshold in 0-d tensors, in place.

    With ``grad_scale`` the gradients are divided by it; where ``found_inf`` is 1 nothing moves.
    """
    # The fused kernels take elements in the order of memory, whatever the strides say.
    grads = [
        grad if grad.stride() == v.stride() else torch.empty_like(v).copy_(grad)
        for v, grad in zip(duals, grads, strict=True)
    ]
    for dtype in {v.dtype for v in duals}:
        torch._fused_sgd_(
            [v for v in duals if v.dtype == dtype],
            [grad for grad in grads if grad.dtype == dtype],
            [],
            lr=lr,
            weight_decay=0.0,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
    for p, v in zip(params, duals, strict=True):
        torch.clamp(v, min=-threshold, max=threshold, out=p)
        torch.sub(v, p, out=p)


def _threshold(params: list[Tensor], duals: list[Tensor], threshold: float) -> None:
    if threshold == 0.0:
        torch._foreach_copy_(params, duals)
        return
    together: tuple[list[Tensor], list[Tensor]] = [], []
    for p, v in zip(params, duals, strict=True):
        # In half precision softshrink rounds g differently from the multi-tensor calls.
        full = p.dtype in (torch.float32, torch.float64)
        if full and (not p.is_cuda or p.numel() > FEW):
            softshrink(v, threshold, out=p)  # type: ignore[call-arg]
        else:
            together[0].append(p)
            together[1].append(v)
    if together[0]:
        _threshold_together(*together, threshold)


def _threshold_together(params: list[Tensor], duals: list[Tensor], threshold: float) -> None:
    # The soft threshold is v − clamp(v, −g, g): there is no multi-tensor softshrink. All of it
    # happens in the parameters' own memory.
    torch._foreach_copy_(params, duals)
    torch._foreach_clamp_max_(params, threshold)
    torch._foreach_clamp_min_(params, -threshold)
    torch._foreach_neg_(params)
    torch._foreach_add_(params, duals)
