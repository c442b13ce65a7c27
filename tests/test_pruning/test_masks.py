import copy
import dataclasses
import io
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hessian import DamagedFileError, NonFiniteError, Objective
from pruning import GRDA, Masks, keep_zeros, magnitude_prune

F64 = torch.float64
KEEP = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)


def network(seed=0, dtype=F64):
    """Half of the weights zero, in every parameter; 89 odd weights in the first."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=F64)
            p.copy_(draw * (draw > 0))
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step(model, optimizer, seed, scaler=None):
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed), dtype=F64)
    optimizer.zero_grad()
    loss = (model(x) - x[:, :3].sin()).square().mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
        return
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


class Regression:
    """½ ‖X w − y‖² / n on twelve columns, of which seven stay; or on these seven alone."""

    def __init__(self, *, smaller):
        generator = torch.Generator().manual_seed(1)
        X = torch.randn(30, 12, generator=generator, dtype=F64)
        start = torch.randn(12, generator=generator, dtype=F64)
        self.y = torch.randn(30, generator=generator, dtype=F64)
        self.X = X[:, KEEP] if smaller else X
        self.model = nn.Module()
        self.model.w = nn.Parameter(start[KEEP] if smaller else start)

    def loss(self):
        return 0.5 * (self.X @ self.model.w - self.y).square().mean()

    def train(self, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()


class NormalizedDescent(torch.optim.Optimizer):
    """w − lr g / ‖g‖ over all weights together: one that puts gradients together."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.sub_(p.grad, alpha=float(group["lr"] / norm))


# --- what a mask is -----------------------------------------------------------------------------


def test_masks_of_a_model_are_its_zeros():
    model = network()
    masks = Masks.of(model)
    flat = weights(model)
    assert list(masks.keep) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, p in model.named_parameters():
        assert torch.equal(masks.keep[name], p != 0)
        assert masks.sparsity_by_parameter()[name] == float((p == 0).double().mean())
    assert masks.num_weights == len(flat) == 156
    assert masks.num_zeros == int((flat == 0).sum()) and 50 < masks.num_zeros < 100
    assert masks.sparsity == masks.num_zeros / 156


def test_masks_of_a_vector_are_those_of_the_model_it_is_written_to():
    model = network()
    X = torch.zeros(2, 5, dtype=F64)
    objective = Objective(
        model, nn.MSELoss(), (X, torch.zeros(2, 3, dtype=F64)), parameters=["2.*"]
    )
    pruned = magnitude_prune(objective.weights(), 0.9)
    masks = Masks.from_vector(objective, pruned.mask)
    objective.write_(pruned.weights)
    expected = Masks.of(model, exclude="0.*")
    assert masks.keep.keys() == expected.keep.keys() == {"2.weight", "2.bias"}
    assert all(torch.equal(masks.keep[name], expected.keep[name]) for name in masks.keep)
    assert masks.sparsity == pruned.sparsity
    pruned.mask.fill_(True)
    assert not masks.keep["2.weight"].all()


def test_a_vector_that_is_no_mask_is_refused(unchecked_shapes):
    data = torch.zeros(2, 5, dtype=F64), torch.zeros(2, 3, dtype=F64)
    objective = Objective(network(), nn.MSELoss(), data)
    with pytest.raises(ValueError, match="one entry for each of the 156 selected weights"):
        Masks.from_vector(objective, torch.ones(155, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"`mask` must be a boolean tensor, got torch.float64"):
        Masks.from_vector(objective, objective.weights())


def test_excluded_parameters_are_not_spoken_of():
    masks = Masks.of(network(), exclude=("*bias", "2.*"))
    assert list(masks.keep) == ["0.weight"]
    with pytest.raises(ValueError, match=r'`exclude` pattern "\*scale" matches none of 0.weight'):
        Masks.of(network(), exclude="*scale")
    with pytest.raises(ValueError, match="`keep` must speak of at least one weight"):
        Masks.of(network(), exclude="*")


def test_parameters_without_zeros_are_not_touched():
    model = network()
    model[0].weight.data.fill_(1.0)
    expected = [model[0].bias, model[2].weight] + [model[2].bias] * bool((model[2].bias == 0).any())
    assert [id(p) for p, _ in Masks.of(model).pairs(model)] == [id(p) for p in expected]


def test_tied_weights_are_masked_once_and_under_either_name():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    model["a"].weight.data[0] = 0.0
    masks = Masks.of(model)
    assert list(masks.keep) == ["a.weight"] and masks.num_weights == 16
    masks = Masks({"b.weight": masks.keep["a.weight"]})
    model["a"].weight.data.fill_(3.0)
    masks.apply_(model)
    assert model["b"].weight[0].tolist() == [0.0] * 4 and torch.all(model["a"].weight[1:] == 3)


def test_masks_are_frozen_and_can_be_copied():
    given = {"w": torch.tensor([True, False])}
    masks = Masks(given)
    given["v"] = torch.tensor([False])
    assert list(masks.keep) == ["w"] and masks.zeros == {"w": 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        masks.keep = {}
    assert torch.equal(copy.deepcopy(masks).keep["w"], masks.keep["w"])
    with pytest.raises(TypeError, match=r"boolean tensors, got torch.float32 for `w`"):
        Masks({"w": torch.ones(2)})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_have_no_masks(bad):
    model = network()
    model[2].weight.data[1, 1] = bad
    with pytest.raises(NonFiniteError, match=r"`2.weight` holds NaN or infinity"):
        Masks.of(model)


def test_a_sharded_parameter_is_refused():
    class Sharded(nn.Parameter):
        def full_tensor(self):
            return self

    model = nn.Module()
    model.w = Sharded(torch.zeros(3))
    with pytest.raises(TypeError, match=r"`w` is sharded over ranks"):
        Masks.of(model)


# --- the model stays plain ----------------------------------------------------------------------


def test_the_model_never_knows():
    model = network()
    keys = list(model.state_dict())
    plain = [{k: len(v) for k, v in m.__dict__.items() if "hooks" in k} for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with keep_zeros(model, optimizer) as kept:
        step(model, optimizer, 0)
        assert list(model.state_dict()) == keys
        assert plain == [
            {k: len(v) for k, v in m.__dict__.items() if "hooks" in k} for m in model.modules()
        ]
        twin = copy.deepcopy(model)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(weights(twin), weights(model))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        assert type(model[0].weight) is nn.Parameter
    assert kept.masks.keep.keys() == set(keys)


def test_a_fine_tuned_model_can_be_exported():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with keep_zeros(model, optimizer) as kept:
        for seed in range(3):
            step(model, optimizer, seed)
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(9), dtype=F64)
        program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)
    for name, mask in kept.masks.keep.items():
        assert torch.all(program.state_dict[name][~mask] == 0)


# --- zeros stay, and the others train as if they had never been ---------------------------------

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "one tensor at a time": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "fused momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "grda": lambda p: GRDA(p, 0.1, c=0.01),
    "grda, foreach=False": lambda p: GRDA(p, 0.1, c=0.01, foreach=False),
    "capturable grda": lambda p: GRDA(p, 0.1, c=0.01, capturable=True),
    "norms": lambda p: NormalizedDescent(p, 0.05),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_sparse_start_trains_as_the_smaller_problem_does(build):
    sparse, small = Regression(smaller=False), Regression(smaller=True)
    optimizer = build([sparse.model.w])
    start = small.model.w.detach().clone()
    with keep_zeros(sparse.model, optimizer, Masks({"w": KEEP})):
        assert torch.equal(sparse.model.w[KEEP], start) and torch.all(sparse.model.w[~KEEP] == 0)
        sparse.train(optimizer, 25)
    small.train(build([small.model.w]), 25)
    # Sums over twelve columns are added in another order than over seven.
    torch.testing.assert_close(sparse.model.w[KEEP], small.model.w, rtol=1e-10, atol=1e-13)
    assert torch.all(sparse.model.w[~KEEP] == 0)
    assert float((small.model.w - start).detach().norm()) > 0.1
    for value in optimizer.state[sparse.model.w].values():
        if isinstance(value, torch.Tensor) and value.shape == KEEP.shape:
            assert torch.all(value[~KEEP] == 0)


def test_a_sparse_start_follows_the_formula_of_momentum():
    problem = Regression(smaller=False)
    optimizer = torch.optim.SGD([problem.model.w], lr=0.1, momentum=0.9, weight_decay=0.01)
    u = torch.where(KEEP, problem.model.w.detach(), 0.0)
    v = torch.zeros_like(u)
    with keep_zeros(problem.model, optimizer, Masks({"w": KEEP})):
        for _ in range(40):
            gradient = problem.X.T @ (problem.X @ u - problem.y) / 30 + 0.01 * u
            v = 0.9 * v + gradient * KEEP
            u = u - 0.1 * v
            problem.train(optimizer, 1)
    torch.testing.assert_close(problem.model.w.detach(), u, rtol=1e-12, atol=1e-14)


def test_a_momentum_from_before_goes_on_for_the_weights_that_stay():
    sparse = Regression(smaller=False)
    optimizer = torch.optim.SGD([sparse.model.w], lr=0.1, momentum=0.9)
    sparse.train(optimizer, 5)
    small = Regression(smaller=True)
    small.model.w.data.copy_(sparse.model.w.detach()[KEEP])
    other = torch.optim.SGD([small.model.w], lr=0.1, momentum=0.9)
    momentum = optimizer.state[sparse.model.w]["momentum_buffer"][KEEP].clone()
    other.state[small.model.w]["momentum_buffer"] = momentum
    with keep_zeros(sparse.model, optimizer, Masks({"w": KEEP})):
        sparse.train(optimizer, 20)
    small.train(other, 20)
    torch.testing.assert_close(sparse.model.w[KEEP], small.model.w, rtol=1e-10, atol=1e-13)


def test_a_state_that_is_loaded_in_between_brings_no_weight_back():
    problem = Regression(smaller=False)
    optimizer = torch.optim.SGD([problem.model.w], lr=0.1, momentum=0.9)
    problem.train(optimizer, 3)
    dense = copy.deepcopy(optimizer.state_dict())
    with keep_zeros(problem.model, optimizer, Masks({"w": KEEP})):
        optimizer.load_state_dict(dense)
        problem.train(optimizer, 1)
        assert torch.all(problem.model.w[~KEEP] == 0)
        assert torch.all(optimizer.state[problem.model.w]["momentum_buffer"][~KEEP] == 0)


def test_without_it_zeros_come_back_and_so_they_do_once_it_is_removed():
    model = network()
    zero = weights(model) == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kept = keep_zeros(model, optimizer)
    step(model, optimizer, 0)
    assert torch.equal(weights(model) == 0, zero)
    kept.remove()
    step(model, optimizer, 1)
    back = int((weights(model)[zero] != 0).sum())  # none to a unit that nothing listens to
    assert back > 0.7 * int(zero.sum())
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
    kept.remove()  # once more does no harm


def test_an_exception_ends_it_too():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), keep_zeros(model, optimizer):
        raise KeyError
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


def test_groups_frozen_layers_and_parameters_that_come_later():
    model = network()
    zero = weights(model) == 0
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}], weight_decay=0.1)
    with keep_zeros(model, optimizer):
        step(model, optimizer, 0)
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
        before = weights(model)
        step(model, optimizer, 1)
        assert torch.equal(weights(model) == 0, zero)
        assert int((weights(model) != before).sum()) == int((~zero).sum())


def test_an_excluded_parameter_trains_densely():
    model = network()
    model[2].bias.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with keep_zeros(model, optimizer, Masks.of(model, exclude="*bias")):
        step(model, optimizer, 0)
    assert torch.all(model[2].bias != 0)
    assert torch.equal(model[2].weight == 0, network()[2].weight == 0)


def test_a_scaler_for_half_precision_steps_and_skips():
    model = network()
    zero = weights(model) == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = copy.deepcopy(model)
    other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    with keep_zeros(model, optimizer), keep_zeros(plain, other):
        for seed in range(5):
            step(model, optimizer, seed, scaler)
            step(plain, other, seed)
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-12, atol=1e-14)
        before = weights(model)
        model[0].bias.register_hook(lambda g: g * math.inf)
        step(model, optimizer, 5, scaler)
        assert torch.equal(weights(model), before)
    assert torch.equal(before == 0, zero)


@pytest.mark.parametrize("build", [torch.optim.Adam, NormalizedDescent])
def test_an_infinite_gradient_of_a_weight_that_is_gone_does_no_harm(build):
    problem = Regression(smaller=False)
    optimizer = build([problem.model.w], lr=0.1)
    with keep_zeros(problem.model, optimizer, Masks({"w": KEEP})):
        for bad in (math.inf, math.nan):
            problem.loss().backward()
            problem.model.w.grad[~KEEP] = bad
            optimizer.step()
    assert torch.all(problem.model.w.isfinite()) and torch.all(problem.model.w[~KEEP] == 0)
    for value in optimizer.state[problem.model.w].values():
        assert torch.all(value.isfinite())


def test_zeros_have_no_sign():
    model = nn.Linear(1, 2, bias=False)
    model.weight.data.fill_(-3.0)
    masks = Masks({"weight": torch.tensor([[True], [False]])})
    masks.apply_(model)
    assert torch.signbit(model.weight).tolist() == [[True], [False]]
    model.weight.data.fill_(-3.0)
    with keep_zeros(model, torch.optim.SGD(model.parameters(), lr=0.1), masks):
        assert torch.signbit(model.weight).tolist() == [[True], [False]]


def test_a_scalar_parameter_leaves_the_count_of_steps_alone():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.Adam(model.parameters())
    with keep_zeros(model, optimizer):
        for _ in range(3):
            model.scale.grad = torch.tensor(1.0)
            optimizer.step()
    assert model.scale.item() == 0.0
    assert optimizer.state[model.scale]["step"].item() == 3.0


@pytest.mark.parametrize("masked", [False, True])
def test_clipping_by_norm_needs_the_gradients_masked_first(masked):
    sparse, small = Regression(smaller=False), Regression(smaller=True)
    masks = Masks({"w": KEEP})
    optimizers = [torch.optim.SGD([problem.model.w], lr=0.1) for problem in (sparse, small)]
    with keep_zeros(sparse.model, optimizers[0], masks):
        for _ in range(5):
            for problem, optimizer in zip((sparse, small), optimizers, strict=True):
                optimizer.zero_grad()
                problem.loss().backward()
                if masked and problem is sparse:
                    masks.apply_to_gradients_(sparse.model)
                nn.utils.clip_grad_norm_(problem.model.parameters(), 0.05)
                optimizer.step()
    difference = float((sparse.model.w[KEEP] - small.model.w).detach().norm())
    assert difference < 1e-13 if masked else difference > 1e-4


def test_a_closure_that_masks_its_gradients_serves_lbfgs():
    sparse, small = Regression(smaller=False), Regression(smaller=True)
    masks = Masks({"w": KEEP})
    masks.apply_(sparse.model)
    for problem in (sparse, small):
        optimizer = torch.optim.LBFGS([problem.model.w], max_iter=6)

        def closure(problem=problem, optimizer=optimizer):
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            if problem is sparse:
                masks.apply_to_gradients_(problem.model)
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(sparse.model.w[KEEP], small.model.w, rtol=1e-9, atol=1e-12)


def test_an_average_that_began_dense_takes_the_masks():
    model = network()
    masks = Masks.of(model)
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
    average = AveragedModel(model)
    average.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with keep_zeros(model, optimizer, masks):
        step(model, optimizer, 0)
        average.update_parameters(model)
    gone = {name: ~mask for name, mask in masks.keep.items()}
    before = {name: p.detach().clone() for name, p in average.module.named_parameters()}
    assert all(torch.all(before[name][mask] != 0) for name, mask in gone.items())
    masks.apply_(average)
    for name, p in average.module.named_parameters():
        assert torch.equal(p, torch.where(gone[name], 0.0, before[name]))


def test_a_data_parallel_model_is_the_model_inside(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain = network()
        wrapped = nn.parallel.DistributedDataParallel(network())
        for model in (plain, wrapped):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            with keep_zeros(model, optimizer):
                for seed in range(4):
                    step(model, optimizer, seed)
        assert torch.equal(weights(wrapped), weights(plain))
        assert list(Masks.of(wrapped).keep) == list(Masks.of(plain).keep)
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_of_another_model_is_refused():
    model, other = network(), network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizer` must train parameters of `model`"):
        keep_zeros(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


# --- files, and masks of another model ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5, 7), (), (0, 4)])
def test_masks_come_back_from_a_file_bit_for_bit(tmp_path, shape):
    generator = torch.Generator().manual_seed(0)
    keep = {
        "one": torch.rand(shape, generator=generator) < 0.3,
        "two.weight": torch.ones(2, 2, dtype=torch.bool),
    }
    again = Masks.load(Masks(keep).save(tmp_path / "masks.safetensors"))
    assert again.keep.keys() == keep.keys()
    for name, mask in keep.items():
        assert torch.equal(again.keep[name], mask) and again.keep[name].shape == mask.shape


def test_a_file_takes_one_bit_a_weight(tmp_path):
    masks = Masks({"w": torch.rand(100, 1000) < 0.1})
    assert 12_500 <= masks.save(tmp_path / "masks.safetensors").stat().st_size < 13_000


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_cut_file_is_refused(tmp_path, cut):
    path = Masks.of(network()).save(tmp_path / "masks.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedFileError, match="must be a whole safetensors file"):
        Masks.load(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(network().state_dict(), path)
    with pytest.raises(DamagedFileError, match=r"that `Masks.save` wrote, got .* with 0.bias, 0.w"):
        Masks.load(path)
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("bits", "shapes"),
    [
        ([255, 127], '{"w": [3, 3]}'),  # bits beyond the ninth
        ([255], '{"w": [3, 3]}'),
        ([255, 128], '{"v": [3, 3]}'),
        ([255, 128], '{"w": "three"}'),
        ([255, 128], "[3, 3]"),
        ([255, 128], "{"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, bits, shapes):
    path = tmp_path / "masks.safetensors"
    metadata = {"format": "flatvalley masks 1", "shapes": shapes}
    save_file({"w": torch.tensor(bits, dtype=torch.uint8)}, path, metadata)
    with pytest.raises(DamagedFileError, match="is damaged"):
        Masks.load(path)


def test_a_file_with_a_mask_of_unknown_shape_is_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    byte = torch.tensor([128], dtype=torch.uint8)
    metadata = {"format": "flatvalley masks 1", "shapes": '{"w": [1]}'}
    save_file({"w": byte, "v": byte.clone()}, path, metadata)
    with pytest.raises(DamagedFileError, match="names and shapes differ"):
        Masks.load(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = Masks.of(network()).save(tmp_path / "masks.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Masks.of(network(seed=1)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert load_file(path).keys() == Masks.of(network()).keep.keys()


def test_a_mask_of_another_model_is_refused_and_changes_nothing():
    masks = Masks.of(network())
    other = nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 4)).to(F64)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = weights(other)
    message = r"got another model: `2.weight` \[3, 17\] here \[4, 17\], `2.bias` \[3\] here \[4\]\."
    for use in (masks.apply_, lambda m: keep_zeros(m, optimizer, masks), masks.pairs):
        with pytest.raises(ValueError, match=message):
            use(other)
    with pytest.raises(ValueError, match=r"`0.weight` \[17, 5\] missing here"):
        masks.apply_(nn.Linear(5, 17))
    assert torch.equal(weights(other), before) and not optimizer._optimizer_step_post_hooks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_keeps_zeros():
    problem = Regression(smaller=False)
    model = problem.model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05).cuda(), capturable=True)
    with keep_zeros(model, optimizer, Masks({"w": KEEP})):
        model.w.grad = torch.ones_like(model.w)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        before = model.w.detach().clone()
        model.w.grad.fill_(2.0)
        graph.replay()
        assert torch.all(model.w[~KEEP.cuda()] == 0)
        assert torch.all((model.w != before)[KEEP.cuda()])
