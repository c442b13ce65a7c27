"""What gRDA refuses: options, parameters and states that do not fit."""

from typing import Any

Group = dict[str, Any]


def check_target(c: float | None, target: float | None, horizon: int | None) -> None:
    """Raise ValueError unless there is either c, or a target in (0, 1) with its horizon."""
    if (c is None) == (target is None):
        raise ValueError(
            "GRDA needs either `c`, or `target_sparsity` with `horizon`, got "
            f"{'neither' if c is None else 'both'}. Give c, or let the target set it."
        )
    if target is None:
        if horizon is not None:
            raise ValueError(
                f"`horizon` belongs to `target_sparsity`, which is not given, got {horizon}. "
                "Leave it out."
            )
        return
    if not 0.0 < target < 1.0:
        raise ValueError(f"`target_sparsity` must be a share between 0 and 1, got {target}.")
    if horizon is None:
        raise ValueError(
            "`target_sparsity` needs `horizon`. Give the number of steps that training will make."
        )
    if horizon < 1:
        raise ValueError(f"`horizon` must be at least 1 step, got {horizon}.")


def check_options(group: Group) -> None:
    """Raise ValueError for numbers out of range and forms that exclude each other."""
    lr, c, mu = (float(group[option]) for option in ("lr", "c", "mu"))
    for name, value in (("lr", lr), ("c", c)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"`{name}` must be finite and not negative, got {value}.")
    if not 0.0 < mu < float("inf"):
        raise ValueError(f"`mu` must be finite and positive, got {mu}.")
    if group["fused"] and (group["foreach"] or group["capturable"]):
        other = "capturable" if group["capturable"] else "foreach"
        raise ValueError(f"`fused=True` and `{other}=True` exclude each other. Choose one.")


def check_parameters(group: Group) -> None:
    """Raise unless all parameters are real, and on one device if the step is to be captured."""
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"GRDA steps real floating-point parameters, got {p.dtype}.")
    devices = {p.device for p in group["params"]}
    if group["capturable"] and len(devices) > 1:
        raise ValueError(
            "`capturable=True` keeps a group's numbers on one device, but its parameters are on "
            f"{', '.join(sorted(map(str, devices)))}. Make a group for each device."
        )


def check_state(state_dict: dict[str, Any], groups: list[Group]) -> None:
    """Raise ValueError unless this is the state of a GRDA with such parameters."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "`state_dict` must be what `GRDA.state_dict()` returned, with `state` and "
            f"`param_groups`, got the keys {sorted(map(str, state_dict))}."
        )
    saved = state_dict["param_groups"]
    sizes = [[len(g["params"]) for g in gs] for gs in (saved, groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`state_dict` has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}. "
            "Build it with the groups of the run that is to be resumed."
        )
    for i, (old, new) in enumerate(zip(saved, groups, strict=True)):
        missing = [k for k in ("lr", "c", "mu", "step", "threshold") if k not in old]
        if missing:
            raise ValueError(
                f"`state_dict` is not the state of a GRDA: group {i} lacks {', '.join(missing)}. "
                "Load the state that a GRDA saved."
            )
        if not 0.0 <= float(old["threshold"]) < float("inf") or int(old["step"]) < 0:
            raise ValueError(
                f"`state_dict` is damaged: group {i} has threshold {float(old['threshold'])} at "
                f"step {int(old['step'])}. Load an earlier one."
            )
        for j, (index, p) in enumerate(zip(old["params"], new["params"], strict=True)):
            dual = state_dict["state"].get(index, {}).get("dual")
            if dual is not None and dual.shape != p.shape:
                raise ValueError(
                    f"`state_dict` does not fit: the dual of parameter {j} of group {i} has shape "
                    f"{tuple(dual.shape)}, the parameter {tuple(p.shape)}. Build the model of the "
                    "run that is to be resumed."
                )
