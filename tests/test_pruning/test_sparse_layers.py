import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pruning import SparseLinear, keep_zeros, to_dense, to_sparse

F64 = torch.float64


def pruned(model, sparsity=0.95, block=1, seed=0, dtype=F64):
    """Random weights, and a share of zeros in blocks, in every matrix."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        values = torch.randn(p.shape, generator=generator, dtype=F64)
        if p.ndim == 2:
            blocks = torch.rand(
                -(-p.shape[0] // block), -(-p.shape[1] // block), generator=generator
            )
            stays = (blocks >= sparsity).repeat_interleave(block, 0).repeat_interleave(block, 1)
            values = values.where(stays[: p.shape[0], : p.shape[1]], 0.0)
        p.data = values.to(dtype)
    return model.eval()


def network(**options):
    layers = nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False)
    return pruned(nn.Sequential(*layers), **options)


def inputs(*shape, dtype=F64, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def layouts(sparse):
    return [type(m).__name__ for m in sparse.modules() if not list(m.children())]


FORMS = [("csr", None), ("bsr", 8), ("bsr", 16)]


# --- the same function --------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "blocksize"), FORMS)
@pytest.mark.parametrize("shape", [(7, 32), (1, 32), (32,), (0, 32), (2, 3, 32), (1, 1, 32)])
def test_outputs_are_those_of_the_dense_model(layout, blocksize, shape):
    model = network(block=blocksize or 1, sparsity=0.8)
    sparse = to_sparse(model, layout, blocksize=blocksize, min_sparsity=0.5)
    assert layouts(sparse) == ["SparseLinear", "ReLU", "SparseLinear"]
    x = inputs(*shape)
    y = sparse(x)
    torch.testing.assert_close(y, model(x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous() and y.shape == (*shape[:-1], 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("layout", "blocksize"), FORMS)
def test_types_are_kept_and_weights_come_back_bit_for_bit(layout, blocksize, dtype):
    model = network(block=blocksize or 1, sparsity=0.8, dtype=dtype)
    sparse = to_sparse(model, layout, blocksize=blocksize, min_sparsity=0.5)
    x = inputs(5, 32, dtype=dtype)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)
    dense = to_dense(sparse)
    assert layouts(dense) == ["Linear", "ReLU", "Linear"]
    assert dense.state_dict().keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        assert dense.state_dict()[name].dtype == dtype
        assert torch.equal(dense.state_dict()[name], t)
    assert all(p.requires_grad for p in dense.parameters())


def test_layers_without_any_weight_left_give_their_bias():
    model = nn.Linear(4, 3)
    model.weight.data.zero_()
    for x in (inputs(2, 4, dtype=torch.float32), inputs(1, 4, dtype=torch.float32)):
        assert torch.equal(to_sparse(model)(x), model.bias.detach().expand(len(x), 3))


def test_the_gradient_of_the_input_is_that_of_the_dense_model():
    model = network()
    for rows in (1, 5):
        x = inputs(rows, 32).requires_grad_()
        found = torch.autograd.grad(to_sparse(model)(x).square().sum(), x)
        expected = torch.autograd.grad(model(x).square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fast", [True, False])
def test_a_transformer_gives_the_same_with_and_without_its_fast_path(fast):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=F64)
    model = pruned(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    sparse = to_sparse(model)
    kinds = [type(m) for m in sparse.modules()]
    assert kinds.count(SparseLinear) == 4  # and attention as it was
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            x = inputs(2, 5, 16)
            torch.testing.assert_close(sparse(x), model(x), rtol=1e-11, atol=1e-11)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_under_autocast_it_computes_in_its_own_type():
    model = network(dtype=torch.float32)
    sparse = to_sparse(model)
    x = inputs(5, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(x), sparse.float()(x))
        assert sparse(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)


# --- which layers -------------------------------------------------------------------------------


def test_only_linear_layers_with_enough_zeros_are_converted():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "dense": nn.Linear(8, 8),
            "sparse": nn.Linear(8, 8),
            "conv": nn.Conv2d(3, 3, 3),
            "own": Own(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    for name, m in model.items():
        if name != "dense":
            for p in m.parameters():
                p.data.zero_()
    model["sparse"].weight.data[0, :6] = 1.0  # 58 of 64 are zero
    sparse = to_sparse(model, min_sparsity=58 / 64)
    changed = [name for name, m in sparse.named_modules() if isinstance(m, SparseLinear)]
    assert changed == ["sparse"] and type(sparse["own"]) is Own
    with pytest.raises(
        ValueError, match=r"`sparse` has 0.9062 of its weights zero, less than 0.91"
    ):
        to_sparse(model, min_sparsity=0.91)


def test_bsr_counts_blocks_and_leaves_shapes_that_do_not_fit():
    scattered = network(sparsity=0.9)
    message = (
        r"worth converting to 'bsr', got none: `0` has 0.0+ of its blocks zero, less than 0.9; "
        r"`2` \[16, 48\] is no multiple of the blocksize 32"
    )
    with pytest.raises(ValueError, match=message):
        to_sparse(
            nn.Sequential(*pruned(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), scattered[2]))),
            "bsr",
            blocksize=32,
        )


def test_a_layer_that_is_used_twice_and_tied_weights():
    shared = nn.Linear(8, 8)
    model = pruned(nn.Sequential(shared, nn.ReLU(), shared, nn.Embedding(8, 8)))
    model[3].weight = shared.weight
    sparse = to_sparse(model, min_sparsity=0.5)
    assert sparse[0] is sparse[2] and torch.equal(sparse[3].weight, shared.weight)
    x = inputs(3, 8)
    torch.testing.assert_close(sparse[:3](x), model[:3](x), rtol=1e-12, atol=1e-12)


def test_the_model_is_only_read():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    sparse = to_sparse(model)
    to_dense(sparse)
    for layer in (sparse[0], SparseLinear(model[0])):
        layer.values.zero_()
        layer.bias.zero_()
    assert torch.equal(torch.get_rng_state(), random)
    assert layouts(model) == ["Linear", "ReLU", "Linear"] and model.training
    assert not sparse.training and not sparse[0].training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_linear_layer_alone_and_a_wrapped_model():
    layer = pruned(nn.Linear(8, 4))
    assert isinstance(to_sparse(layer, min_sparsity=0.0), SparseLinear)
    assert type(to_dense(to_sparse(layer, min_sparsity=0.0))) is nn.Linear
    assert isinstance(to_sparse(nn.DataParallel(layer), min_sparsity=0.0), SparseLinear)
    assert "layout=bsr, blocksize=4, stored=" in repr(
        to_sparse(layer, "bsr", blocksize=4, min_sparsity=0.0)
    )


# --- an ordinary module -------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "blocksize"), FORMS[:2])
def test_copies_states_and_conversions_work(tmp_path, layout, blocksize):
    model = network(block=blocksize or 1, dtype=torch.float32)
    sparse = to_sparse(model, layout, blocksize=blocksize, min_sparsity=0.5)
    x = inputs(5, 32, dtype=torch.float32)
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    save_file(sparse.state_dict(), tmp_path / "sparse.safetensors")
    other = copy.deepcopy(sparse)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(load_file(tmp_path / "sparse.safetensors"))
    assert torch.equal(other(x), sparse(x))
    torch.testing.assert_close(
        copy.deepcopy(sparse).double()(x.double()), model.double()(x.double())
    )


def test_memory_is_that_of_the_weights_left():
    sparse = to_sparse(pruned(nn.Linear(400, 300), 0.98, dtype=torch.float32))
    size = sum(b.numel() * b.element_size() for b in sparse.buffers())
    left = int((sparse.weight != 0).sum())
    assert size == 8 * left + 4 * 301 + 4 * 300 < 0.05 * 4 * 120_000


@pytest.mark.parametrize(("layout", "blocksize"), FORMS[:2])
@pytest.mark.parametrize("strict", [True, False])
def test_export_saves_a_graph_for_any_batch(layout, blocksize, strict, unchecked_shapes):
    model = network(block=blocksize or 1)
    sparse = to_sparse(model, layout, blocksize=blocksize, min_sparsity=0.5)
    rows = {0: torch.export.Dim("rows", min=2)}
    program = torch.export.export(sparse, (inputs(4, 32),), dynamic_shapes=(rows,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    x = inputs(9, 32, seed=5)
    assert torch.equal(again(x), sparse(x))
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)


def test_compilation_sees_one_operator():
    sparse = to_sparse(network())
    x = inputs(4, 32)
    with torch.no_grad():
        compiled = torch.compile(sparse, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), sparse(x))


def test_a_fine_tuned_model_is_converted_and_back():
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with keep_zeros(model, optimizer):
        for seed in range(3):
            optimizer.zero_grad()
            model(inputs(8, 32, seed=seed)).square().mean().backward()
            optimizer.step()
    x = inputs(5, 32)
    torch.testing.assert_close(to_sparse(model)(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_nothing_warns_in_a_fresh_process():
    code = """
import torch
from torch import nn
from pruning import to_sparse
layer = nn.Linear(8, 8)
layer.weight.data[1:] = 0.0
for options in ({}, {"layout": "bsr", "blocksize": 2}):
    to_sparse(layer, min_sparsity=0.5, **options)(torch.ones(3, 8))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "csc"}, r"`layout` must be .* got 'csc'"),
        ({"layout": "bsr"}, r"`blocksize` must be given .* got None for 'bsr'"),
        ({"blocksize": 4}, r"`blocksize` must be given .* and for no other.* got 4 for 'csr'"),
        ({"layout": "bsr", "blocksize": 0}, r"a positive number such as 16, got 0"),
        ({"min_sparsity": -0.1}, r"`min_sparsity` must be in \[0, 1\].* got -0.1"),
        ({"min_sparsity": float("nan")}, r"`min_sparsity` must be in \[0, 1\].* got nan"),
        ({"min_sparsity": 1.0}, r"got none: `0` has 0.9.* of its weights zero, less than 1.0; `2`"),
    ],
)
def test_bad_options_are_named(options, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        to_sparse(network(), **options)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="got none: no such layer"):
        to_sparse(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layout", "blocksize"), FORMS[:2])
def test_types_without_a_product_are_refused(layout, blocksize, dtype):
    model = network(block=blocksize or 1, dtype=dtype)
    with pytest.raises(ValueError, match=rf"multiplies for {dtype} on cpu, the weights of `0`"):
        to_sparse(model, layout, blocksize=blocksize, min_sparsity=0.5)


def two_of_four(rows, columns):
    layer = nn.Linear(columns, rows, dtype=torch.float16)
    layer.weight.data *= torch.tensor([0, 1, 0, 1]).tile(rows, columns // 4)
    return layer.eval()


def test_two_of_four_is_for_cuda_and_looks_at_the_pattern():
    with pytest.raises(ValueError, match=r'"2:4" must have float16 .* got torch.float16 on cpu'):
        to_sparse(two_of_four(32, 64), "2:4")
    with pytest.raises(ValueError, match=r"\[32, 32\] is no multiple of \[32, 64\]"):
        to_sparse(two_of_four(32, 32), "2:4")
    three = two_of_four(32, 64)
    three.weight.data[5, :4] = torch.tensor([1, 1, 1, 0])
    three.weight.data[6] = 0.0
    with pytest.raises(ValueError, match="more than two weights that are not zero in a group of 4"):
        to_sparse(three, "2:4")


def test_hooks_would_be_lost_and_are_refused():
    model = network()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"no hooks on layers to convert, but `0` has some"):
        to_sparse(model)


def test_inputs_of_another_size_are_refused(unchecked_shapes):
    sparse = to_sparse(network())
    with pytest.raises(ValueError, match=r"must have 32 inputs .* got shape \[2, 16\]"):
        sparse(inputs(2, 16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("layout", "blocksize"), FORMS)
def test_outputs_on_cuda(layout, blocksize):
    model = network(block=blocksize or 1, sparsity=0.8).cuda()
    sparse = to_sparse(model, layout, blocksize=blocksize, min_sparsity=0.5)
    for rows in (1, 7):
        x = inputs(rows, 32).cuda()
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-11, atol=1e-11)
    assert torch.equal(to_dense(sparse)[0].weight, model[0].weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_of_four_on_cuda():
    model = two_of_four(64, 128).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = to_sparse(model, "2:4")
        x = inputs(32, 128, dtype=torch.float16).cuda()
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-2, atol=1e-2)
    assert torch.equal(to_dense(sparse).weight, model.weight)
