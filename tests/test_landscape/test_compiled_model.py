"""Compiled models: the same function, taken only where the model is one graph and it pays."""

import gc
import shutil
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import Objective
from landscape import Line, Plan, evaluate, sweep
from landscape.compiled_model import CompiledModel, require_few_forms
from landscape.plans import Probe, UnsuitableError, choose_plan

COMPILED = Plan(compiled=True)
POINTS = [0.0, 0.5, 1.0]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


class Net(nn.Module):
    """Batch norm, a weight that is used twice, and one that is not asked about."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.last = nn.Linear(4, 5).requires_grad_(False)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.last(torch.tanh(self.b(torch.relu(self.a(x)))))


def problem(dtype=torch.float64, n=22, norm=True):
    torch.manual_seed(0)
    model = Net().to(dtype).eval()
    if not norm:
        model.norm = nn.Identity()
    x, y = torch.randn(n, 3, 6, 6, dtype=dtype), torch.arange(n) % 5
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y), batch_size=10)
    w = objective.weights()
    return objective, Line(w, -2 * w)


@needs_compiler
@pytest.mark.parametrize("policy", ["recompute", "batch"])
def test_losses_are_those_of_the_plain_way(policy):
    objective, line = problem()
    options = {"metrics": ("loss", "error"), "batch_norm": policy}
    state = {name: t.clone() for name, t in objective.model.state_dict().items()}
    seed = torch.get_rng_state()
    plain = sweep(objective, line, POINTS, **options, speed="plain")
    found = sweep(objective, line, POINTS, **options, speed=COMPILED)
    assert_close(found.sums, plain.sums, rtol=1e-12, atol=0)
    assert found.provenance["plan"]["compiled"]
    assert found.provenance["plan"]["deviation"] < 1e-12
    for name, t in objective.model.state_dict().items():
        assert torch.equal(t, state[name])
    assert torch.equal(torch.get_rng_state(), seed)
    again = sweep(objective, line, POINTS, **options, speed=COMPILED)
    assert torch.equal(again.sums, found.sums)


@needs_compiler
def test_not_a_number_is_kept():
    objective, line = problem(norm=False)
    line = Line(line(0.0), line(1.0).clone())
    line.end[3] = torch.nan
    found = evaluate(objective, line, POINTS, speed=Plan(compiled=True, deviation=0.0))
    assert torch.isfinite(found.mean).tolist() == [True, False, False]


@needs_compiler
def test_reduced_precision_goes_with_it():
    objective, line = problem(torch.float32, norm=False)
    options = {"precision": "bfloat16"}
    eager = evaluate(objective, line, POINTS, **options)
    plan = Plan(compiled=True, precision="bfloat16")
    found = evaluate(objective, line, POINTS, **options, speed=plan)
    full = evaluate(objective, line, POINTS, speed="plain")
    assert_close(found.mean, eager.mean, rtol=0.02, atol=0)
    assert 0 < found.provenance["plan"]["deviation"] < 0.05
    assert not torch.equal(found.mean, full.mean)


def test_a_model_that_is_no_single_graph_is_refused():
    class Branching(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if float(y.sum()) > 0 else -y

    objective = Objective(Branching(2, 1), nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    w = objective.weights()
    with pytest.raises(ValueError, match=r"`speed` must be a plan that fits.* compiled=True") as e:
        evaluate(objective, Line(w, 2 * w), POINTS, speed=COMPILED)
    assert "data-dependent" in str(e.value.__cause__.__cause__)
    known = Plan(compiled=True, deviation=0.0)
    with pytest.raises(ValueError, match="`speed` must be a plan that fits"):
        evaluate(objective, Line(w, 2 * w), POINTS, speed=known)


def test_many_forms_of_batches_are_refused():
    batches = [(torch.ones(n, 2), torch.ones(n, 1)) for n in (1, 2, 2, 3, 4, 4)]
    require_few_forms(batches)
    require_few_forms(2 * batches)
    with pytest.raises(UnsuitableError):
        require_few_forms([*batches, (torch.ones(4, 2).double(), torch.ones(4, 1))])
    objective = Objective(
        nn.Linear(2, 1), nn.MSELoss(), [(torch.ones(n, 2), torch.ones(n, 1)) for n in range(1, 6)]
    )
    w = objective.weights()
    with pytest.raises(ValueError, match="`speed` must be a plan that fits"):
        evaluate(objective, Line(w, 2 * w), POINTS, speed=COMPILED)


@pytest.mark.parametrize("name", ["reuse_first_layer", "onednn_linear"])
def test_what_a_graph_cannot_have_put_in_is_named(name):
    with pytest.raises(ValueError, match=f"`{name}` must be False with `compiled`, got True"):
        Plan(compiled=True, **{name: True})


@needs_compiler
def test_nothing_stays_behind():
    model = nn.Linear(3, 2)
    run = CompiledModel(model)
    values = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.ones(1, 3)
    with torch.no_grad():
        assert_close(run(values, x), model(x))
    code, gone = weakref.ref(run._run), weakref.ref(model)
    del run, model
    gc.collect()
    assert code() is None
    assert gone() is None


def test_compiling_counts_as_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("landscape.plans.time.perf_counter", lambda: clock[0])
    tried = []

    def make_probe(plan):
        tried.append(plan)

        def losses():
            clock[0] += 60.0 * plan.compiled
            return [1.0]

        def run():
            clock[0] += 0.2 if plan.compiled else 0.5 if plan.reuse_first_layer else 1.0

        return Probe(losses, run, num_points=1)

    options = {"fixed": None, "tolerance": 1e-5}

    def chosen(work):
        tried.clear()
        return choose_plan(make_probe, nn.Linear(1, 1), Plan(), work=work, **options)

    reused = Plan(reuse_first_layer=True, deviation=0.0)
    assert chosen(230.0) == reused
    assert not any(plan.compiled for plan in tried)  # two minutes' work is not left
    assert chosen(250.0) == Plan(compiled=True, deviation=0.0)  # 110 seconds instead of 125
    assert sum(plan.compiled for plan in tried) == 1
    monkeypatch.setattr("landscape.plans.GAIN", 0.85)
    assert chosen(250.0) == reused


@needs_compiler
def test_worker_processes_give_the_same_bits():
    objective, line = problem(torch.float32, norm=False)
    plan = Plan(compiled=True, threads=1, deviation=0.0)
    points = torch.linspace(0, 1, 17)
    alone = evaluate(objective, line, points, speed=plan)
    shared = evaluate(objective, line, points, speed=plan, workers=2)
    assert torch.equal(shared.total, alone.total)
