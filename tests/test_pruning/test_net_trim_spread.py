"""Layers shared by processes and ranks, and kept in a folder: the bits of one process."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hessian import ConvergenceWarning, NonFiniteError
from pruning import net_trim, net_trim_layers, net_trim_solved, net_trim_spread
from tests.cases import seeded
from tests.test_pruning.net_trim_rank_worker import problem


@pytest.fixture(autouse=True)
def one_thread():
    """Products on another number of threads round in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(found, expected):
    assert torch.equal(found.weights, expected.weights)
    assert (found.discrepancy, found.bound) == (expected.discrepancy, expected.bound)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert (one.weight, one.drift, one.kind) == (other.weight, other.drift, other.kind)
        for trim, same in zip(one.trims, other.trims, strict=True):
            numbers = {**vars(trim), "weights": 0, "seconds": 0}
            assert numbers == {**vars(same), "weights": 0, "seconds": 0}
            assert torch.equal(trim.weights, same.weights)


class Dies(nn.Linear):
    """A layer that ends every process but the one that made it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.main = os.getpid()

    def forward(self, x):
        if os.getpid() != self.main:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Masked(nn.Module):
    """Two layers alike, of which the second one is given a NaN that no output shows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        z = self.a(x).relu()
        return self.c(z) + 0 * self.b(z * torch.nan).relu().nan_to_num(0.0)[:, :2]


def test_worker_processes_give_the_same_bits():
    model, x = problem()
    before = copy.deepcopy(model.state_dict())
    seen = []
    alone = net_trim(model, x, epsilon=0.1)
    shared = net_trim(model, x, epsilon=0.1, workers=2, progress=lambda *now: seen.append(now))
    assert_same(shared, alone)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not multiprocessing.active_children()
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


@pytest.mark.slow
def test_an_error_in_a_worker_names_the_layer_and_ends_all_processes():
    model = seeded(Masked)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=r"Layer of `b\.weight`") as caught:
        net_trim(model, torch.randn(30, 6).double(), epsilon=0.1, workers=2)
    assert "In a worker process:" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_other_errors_name_the_layer_in_a_note(monkeypatch):
    def fails(*args, **options):
        raise ZeroDivisionError("planned")

    monkeypatch.setattr(net_trim_solved, "group_problems", fails)
    with pytest.raises(ZeroDivisionError, match="planned") as caught:
        net_trim(*problem(), epsilon=0.1)
    assert caught.value.__notes__ == ["In the layer of `0.weight`."]


@pytest.mark.slow
def test_a_worker_that_dies_names_the_layer():
    model = seeded(lambda: nn.Sequential(Dies(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    with pytest.raises(RuntimeError, match=r"worker process died .* had the layer of `\d\.weight`"):
        net_trim(model, torch.randn(30, 6).double(), epsilon=0.1, workers=2)
    assert not multiprocessing.active_children()


def test_the_largest_layers_are_handed_out_first(monkeypatch):
    handed = []

    def here(make, recipe, jobs, *, workers, threads):
        handed.append(([layer.weight for layer in jobs], workers, threads))
        serve = make(recipe)
        yield from ((place, serve(job)) for place, job in enumerate(jobs))

    monkeypatch.setattr(net_trim_spread, "by_workers", here)
    model, x = problem()
    shared = net_trim(model, x, epsilon=0.1, workers=3)
    # 4 N M P + 2 N² M flops: of rows for the ReLUs, and of moments for the others.
    assert handed == [(["3.weight", "5.weight", "0.weight", "7.weight"], 3, 1)]
    assert_same(shared, net_trim(model, x, epsilon=0.1))


@pytest.mark.slow
def test_who_is_interrupted_leaves_no_process_behind(tmp_path):
    model, x = problem()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        net_trim(model, x, epsilon=0.1, workers=2, progress=stop, checkpoint=tmp_path)
    assert not multiprocessing.active_children()
    kept = list(tmp_path.glob("*.safetensors"))
    assert len(kept) == 1
    # One process goes on with what two began.
    alone = net_trim(model, x, epsilon=0.1)
    assert_same(net_trim(model, x, epsilon=0.1, checkpoint=tmp_path), alone)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"workers": 0}, "`workers` must be at least 1, got 0"),
        ({"workers": 2, "mode": "cascade"}, "`workers` must be 1 and `group` None in a cascade"),
    ],
)
def test_processes_that_cannot_share_the_work_are_refused(options, message):
    model, x = problem()
    with pytest.raises(ValueError, match=message):
        net_trim(model, x, epsilon=0.1, **options)


def test_what_cannot_be_sent_to_a_process_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[1].forward = lambda x: x.relu()
    with pytest.raises(ValueError, match="`workers` above 1 needs a model and calibration inputs"):
        net_trim(model, torch.randn(20, 3), epsilon=0.1, workers=2)


@pytest.mark.slow
def test_ranks_share_the_layers_and_agree_with_one_process(tmp_path):
    command = [sys.executable, "-m", "tests.test_pruning.net_trim_rank_worker"]
    started = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store"), str(tmp_path)])
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=240) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    model, x = problem()
    alone = net_trim(model, x, epsilon=0.1)
    numbers = [[layer.discrepancy, layer.violation] for layer in alone.layers]
    seen = []
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(found["weights"], alone.weights)
        assert torch.equal(found["numbers"], torch.tensor(numbers))
        seen += found["seen"].tolist()
    # The largest layer is as much work as all others.
    assert sorted(total for _, total in seen) == [1, 3, 3, 3]
    # What ranks have kept, one process goes on with: it solves nothing.
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 4
    again = net_trim(model, x, epsilon=0.1, checkpoint=tmp_path / "kept", max_iterations=3000)
    assert_same(again, alone)
    told = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert told[1][0] == "ZeroDivisionError: planned"
    assert told[0][0] == "RankError: Rank 1 of 2 failed with ZeroDivisionError: planned"
    for rank in (0, 1):
        assert all("Every rank must be given the same" in text for text in told[rank][1:])
        assert len(told[rank]) == 3


def interrupted(model, x, folder, after, **options):
    """Prune until so many layers are done."""

    def stop(done, total):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        net_trim(model, x, checkpoint=folder, progress=stop, **options)


OPTIONS = {
    "parallel": {"epsilon": 0.1},
    "cascade": {"epsilon": 0.1, "mode": "cascade", "refit": True},
}


@pytest.mark.parametrize("mode", OPTIONS)
def test_a_killed_pruning_goes_on_to_the_same_bits(mode, tmp_path, monkeypatch):
    model, x = problem()
    whole = net_trim(model, x, **OPTIONS[mode])
    solved = []

    def counted(objective, layer, *args, **options):
        solved.append(layer.weight)
        return solve(objective, layer, *args, **options)

    module = net_trim_spread if mode == "parallel" else net_trim_layers
    solve = module.solved_layer
    monkeypatch.setattr(module, "solved_layer", counted)
    for after in (1, 3):
        interrupted(model, x, tmp_path / "kept", after, **OPTIONS[mode])
    assert len(solved) == 3
    seen = []
    again = net_trim(
        model,
        x,
        **OPTIONS[mode],
        checkpoint=str(tmp_path / "kept"),
        progress=lambda *now: seen.append(now),
    )
    assert_same(again, whole)
    assert solved == [layer.weight for layer in whole.layers] and seen[-1] == (4, 4)


def test_a_budget_that_ran_out_is_told_again(tmp_path):
    model, x = problem()
    options = {"epsilon": 0.1, "max_iterations": 20, "checkpoint": tmp_path}
    told = []
    for _ in range(2):
        with pytest.warns(ConvergenceWarning) as heard:
            net_trim(model, x, **options)
        told.append([str(warning.message) for warning in heard])
    assert told[0] == told[1] and told[0][0].startswith("Layer of `0.weight`: Net-Trim did not")


def test_a_layer_that_is_damaged_is_solved_again(tmp_path):
    model, x = problem()
    whole = net_trim(model, x, epsilon=0.1, checkpoint=tmp_path)
    path = tmp_path / "3.weight.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert_same(net_trim(model, x, epsilon=0.1, checkpoint=tmp_path), whole)
    assert abs(len(path.read_bytes()) - len(data)) <= 40  # whole again; its times differ


def other_inputs(model, x):
    return model, x + 1e-3


def other_weights(model, x):
    with torch.no_grad():
        model[3].weight[0, 0] += 1e-9
    return model, x


def fewer_weights(model, x):
    model[3].bias.requires_grad_(False)
    return model, x


OTHERS = {
    "calibration": (other_inputs, {}),
    "weights, calibration": (other_weights, {}),
    "model, weights": (fewer_weights, {}),
    "epsilon": (None, {"epsilon": 0.2}),
    "tol": (None, {"tol": 1e-3}),
    "rho": (None, {"rho": 2.0}),
    "exclude": (None, {"exclude": "3.*"}),
    "mode": (None, {"mode": "cascade"}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_another_pruning_is_refused(what, tmp_path):
    change, options = OTHERS[what]
    model, x = problem()
    interrupted(model, x, tmp_path, 1, epsilon=0.1)
    if change is not None:
        model, x = change(model, x)
    with pytest.raises(ValueError, match=f"`checkpoint` must be new .* other {what}. Choose"):
        net_trim(model, x, **{"epsilon": 0.1, **options}, checkpoint=tmp_path)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    model, x = problem()
    (tmp_path / "net_trim.json").write_text("{")
    with pytest.raises(ValueError, match=r"`checkpoint` must be new .* is damaged"):
        net_trim(model, x, epsilon=0.1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"`checkpoint` must be new .* is a file"):
        net_trim(model, x, epsilon=0.1, checkpoint=tmp_path / "net_trim.json")
