"""The closed loop that leads gRDA's threshold to a wanted sparsity without making the host wait."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.grda_numbers import Group, put
from pruning.sparsity_target import constant_for, growth, landing


class Steering:
    """Measures the duals of groups with a common target, and sets the thresholds they aim at.

    A measurement is used at the next one: by then it has travelled to the host. The same is done
    on every device and in every form of the step, so that all make the same run.
    """

    def __init__(self) -> None:
        self._reading: Reading | None = None
        self._waiting: list[tuple[Group, float, float]] = []

    def steer(self, groups: Sequence[Group], duals: Sequence[Sequence[Tensor]]) -> None:
        """Aim at the last measurement, and make the next one."""
        self.settle()
        for group in groups:
            put(group, "aim", group["next_aim"])
        if groups:
            self._measure(groups, duals)

    @torch.no_grad()
    def _measure(self, groups: Sequence[Group], duals: Sequence[Sequence[Tensor]]) -> None:
        """Ask which c would lead to the target at the landing, and with it the thresholds there."""
        asked = []
        for group, vs in zip(groups, duals, strict=True):
            step, lr, mu = group["step"], group["lr"], float(group["mu"])
            asked.append(
                (vs, group["threshold"], growth(lr, mu, step, landing(step, group["horizon"])))
            )
        c = constant_for(groups[0]["target_sparsity"], asked)
        for group, (_, threshold, reach) in zip(groups, asked, strict=True):
            if group["capturable"]:
                aim = threshold + c.to(threshold.device) * reach
                # Where no c is enough, because the learning rate is zero now, the aim stays.
                put(group, "next_aim", torch.where(aim.isfinite(), aim, group["next_aim"]))
            else:
                self._waiting.append((group, threshold, float(reach)))
        if self._waiting:
            self._reading = Reading(c)

    def settle(self) -> None:
        """Turn the c that was asked for into the thresholds aimed at next; waits for it."""
        if self._reading is None:
            return
        c = self._reading.get()
        for group, threshold, reach in self._waiting:
            if reach > 0.0 and c < float("inf"):
                group["next_aim"] = threshold + c * reach
        self._reading, self._waiting = None, []


class Reading:
    """A number on its way to the host, which does not wait for it until it is asked for."""

    def __init__(self, number: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._number = number
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def get(self) -> float:
        """Return the number, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)
