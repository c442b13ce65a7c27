"""Walking over the ground leaves the model where it stands, also when a step fails."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessian import Objective
from landscape import BezierCurve, Line, Plane, barrier, evaluate, grid, train_bezier

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
Y = torch.arange(8) % 2


class FailsLater:
    """Cross entropy that raises in its n-th call."""

    def __init__(self):
        self.calls, self.at = 0, -1

    def __call__(self, output, target, reduction="mean"):
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("planned")
        return F.cross_entropy(output, target, reduction=reduction)


CALLS = {
    "evaluate a line": lambda o, a, b, c: evaluate(o, Line(a, b), [0.0, 0.5, 1.0]),
    "evaluate a curve": lambda o, a, b, c: evaluate(o, BezierCurve(torch.stack([a, b, c])), [0.5]),
    "evaluate a plane": lambda o, a, b, c: evaluate(
        o, Plane.through(a, b, c), grid([0.0, 1.0], [0.0, 1.0])
    ),
    "barrier": lambda o, a, b, c: barrier(o, Line(a, b), num_points=5),
    "train_bezier": lambda o, a, b, c: train_bezier(o, a, b, epochs=3, lr=0.1),
}


def everything(model):
    state = [torch.is_grad_enabled(), torch.get_rng_state().tolist(), torch.get_default_dtype()]
    state += [(name, m.training) for name, m in model.named_modules()]
    for name, p in model.named_parameters():
        grad = None if p.grad is None else p.grad.tolist()
        state.append((name, id(p), p.tolist(), p.requires_grad, grad, p._version))
    return state


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_leaves_the_model_as_it_was(call, fails):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().train()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    criterion = FailsLater()
    objective = Objective(model, criterion, (X, Y), batch_size=4)
    w = objective.weights()
    ends = w, w + torch.linspace(0, 1, len(w), dtype=w.dtype), w.flip(0)
    copies = [end.clone() for end in ends]
    before = everything(model)
    if fails:
        criterion.at = criterion.calls + 2
        with pytest.raises(ZeroDivisionError, match="planned"):
            CALLS[call](objective, *ends)
    else:
        CALLS[call](objective, *ends)
    assert everything(model) == before
    assert all(torch.equal(a, b) for a, b in zip(ends, copies, strict=True))
