"""Compiled models: the same function, taken only where the model is one graph and it pays."""

import gc
import shutil
import threading
import time
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hessian import Objective
from landscape import Line, Plan, evaluate, sweep
from landscape.compiled_model import CompiledModel, require_few_forms
from landscape.plans import PlanWarning, Probe, UnsuitableError, choose_plan

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
@pytest.mark.parametrize(
    ("policy", "plan"),
    [("recompute", COMPILED), ("batch", Plan(compiled=True, channels_last=True))],
    ids=["renewed", "by batch, channels last"],
)
def test_losses_are_those_of_the_plain_way(policy, plan):
    objective, line = problem()
    options = {"metrics": ("loss", "error"), "batch_norm": policy}
    state = {name: t.clone() for name, t in objective.model.state_dict().items()}
    seed = torch.get_rng_state()
    plain = sweep(objective, line, POINTS, **options, speed="plain")
    found = sweep(objective, line, POINTS, **options, speed=plan)
    assert_close(found.sums, plain.sums, rtol=1e-12, atol=0)
    assert found.provenance["plan"]["compiled"]
    assert found.provenance["plan"]["deviation"] < 1e-12
    for name, t in objective.model.state_dict().items():
        assert torch.equal(t, state[name])
    assert torch.equal(torch.get_rng_state(), seed)
    again = sweep(objective, line, POINTS, **options, speed=plan)
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
    assert "(torch.compile: " in str(e.value)
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
    with pytest.raises(ValueError, match="batches of 5 shapes"):
        evaluate(objective, Line(w, 2 * w), POINTS, speed=COMPILED)


@pytest.mark.parametrize("name", ["reuse_first_layer", "onednn_linear"])
def test_what_a_graph_cannot_have_put_in_is_named(name):
    with pytest.raises(ValueError, match=f"`{name}` must be False with `compiled`, got True"):
        Plan(compiled=True, **{name: True})


@needs_compiler
def test_many_models_have_graphs_of_their_own():
    for n in range(1, 11):  # torch keeps eight graphs of one function
        model = nn.Linear(2, n)
        values = {name: 2 * p.detach() for name, p in model.named_parameters()}
        with torch.no_grad():
            assert_close(
                CompiledModel(model)(values, torch.ones(1, 2)), 2 * model(torch.ones(1, 2))
            )


@needs_compiler
def test_models_and_graphs_are_freed():
    kept = []
    for _ in range(3):
        model = nn.Linear(3, 2)
        run = CompiledModel(model)
        values = {name: p.detach() for name, p in model.named_parameters()}
        with torch.no_grad():
            assert_close(run(values, torch.ones(1, 3)), model(torch.ones(1, 3)))
        code = run._run._torchdynamo_orig_callable.__code__
        kept.append((weakref.ref(model), weakref.ref(code)))
        del run, model, code
        gc.collect()
    assert all(model() is None for model, _ in kept)
    assert all(code() is None for _, code in kept[1:])  # torch may keep the first of a process


def test_it_is_never_tried_unasked():
    tried = []

    def make_probe(plan):
        tried.append(plan)
        return Probe(lambda: [1.0], lambda: time.sleep(0.001), num_points=1)

    choose_plan(make_probe, nn.Conv2d(1, 1, 1), Plan(), fixed=None, work=1e9, tolerance=1e-5)
    assert len(tried) > 3
    assert not any(plan.compiled for plan in tried)


@needs_compiler
def test_the_deviation_is_that_of_every_objective():
    """What is compiled may be another function, as beside torch's fast path for attention."""

    class Different(nn.Linear):
        def forward(self, x, marked):
            return super().forward(x) + marked * torch.compiler.is_compiling()

    model = Different(4, 1)
    x, y = torch.randn(6, 4), torch.ones(6, 1)
    objectives = {
        name: Objective(model, nn.MSELoss(), [(x, mask, y)])
        for name, mask in (("train", 0 * y), ("test", 0.1 * y))
    }
    w = objectives["train"].weights()
    line = Line(w, 1.5 * w)
    plain = sweep(objectives, line, POINTS, metrics=("loss",), speed="plain")
    with pytest.warns(PlanWarning, match="compiled=True.* off those of the plain way"):
        found = sweep(objectives, line, POINTS, metrics=("loss",), speed=COMPILED)
    off = (found["test", "loss"].mean / plain["test", "loss"].mean - 1).abs().max()
    assert off > 1e-4
    assert found.provenance["plan"]["deviation"] > 1e-4


@needs_compiler
def test_two_threads_leave_the_filters_of_warnings_alone():
    before = list(warnings.filters)
    models = [CompiledModel(nn.Linear(3, n)) for n in (1, 2)]

    def run(model):
        values = {name: p.detach() for name, p in model._model.named_parameters()}
        for n in (1, 2):
            model(values, torch.ones(n, 3))

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


@needs_compiler
def test_worker_processes_give_the_same_bits():
    objective, line = problem(torch.float32, norm=False)
    plan = Plan(compiled=True, threads=1, deviation=0.0)
    points = torch.linspace(0, 1, 17)
    alone = evaluate(objective, line, points, speed=plan)
    shared = evaluate(objective, line, points, speed=plan, workers=2)
    assert torch.equal(shared.total, alone.total)
