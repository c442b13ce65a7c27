"""One run of a training: a model, its optimizer, and what prunes beside it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatvalley.specs import Spec
from flatvalley.train_config import TrainConfig, file_name
from pruning import GRDA
from pruning.gradual_magnitude import GradualMagnitude

Criterion = Callable[[Tensor, Tensor], Tensor]
"""From outputs and targets to the mean loss over the batch."""

# Gradual magnitude pruning ends when a fourth of the steps is left to recover in.
MAGNITUDE_END = 0.75


class Trainee:
    """A model with its optimizer, stepped on batches that it is given.

    Args:
        text: The run as the settings name it, such as ``"grda:c=0.004"``.
        spec: The same, parsed.
        model: Its own model, on its device, in training mode.
        criterion: The loss.
        config: Settings of the training.
        num_steps: Steps of the whole training.
        horizon: gRDA's horizon in steps, where the run does not name one.
        distributed: Whether gradients are averaged over the processes of the default group.
    """

    def __init__(
        self,
        text: str,
        spec: Spec,
        model: nn.Module,
        criterion: Criterion,
        config: TrainConfig,
        *,
        num_steps: int,
        horizon: int,
        distributed: bool = False,
    ) -> None:
        self.name, self.spec, self.model, self.criterion = text, spec, model, criterion
        self.folder = file_name(text)
        """Name of the folder of its weights."""
        self.base_lr = float(spec.settings.get("lr", config.lr))
        self.optimizer = _optimizer(spec, model, self.base_lr, num_steps, horizon)
        self.pruner = _pruner(spec, model, self.optimizer, num_steps)
        self._precision = config.precision
        self._device_type = torch.device(config.device).type
        self._forward: nn.Module = model
        if distributed:
            self._forward = DistributedDataParallel(model)
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.num_weights = sum(p.numel() for p in self.params.values())

    def set_rate(self, factor: float) -> None:
        """Set the learning rate of the next step to so much of the base rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Make one step; return loss and outputs, still on the device."""
        loss, out = self.backward(x, y)
        self.optimizer.step()
        self.prune()
        return loss, out

    def backward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a batch; return loss and outputs."""
        self.optimizer.zero_grad()
        with self.autocast():
            out = self._forward(x)
            loss = self.criterion(out, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), out.detach()

    def prune(self) -> None:
        """Let gradual pruning, if there is any, do its part of the step."""
        if self.pruner is not None:
            self.pruner.step()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self._precision == "bf16":
            return torch.autocast(self._device_type, torch.bfloat16)
        return nullcontext()

    def sparsity(self) -> float:
        """Return the share of zeros among all weights that are trained."""
        zeros = torch.stack([(p == 0).sum() for p in self.params.values()]).sum()
        return int(zeros) / self.num_weights

    def pruned_sparsity(self) -> float:
        """Return the share of zeros among the weights that are to be pruned."""
        if self.pruner is not None:
            return self.pruner.sparsity()
        return self.optimizer.sparsity() if isinstance(self.optimizer, GRDA) else 0.0

    def threshold(self) -> tuple[float, float]:
        """Return gRDA's threshold and its constant c now, of the groups that are pruned; or NaN."""
        if not isinstance(self.optimizer, GRDA):
            return float("nan"), float("nan")
        group = self.optimizer.param_groups[0]  # the one that is pruned comes first
        return float(group["threshold"]), float(group["c"])

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the model's state on the CPU; of tied tensors one."""
        return model_state(self.model)

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | ({} if self.pruner is None else {"pruner": self.pruner.state_dict()})

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(_in_layout_of(state["optimizer"], self.optimizer))
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state on the CPU; of tied tensors one, as safetensors wants."""
    seen: set[tuple[int, torch.Size]] = set()
    found = {}
    for name, t in model.state_dict().items():
        mark = (t.data_ptr(), t.shape)
        if t.numel() and mark in seen:
            continue
        seen.add(mark)
        found[name] = t.detach().to("cpu", copy=True).contiguous()
    return found


def _optimizer(
    spec: Spec, model: nn.Module, lr: float, num_steps: int, horizon: int
) -> torch.optim.Optimizer:
    given = {k: v for k, v in spec.settings.items() if k in ("momentum", "weight_decay")}
    params = [p for p in model.parameters() if p.requires_grad]
    if spec.name != "grda":
        return torch.optim.SGD(params, lr=lr, **given)
    pruned, kept = _split(spec, model)
    groups: list[dict[str, Any]] = [{"params": pruned}]
    if kept:
        groups.append({"params": kept, "c": 0.0})
    mu = spec.settings.get("mu", 0.6)
    if "c" in spec.settings:
        return GRDA(groups, lr, c=spec.settings["c"], mu=mu)
    if "horizon" in spec.settings:
        horizon = max(1, round(spec.settings["horizon"] * num_steps))
    return GRDA(groups, lr, mu=mu, target_sparsity=spec.settings["target"], horizon=horizon)


def _pruner(
    spec: Spec, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int
) -> GradualMagnitude | None:
    if spec.name != "magnitude":
        return None
    found = spec.settings
    begin, end = (
        round(found.get(name, default) * num_steps)
        for name, default in (("begin", 0.0), ("end", MAGNITUDE_END))
    )
    if begin >= end:
        raise ValueError(
            f"`runs` needs begin before end for magnitude, got steps {begin} and {end} of "
            f"{num_steps}. Train longer, or set them farther apart."
        )
    dense = {id(p) for p in _split(spec, model)[1]}
    return GradualMagnitude(
        optimizer,
        found["target"],
        begin=begin,
        end=end,
        every=found.get("every", max(1, (end - begin) // 100)),
        exclude=lambda p: id(p) in dense,
    )


def _split(spec: Spec, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters that are pruned, and those that ``keep`` names."""
    patterns = spec.settings.get("keep", "").split("+") if "keep" in spec.settings else []
    pruned: list[Tensor] = []
    kept: list[Tensor] = []
    used = set()
    names = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        names.append(name)
        fitting = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        used |= fitting
        (kept if fitting else pruned).append(p)
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused or not pruned:
        raise ValueError(
            f"`runs` keep must name some parameters and leave some to prune, got "
            f"{', '.join(unused or patterns)}. The model has {', '.join(names[:6])}, ..."
        )
    return pruned, kept


def _in_layout_of(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Lay optimizer tensors out in memory as the parameters are, such as channels last."""
    params: Iterator[Tensor] = (p for group in optimizer.param_groups for p in group["params"])
    for index, p in enumerate(params):
        for key, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                state["state"][index][key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
    return state
