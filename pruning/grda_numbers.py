"""The numbers of a parameter group of gRDA: how its threshold grows, on the host or on a device."""

from typing import Any

import torch
from torch import Tensor

from pruning.sparsity_target import growth, landing

Group = dict[str, Any]
NUMBERS = ("lr", "step", "threshold", "aim", "next_aim")
"""What a capturable group keeps in 0-d tensors on the device; and c, where a target sets it."""


def grow(group: Group) -> None:
    """Count a step and add its increment to g, in float64 and with the current learning rate."""
    n = group["step"] = group["step"] + 1
    lr, mu = float(group["lr"]), float(group["mu"])
    if group["target_sparsity"] is not None:
        reach = growth(lr, mu, n - 1, landing(n - 1, group["horizon"]))
        gap = max(0.0, group["aim"] - group["threshold"])
        group["c"] = gap / reach if reach > 0.0 else 0.0
    grown = float(n) ** mu - float(n - 1) ** mu
    group["threshold"] += float(group["c"]) * lr ** (mu + 0.5) * grown


def grow_on_device(group: Group, found_inf: Tensor | None) -> None:
    """Do the same in 0-d tensors, and nothing where an infinite gradient was found."""
    n, lr, mu = group["step"], group["lr"], float(group["mu"])
    if group["target_sparsity"] is not None:
        reach = growth(lr, mu, n, landing(n, group["horizon"]))
        gap = (group["aim"] - group["threshold"]).clamp_(min=0.0)
        group["c"].copy_(torch.where(reach > 0.0, gap / reach, 0.0))
    made = torch.ones_like(n) if found_inf is None else 1.0 - found_inf.to(n)
    group["threshold"].add_(group["c"] * growth(lr, mu, n, n + 1) * made)
    n.add_(made)


def place(group: Group) -> None:
    """Put the numbers where this group's form of the step wants them."""
    names = [name for name in NUMBERS if name in group]
    if group["target_sparsity"] is not None:
        names.append("c")
    for name in names:
        value = group[name]
        if group["capturable"]:
            device = group["params"][0].device
            group[name] = torch.as_tensor(value, dtype=torch.float64, device=device)
        elif isinstance(value, Tensor) and name != "lr":
            group[name] = int(value) if name == "step" else float(value)


def put(group: Group, name: str, value: float | Tensor) -> None:
    """Set a number, in place where it is a tensor: a captured step reads its memory."""
    if isinstance(group[name], Tensor):
        group[name].copy_(value)
    else:
        group[name] = float(value)
