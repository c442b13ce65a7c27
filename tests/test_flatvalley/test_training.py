"""The training beside ten-line loops, and what it promises about runs side by side."""

import csv
import json
import math
import sys
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from flatvalley.batches import ResidentBatches
from flatvalley.data import Dataset, load_dataset
from flatvalley.sparse_weights import load_sparse_weights, save_sparse_weights
from flatvalley.train_config import TrainConfig
from flatvalley.train_data import load_train_data
from flatvalley.training import train
from flatvalley.training_loop import Training


@pytest.fixture(scope="module")
def digits():
    found = load_dataset("digits")
    return Dataset(
        "digits",
        found.train_inputs[:300],
        found.train_labels[:300],
        found.test_inputs[:90],
        found.test_labels[:90],
        10,
    )


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


def noisy():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 10)
    )


def run(digits, make_model=network, folder=None, **settings):
    settings = {"epochs": 3, "batch_size": 32, "log_every": 4} | settings
    return train(TrainConfig(**settings), folder, make_model=make_model, data=digits)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_weights_and_losses_are_those_of_plain_loops_in_float64(digits):
    """SGD and gRDA written down once more, with the schedule and the threshold of the paper."""
    lr, c, mu, epochs, size = 0.3, 0.01, 0.7, 5, 32
    result = run(
        digits,
        runs=("sgd", f"grda:c={c},mu={mu}"),
        lr=lr,
        epochs=epochs,
        schedule="paper",
        precision="float64",
        seed=7,
    )
    x = digits.train_inputs.double()
    batches = ResidentBatches(x, digits.train_labels, size, seed=7)
    sgd, grda = network().double(), network().double()
    duals = [p.detach().clone() for p in grda.parameters()]
    threshold, losses = 0.0, {epoch: [0.0, 0.0] for epoch in range(epochs)}
    for n in range(1, epochs * len(batches) + 1):
        x, y = batches.batch(n - 1)
        epoch = (n - 1) // len(batches)
        alpha = (epoch + 1) / epochs
        rate = lr * (1 if alpha <= 0.5 else max(1 - 0.99 * (alpha - 0.5) / 0.4, 0.01))
        threshold += c * rate ** (mu + 0.5) * (n**mu - (n - 1) ** mu)
        for i, model in enumerate((sgd, grda)):
            loss = cross_entropy(model(x), y)
            losses[epoch][i] += loss.item() * len(y) / len(digits.train_labels)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for j, (p, g) in enumerate(zip(model.parameters(), grads, strict=True)):
                    if model is sgd:
                        p -= rate * g
                    else:
                        duals[j] -= rate * g
                        p.copy_(duals[j].sign() * (duals[j].abs() - threshold).clamp(min=0))
    for model, end in zip((sgd, grda), result.runs, strict=True):
        for name, p in model.named_parameters():
            torch.testing.assert_close(end.weights[name], p.detach(), rtol=1e-11, atol=1e-13)
    zeros = sum(int((p == 0).sum()) for p in grda.parameters())
    assert result.runs[1].sparsity == zeros / sum(p.numel() for p in grda.parameters())
    assert 0.05 < result.runs[1].sparsity < 0.95
    for row in result.tables["epochs"]:
        i = result.config.runs.index(row["run"])
        assert row["train_loss"] == pytest.approx(losses[row["epoch"] - 1][i], rel=1e-11)
        rates = [0.3, 0.3, 0.22575, 0.07725, 0.003]
        assert row["lr"] == pytest.approx(rates[row["epoch"] - 1])
    last = result.tables["epochs"][-1]
    assert last["threshold"] == pytest.approx(threshold, rel=1e-12)
    with torch.no_grad():
        out = grda(digits.test_inputs.double())
    assert last["test_loss"] == pytest.approx(cross_entropy(out, digits.test_labels).item())
    assert last["test_accuracy"] == (out.argmax(1) == digits.test_labels).double().mean().item()


@pytest.mark.parametrize("beside", [(), ("grda:c=0.02",), ("magnitude:target=0.5", "grda:c=0.02")])
def test_a_run_is_the_same_to_the_last_bit_whatever_stands_beside_it(digits, beside):
    alone = run(digits, noisy, runs=("sgd:momentum=0.9",))
    after = run(digits, noisy, runs=(*beside, "sgd:momentum=0.9"))
    assert same(alone["sgd:momentum=0.9"].weights, after["sgd:momentum=0.9"].weights)


def test_dropout_is_shared_by_the_runs_and_new_in_every_step(digits):
    """With c = 0 gRDA is SGD; so the two agree only if they drew the same."""
    result = run(digits, noisy, runs=("sgd", "grda:c=0"), epochs=1)
    assert same(result["sgd"].weights, result["grda:c=0"].weights)
    seen = []

    class Noted(nn.Dropout):
        def forward(self, x):
            out = super().forward(torch.ones_like(x))
            if self.training:
                seen.append(out.detach().clone())
            return out * x

    def model():
        found = noisy()
        found[3] = Noted(0.4)
        return found

    run(digits, model, runs=("sgd", "grda:c=0"), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert not torch.equal(seen[0], seen[2])


def test_nothing_waits_for_the_device_between_two_readings(digits):
    """A step reads no number back: no operator that needs one on the host is called."""

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.called = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.called.add(func.name())
            return func(*args, **(kwargs or {}))

    # Gradual pruning may wait where it decides, which is every so many steps.
    config = TrainConfig(runs=("sgd", "grda:c=0.01", "magnitude:target=0.5,every=99"), epochs=60)
    training = Training(config, load_train_data(config, digits), noisy)
    waiting = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}
    training._advance()
    with Watch() as watch:
        for _ in range(2):
            training._advance()
    assert "aten::addmm" in watch.called
    assert not watch.called & waiting
    with Watch() as watch:
        training._read()
    assert watch.called & waiting


def test_the_state_outside_is_left_as_it_was(digits):
    def outside():
        return (
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            warnings.showwarning,
        )

    torch.manual_seed(5)
    before = outside()
    run(digits, noisy, runs=("sgd",), epochs=1, precision="tf32", threads=2)
    assert outside() == before

    def stop(step, steps, losses):
        raise RuntimeError("stop")

    config = TrainConfig(runs=("sgd",), epochs=1, precision="tf32", threads=2)
    with pytest.raises(RuntimeError, match="stop"):
        train(config, make_model=noisy, data=digits, progress=stop)
    assert outside() == before


def test_the_test_waits_for_the_end_where_samples_are_held_out(digits):
    result = run(digits, runs=("sgd",), validation=0.2, epochs=4, eval_every=2)
    looks = [
        (row["validation_accuracy"] is not None, row["test_accuracy"] is not None)
        for row in result.tables["epochs"]
    ]
    assert looks == [(False, False), (True, False), (False, False), (True, True)]
    # The held-out samples are the same for another seed, and none of them is trained on.
    config = TrainConfig(data="digits", validation=0.2, seed=9)
    first, second = (
        load_train_data(c, digits) for c in (config, TrainConfig(validation=0.2, seed=1))
    )
    held_out = first.validation.batches.batch(0)[0]
    assert torch.equal(held_out, second.validation.batches.batch(0)[0])
    trained = torch.cat([first.train.batches.batch(s)[0] for s in range(len(first.train.batches))])
    everything = torch.cat([held_out, trained]).sort(0).values
    assert torch.equal(everything, digits.train_inputs.sort(0).values)


def test_parameters_that_are_kept_are_trained_by_plain_sgd_or_stay_dense(digits):
    runs = ("grda:c=0.1,keep=2.*+*.bias", "magnitude:target=0.9,keep=2.*+*.bias")
    for end in run(digits, runs=runs).runs:
        zeros = {name: float((t == 0).float().mean()) for name, t in end.weights.items()}
        assert zeros["0.weight"] > 0.3
        assert all(share == 0 for name, share in zeros.items() if name != "0.weight")
        assert end.pruned_sparsity == pytest.approx(zeros["0.weight"])


def test_precisions_differ_by_their_rounding(digits):
    ends = {p: run(digits, precision=p, runs=("sgd",)) for p in ("float32", "float64", "bf16")}
    kinds = {p: end["sgd"].weights["0.weight"].dtype for p, end in ends.items()}
    assert kinds == {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
    exact = ends["float64"]["sgd"].weights["0.weight"]
    errors = {
        p: float((end["sgd"].weights["0.weight"].double() - exact).norm() / exact.norm())
        for p, end in ends.items()
    }
    assert errors["float32"] < 1e-5
    assert 1e-5 < errors["bf16"] < 1e-1


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("even", [0, 6, 12, 18, 24, 30]), ("log", [0, 1, 2, 5, 13, 30])],
)
def test_trajectories_are_the_weights_at_the_steps_asked_for(digits, tmp_path, spacing, steps):
    options = {"runs": ("sgd", "grda:c=0.01"), "snapshots": 5, "snapshot_spacing": spacing}
    result = run(digits, noisy, tmp_path, **options)
    files = sorted((tmp_path / "trajectory").iterdir())
    assert [int(file.stem.split("-")[1]) for file in files] == steps
    first, last = load_file(files[0]), load_file(files[-1])
    start = torch.cat([p.detach().flatten() for p in noisy().parameters()])
    for end in result.runs:
        assert torch.equal(first[end.name], start)
        assert torch.equal(last[end.name], end.vector(noisy()))
        assert torch.equal(last[f"{end.name}/1.running_var"], end.weights["1.running_var"])


def test_the_folder_holds_tables_and_weights_that_agree_with_the_result(digits, tmp_path):
    result = run(digits, noisy, tmp_path, runs=("sgd", "grda:c=0.2"))
    table = rows(tmp_path / "tables" / "epochs.csv")
    assert [(row["run"], int(row["epoch"])) for row in table] == [
        (name, epoch) for epoch in (1, 2, 3) for name in ("sgd", "grda:c=0.2")
    ]
    for end in result.runs:
        row = [row for row in table if row["run"] == end.name][-1]
        assert float(row["test_accuracy"]) == end.test_accuracy
        assert float(row["sparsity"]) == end.sparsity
    assert result["grda:c=0.2"].sparsity > 0.5
    dense = load_file(tmp_path / "grda_c0.2" / "weights.safetensors")
    assert same(dense, result["grda:c=0.2"].weights)
    assert same(load_sparse_weights(tmp_path / "grda_c0.2" / "sparse.safetensors"), dense)
    assert not (tmp_path / "sgd" / "sparse.safetensors").exists()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["results"]["sgd"]["test_accuracy"] == result["sgd"].test_accuracy
    steps = rows(tmp_path / "tables" / "steps.csv")
    seen = [int(row["step"]) for row in steps if row["run"] == "sgd"]
    assert seen == [1, 4, 8, 10, 12, 16, 20, 24, 28, 30]
    # The losses of the rows between two epochs add up to that of the epoch.
    mean = sum(
        float(row["train_loss"]) * n
        for row, n in zip(
            [row for row in steps if row["run"] == "sgd"][:4], (32, 96, 128, 44), strict=True
        )
    )
    assert mean / 300 == pytest.approx(float(table[0]["train_loss"]), rel=1e-12)
    again = run(digits, noisy, tmp_path, runs=("sgd", "grda:c=0.2"))
    assert str(again.tables) == str(result.tables)  # a NaN is not equal to itself
    assert same(again["sgd"].weights, result["sgd"].weights)


def test_evaluation_is_that_of_the_trained_model_in_evaluation_mode(digits):
    end = run(digits, noisy, runs=("sgd",), validation=0.1)["sgd"]
    model = noisy().eval()
    model.load_state_dict(end.weights)
    with torch.no_grad():
        out = model(digits.test_inputs)
    assert end.row["test_loss"] == pytest.approx(cross_entropy(out, digits.test_labels).item())
    right = (out.argmax(1) == digits.test_labels).double().mean().item()
    assert end.row["test_accuracy"] == right


def test_augmentation_and_bytes_change_training_but_not_evaluation():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = (images.float().mean((1, 2, 3)) > 127).long()
    scale = ((0.5,), (0.25,))
    as_bytes = Dataset("bytes", images, labels, images, labels, 2, scale)
    floats = ((images.float() / 255) - 0.5) / 0.25
    as_floats = Dataset("floats", floats, labels, floats, labels, 2)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    settings = {"runs": ("sgd",), "lr": 0.01, "epochs": 2, "batch_size": 8}
    ends = [run(data, model, **settings)["sgd"] for data in (as_bytes, as_floats)]
    for name, t in ends[0].weights.items():
        torch.testing.assert_close(t, ends[1].weights[name], rtol=1e-5, atol=1e-6)
    changed = run(as_bytes, model, augment="crop-flip", **settings)["sgd"]
    assert not torch.allclose(changed.weights["0.weight"], ends[0].weights["0.weight"], atol=1e-4)
    net = model()
    net.load_state_dict(changed.weights)
    with torch.no_grad():
        loss = cross_entropy(net(floats), labels).item()
    assert changed.row["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_sparse_weights_come_back_bit_by_bit_in_less_room(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 30, generator=generator)
    weight[torch.rand(200, 30, generator=generator) < 0.9] = 0.0
    weight[5, 6] = -math.inf
    state = {
        "layer.weight": weight,
        "dense": torch.randn(7, generator=generator),
        "empty": torch.zeros(40),
        "count": torch.tensor(3),
        "half": weight.to(torch.bfloat16),
    }
    path = save_sparse_weights(tmp_path / "w.safetensors", state)
    again = load_sparse_weights(path)
    assert again.keys() == state.keys()
    for name, t in state.items():
        assert again[name].dtype == t.dtype
        assert torch.equal(again[name], t), name
    dense = sum(t.numel() * t.element_size() for t in state.values())
    assert path.stat().st_size < 0.3 * dense


def test_a_folder_of_images_is_trained_on_file_by_file_and_resumes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 9), ("val", 4)):
        for number, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 120, (20, 24, 3), generator=generator) + 130 * number
                image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")

    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )

    config = TrainConfig(
        data=str(tmp_path / "images"),
        runs=("sgd", "grda:c=0.001"),
        epochs=5,
        batch_size=4,
        augment="crop-flip",
        image_size=12,
        drop_last=True,
        validation=2 / 18,
        log_every=3,
    )
    whole = train(config, make_model=model)
    assert whole.num_steps == 5 * 4
    assert whole["sgd"].test_accuracy == 1.0
    assert whole.num_test_samples == 8

    class StopError(Exception):
        pass

    def stop(step, steps, losses):
        if step == 11:
            raise StopError

    with pytest.raises(StopError):
        train(config, tmp_path / "run", make_model=model, checkpoint_seconds=0.0, progress=stop)
    resumed = train(config, tmp_path / "run", make_model=model)
    assert same(whole["sgd"].weights, resumed["sgd"].weights)
    assert same(whole["grda:c=0.001"].weights, resumed["grda:c=0.001"].weights)
    next((tmp_path / "images" / "train" / "dark").iterdir()).unlink()
    with pytest.raises(ValueError, match="differs in data digest"):
        train(config, tmp_path / "run", make_model=model)


def test_event_files_get_every_number_and_forget_what_a_kill_undid(digits, tmp_path, monkeypatch):
    """With a stand-in for TensorBoard, which need not be installed."""
    opened, written = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            self.name = folder.rsplit("/", 1)[1]
            opened.append((self.name, purge_step))

        def add_scalar(self, tag, value, step):
            written.append((self.name, tag, value, step))

        def flush(self):
            pass

        def close(self):
            opened.append((self.name, "closed"))

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)

    class StopError(Exception):
        pass

    def stop(step, steps, losses):
        if step == 15:
            raise StopError

    config = TrainConfig(runs=("sgd", "grda:c=0.01"), epochs=3, batch_size=32, log_every=4)
    options = {"make_model": network, "data": digits, "tensorboard": True}
    with pytest.raises(StopError):
        train(config, tmp_path, checkpoint_seconds=0.0, progress=stop, **options)
    before = len(written)
    result = train(config, tmp_path, **options)
    assert {name for name, _ in opened} == {"sgd", "grda_c0.01", "all"}
    # The checkpoint is of step 12; the next row is of step 16.
    assert [purge for name, purge in opened if name == "sgd"] == [1, 16, "closed"]
    assert not any(value != value for _, _, value, _ in written)
    expected = {
        ("sgd", "epochs/test_accuracy", row["test_accuracy"], row["step"])
        for row in result.tables["epochs"]
        if row["run"] == "sgd" and row["step"] > 12
    }
    assert expected <= set(written[before:])
    assert ("grda_c0.01", "steps/threshold", result["grda:c=0.01"].row["threshold"], 30) in written
