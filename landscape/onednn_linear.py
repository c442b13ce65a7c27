"""Linear layers run by oneDNN, where torch would call the BLAS that it is linked to."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mkldnn

from hessian.objective import Objective
from landscape.stand_ins import Forwards, Function, is_patched

MOST_DIMENSIONS = 5
"""Of a tensor that oneDNN takes."""


def onednn_forwards(objective: Objective) -> Forwards:
    """Return what stands in for the linear layers of a model; nothing but for float32 on a CPU.

    On AMD processors a product takes about half the time of MKL's, with other bits. Outputs have
    no gradient. What oneDNN does not take is left to torch.
    """
    on_cpu = objective.device.type == "cpu" and objective.dtype == torch.float32
    if not (on_cpu and mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return {}
    return {
        m: partial(_linear, m, m.forward)
        for m in objective.model.modules()
        if type(m) is nn.Linear and m.weight.numel() > 0 and not is_patched(m)
    }


def _linear(layer: nn.Linear, otherwise: Function, *arguments: Any, **named: Any) -> Any:
    x = arguments[0] if len(arguments) == 1 and not named else None
    if not (type(x) is Tensor and x.dtype == torch.float32 and 1 <= x.ndim <= MOST_DIMENSIONS):
        return otherwise(*arguments, **named)
    return nn.functional.linear(x.to_mkldnn(), layer.weight, layer.bias).to_dense()
