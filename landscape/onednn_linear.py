"""Linear layers run by oneDNN, where torch would call the BLAS that it is linked to."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.backends import mkldnn

from hessian.objective import Objective
from landscape.stand_ins import Forwards


def onednn_forwards(objective: Objective) -> Forwards:
    """Return what stands in for the linear layers of a model; nothing but for float32 on a CPU.

    On AMD processors a product takes about half the time of MKL's, with other bits. Outputs have
    no gradient.
    """
    on_cpu = objective.device.type == "cpu" and objective.dtype == torch.float32
    if not (on_cpu and mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return {}
    return {m: partial(_linear, m) for m in objective.model.modules() if type(m) is nn.Linear}


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x.to_mkldnn(), module.weight, module.bias).to_dense()
