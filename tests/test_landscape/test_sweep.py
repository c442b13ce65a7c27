"""Several metrics at once, kept in files, gone on with after a kill, by whatever processes."""

import json
import math
import os
import sys
import weakref
from itertools import pairwise
from multiprocessing import parent_process

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessian import DamagedFileError, Objective
from landscape import (
    BezierCurve,
    Evaluation,
    Line,
    Plan,
    Plane,
    PolyChain,
    evaluate,
    grid,
    load_sweep,
    save_sweep,
    sweep,
)
from landscape.combinations import as_combination, write_weights_
from landscape.plans import PlanWarning, Probe, choose_plan, relative_deviation
from landscape.point_meter import PointMeter
from tests.cases import seeded

X = torch.linspace(-2, 2, 36, dtype=torch.float64).sin().reshape(12, 3)
Y = torch.arange(12) % 2


def network():
    return seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))).double()


@pytest.fixture
def problem():
    model = network()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=5)
    w = objective.weights()
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.randn(len(w), generator=generator, dtype=w.dtype) for _ in range(2))
    return objective, Plane(w, u, v)


POINTS = grid(torch.linspace(0, 1, 4), torch.linspace(-1, 1, 5))


def test_one_pass_gives_loss_error_gradient_and_eigenvalues(problem):
    objective, plane = problem
    metrics = ("loss", "error", "gradient_norm", "top_eigenvalue", "bottom_eigenvalue")
    found = sweep(objective, plane, POINTS, metrics=metrics)
    for i, j in ((0, 0), (3, 1), (2, 4)):
        w = plane(POINTS[i, j])
        output = objective.output(w, (X, Y))
        assert_close(found["objective", "loss"].mean[i, j].item(), objective.loss(w))
        wrong = (output.argmax(dim=1) != Y).double()
        assert_close(found["objective", "error"].mean[i, j], wrong.mean())
        assert_close(found["objective", "error"].standard_error[i, j], wrong.std() / math.sqrt(12))
        norm = objective.gradient(w).norm()
        assert_close(found["objective", "gradient_norm"].mean[i, j], norm)
        eye = torch.eye(len(w), dtype=w.dtype)
        H = torch.stack([objective.hessian_product(w, e) for e in eye])
        values = torch.linalg.eigvalsh(H)
        scale = float(values.abs().max())
        ends = [found["objective", m].mean[i, j] for m in metrics[3:]]
        assert_close(torch.stack(ends), values[[-1, 0]], atol=2e-3 * scale, rtol=0)
    assert found["objective", "gradient_norm"].count.eq(1).all()
    with pytest.raises(KeyError, match="was not measured"):
        found["objective", "accuracy"]


def test_the_sweep_is_the_objectives_own_loss(problem):
    objective, plane = problem
    found = evaluate(objective, plane, POINTS)
    truth = [objective.statistics(plane(p)) for p in POINTS.reshape(-1, 2)]
    assert_close(found.total.reshape(-1), torch.tensor([t.total for t in truth]).double())
    squares = torch.tensor([t.total_squares for t in truth]).double()
    assert_close(found.total_squares.reshape(-1), squares)


def test_unevenly_counted_samples_keep_their_weights():
    model = network()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]).double())
    objective = Objective(model, criterion, (X, Y), batch_size=5)
    w = objective.weights()
    found = evaluate(objective, Line(w, 2 * w), [0.0, 0.5])
    assert_close(found.mean[1].item(), objective.loss(1.5 * w))
    assert_close(found.total_squares[1].item(), objective.statistics(1.5 * w).total_squares)


@pytest.mark.parametrize("kind", ["line", "bezier", "chain", "plane"])
def test_weights_in_the_buffer_are_the_paths_and_exact_at_its_ends(kind):
    a, b, c = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    a[:5] = b[:5] = c[:5] = 0.0
    path = {
        "line": Line(a, b),
        "bezier": BezierCurve(torch.stack([a, c, b])),
        "chain": PolyChain(torch.stack([a, c, b])),
        "plane": Plane(a, b, c),
    }[kind]
    points = POINTS.reshape(-1, 2) if kind == "plane" else torch.linspace(-0.5, 1.5, 9).double()
    out = torch.full((50,), torch.nan)
    for p in points:
        write_weights_(out, as_combination(path), p)
        w = path(p) if kind == "plane" else path(float(p))
        assert_close(out, w, atol=1e-6, rtol=1e-6)
    ends = torch.zeros(2).double() if kind == "plane" else torch.tensor(0.0).double()
    write_weights_(out, as_combination(path), ends)
    assert torch.equal(out, a)
    if kind != "plane":
        write_weights_(out, as_combination(path), torch.tensor(1.0).double())
        assert torch.equal(out, b)
    write_weights_(out, as_combination(path), points[3])
    assert torch.equal(out[:5], torch.zeros(5))  # zeros of all ends stay zero


def test_a_bend_without_a_loss_does_not_spoil_the_ends():
    a, b = torch.zeros(3), torch.ones(3)
    curve = BezierCurve(torch.stack([a, torch.full((3,), torch.inf), b]))
    out = torch.empty(3)
    for t, end in ((0.0, a), (1.0, b)):
        write_weights_(out, as_combination(curve), torch.tensor(t).double())
        assert torch.equal(out, end)


class StopsAt:
    """Progress that ends the process' work at some point."""

    def __init__(self, at):
        self.at = at

    def __call__(self, done, total):
        if done == self.at:
            raise KeyboardInterrupt


class Counting(nn.Module):
    """A loss that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, output, target):
        self.calls += 1
        return nn.functional.cross_entropy(output, target, reduction="none")


def test_a_killed_surface_goes_on_and_ends_bit_identical(tmp_path, problem):
    _, plane = problem
    criterion = Counting()
    objective = Objective(network(), criterion, (X, Y))
    points = POINTS.clone()
    points[1, 2] = torch.inf  # no loss there; not a reason to measure it again
    whole = evaluate(objective, plane, points)
    assert whole.num_nonfinite == 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(objective, plane, points, folder=tmp_path, progress=StopsAt(19))
    assert len(list(tmp_path.glob("points-*"))) == 2  # 8 points each
    criterion.calls = 0
    steps = []
    resumed = evaluate(
        objective, plane, points, folder=tmp_path, progress=lambda *step: steps.append(step)
    )
    assert criterion.calls == 4 + 2  # of 20, and at the ends to see that it is the same loss
    assert steps[:2] == [(8, 20), (16, 20)] and steps[-1] == (20, 20)
    for name in ("count", "total", "total_squares"):
        one, other = getattr(whole, name), getattr(resumed, name)
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))
    assert resumed.provenance == whole.provenance
    criterion.calls = 0
    evaluate(objective, plane, points, folder=tmp_path)
    assert criterion.calls == 2


def test_a_loss_of_zero_or_below_is_a_finished_point(tmp_path, formula_objective):
    """Not a sentinel for "not computed", for which other tools take it."""
    calls = []

    def f(w, x):
        calls.append(w)
        return -w.abs() * torch.ones(len(x), dtype=w.dtype)

    objective = formula_objective(f, [1.0])
    line = Line(torch.tensor([0.0]).double(), torch.tensor([1.0]).double())
    first = evaluate(objective, line, [0.0, 0.5, 1.0], folder=tmp_path)
    assert first.mean.tolist() == [0.0, -0.5, -1.0] and first.num_nonfinite == 0
    calls.clear()
    again = evaluate(objective, line, [0.0, 0.5, 1.0], folder=tmp_path)
    assert len(calls) == 2 and torch.equal(again.total, first.total)


@pytest.mark.parametrize("change", ["model", "criterion"])
def test_a_folder_of_another_loss_is_refused_though_every_name_agrees(tmp_path, problem, change):
    objective, plane = problem
    scale = [1.0]

    def criterion(output, target):
        return scale[0] * nn.functional.cross_entropy(output, target)

    def own(model):
        return Objective(model, criterion, (X, Y), batch_size=5)

    first = evaluate(own(objective.model), plane, POINTS, folder=tmp_path)
    if change == "criterion":
        scale[0] = 5.0
    else:
        objective.model[1] = nn.Tanh()
    with pytest.raises(ValueError, match="have other losses: the model or the criterion"):
        evaluate(own(objective.model), plane, POINTS, folder=tmp_path)
    scale[0], objective.model[1] = 1.0 + 1e-9, nn.ReLU()  # rounding is none of its business
    again = evaluate(own(objective.model), plane, POINTS, folder=tmp_path)
    assert torch.equal(again.total, first.total)


def test_a_damaged_shard_is_measured_again(tmp_path, problem):
    objective, plane = problem
    whole = evaluate(objective, plane, POINTS, folder=tmp_path)
    shard = tmp_path / "points-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert torch.equal(evaluate(objective, plane, POINTS, folder=tmp_path).total, whole.total)


def test_a_folder_of_another_surface_is_refused_and_the_difference_named(tmp_path, problem):
    objective, plane = problem
    evaluate(objective, plane, POINTS, folder=tmp_path)
    with pytest.raises(ValueError, match=r"have other points\. Choose another folder"):
        evaluate(objective, plane, POINTS + 1, folder=tmp_path)
    with pytest.raises(ValueError, match="have other path"):
        evaluate(objective, Plane(plane.origin, plane.u, -plane.v), POINTS, folder=tmp_path)
    other = Objective(objective.model, nn.CrossEntropyLoss(), (X + 1, Y), batch_size=5)
    with pytest.raises(ValueError, match="have other data"):
        evaluate(other, plane, POINTS, folder=tmp_path)
    with pytest.raises(ValueError, match="have other metrics"):
        sweep(objective, plane, POINTS, metrics=("error",), folder=tmp_path)
    with pytest.raises(ValueError, match="`speed` must be what the points"):
        evaluate(objective, plane, POINTS, folder=tmp_path, speed=Plan(batch_size=3))
    other = tmp_path / "other"
    evaluate(objective, plane, POINTS, folder=other, speed=Plan(reuse_first_layer=True))
    with pytest.raises(ValueError, match="`speed` must be what the points"):
        evaluate(objective, plane, POINTS, folder=other, speed="plain")
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        evaluate(objective, plane, POINTS, folder=tmp_path)


def test_worker_processes_give_the_same_bits(tmp_path, problem):
    objective, plane = problem
    alone = evaluate(objective, plane, POINTS)
    steps = []
    options = {"workers": 2, "folder": tmp_path, "progress": lambda *step: steps.append(step)}
    spread = evaluate(objective, plane, POINTS, **options)
    assert torch.equal(alone.total, spread.total)
    assert torch.equal(alone.total_squares, spread.total_squares)
    # By files of 8, 8 and 4 points, in whatever order.
    done = [0, *(done for done, _ in steps)]
    assert sorted(b - a for a, b in pairwise(done)) == [4, 8, 8] and steps[-1] == (20, 20)
    # Going on, they measure nothing that is there.
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("points-*")}
    lost = tmp_path / "points-000001.safetensors"
    assert len(written) == 3
    lost.unlink()
    again = evaluate(objective, plane, POINTS, **options)
    assert torch.equal(again.total, alone.total)
    assert {path for path, time in written.items() if path.stat().st_mtime_ns != time} == {lost}


class FailsElsewhere(nn.Module):
    """Cross entropy; in a worker process something else happens where the output is large."""

    def __init__(self, dies):
        super().__init__()
        self.dies = dies

    def forward(self, output, target):
        if parent_process() is not None and float(output.abs().max()) > 5:
            if self.dies:
                os._exit(9)
            raise ZeroDivisionError("planned")
        return nn.functional.cross_entropy(output, target, reduction="none")


def test_an_error_in_a_worker_process_is_raised_here(problem):
    _, plane = problem
    objective = Objective(network(), FailsElsewhere(dies=False), (X, Y))
    assert float(objective.output(plane(POINTS[3, 4]), (X, Y)).abs().max()) > 5
    with pytest.raises(ZeroDivisionError, match="planned"):
        evaluate(objective, plane, POINTS, workers=2)


def test_a_worker_process_that_dies_is_named_and_its_folder_goes_on(tmp_path, problem):
    _, plane = problem
    objective = Objective(network(), FailsElsewhere(dies=True), (X, Y))
    with pytest.raises(RuntimeError, match=r"A worker process died .* run the same call again"):
        evaluate(objective, plane, POINTS, workers=2, folder=tmp_path)
    found = evaluate(objective, plane, POINTS, folder=tmp_path)
    assert torch.equal(found.total, evaluate(objective, plane, POINTS).total)


def test_what_cannot_be_sent_to_a_process_is_named(problem):
    _, plane = problem
    objective = Objective(network(), lambda o, t: (o**2).sum(dim=1), (X, Y))
    with pytest.raises(ValueError, match="`workers` above 1 needs a model, criterion and path"):
        evaluate(objective, plane, POINTS, workers=2)


def test_files_keep_every_bit(tmp_path, problem):
    objective, plane = problem
    test = Objective(objective.model, nn.CrossEntropyLoss(), (X[:4], Y[:4]))
    found = sweep({"train": objective, "test": test}, plane, POINTS, metrics=("loss", "error"))
    back = load_sweep(save_sweep(found, tmp_path / "surface.safetensors"))
    assert back.columns == found.columns and torch.equal(back.sums, found.sums)
    assert torch.equal(back.points, found.points)
    assert back.provenance == json.loads(json.dumps(dict(found.provenance)))
    assert back.provenance["samples"] == {"train": 12, "test": 4}
    files = {save_sweep(found, tmp_path / f"{k}.safetensors").read_bytes() for k in range(8)}
    assert len(files) == 1  # and the file is the same each time
    one = found["test", "error"]
    back = load_sweep(save_sweep(one, tmp_path / "one.safetensors"))["test", "error"]
    assert torch.equal(back.total, one.total) and back.provenance == dict(one.provenance)
    (tmp_path / "one.safetensors").write_bytes(b"\x08\x00\x00\x00")
    with pytest.raises(DamagedFileError, match="must be a whole safetensors file"):
        load_sweep(tmp_path / "one.safetensors")


class PeakMemory(TorchDispatchMode):
    """The most bytes at once in storages that operations made and that are still held."""

    def __init__(self):
        super().__init__()
        self.peak, self._live = 0, {}

    @property
    def now(self):
        return sum(self._live.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {place(t) for t in tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            key, storage = place(tensor), tensor.untyped_storage()
            if key not in known and key not in self._live:
                self._live[key] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, key, None)
                self.peak = max(self.peak, self.now)
        return out


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def dense_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 81, 300), nn.ReLU(), nn.Linear(300, 2))


def convolutions():
    layers = nn.Conv2d(8, 64, 5), nn.ReLU(), nn.Conv2d(64, 128, 5)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 2))


@pytest.mark.parametrize("network_of", [dense_network, convolutions])
@pytest.mark.parametrize(
    "speed",
    [
        "plain",
        "auto",
        Plan(reuse_first_layer=True),
        Plan(channels_last=True),
        Plan(channels_last=True, reuse_first_layer=True),
    ],
    ids=["plain", "auto", "reused", "channels last", "both"],
)
def test_a_whole_grid_takes_one_vector_beyond_the_plane(network_of, speed, monkeypatch):
    monkeypatch.setattr("landscape.plans.WORTHWHILE_SECONDS", 0.0)  # trials and all
    monkeypatch.setattr("landscape.plans.GAIN", 10.0)
    x = torch.linspace(-9, 9, 2 * 8 * 81).sin().view(2, 8, 9, 9), torch.arange(2)
    objective = Objective(seeded(network_of).float(), nn.CrossEntropyLoss(), x)
    w = objective.weights()
    plane = Plane(w, torch.full_like(w, 1e-3), torch.linspace(-1e-3, 1e-3, len(w)))
    side = 15 if speed == "auto" else 3
    points = grid(torch.linspace(-1, 1, side), torch.linspace(0, 1, side))
    with PeakMemory() as memory:
        found = evaluate(objective, plane, points, speed=speed)
    if speed == "auto":
        assert found.provenance["plan"]["reuse_first_layer"]
    assert 4 * len(w) <= memory.peak < 1.5 * 4 * len(w)


@pytest.mark.parametrize("plan", [Plan(batch_size=4), Plan(reuse_first_layer=True)])
@pytest.mark.parametrize("cut", [12, 5])
def test_plans_agree_with_the_plain_way_and_say_how_well(problem, plan, cut):
    model = problem[0].model
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=cut)
    plain = evaluate(objective, problem[1], POINTS, speed="plain")
    quick = evaluate(objective, problem[1], POINTS, speed=plan)
    assert_close(quick.total, plain.total, rtol=1e-12, atol=0)
    assert plain.provenance["plan"]["deviation"] == 0
    assert quick.provenance["plan"]["deviation"] < 1e-12
    known = Plan.from_json(quick.provenance["plan"])
    again = evaluate(objective, problem[1], POINTS, speed=known)
    assert torch.equal(again.total, quick.total) and again.provenance == quick.provenance


def test_reduced_precision_is_recorded_with_its_deviation(problem):
    model = network().float()
    objective = Objective(model, nn.CrossEntropyLoss(), (X.float(), Y))
    w = objective.weights()
    line = Line(w, 2 * w)
    full = evaluate(objective, line, [0.0, 0.5, 1.0]).mean
    found = evaluate(objective, line, [0.0, 0.5, 1.0], precision="bfloat16")
    deviation = found.provenance["plan"]["deviation"]
    assert deviation == pytest.approx(relative_deviation(found.mean.tolist(), full.tolist()))
    assert 1e-6 < deviation < 1e-2


def test_a_plan_is_taken_only_if_it_agrees_and_wins(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("landscape.plans.time.perf_counter", lambda: clock[0])
    costs = {Plan(): 1.0, Plan(batch_size=64): 0.5, Plan(batch_size=256): 0.4}
    losses = {Plan(batch_size=256): [1.0, 2.0001]}
    tried = []

    def make_probe(plan):
        tried.append(plan.batch_size)
        key = Plan(batch_size=plan.batch_size, reuse_first_layer=plan.reuse_first_layer)

        def run():
            clock[0] += 2 * costs.get(key, 0.99)

        return Probe(lambda: losses.get(key, [1.0, 2.0]), run, num_points=2)

    choice = {"fixed": None, "tolerance": 1e-5}
    found = choose_plan(make_probe, nn.Linear(1, 1), Plan(), work=1000.0, **choice)
    assert found == Plan(batch_size=64, deviation=0.0)  # 256 is off, the others no faster
    assert 2048 not in tried  # 1024 was no faster
    found = choose_plan(make_probe, nn.Linear(1, 1), Plan(), work=100.0, **choice)
    assert found == Plan(deviation=0.0)  # not worth a trial
    tried.clear()
    costs |= {Plan(batch_size=1024): 0.4, Plan(batch_size=2048): 0.35}
    found = choose_plan(make_probe, nn.Linear(1, 1), Plan(), work=1000.0, **choice)
    assert found == Plan(batch_size=2048, deviation=0.0)
    assert tried[-2:] == [1024, 2048]


def test_oneDNN_is_tried_and_a_trial_that_fails_is_left_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("landscape.plans.time.perf_counter", lambda: clock[0])

    def make_probe(plan):
        def run():
            clock[0] += 0.5 if plan.onednn_linear else 1.0
            assert plan.batch_size != 256

        return Probe(lambda: [1.0, 1 / (plan.batch_size != 64)], run, num_points=1)

    options = {"fixed": None, "work": 1000.0, "tolerance": 1e-5}
    found = choose_plan(make_probe, nn.Linear(1, 1), Plan(), **options)
    assert found == Plan(onednn_linear=True, deviation=0.0)


def test_a_fixed_plan_that_disagrees_is_named():
    def make_probe(plan):
        return Probe(lambda: [1.0 + (plan.batch_size == 7)], lambda: None, num_points=1)

    options = {"fixed": Plan(batch_size=7), "work": 1.0, "tolerance": 1e-5}
    with pytest.warns(
        PlanWarning, match=r"batch_size=7.* are up to 5.0e-01 off .* more than 1e-05"
    ):
        found = choose_plan(make_probe, nn.Linear(1, 1), Plan(), **options)
    assert found.deviation == 0.5


def test_trials_are_timed_on_points_that_follow_each_other(problem, monkeypatch):
    objective, plane = problem
    probes, measured = [], []
    real = PointMeter.measure
    monkeypatch.setattr(
        sys.modules["landscape.evaluate"],  # the package has a function of that name
        "choose_plan",
        lambda make_probe, *_, **__: probes.append(make_probe(Plan())) or Plan(deviation=0.0),
    )
    evaluate(objective, plane, POINTS)
    monkeypatch.setattr(
        PointMeter, "measure", lambda self, point: measured.append(point) or real(self, point)
    )
    probes[0].run()
    rows = POINTS.reshape(-1, 2)
    begin = len(rows) // 2 - 1
    assert torch.equal(torch.stack(measured), rows[begin : begin + 3])
    assert probes[0].num_points == 3


def test_the_best_of_some_runs_counts():
    times = iter([5.0, 9.0, 9.0, 12.0, 12.0, 17.0])  # runs of four seconds, three and five
    probe = Probe(lambda: [1.0], lambda: None, num_points=2)
    assert probe.seconds(lambda: next(times)) == 1.5


def test_deviation_is_relative_and_nan_where_only_one_is_finite():
    assert relative_deviation([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert relative_deviation([0.0, math.nan], [0.0, math.nan]) == 0
    assert math.isnan(relative_deviation([math.nan], [1.0]))


def test_bad_options_are_named(problem):
    objective, plane = problem
    with pytest.raises(ValueError, match=r'`metrics` must be among loss, .* got "accuracy"'):
        sweep.__wrapped__(objective, plane, POINTS, metrics=("accuracy",))
    with pytest.raises(ValueError, match="`metrics` must name each metric once"):
        sweep(objective, plane, POINTS, metrics=("loss", "loss"))
    with pytest.raises(ValueError, match=r'`speed` must be "auto", "plain" or a `Plan`, got .fast'):
        sys.modules["landscape.evaluate"]._require_speed.__wrapped__("fast")
    with pytest.raises(ValueError, match="`workers` must be at least 1, got 0"):
        evaluate(objective, plane, POINTS, workers=0)
    with pytest.raises(ValueError, match='`precision` must be "full" or "bfloat16"'):
        sweep.__wrapped__(objective, plane, POINTS, precision="tf32")
    with pytest.raises(ValueError, match="`objectives` must hold at least one"):
        sweep({}, plane, POINTS)
    other = Objective(network(), nn.CrossEntropyLoss(), (X, Y))
    with pytest.raises(ValueError, match=r'must share one model .* but "b" has others'):
        sweep({"a": objective, "b": other}, plane, POINTS)
    with pytest.raises(ValueError, match="`speed` must be a plan that fits"):
        evaluate(objective, lambda t: plane.origin * t, [0.5], speed=Plan(reuse_first_layer=True))
    with pytest.raises(ValueError, match="`speed` must be a plan that fits"):
        known = Plan(reuse_first_layer=True, deviation=0.0)
        evaluate(objective, lambda t: plane.origin * t, [0.5], speed=known)


def test_an_evaluation_made_by_hand_has_no_provenance():
    n = torch.ones(2).double()
    assert dict(Evaluation(torch.zeros(2).double(), n, n, n).provenance) == {}
