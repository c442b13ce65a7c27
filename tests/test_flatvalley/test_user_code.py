"""Factories and weights of the user's own: what is found, what is refused, and in which words."""

import random
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatvalley.user_code import build, build_model, describe, importable_from, load_weights_

MODULE = """
import random
import numpy as np
import torch
from torch import nn

THREE = 3
instance = nn.Linear(2, 1)


def linear():
    return nn.Linear(2, 1)


def draws():
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def raises():
    return {}["key"]


def needs(width, depth=2):
    return nn.Linear(width, depth)


class Nets:
    @staticmethod
    def small():
        return nn.Linear(1, 1)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own_net.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import torch\n\nx = 1 / 0\n")
    (tmp_path / "own_import.py").write_text("import no_such_package_at_all\n")
    with importable_from(tmp_path):
        yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_factory_is_found_in_the_folder_and_in_a_class(folder):
    assert build_model("own_net:linear").in_features == 2
    assert build_model("own_net:Nets.small").in_features == 1
    assert isinstance(build("torch.nn:MSELoss", "criterion"), nn.MSELoss)


def test_path_is_put_back(tmp_path):
    before = list(sys.path)
    with importable_from(tmp_path):
        assert sys.path[0] == str(tmp_path)
    assert sys.path == before


def test_same_seed_builds_the_same_and_leaves_the_generators_alone(folder):
    build("own_net:linear", "model")  # imported now: that draws as well
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, again, other = (build("own_net:draws", "data", seed=s) for s in (3, 3, 4))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_net", '`model` must be "package.module:factory", got "own_net"'),
        ("own_net:", '`model` must be "package.module:factory", got "own_net:"'),
        ("nowhere.at.all:f", "names the module nowhere.at.all, but there is no module nowhere in"),
        ("own_import:f", "could not be imported: ModuleNotFoundError: No module named 'no_such"),
        ("own_broken:f", r"could not be imported: ZeroDivisionError: .* \(own_broken.py, line 3\)"),
        ("own_net:lineal", "which has no `lineal`. It has linear, draws, raises, needs, Nets"),
        ("own_net:Nets.big", "which has no `big`"),
        ("own_net:raises", r"own_net:raises raised KeyError: 'key' \(own_net.py, line 20\)"),
        ("own_net:needs", r"must be callable without arguments, but takes \(width, depth=2\)"),
        ("own_net:THREE", "must be a function without arguments, got an object of type int"),
        ("own_net:instance", "got an object of type Linear. Write `def factory"),
        ("own_net:draws", "must return a torch.nn.Module, got a tuple"),
    ],
)
def test_what_cannot_be_built_is_named(folder, spec, message):
    with pytest.raises(ValueError, match=message):
        build_model(spec)


def test_place_of_an_error_is_in_the_users_file_not_in_torch(folder):
    (folder / "own_shape.py").write_text(
        "import torch\n\n\ndef f():\n    return torch.ones(2) @ torch.ones(3)\n"
    )
    with pytest.raises(ValueError, match=r"RuntimeError.*\(own_shape.py, line 5\)"):
        build("own_shape:f", "data")


def test_error_without_a_message_is_still_described():
    assert describe(KeyboardInterrupt()) == "KeyboardInterrupt"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)


def test_weights_and_buffers_are_those_of_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    file = {key: torch.full_like(value, 2) for key, value in model.state_dict().items()}
    floats = {key: t.float() if t.is_floating_point() else t for key, t in file.items()}
    save_file(floats, tmp_path / "w.safetensors")
    load_weights_(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, file[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_one_name_of_tied_weights_is_enough(tmp_path, kept):
    model = Tied()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    del state["head.weight"], state["embed.weight"]
    state[kept] = torch.ones(5, 3)
    save_file(state, tmp_path / "w.safetensors")
    load_weights_(model, tmp_path / "w.safetensors")
    assert torch.equal(model.head.weight, torch.ones(5, 3))
    assert model.head.weight is model.embed.weight


def test_all_misfits_are_named_and_nothing_is_written(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    del state["0.bias"]
    state["1.weight"] = torch.ones(1, 4)
    state["module.extra"] = torch.ones(1)
    save_file(state, tmp_path / "w.safetensors")
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_weights_(model, tmp_path / "w.safetensors")
    assert "missing in the file: 0.bias;" in str(caught.value)
    assert "not in the model: module.extra;" in str(caught.value)
    assert "1.weight is [1, 4] in the file and [1, 3] in the model" in str(caught.value)
    assert torch.equal(model[0].weight, before)


def test_long_lists_of_keys_are_cut(tmp_path):
    save_file({f"k{i}": torch.ones(1) for i in range(9)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"not in the model: k0, k1, k2, k3, k4 and 4 more"):
        load_weights_(nn.Linear(1, 1), tmp_path / "w.safetensors")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_is_not_loaded_and_the_way_out_works(tmp_path, name, zipped):
    path = tmp_path / name
    torch.save({"weight": Bomb()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="A pickle can run any code") as caught:
        load_weights_(nn.Linear(2, 1), path)
    command = str(caught.value).split('python -c "')[1].rstrip('"')
    model = nn.Linear(2, 1)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a one-liner closes its file at the end
        exec(command)
    other = nn.Linear(2, 1)
    load_weights_(other, tmp_path / f"{name}.safetensors")
    assert torch.equal(other.weight, model.weight)


def test_file_that_is_no_safetensors_file_says_so(tmp_path):
    (tmp_path / "w.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"must be a safetensors file, and .* is none"):
        load_weights_(nn.Linear(1, 1), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="there is no file"):
        load_weights_(nn.Linear(1, 1), tmp_path / "no.safetensors")
