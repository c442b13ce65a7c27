"""The gRDA optimizer: SGD on a dual vector, whose soft-thresholded copy the network uses."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pruning.sparsity_target import (
    TOLERANCE,
    Reading,
    SparsityWarning,
    constant_for,
    growth,
    interval,
    landing,
    num_zeros,
)


class TheoremWarning(UserWarning):
    """Settings under which gRDA runs, but outside the theorem that links it to DP."""


_Measured = tuple[Reading, list[tuple[dict[str, Any], float, float]]]
"""A c under way, and the groups with threshold and reach at the time it was asked for."""


class GRDA(Optimizer):
    """Generalised regularised dual averaging: SGD whose weights are soft-thresholded.

    With the dual v starting at the initial weights,

        v_{n+1} = v_n − γ ∇f(w_n),    w_{n+1} = sign(v_{n+1}) max(|v_{n+1}| − g_{n+1}, 0),
        g_n = g_{n−1} + c γ_n^{μ+1/2} (n^μ − (n−1)^μ),

    which for a constant learning rate γ is g_n = c √γ (n γ)^μ. The threshold acts on v and is
    never compounded into it, so a weight that became zero can return. c = 0 is SGD, bit for bit.
    Momentum and weight decay are outside the theory and not offered.

    Every option may differ by parameter group, and ``lr`` may change at any step, by a
    scheduler or by hand. ``group["threshold"]`` and ``group["step"]`` tell g and n of a group at
    no cost; they and the duals are in ``state_dict()``, from which training resumes exactly. A
    parameter without a gradient is left alone in that step. Save and load the model's weights
    together with the optimizer's state: the dual belongs to them.

    Costs one parameter copy of memory. A step moves 5/3 of SGD's memory tensor by tensor, and up
    to 14/3 in one call for all.

    Args:
        params: Parameters, or groups of them as dictionaries.
        lr: Learning rate γ ≥ 0; one that works for SGD without momentum.
        c: Sparsity constant c ≥ 0, in units of weights; 0.0005 to 0.005 is usual. Not together
            with ``target_sparsity``.
        mu: Exponent μ > 0 of the threshold's growth. The theorem needs 1/2 < μ < 1.
        target_sparsity: Share of zeros wanted among the weights of all groups but those with c = 0,
            in (0, 1). The c of every step is then set so that it is reached.
        horizon: Number of steps of the training with a target; from three quarters of it on the
            sparsity is held.
        foreach: Whether all tensors are stepped in one call. Default: on CUDA, where launches are
            what costs; on the CPU one tensor at a time is faster, as it stays in the cache.

    Raises:
        ValueError: If lr or c is negative, mu is not positive, or one is not finite.
        TypeError: If a parameter is not real floating-point.

    Warns:
        TheoremWarning: If mu is outside (1/2, 1) and c is not 0.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
        >>> optimizer = GRDA([w], lr=0.1, c=0.1, mu=0.6)
        >>> w.sum().backward(); optimizer.step()
        >>> w.data
        tensor([ 0.8921, -0.0821])

    References:
        Chao, Wang, Xing, Cheng (2020), Directional Pruning of Deep Neural Networks, equation
        (gRDA). Chao & Cheng (2019), A generalization of regularized dual averaging.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        c: float | None = None,
        mu: float = 0.6,
        target_sparsity: float | None = None,
        horizon: int | None = None,
        foreach: bool | None = None,
    ) -> None:
        if (c is None) == (target_sparsity is None):
            raise ValueError(
                "GRDA needs either `c` or `target_sparsity` with `horizon`, got "
                f"{'neither' if c is None else 'both'}. Give c, or let the target set it."
            )
        _check_target(target_sparsity, horizon)
        self._reading: _Measured | None = None
        options = {"lr": lr, "c": c, "mu": mu, "foreach": foreach}
        super().__init__(
            params, {**options, "target_sparsity": target_sparsity, "horizon": horizon}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose threshold starts at 0 now.

        Raises:
            ValueError: As for the options of the optimizer.
            TypeError: If a parameter is not real floating-point.
        """
        # A copy, so that the same dictionaries can begin another run: n and g are kept in here.
        param_group = {**param_group}
        target = self.defaults["target_sparsity"]
        if {"target_sparsity", "horizon"} & param_group.keys():
            raise ValueError(
                "`target_sparsity` and `horizon` hold for all groups together. Give them to GRDA, "
                "and `c=0.0` to a group that is to stay dense."
            )
        if target is not None and param_group.get("c", 0.0) != 0.0:
            raise ValueError(
                "With `target_sparsity` a group may only set `c=0.0`, to stay dense, got "
                f"{param_group['c']}. The target sets c of all other groups."
            )
        if target is not None and "c" not in param_group:
            param_group.update(c=0.0, aim=0.0, next_aim=0.0)
        else:
            param_group.update(target_sparsity=None, horizon=None)
        for option in ("lr", "c", "mu", "foreach"):
            param_group.setdefault(option, self.defaults[option])
        lr, c, mu = (float(param_group[option]) for option in ("lr", "c", "mu"))
        for name, value in (("lr", lr), ("c", c)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be finite and not negative, got {value}.")
        if not 0.0 < mu < float("inf"):
            raise ValueError(f"`mu` must be finite and positive, got {mu}.")
        if (c > 0 or "aim" in param_group) and not 0.5 < mu < 1.0:
            warnings.warn(
                f"`mu` = {mu} is outside (1/2, 1), where gRDA is known to perform directional "
                "pruning: below, noise outgrows the threshold in flat directions; above, sharp "
                "directions keep an offset. Use a mu such as 0.6 for the theorem to hold.",
                TheoremWarning,
                stacklevel=4,  # past the constructors of GRDA and of Optimizer
            )
        param_group.setdefault("step", 0)
        param_group.setdefault("threshold", 0.0)
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise TypeError(f"GRDA steps real floating-point parameters, got {p.dtype}.")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step from the gradients at hand.

        Args:
            closure: Evaluates the model again and returns the loss, as in every torch optimizer.

        Returns:
            The closure's loss, if there is a closure.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for p in self._all_params()):
            raise RuntimeError(
                "GRDA needs dense gradients, got a sparse one. Build the embedding with "
                "`sparse=False`."
            )
        self._steer()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "dual" not in self.state[p]:
                    self.state[p]["dual"] = p.detach().clone()
            self._grow_threshold(group)
            duals = [self.state[p]["dual"] for p in params]
            grads = [p.grad for p in params]
            lr, threshold = float(group["lr"]), group["threshold"]
            if group["foreach"] is None:
                foreach = all(p.is_cuda and type(p) in (Parameter, Tensor) for p in params)
            else:
                foreach = group["foreach"]
            step = _step_together if foreach else _step_one_by_one
            step(params, duals, grads, lr, threshold)
        self._judge()
        return loss

    def sparsity(self) -> float:
        """Return the share of zeros now, over the groups that prune; 0 if none does.

        One pass over the weights, and the host waits for it.
        """
        pruned = [
            p
            for group in self.param_groups
            if group["c"] > 0 or group["target_sparsity"] is not None
            for p in group["params"]
        ]
        zeros = sum(int(num_zeros(p)) for p in pruned)
        return zeros / max(1.0, float(sum(p.numel() for p in pruned)))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs; the host waits for the last measurement."""
        self._settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reading = None

    def _all_params(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _steered(self) -> list[dict[str, Any]]:
        return [g for g in self.param_groups if g["target_sparsity"] is not None]

    def _steer(self) -> None:
        """When it is time, aim at what was measured an interval ago, and measure again.

        The delay lets the number travel while training goes on; it is kept on every device, so
        that all make the same run.
        """
        groups = self._steered()
        if not groups:
            return
        step, horizon = max(g["step"] for g in groups), groups[0]["horizon"]
        if step % interval(horizon) == 0:
            self._settle()
            for g in groups:
                g["aim"] = g["next_aim"]
            self._measure(groups)
            if step == 0:
                self._settle()
                for g in groups:
                    g["aim"] = g["next_aim"]

    def _measure(self, groups: list[dict[str, Any]]) -> None:
        """Begin to ask which c would lead to the target."""
        measured = []
        for g in groups:
            duals = [self.state[p].get("dual", p) if p in self.state else p for p in g["params"]]
            to = landing(g["step"], g["horizon"])
            reach = growth(float(g["lr"]), float(g["mu"]), g["step"], to)
            measured.append((duals, g["threshold"], reach))
        if any(reach > 0 for _, _, reach in measured):
            c = Reading(constant_for(groups[0]["target_sparsity"], measured))
            self._reading = c, [(g, t, r) for g, (_, t, r) in zip(groups, measured, strict=True)]

    def _settle(self) -> None:
        """Turn the number that was asked for into the threshold aimed at next."""
        if self._reading is not None:
            reading, groups = self._reading
            self._reading = None
            c = reading.get()
            for group, threshold, reach in groups:
                if reach > 0 and math.isfinite(c):
                    group["next_aim"] = threshold + c * reach

    def _judge(self) -> None:
        """Warn at the horizon if the target was missed."""
        groups = self._steered()
        if not groups or max(g["step"] for g in groups) != groups[0]["horizon"]:
            return
        target, found = groups[0]["target_sparsity"], self.sparsity()
        if abs(found - target) > TOLERANCE:
            warnings.warn(
                f"`target_sparsity` = {target} was not reached: at the horizon of "
                f"{groups[0]['horizon']} steps {found:.4f} of the weights are zero. "
                + (
                    "Train longer, or with a larger `lr`, and set `horizon` to the number of steps."
                    if found < target
                    else "Zeros beyond the threshold do not come back in time: give a longer "
                    "`horizon`, or a lower `lr`."
                ),
                SparsityWarning,
                stacklevel=3,
            )

    @staticmethod
    def _grow_threshold(group: dict[str, Any]) -> None:
        """Add the increment of this step to g, in float64 and with the current learning rate."""
        n = group["step"] = group["step"] + 1
        mu = float(group["mu"])
        if group["target_sparsity"] is not None:
            # As the theorem's threshold grows from here, but so that it arrives.
            reach = growth(float(group["lr"]), mu, n - 1, landing(n - 1, group["horizon"]))
            gap = max(0.0, group["aim"] - group["threshold"])
            group["c"] = gap / reach if reach > 0 else 0.0
        grown = float(n) ** mu - float(n - 1) ** mu
        group["threshold"] += float(group["c"]) * float(group["lr"]) ** (mu + 0.5) * grown


def _check_target(target: float | None, horizon: int | None) -> None:
    if target is not None and not 0.0 < target < 1.0:
        raise ValueError(f"`target_sparsity` must lie between 0 and 1, got {target}.")
    if target is not None and horizon is None:
        raise ValueError(
            "`target_sparsity` needs `horizon`, the number of steps that training will make."
        )
    if target is None and horizon is not None:
        raise ValueError(
            f"`horizon` is for `target_sparsity`, which is not given; got {horizon}. Leave it out."
        )
    if horizon is not None and horizon < 1:
        raise ValueError(f"`horizon` must be at least 1 step, got {horizon}.")


def _step_one_by_one(
    params: list[Tensor], duals: list[Tensor], grads: list[Tensor], lr: float, threshold: float
) -> None:
    for p, v, grad in zip(params, duals, grads, strict=True):
        v.add_(grad, alpha=-lr)
        if threshold > 0.0 and p.dtype in (torch.float32, torch.float64):
            torch.ops.aten.softshrink.out(v, threshold, out=p)
        else:
            # In half precision softshrink rounds g differently from the multi-tensor calls.
            _threshold_together([p], [v], threshold)


def _step_together(
    params: list[Tensor], duals: list[Tensor], grads: list[Tensor], lr: float, threshold: float
) -> None:
    torch._foreach_add_(duals, grads, alpha=-lr)
    _threshold_together(params, duals, threshold)


def _threshold_together(params: list[Tensor], duals: list[Tensor], threshold: float) -> None:
    torch._foreach_copy_(params, duals)
    if threshold > 0.0:
        # The soft threshold is v − clamp(v, −g, g): there is no multi-tensor softshrink. All of
        # it happens in the parameters' own memory.
        torch._foreach_clamp_max_(params, threshold)
        torch._foreach_clamp_min_(params, -threshold)
        torch._foreach_neg_(params)
        torch._foreach_add_(params, duals)
