import json
import os

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from flatvalley.models import lenet_300_100
from flatvalley.sparse_weights import (
    _gaps,
    _places,
    load_sparse_weights,
    save_sparse_weights,
)
from hessian import DamagedFileError

TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def sparse(shape, sparsity, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).clamp(-3, 3)
    values[torch.rand(shape, generator=generator) < sparsity] = 0.0
    return values.to(dtype)


def bits(t):
    return t.contiguous().reshape(-1).view(torch.uint8)


def pruned_lenet(sparsity):
    model = lenet_300_100(seed=0)
    for p in model.parameters():
        p.data.copy_(sparse(p.shape, sparsity, seed=p.numel()))
    return model


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95, 0.9995, 1.0])
def test_every_bit_comes_back(tmp_path, dtype, sparsity):
    state = {"a.weight": sparse((70, 90), sparsity, dtype), "b": sparse((), 0.0, dtype)}
    again = load_sparse_weights(save_sparse_weights(tmp_path / "w.safetensors", state))
    assert again.keys() == state.keys()
    for name, t in state.items():
        assert again[name].dtype == dtype and again[name].shape == t.shape
        assert torch.equal(bits(again[name]), bits(t))


def test_extremes_of_the_range_come_back(tmp_path):
    info = torch.finfo(torch.float32)
    values = torch.zeros(400)
    values[[3, 77, 399]] = torch.tensor([info.max, -info.smallest_normal, float("inf")])
    values[100] = 1e-45  # the smallest there is
    again = load_sparse_weights(save_sparse_weights(tmp_path / "w.safetensors", {"w": values}))
    assert torch.equal(bits(again["w"]), bits(values))


def test_a_zero_loses_its_sign_where_it_is_left_out(tmp_path):
    values = torch.tensor([-0.0, 0.0, 2.0] + [-0.0] * 40)
    again = load_sparse_weights(save_sparse_weights(tmp_path / "w.safetensors", {"w": values}))
    assert torch.equal(again["w"], values) and not torch.signbit(again["w"]).any()


def test_a_transposed_tensor_and_an_empty_one_come_back(tmp_path):
    state = {"t": sparse((40, 30), 0.9).t(), "none": torch.zeros(0, 3)}
    again = load_sparse_weights(save_sparse_weights(tmp_path / "w.safetensors", state))
    assert torch.equal(again["t"], state["t"]) and again["none"].shape == (0, 3)


@given(st.lists(st.integers(0, 700), max_size=40))
@settings(max_examples=60, deadline=None)
def test_gaps_tell_the_places(gaps):
    places = (torch.tensor(gaps, dtype=torch.int64) + 1).cumsum(0) - 1
    assert torch.equal(_places(_gaps(places)), places)


def test_the_bytes_of_gaps_are_these():
    places = torch.tensor([0, 1, 256, 257 + 255, 513 + 2 * 255 + 7])
    assert _gaps(places).tolist() == [0, 0, 254, 255, 0, 255, 255, 7]


@pytest.mark.parametrize(
    ("sparsity", "most"),
    # Values, and places at the cost of the cheaper way: a bit each, or a byte a value.
    [(0.5, 0.5 + 1 / 32), (0.8, 0.2 + 1 / 32), (0.9, 0.1 * 1.25), (0.98, 0.02 * 1.255)],
)
def test_a_pruned_model_is_as_small_as_it_should_be_and_loads_into_a_plain_one(
    tmp_path, sparsity, most
):
    model = pruned_lenet(sparsity)
    path = save_sparse_weights(tmp_path / "small.safetensors", model.state_dict())
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    ratio = path.stat().st_size / (tmp_path / "dense.safetensors").stat().st_size
    nonzero = sum(int((p != 0).sum()) for p in model.parameters())
    assert nonzero / 266_610 == pytest.approx(1 - sparsity, abs=0.002)
    assert (1 - sparsity) * 0.99 < ratio < most * 1.02 + 0.002
    plain = lenet_300_100(seed=1)
    plain.load_state_dict(load_sparse_weights(path))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_dense_model_is_stored_as_it_is(tmp_path):
    state = lenet_300_100(seed=0).state_dict()
    path = save_sparse_weights(tmp_path / "w.safetensors", state)
    stored = load_file(path)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], t) for name, t in state.items())


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(50, 50), "b": nn.Linear(50, 50)})
    model["b"].weight = model["a"].weight
    path = save_sparse_weights(tmp_path / "w.safetensors", model.state_dict())
    assert path.stat().st_size < 1.5 * 4 * 50 * 50
    again = load_sparse_weights(path)
    assert again.keys() == model.state_dict().keys()
    assert again["a.weight"].data_ptr() == again["b.weight"].data_ptr()
    # Views of one tensor that differ are two tensors.
    w = torch.arange(6.0)
    state = {
        "front": w[:3],
        "back": w[3:],
        "square": w[:4].view(2, 2),
        "turned": w[:4].view(2, 2).t(),
    }
    again = load_sparse_weights(save_sparse_weights(path, state))
    assert all(torch.equal(again[name], t) for name, t in state.items())


def test_names_that_look_like_parts_are_not_mixed_up(tmp_path):
    w = sparse((100,), 0.9)
    state = {"w": w, "w.values": w + 1, "w.gaps": w + 2, "w.bits": w + 3, "v": w}
    again = load_sparse_weights(save_sparse_weights(tmp_path / "w.safetensors", state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], t) for name, t in state.items())


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [t for t in TYPES if t.is_floating_point], ids=str)
def test_nan_is_refused_and_what_was_there_stays(tmp_path, dtype):
    path = save_sparse_weights(tmp_path / "w.safetensors", {"w": torch.ones(3)})
    state = {"v": torch.ones(2), "w": torch.tensor([0.0, float("nan")]).to(dtype)}
    with pytest.raises(ValueError, match="must not hold NaN, but `w` does"):
        save_sparse_weights(path, state)
    assert torch.equal(load_sparse_weights(path)["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1.0, r"`state` must hold dense tensors, got float for `w`"),
        (sparse((4, 4), 0.9).to_sparse(), r"`state` must hold dense tensors, got Tensor for `w`"),
        (torch.zeros(2, dtype=torch.complex128), r"got torch.complex128 for `w`"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(TypeError, match=message):
        save_sparse_weights(tmp_path / "w.safetensors", {"w": wrong})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_sparse_weights(tmp_path / "w.safetensors", {"w": sparse((100,), 0.9)})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_sparse_weights(path, {"w": torch.ones(3)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(3)}, path)
    with pytest.raises(DamagedFileError, match="must be written by `save_sparse_weights`"):
        load_sparse_weights(path)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_file_with_one_bit_changed_is_refused(tmp_path, place):
    state = pruned_lenet(0.9).state_dict()
    path = save_sparse_weights(tmp_path / "w.safetensors", state)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(place * (len(data) - start))] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match="its checksum is not that of its tensors"):
        load_sparse_weights(path)


@pytest.mark.parametrize("cut", [0, 7, 100, 5000, -1])
def test_a_cut_file_is_refused(tmp_path, cut):
    path = save_sparse_weights(tmp_path / "w.safetensors", pruned_lenet(0.9).state_dict())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedFileError, match="is damaged"):
        load_sparse_weights(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shapes", {"w": [10]}),  # places beyond it
        ("shapes", {"v": [100]}),
        ("shapes", {"w": "many"}),
        ("shapes", [100]),
        ("shapes", None),
        ("same", {"v": "u"}),
        ("same", None),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, key, value):
    path = save_sparse_weights(tmp_path / "w.safetensors", {"w": sparse((100,), 0.95)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][key] = json.dumps(value)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(DamagedFileError, match="is damaged"):
        load_sparse_weights(path)
