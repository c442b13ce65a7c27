from dataclasses import replace

import numpy as np
import pytest
import torch

from flatvalley.coupled import CoupledConfig, train_coupled
from flatvalley.data import load_dataset
from flatvalley.models import tanh_mlp
from flatvalley.run import DamagedFileError
from hessian import NonFiniteError

CONFIG = CoupledConfig(gamma=0.4, time=12.0, batch_size=32, num_snapshots=5)


@pytest.fixture(scope="module")
def data():
    found = load_dataset("digits", dtype=torch.float64)
    return found.train_inputs[:200], found.train_labels[:200]


def make_model():
    return tanh_mlp([64, 6, 10], seed=0, dtype=torch.float64)


def test_coupled_run_equals_a_transcription_of_the_recursions(data):
    """SGD and gRDA by hand in NumPy, gradients by autograd, on the batches of the seed."""
    result = train_coupled(make_model, *data, CONFIG)
    model = make_model()
    shapes = [p.shape for p in model.parameters()]

    def gradient(w, rows):
        parts = torch.split(torch.from_numpy(w), [s.numel() for s in shapes])
        parts = [p.view(s).requires_grad_() for p, s in zip(parts, shapes, strict=True)]
        hidden = torch.tanh(data[0][rows] @ parts[0].T + parts[1])
        loss = torch.nn.functional.cross_entropy(hidden @ parts[2].T + parts[3], data[1][rows])
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parts)]).numpy()

    w = v = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    u, g, clipped = w.copy(), 0.0, np.zeros(len(w), dtype=bool)
    for n in range(1, CONFIG.num_steps + 1):
        epoch, index = divmod(n - 1, 7)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(epoch))
        rows = order[32 * index : 32 * (index + 1)]
        u = u - 0.4 * gradient(u, rows)
        v = v - 0.4 * gradient(w, rows)
        g = 0.02 * 0.4**0.5 * (n * 0.4) ** 0.6
        w = np.sign(v) * np.maximum(np.abs(v) - g, 0)
        clipped |= w == 0
    np.testing.assert_allclose(result.sgd.numpy(), u, atol=1e-12)
    np.testing.assert_allclose(result.grda.numpy(), w, atol=1e-12)
    assert np.array_equal(result.clipped.numpy(), clipped)
    assert result.threshold == pytest.approx(g, rel=1e-12)
    assert 0 < float((result.grda == 0).double().mean()) < 1


def test_every_run_starts_at_one_point_and_the_second_sgd_run_goes_elsewhere(data):
    result = train_coupled(make_model, *data, CONFIG)
    assert torch.equal(result.sgd_path[0], result.start)
    assert torch.equal(result.grda_path[0], result.start)
    assert torch.equal(result.sgd_path[-1], result.sgd)
    assert torch.equal(result.grda_path[-1], result.grda)
    assert result.times[-1] == pytest.approx(CONFIG.time)
    assert not torch.equal(result.second_sgd, result.sgd)


def test_both_transports_predict_grda_better_than_no_prediction(data):
    result = train_coupled(make_model, *data, replace(CONFIG, gamma=0.1))
    D = result.grda - result.sgd
    for transport in (result.transport, result.batch_transport):
        predicted = transport.difference(result.sgd)
        assert float(torch.cosine_similarity(predicted, D, dim=0)) > 0.9


class StoppedError(Exception):
    pass


def test_transport_with_the_full_hessian_takes_one_product_an_interval(data):
    result = train_coupled(make_model, *data, replace(CONFIG, gamma=0.04))
    assert result.batch_transport.num_steps == 300
    assert result.transport.num_steps == 150  # every 0.08, the multiple of 0.04 nearest to 0.1
    assert result.transport.threshold == result.batch_transport.threshold
    every_step = train_coupled(
        make_model, *data, replace(CONFIG, gamma=0.04, transport_interval=0.01)
    )
    assert every_step.transport.num_steps == 300
    D = every_step.transport.difference(result.sgd)
    change = float((result.transport.difference(result.sgd) - D).norm() / D.norm())
    assert 0 < change < 0.05


@pytest.mark.parametrize("stop", [1, 6, 7, 8, 29])
@pytest.mark.parametrize("interval", [0.1, 1.2])
def test_run_cut_off_anywhere_ends_with_the_same_bits(data, tmp_path, stop, interval):
    config = replace(CONFIG, transport_interval=interval)
    whole = train_coupled(make_model, *data, config)

    def stop_later(done, total):
        if done == stop + 1:
            raise StoppedError

    path = tmp_path / "state"
    with pytest.raises(StoppedError):
        train_coupled(
            make_model, *data, config, checkpoint=path, checkpoint_seconds=-1.0, progress=stop_later
        )
    steps = []
    resumed = train_coupled(
        make_model, *data, config, checkpoint=path, progress=lambda done, total: steps.append(done)
    )
    assert steps[0] == stop + 1
    for name in ("sgd", "grda", "second_sgd", "clipped", "times", "sgd_path", "grda_path"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    for name in ("transport", "batch_transport"):
        assert vars(getattr(resumed, name)).keys() == vars(getattr(whole, name)).keys()
        assert torch.equal(getattr(resumed, name).offset, getattr(whole, name).offset)
        assert getattr(resumed, name).num_products == getattr(whole, name).num_products
    assert resumed.threshold == whole.threshold


def test_checkpoint_of_another_run_is_refused(data, tmp_path):
    path = tmp_path / "state"
    train_coupled(make_model, *data, CONFIG, checkpoint=path, checkpoint_seconds=-1.0)
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        train_coupled(make_model, *data, replace(CONFIG, c=0.03), checkpoint=path)


def test_damaged_checkpoint_says_what_to_do(data, tmp_path):
    path = tmp_path / "state"
    train_coupled(make_model, *data, CONFIG, checkpoint=path, checkpoint_seconds=-1.0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"is damaged .* Remove it"):
        train_coupled(make_model, *data, CONFIG, checkpoint=path)


def test_divergence_names_the_step_and_the_cure(data):
    inputs = data[0].clone()
    inputs[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"The loss of \w+ is nan in step \d+ .* Lower"):
        train_coupled(make_model, inputs, data[1], CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, "`gamma` must be positive and finite, got 0.0"),
        ({"gamma": float("nan")}, "`gamma` must be positive and finite, got nan"),
        ({"gamma": 100.0}, "`gamma` must leave room for two steps"),
        ({"gamma": 1e-300}, "at most 10,000,000,000 steps"),
        ({"gamma": 1e300, "time": 1e302, "mu": 0.9}, "must give a finite threshold"),
        ({"mu": 1.5}, "`mu` must be between 1/2 and 1"),
        ({"c": -1.0}, "`c` must be positive"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_at_the_door(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_random_state_and_settings_are_left_alone(data):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train_coupled(make_model, *data, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
