"""What a training refuses, and what it keeps when something goes wrong."""

import json
import os
import resource
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flatvalley.batches import ResidentBatches
from flatvalley.checkpoints import Checkpoints, StorageError, pack, unpack
from flatvalley.data import Dataset
from flatvalley.run import read_tensors
from flatvalley.train_config import TrainConfig
from flatvalley.training import train
from hessian import DamagedFileError, NonFiniteError

NUM, SIZE = 60, 10


def samples(bad=None, value=0.0):
    """Points of the plane by the sign of their product; one of them may be bad."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(NUM, 2, generator=generator) + 0.5
    y = (x[:, 0] > x[:, 1]).long()
    if bad is not None:
        x[bad, 0] = value
    return Dataset("points", x, y, x[:20].abs() + 0.1, y[:20], 2)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))


def steep():
    """Two layers without a bound between them: at a huge learning rate they overflow."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 2))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Root(nn.Module):
    """Square roots, with an infinite slope at 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.layer = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

    def forward(self, x):
        return self.layer((self.scale * x).sqrt())


def step_of(sample, epoch=0, seed=0):
    """Number of the step, from 1, in which a sample is seen."""
    numbers = torch.arange(NUM)
    batches = ResidentBatches(numbers, numbers, SIZE, seed=seed)
    first = epoch * len(batches)
    return next(
        step + 1
        for step in range(first, first + len(batches))
        if sample in batches.batch(step)[1].tolist()
    )


def run(data, folder=None, make_model=linear, seconds=0.0, **settings):
    settings = {"runs": ("sgd",), "epochs": 4, "batch_size": SIZE, "log_every": 2} | settings
    return train(
        TrainConfig(**settings),
        folder,
        make_model=make_model,
        data=data,
        checkpoint_seconds=seconds,
    )


@pytest.mark.parametrize("folder", [False, True])
def test_a_gradient_that_is_not_finite_is_named_with_run_and_step(tmp_path, folder):
    """The loss is finite there, and the slope of the root at 0 times 0 is NaN."""
    bad = 17
    step = step_of(bad)
    where = tmp_path / "run" if folder else None
    expected = rf"The gradient of scale is not finite in step {step} of sgd, at learning rate 0.1"
    with pytest.raises(NonFiniteError, match=expected) as caught:
        run(samples(bad, 0.0), where, Root)
    if folder:
        last = max((where / "checkpoints").iterdir(), default=None)
        if last is None:
            assert "There is no checkpoint before it" in str(caught.value)
        else:
            kept = int(last.stem.split("-")[1])
            assert kept < step
            assert f"The last good checkpoint, of step {kept}," in str(caught.value)


def test_the_run_that_diverges_is_named_and_the_last_good_checkpoint_is_good(tmp_path):
    runs = ("sgd", "sgd:lr=1e25", "grda:c=0.01")
    with pytest.raises(NonFiniteError, match=r"in step \d+ of sgd:lr=1e25, .* Lower") as caught:
        run(samples(), tmp_path, steep, runs=runs, log_every=1)
    newest = max((tmp_path / "checkpoints").iterdir())
    tensors, header = read_tensors(newest)
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
    assert f"of step {header['step']}, is in" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "runs", "what"),
    [
        (samples(5, float("nan")), ("sgd",), "An input of the batch"),
        (samples(), ("sgd:lr=1e25",), "The loss"),
    ],
)
def test_inputs_and_losses_that_are_not_finite_are_named(data, runs, what):
    with pytest.raises(NonFiniteError, match=f"{what} is not finite in step"):
        run(data, None, steep, runs=runs)


def test_a_weight_that_overflows_is_named_and_not_written(tmp_path):
    """After one step of rate 3e38, whose loss is finite; weight decay makes it large enough."""
    with pytest.raises(
        NonFiniteError, match=r"The weight 0\.weight is not finite in step 1 of sgd.* no checkpoint"
    ):
        runs = ("sgd:lr=3e38,weight_decay=100",)
        run(samples(), tmp_path, steep, runs=runs, log_every=1)
    assert not list(tmp_path.rglob("step-*"))


def test_magnitude_pruning_of_weights_that_are_not_finite_is_located_too():
    with pytest.raises(NonFiniteError, match=r"is not finite in step \d+ of magnitude"):
        run(samples(), None, steep, runs=("magnitude:target=0.5,every=1,lr=1e25",), log_every=999)


def killed_run(folder, **settings):
    """A training that stopped half way, by a progress that raises."""

    class StopError(Exception):
        pass

    def stop(step, steps, losses):
        if step == 13:
            raise StopError

    settings = {"runs": ("sgd", "grda:c=0.01"), "epochs": 4, "batch_size": SIZE} | settings
    config = TrainConfig(log_every=2, **settings)
    with pytest.raises(StopError):
        train(
            config, folder, make_model=linear, data=samples(), checkpoint_seconds=0.0, progress=stop
        )
    return sorted((folder / "checkpoints").iterdir())


def whole(**settings):
    return run(samples(), runs=("sgd", "grda:c=0.01"), **settings)


def same(a, b):
    return all(
        torch.equal(t, other.weights[name])
        for run_, other in zip(a.runs, b.runs, strict=True)
        for name, t in run_.weights.items()
    )


def torn(data):
    return data[: len(data) // 2]


def flipped(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("damage", [torn, flipped, lambda data: b"", lambda data: b"PK" + data])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, damage):
    files = killed_run(tmp_path)
    assert [file.name for file in files] == [f"step-{s:09}.safetensors" for s in (10, 12)]
    files[-1].write_bytes(damage(files[-1].read_bytes()))
    result = run(samples(), tmp_path, runs=("sgd", "grda:c=0.01"))
    assert same(result, whole())
    (note,) = result.notes
    assert "Passed over a damaged checkpoint" in note
    assert files[-1].name in note


def test_where_every_checkpoint_is_damaged_nothing_is_trained_or_removed(tmp_path):
    for file in killed_run(tmp_path):
        file.write_bytes(torn(file.read_bytes()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DamagedFileError, match=r"No checkpoint in .*Remove that folder to train"):
        run(samples(), tmp_path, runs=("sgd", "grda:c=0.01"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    other = killed_run(tmp_path / "other", seed=5)
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "own" / "checkpoints")
    config = TrainConfig(
        runs=("sgd", "grda:c=0.01"), epochs=4, batch_size=SIZE, log_every=2, seed=0
    )
    (tmp_path / "own" / "run.json").write_text(
        (tmp_path / "other" / "run.json").read_text().replace('"seed": 5', '"seed": 0')
    )
    with pytest.raises(ValueError, match="must be a checkpoint of this training, but differs in"):
        train(config, tmp_path / "own", make_model=linear, data=samples())
    assert len(other) == 2


def test_other_data_or_another_start_in_the_same_folder_are_refused(tmp_path):
    killed_run(tmp_path)
    with pytest.raises(ValueError, match="differs in data digest"):
        run(samples(3, 2.0), tmp_path, runs=("sgd", "grda:c=0.01"))

    def other_start():
        model = linear()
        nn.init.ones_(model[0].weight)
        return model

    with pytest.raises(ValueError, match="differs in start digest"):
        run(samples(), tmp_path, other_start, runs=("sgd", "grda:c=0.01"))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(lr differ\)"):
        run(samples(), tmp_path, runs=("sgd", "grda:c=0.01"), lr=0.2)


def test_a_foreign_file_among_the_checkpoints_is_passed_over(tmp_path):
    killed_run(tmp_path)
    save_file({"w": torch.ones(3)}, tmp_path / "checkpoints" / "step-000000099.safetensors")
    result = run(samples(), tmp_path, runs=("sgd", "grda:c=0.01"))
    assert same(result, whole())
    assert "not as a training wrote it" in result.notes[0]


def test_a_full_disk_stops_with_what_to_do_and_loses_nothing(tmp_path):
    """The limit on the size of files lets the first checkpoints through, and no longer ones."""
    sizes = killed_run(tmp_path / "sizes")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Python ignores the signal that comes with the error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0].stat().st_size - 700, before[1]))
        with pytest.raises(StorageError, match=r"could not be written \(File too large\)") as full:
            run(samples(), tmp_path / "run", runs=("sgd", "grda:c=0.01"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert "Make room and run the same command again" in str(full.value)
    assert f"The last checkpoint is {kept[-1]}" in str(full.value)
    assert not list((tmp_path / "run").rglob(".*"))
    expected = whole()
    assert same(run(samples(), tmp_path / "run", runs=("sgd", "grda:c=0.01")), expected)
    for end, name in zip(expected.runs, ("sgd", "grda_c0.01"), strict=True):
        found = load_file(tmp_path / "run" / name / "weights.safetensors")
        assert all(torch.equal(t, found[key]) for key, t in end.weights.items())


def test_every_write_that_fails_is_a_storage_error(tmp_path, monkeypatch):
    def full(path, *arguments):
        raise OSError(28, "No space left on device")

    for place in ("os.fsync", "flatvalley.checkpoints.write_tensors"):
        folder = tmp_path / place
        killed_run(folder)
        before = {p: p.read_bytes() for p in (folder / "checkpoints").iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(StorageError, match=r"No space left on device.*Make room"):
                run(samples(), folder, runs=("sgd", "grda:c=0.01"))
        assert {p: p.read_bytes() for p in (folder / "checkpoints").iterdir()} == before
        assert same(run(samples(), folder, runs=("sgd", "grda:c=0.01")), whole())


def test_states_come_back_as_they_were():
    shared = torch.arange(6.0).view(2, 3)
    state = {
        "tensors": [shared, shared, shared[1], torch.zeros(0), torch.tensor(3), shared.t()],
        3: (None, True, -1, 0.1, float("inf"), "text"),
        "half": torch.ones(3, dtype=torch.bfloat16),
        (1, 2): {"nested": [float("nan")]},
    }
    tensors, skeleton = pack(state)
    again = unpack(tensors, json.loads(json.dumps(skeleton)))
    assert again.keys() == state.keys()
    for a, b in zip(again["tensors"], state["tensors"], strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert again[3] == state[3]
    assert torch.equal(again["half"], state["half"])
    assert str(again[1, 2]) == "{'nested': [nan]}"
    assert len(tensors) == 6
    with pytest.raises(TypeError, match="must hold tensors and plain values, got a Linear"):
        pack({"layer": nn.Linear(1, 1)})


def test_the_last_two_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"seed": 0})
    for step in (1, 5, 20):
        checkpoints.save(step, {"w": torch.full((2,), float(step))})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000000005.safetensors",
        "step-000000020.safetensors",
    ]
    assert checkpoints.latest().step == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"lr": 0.0}, "`lr` must be positive and finite, got 0.0"),
        ({"lr": float("inf")}, "`lr` must be positive and finite, got inf"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"validation": 1.0}, r"`validation` must be a share in \[0, 1\), got 1.0"),
        ({"precision": "fp16"}, "`precision` must be one of float32, float64, tf32, bf16, got"),
        ({"augment": "mixup"}, "`augment` must be one of none, crop-flip, got"),
        ({"criterion": "mse"}, "`criterion` must be cross-entropy or package.module:factory"),
        ({"schedule": "steps"}, "`schedule` must begin with one of"),
        ({"runs": ()}, "`runs` must name one optimizer or more, got none"),
        ({"runs": ("sgd", "sgd")}, "`runs` must differ from each other"),
        ({"runs": ("adam",)}, "`runs` must begin with one of sgd, grda, magnitude, got"),
        ({"runs": ("grda",)}, "`runs` needs either c or target for grda, got"),
        ({"runs": ("grda:c=1,target=0.5",)}, "`runs` needs either c or target for grda"),
        ({"runs": ("grda:c=-1",)}, "`runs` needs c finite and ≥ 0, got"),
        ({"runs": ("grda:c=1,horizon=0.5",)}, "`runs` takes horizon with target only"),
        ({"runs": ("grda:target=1.5",)}, "`runs` needs target between 0 and 1, got"),
        ({"runs": ("grda:d=1",)}, "`runs` grda takes c=…, mu=…, target=…,"),
        ({"runs": ("grda:c=x",)}, "`runs` needs a number for c, got"),
        ({"runs": ("magnitude",)}, "`runs` needs target for magnitude, such as 0.9"),
    ],
)
def test_settings_out_of_range_are_refused_at_the_door(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": "lenet-6", "data": "digits"},
            "`model` must be one of digits-mlp, lenet-300-100, ",
        ),
        ({"data": "mnits"}, "`data` must be one of cifar10, digits, mnist, got"),
        ({"data": "digits"}, "`model` lenet-300-100 must be able to evaluate `data` digits"),
        ({"data": "digits", "augment": "crop-flip"}, "`augment` crop-flip needs images"),
        ({"data": "digits", "train_samples": 2000}, "`train_samples` must be at most 1,437"),
        ({"data": "nothing.here:data"}, "`data` names the module nothing.here, but there is no"),
        (
            {"data": "digits", "model": "torch.nn:Bilinear"},
            "`model` torch.nn:Bilinear must be callable without",
        ),
        ({"data": "torch.nn:Identity"}, "must return a flatvalley.data.Dataset, or two pairs"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_file_is_written(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_starts_that_differ_are_refused():
    def anywhere():
        return nn.Linear(2, 2)

    with pytest.raises(ValueError, match="`make_model` must return the same freshly started"):
        run(samples(), None, anywhere, runs=("sgd", "grda:c=0.1"))


@pytest.mark.parametrize("keep", ["*.nothing", "*"])
def test_patterns_that_keep_nothing_or_all_are_refused(keep):
    with pytest.raises(ValueError, match="`runs` keep must name some parameters and leave some"):
        run(samples(), runs=(f"grda:c=0.1,keep={keep}",))


def test_a_missing_data_set_says_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATVALLEY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"is not there. Put the file there"):
        train(TrainConfig(data="mnist"), tmp_path / "run")


def test_a_target_that_cannot_be_reached_is_passed_on_to_the_result():
    """At a learning rate of 0 no threshold grows; the optimizer says so, the result repeats it."""
    with pytest.warns(UserWarning, match="sparsity") as caught:
        result = run(samples(), runs=("grda:target=0.6,lr=0",), epochs=1)
    assert not result.reached
    assert result.runs[0].missed
    assert set(result.notes) <= {str(w.message) for w in caught}
    assert any("sparsity" in note for note in result.notes)


def test_tensorboard_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="`tensorboard` needs the package tensorboard"):
        train(
            TrainConfig(epochs=1, runs=("sgd",)),
            tmp_path,
            make_model=linear,
            data=samples(),
            tensorboard=True,
        )
