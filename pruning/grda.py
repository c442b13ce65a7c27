"""The gRDA optimizer: SGD on a dual vector, whose soft-thresholded copy the network uses."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from hessian.errors import NonFiniteError
from hessian.unsharded import is_sharded
from pruning.grda_checks import check_options, check_parameters, check_state, check_target
from pruning.grda_fused import FusedStep, compiled_kernels
from pruning.grda_numbers import Group, grow, grow_on_device, place
from pruning.grda_steering import Steering
from pruning.grda_step import local, local_gradient, step_on_device, step_one_by_one, step_together
from pruning.sparsity_target import TOLERANCE, SparsityWarning, interval, num_zeros

_FORM = ("foreach", "fused", "capturable")


class TheoremWarning(UserWarning):
    """Settings under which gRDA runs, but outside the theorem that links it to DP."""


class GRDA(Optimizer):
    """Generalised regularised dual averaging: SGD whose weights are soft-thresholded.

    With the dual v starting at the initial weights,

        v_{n+1} = v_n − γ ∇f(w_n),    w_{n+1} = sign(v_{n+1}) max(|v_{n+1}| − g_{n+1}, 0),
        g_n = g_{n−1} + c γ_n^{μ+1/2} (n^μ − (n−1)^μ),

    which for a constant learning rate γ is g_n = c √γ (n γ)^μ. The threshold acts on v and is
    never compounded into it, so a weight that became zero can return. c = 0 is SGD, bit for bit.
    Momentum and weight decay are outside the theory and not offered.

    **Groups.** Every option but the target may differ by parameter group; a group with ``c=0.0``
    is plain SGD. ``lr`` may change at any step, by a scheduler or by hand. ``group["threshold"]``
    and ``group["step"]`` tell g and n of a group at no cost; :meth:`sparsity` counts zeros. A
    parameter without a gradient is left alone in that step.

    **A wanted sparsity.** With ``target_sparsity`` the constant c of every step follows from a
    measurement. 500 times in a horizon, the c with which the target would be met at three quarters
    of the horizon is read off the duals (a quantile, see ``constant_for``), and the threshold goes
    on growing by the law above with it, so that it arrives whatever the learning rate does. In
    the last quarter it follows the duals as far as it must grow, and the network trains at the
    wanted sparsity. The host never waits: each measurement is used one interval later. The theory
    of a threshold that does not follow the power law is ``schedule_response``. A run that was not
    given a target keeps the theorem's form. At the horizon, a sparsity more than 0.01 off warns.

    **Precision and ranks.** ``GradScaler``, gradient accumulation and clipping work as with SGD; a
    step that the scaler skips does not grow the threshold. Under DDP every rank makes the same
    step. Parameters sharded by FSDP2 or another DTensor have duals sharded alike, and sparsity
    counts all of them.

    **Bad numbers.** A NaN in a gradient stays in the dual for good, so it need not be looked for at
    every step, at which the host would wait: call :meth:`check_finite` when you log.

    **Resume.** ``state_dict()`` holds all that an exact resume needs. Save the model's weights with
    it: the duals belong to them.

    Costs one parameter copy of memory. A step must read v and the gradient and write v and w, 4/3
    of SGD's memory traffic: ``fused`` is near that; the others take 5/3 to 6/3.

    Args:
        params: Parameters, pairs of name and parameter, or groups of them as dictionaries.
        lr: Learning rate γ ≥ 0; one that works for SGD without momentum.
        c: Sparsity constant c ≥ 0, in units of weights; 0.0005 to 0.005 is usual. Left out with a
            target.
        mu: Exponent μ > 0 of the threshold's growth. The theorem needs 1/2 < μ < 1.
        target_sparsity: Share of zeros wanted, in (0, 1), among the weights of all groups without
            ``c=0.0``.
        horizon: Number of steps that training with the target will make.
        foreach: Whether all tensors are stepped in one call, the default, or each by itself.
        fused: Whether a kernel makes the step in one pass over memory, for float32 and float64 on
            the CPU; other tensors are stepped as without it. It is compiled for this machine when
            the optimizer is built, by a C compiler, in about a second.
        capturable: Whether lr, step and threshold are 0-d tensors on the parameters' device, so
            that the step can be captured in a CUDA graph, and a ``GradScaler`` does not make the
            host wait. With a target, call :meth:`steer` between replays.

    Raises:
        ValueError: If lr or c is negative, mu is not positive, or one is not finite; if not exactly
            one of c and the target is given; if the target is outside (0, 1), lacks a horizon, or
            comes with another c than 0 in a group; if two forms of the step exclude each other.
        TypeError: If a parameter is not real floating-point.
        RuntimeError: If ``fused`` finds no C compiler.

    Warns:
        TheoremWarning: If mu is outside (1/2, 1) and c is not 0.
        SparsityWarning: At the horizon, if the target was missed.

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
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        *,
        c: float | None = None,
        mu: float = 0.6,
        target_sparsity: float | None = None,
        horizon: int | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        check_target(c, target_sparsity, horizon)
        self._steering = Steering()
        self._fused_steps: defaultdict[int, FusedStep] = defaultdict(FusedStep)
        defaults = {
            "lr": lr,
            "c": c,
            "mu": mu,
            "target_sparsity": target_sparsity,
            "horizon": horizon,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose threshold starts at 0 now.

        Raises:
            ValueError: As for the options of the optimizer.
            TypeError: If a parameter is not real floating-point.
            RuntimeError: If ``fused`` finds no C compiler.
        """
        # A copy, so that the same dictionaries can begin another run: n and g are kept in here.
        group = {**param_group}
        own = [group.pop(name, None) for name in ("target_sparsity", "horizon")]
        if own != [None, None]:
            raise ValueError(
                "`target_sparsity` and `horizon` hold for all groups together. Give them to GRDA, "
                "and `c=0.0` to a group that is to stay dense."
            )
        follows = self.defaults["target_sparsity"] is not None and "c" not in group
        for option in ("lr", "c", "mu", *_FORM):
            group.setdefault(option, self.defaults[option])
        if follows:
            group.update(c=0.0, aim=0.0, next_aim=0.0, calls=0)
        else:
            if self.defaults["target_sparsity"] is not None and group["c"] != 0.0:
                raise ValueError(
                    "With `target_sparsity` a group may only set `c=0.0`, to stay dense, got "
                    f"{group['c']}. The target sets c of all other groups."
                )
            group.update(target_sparsity=None, horizon=None)
        check_options(group)
        mu = group["mu"]
        if (follows or group["c"] > 0.0) and not 0.5 < mu < 1.0:
            warnings.warn(
                f"`mu` = {mu} is outside (1/2, 1), where gRDA is known to perform directional "
                "pruning: below, noise outgrows the threshold in flat directions; above, sharp "
                "directions keep an offset. Use a mu such as 0.6 for the theorem to hold.",
                TheoremWarning,
                stacklevel=4,  # past the constructors of GRDA and of Optimizer
            )
        if group["fused"]:
            compiled_kernels()
        group.setdefault("step", 0)
        group.setdefault("threshold", 0.0)
        super().add_param_group(group)
        try:
            check_parameters(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        place(self.param_groups[-1])
        self._offer_scaling()

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
        for group in self.param_groups:
            if group["capturable"] and not isinstance(group["lr"], Tensor):  # set by hand
                place(group)
        # All groups first, so that a refusal leaves every weight where it was.
        tensors = [self._tensors(group) for group in self.param_groups]
        steered = self._steered()
        capturing = steered and steered[0]["capturable"] and _is_capturing()
        if steered and not capturing:
            self._steer_in_time(steered)
        for i, (params, duals, grads) in enumerate(tensors):
            if params:
                self._step_group(i, params, duals, grads)
        if steered and not capturing:
            self._judge(steered)
        return loss

    def sparsity(self) -> float:
        """Return the share of zeros now, over the groups that prune; 0 if none does.

        One pass over these weights, on all ranks that share them, and the host waits for it.
        """
        groups = [g for g in self.param_groups if g["target_sparsity"] is not None or g["c"] > 0]
        pruned = [p for g in groups for p in g["params"]]
        if not pruned:
            return 0.0
        zeros = [num_zeros(p) for p in pruned]
        total = torch.stack([count.to(zeros[0].device) for count in zeros]).sum()
        share: float = int(total) / sum(p.numel() for p in pruned)
        return share

    def check_finite(self) -> None:
        """Look for NaN and infinity in the gradients at hand and in the duals.

        A dual never recovers from them, so that a call now and then finds what happened since the
        last one. One pass over gradients and duals, and the host waits for it. Where parameters
        are sharded, the rank that holds the bad part raises.

        Raises:
            NonFiniteError: Naming the step and the first tensor.
        """
        names, tensors, steps = [], [], []
        for i, group in enumerate(self.param_groups):
            labels = group.get("param_names") or [
                f"parameter {j} of group {i}" for j in range(len(group["params"]))
            ]
            for label, p in zip(labels, group["params"], strict=True):
                dual = self.state[p].get("dual") if p in self.state else None
                for what, t in (("gradient", p.grad), ("dual", dual)):
                    if t is not None:
                        names.append(f"the {what} of {label}, shape {tuple(p.shape)},")
                        tensors.append(local(t))
                        steps.append(group["step"])
        wrong = [t.isfinite().all().logical_not_().to(tensors[0].device) for t in tensors]
        if wrong and (where := torch.stack(wrong).nonzero()).numel():
            first = int(where[0])
            raise NonFiniteError(
                f"After {int(steps[first])} steps {names[first]} is not finite. Go back to a state "
                "before that, and lower `lr`, clip the gradients, or look at that batch."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs; the host waits for the last measurement."""
        self._steering.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where another GRDA stopped; the form of the step stays this one's.

        Raises:
            ValueError: If it is not the state of a GRDA with such parameters.
        """
        check_state(state_dict, self.param_groups)
        forms = [{form: group[form] for form in _FORM} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, form in zip(self.param_groups, forms, strict=True):
            group.update(form)
            place(group)
        self._offer_scaling()

    def __getstate__(self) -> dict[str, Any]:
        self._steering.settle()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._steering = Steering()
        self._fused_steps = defaultdict(FusedStep)
        self._offer_scaling()

    def _offer_scaling(self) -> None:
        # Only a threshold on the device can stay behind when the scaler finds an infinity, without
        # the host asking. Otherwise the scaler asks, and leaves out the whole step.
        self._step_supports_amp_scaling = all(g["capturable"] for g in self.param_groups)

    def _tensors(self, group: Group) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return parameters with gradients, their duals and gradients, as far as this rank's."""
        params: list[Tensor] = []
        duals: list[Tensor] = []
        grads: list[Tensor] = []
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    "GRDA needs dense gradients, got a sparse one. Build the embedding with "
                    "`sparse=False`."
                )
            state = self.state[p]
            dual = state.get("dual")
            if dual is None:
                dual = state["dual"] = p.detach().clone()
            if is_sharded(p):
                p, dual, grad = local(p), local(dual), local_gradient(p, grad)
            params.append(p)
            duals.append(dual)
            grads.append(grad)
        return params, duals, grads

    def _step_group(
        self, i: int, params: list[Tensor], duals: list[Tensor], grads: list[Tensor]
    ) -> None:
        group = self.param_groups[i]
        if group["capturable"]:
            found_inf = getattr(self, "found_inf", None)
            grow_on_device(group, found_inf)
            scale = getattr(self, "grad_scale", None)
            numbers = group["lr"], group["threshold"]
            step_on_device(params, duals, grads, *numbers, scale, found_inf)
            return
        grow(group)
        numbers = float(group["lr"]), group["threshold"]
        if group["fused"]:
            params, duals, grads = self._fused_steps[i](params, duals, grads, *numbers)
        if params:
            step = step_one_by_one if group["foreach"] is False else step_together
            step(params, duals, grads, *numbers)

    def steer(self) -> None:
        """Measure, and from now on aim at what was measured at the last call.

        ``step`` calls this in time, unless it is captured in a CUDA graph; then call it between
        replays, every ``horizon / 500`` steps or so. Without a target it does nothing.
        """
        groups = self._steered()
        duals = [[self._dual(p) for p in g["params"]] for g in groups]
        self._steering.steer(groups, duals)

    def _dual(self, p: Tensor) -> Tensor:
        """Return the dual, which is the parameter itself before its first gradient."""
        dual: Tensor = self.state[p]["dual"] if p in self.state else p
        return dual

    def _steered(self) -> list[Group]:
        return [g for g in self.param_groups if g["target_sparsity"] is not None]

    def _steer_in_time(self, groups: list[Group]) -> None:
        calls = groups[0]["calls"]
        if calls % interval(groups[0]["horizon"]) == 0:
            self.steer()
        if calls == 0:  # nothing was measured before that one could aim at
            self.steer()
        for g in groups:
            g["calls"] += 1

    def _judge(self, groups: list[Group]) -> None:
        """Warn at the horizon if the target was missed."""
        if groups[0]["calls"] != groups[0]["horizon"]:
            return
        target, found = groups[0]["target_sparsity"], self.sparsity()
        if abs(found - target) > TOLERANCE:
            change = (
                "Train longer or with a larger `lr`, and give the new number of steps as `horizon`."
                if found < target
                else "The duals fell back below a threshold that does not shrink. Train longer or "
                "with a smaller `lr`."
            )
            warnings.warn(
                f"`target_sparsity` = {target} was missed: after the {groups[0]['horizon']} steps "
                f"of `horizon` {found:.4f} of the weights are zero. {change}",
                SparsityWarning,
                stacklevel=4,
            )


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
