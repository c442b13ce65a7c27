"""The forms of gRDA's step, and what people wrap around it, against ten lines in float64."""

import copy
import ctypes
import itertools
import subprocess

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pruning.grda_fused
from hessian.errors import NonFiniteError
from pruning import GRDA
from pruning.grda_fused import compiled_kernels, fits_kernel

F64 = torch.float64
FORMS = [{}, {"foreach": False}, {"fused": True}, {"capturable": True}]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


class Transcription:
    """Section 2 of the theory, a list of float64 tensors at a time."""

    def __init__(self, params, c, mu=0.6):
        self.v = [p.detach().double().clone() for p in params]
        self.w, self.c, self.mu, self.n, self.g = [v.clone() for v in self.v], c, mu, 0, 0.0

    def step(self, grads, lr):
        self.n += 1
        self.g += self.c * lr ** (self.mu + 0.5) * (self.n**self.mu - (self.n - 1) ** self.mu)
        self.v = [v - lr * grad.double() for v, grad in zip(self.v, grads, strict=True)]
        self.w = [v.sign() * (v.abs() - self.g).clamp(min=0) for v in self.v]


def network(dtype=F64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 25), nn.Tanh(), nn.Linear(25, 3))
    return model.to(dtype)


TWIN = network()


def batch(n, dtype=F64):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(12, 6, generator=generator, dtype=F64)
    return x.to(dtype), x[:, :3].sin().to(dtype)


def loss(model, x, y):
    return (model(x) - y).square().mean()


def gradients(weights, n, clip=None):
    """Of the float64 network at these weights, over the whole batch."""
    for p, w in zip(TWIN.parameters(), weights, strict=True):
        p.data.copy_(w)
    grads = torch.autograd.grad(loss(TWIN, *batch(n)), list(TWIN.parameters()))
    if clip is not None:
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        grads = [grad * min(1.0, clip / float(norm + 1e-6)) for grad in grads]
    return grads


SCHEDULES = {
    "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 150, gamma=0.3),
    "cosine with restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 120),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.2, total_steps=501, cycle_momentum=False
    ),
}


@forms
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_500_steps_with_a_scheduler_are_the_transcription(form, schedule):
    model = network()
    optimizer = GRDA(model.parameters(), lr=0.1, c=0.02, **form)
    scheduler = SCHEDULES[schedule](optimizer)
    truth = Transcription(model.parameters(), c=0.02)
    for n in range(500):
        truth.step(gradients(truth.w, n), float(optimizer.param_groups[0]["lr"]))
        optimizer.zero_grad()
        loss(model, *batch(n)).backward()
        optimizer.step()
        scheduler.step()
    compare(model, optimizer, truth)


@forms
def test_500_steps_of_accumulated_and_clipped_gradients_are_the_transcription(form):
    model = network()
    optimizer = GRDA(model.parameters(), lr=0.1, c=0.02, **form)
    truth = Transcription(model.parameters(), c=0.02)
    for n in range(500):
        truth.step(gradients(truth.w, n, clip=0.3), 0.1)
        optimizer.zero_grad()
        for x, y in zip(*(t.split(3) for t in batch(n)), strict=True):
            (loss(model, x, y) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    compare(model, optimizer, truth)


def compare(model, optimizer, truth, atol=1e-12):
    group = optimizer.param_groups[0]
    assert float(group["threshold"]) == pytest.approx(truth.g, rel=1e-12)
    assert group["step"] == truth.n
    zeros = 0
    for p, v, w in zip(model.parameters(), truth.v, truth.w, strict=True):
        assert_close(optimizer.state[p]["dual"].double(), v, rtol=0, atol=atol)
        assert_close(p.detach().double(), w, rtol=0, atol=atol)
        zeros += int((p == 0).sum())
    assert 10 < zeros < 240
    assert optimizer.sparsity() == zeros / sum(p.numel() for p in model.parameters())


# --- mixed precision ----------------------------------------------------------------------------


@forms
def test_autocast_with_a_scaler_is_the_transcription_of_its_own_gradients(form):
    """In float32, fed the unscaled gradients of the autocast run; skipped steps do not count."""
    model = network(torch.float32)
    optimizer = GRDA(model.parameters(), lr=0.1, c=0.02, **form)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=50)
    truth = Transcription(model.parameters(), c=0.02)
    skipped = 0
    for n in range(500):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, *batch(n, torch.float32))
        scale = scaler.get_scale()
        scaler.scale(value).backward()
        if n % 100 == 7:
            model[0].weight.grad[0, 0] = torch.inf
        grads = [p.grad.clone() / scale for p in model.parameters()]
        if n % 2:
            scaler.unscale_(optimizer)  # as clipping needs it
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if n % 100 == 7:
            skipped += 1
            now = [p.detach() for p in model.parameters()]
            assert all(map(torch.equal, now, before))
        else:
            truth.step(grads, 0.1)
    assert skipped == 5 and truth.n == 495
    # Each of the 495 sums rounds at 6e-8 of weights below 1.
    compare(model, optimizer, truth, atol=495 * 6e-8)


def test_only_the_form_on_the_device_takes_scaling_off_the_scaler():
    w = nn.Parameter(torch.ones(1))
    for form in FORMS:
        supports = GRDA([w], lr=0.1, c=0.1, **form)._step_supports_amp_scaling
        assert supports == form.get("capturable", False)


# --- the fused kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_the_kernel_is_the_loop_bit_for_bit(dtype, threads, stream, monkeypatch):
    """Sizes around the width of vectors, the buffer and the cuts between threads."""
    monkeypatch.setattr(pruning.grda_fused, "STREAM_BYTES", 0 if stream else 1 << 60)
    monkeypatch.setattr(pruning.grda_fused, "THREAD_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 2, 3, 15, 16, 17, 31, 511, 513, 1023, 1024, 1025, 2049, 40_000]
    starts = [torch.randn(n + 1, generator=generator, dtype=dtype)[1:] for n in sizes]
    grads = [torch.randn(n, generator=generator, dtype=dtype) for n in sizes]
    runs = []
    for form in ({"fused": True}, {"foreach": False}):
        # Views at an odd address, as in a flat buffer.
        params = [nn.Parameter(torch.cat([start.new_zeros(1), start])[1:]) for start in starts]
        optimizer = GRDA(params, lr=0.1, c=1.0, **form)
        for _ in range(3):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
        runs.append([*params, *(optimizer.state[p]["dual"] for p in params)])
    assert all(map(torch.equal, *runs))
    assert any((p == 0).any() for p in runs[0])


def test_tensors_in_another_order_of_memory_are_stepped_right():
    w = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    layouts = {
        "contiguous": lambda t: t.contiguous(),
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "every second": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    }
    expected = None
    for form, (a, b) in itertools.product(FORMS, itertools.product(layouts, repeat=2)):
        p = nn.Parameter(layouts[a](w.clone()))
        p.grad = layouts[b](grad)
        GRDA([p], lr=0.1, c=1.0, **form).step()
        expected = p.detach() if expected is None else expected
        # Strided loops of torch round twice where the others round once.
        assert_close(p.detach(), expected, rtol=0, atol=5e-7, msg=f"{form}, {a}, {b}")
    assert fits_kernel(*[layouts["reversed"](w)] * 3)
    assert not fits_kernel(layouts["reversed"](w), w, w)
    assert not fits_kernel(*[layouts["every second"](w)] * 3)


def test_a_storage_that_was_swapped_is_found_again():
    p = nn.Parameter(torch.ones(5))
    optimizer = GRDA([p], lr=0.1, c=0.0, fused=True)
    for value in (1.0, 2.0, 3.0):
        p.data = torch.full((5,), 1.0)
        p.grad = torch.ones(5)
        optimizer.step()
        assert_close(p.data, torch.full((5,), 1.0 - 0.1 * value))


def test_a_graph_that_saved_the_old_weights_notices_the_fused_step():
    p = nn.Parameter(torch.ones(3))
    value = (p * p).sum()
    p.grad = torch.ones(3)
    GRDA([p], lr=0.1, c=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.fixture
def fresh_kernels():
    compiled_kernels.cache_clear()
    yield
    compiled_kernels.cache_clear()


@pytest.mark.usefixtures("fresh_kernels")
def test_without_a_compiler_fused_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a C compiler.*cc, gcc, clang.*leave `fused`"):
        GRDA([nn.Parameter(torch.ones(1))], lr=0.1, c=0.1, fused=True)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"none of no-such-compiler was found"):
        GRDA([nn.Parameter(torch.ones(1))], lr=0.1, c=0.1, fused=True)


@pytest.mark.usefixtures("fresh_kernels")
def test_a_compiler_that_fails_is_quoted(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "unknown option\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match=r"could not be compiled: .*\nunknown option"):
        GRDA([nn.Parameter(torch.ones(1))], lr=0.1, c=0.1, fused=True)
    assert ctypes.CDLL is not None


@pytest.mark.parametrize("other", ["foreach", "capturable"])
def test_forms_that_exclude_each_other_are_refused(other):
    with pytest.raises(ValueError, match=rf"`fused=True` and `{other}=True` exclude"):
        GRDA([nn.Parameter(torch.ones(1))], lr=0.1, c=0.1, fused=True, **{other: True})


# --- memory, copies, states ---------------------------------------------------------------------


@forms
def test_the_state_is_one_copy_of_the_parameters(form):
    model = network()
    optimizer = GRDA(model.parameters(), lr=0.1, c=0.02, **form)
    loss(model, *batch(0)).backward()
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values()]
    assert sum(t.nbytes for t in held) == sum(p.nbytes for p in model.parameters())


@forms
@pytest.mark.parametrize("aim", [{"c": 0.05}, {"target_sparsity": 0.5, "horizon": 60}], ids=str)
def test_a_deep_copy_and_a_loaded_state_go_on_bit_for_bit(form, aim):
    def advance(model, optimizer, first, last):
        for n in range(first, last):
            optimizer.zero_grad()
            loss(model, *batch(n)).backward()
            optimizer.step()

    model = network()
    optimizer = GRDA(model.parameters(), lr=0.1, **aim, **form)
    advance(model, optimizer, 0, 25)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    loaded = copy.deepcopy(model)
    loaded_optimizer = GRDA(loaded.parameters(), lr=0.7, **aim, **form)
    loaded_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(model, optimizer, 25, 60)
    for other, other_optimizer in ((twin, twin_optimizer), (loaded, loaded_optimizer)):
        assert not torch.equal(other[2].weight, model[2].weight)
        advance(other, other_optimizer, 25, 60)
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q)
        ours, theirs = optimizer.param_groups[0], other_optimizer.param_groups[0]
        for name in ("lr", "c", "step", "threshold"):
            assert float(ours[name]) == float(theirs[name])
    assert optimizer.sparsity() > 0.1


def test_a_state_may_be_taken_up_in_another_form():
    model = network()
    optimizer = GRDA(model.parameters(), lr=0.1, c=0.05)
    loss(model, *batch(0)).backward()
    optimizer.step()
    for form in FORMS:
        other = copy.deepcopy(model)
        taken = GRDA(other.parameters(), lr=0.9, c=0.9, **form)
        taken.load_state_dict(optimizer.state_dict())
        group = taken.param_groups[0]
        assert isinstance(group["threshold"], torch.Tensor) == form.get("capturable", False)
        assert group["fused"] == form.get("fused")
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        taken.step()
        assert float(group["threshold"]) == pytest.approx(0.05 * 0.1**0.5 * 0.2**0.6, rel=1e-12)
        assert type(group["step"]) is (torch.Tensor if form.get("capturable") else int)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["param_groups"][0].pop("threshold"), "not the state of a GRDA: group 0 lacks"),
        (lambda s: s.pop("state"), r"must be what `GRDA.state_dict\(\)` returned"),
        (
            lambda s: s["param_groups"][0]["params"].pop(),
            r"groups of \[3\] parameters, this .*\[4\]",
        ),
        (lambda s: s["state"][0].update(dual=torch.ones(2)), r"dual of parameter 0 of group 0"),
        (lambda s: s["param_groups"][0].update(threshold=torch.nan), "is damaged: group 0 has"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(spoil, message):
    model = network()
    optimizer = GRDA(model.parameters(), lr=0.1, c=0.05)
    loss(model, *batch(0)).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["step"] == 1 and len(optimizer.state) == 4


def test_the_state_of_another_optimizer_is_refused():
    model = network()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="not the state of a GRDA: group 0 lacks c, mu, step"):
        GRDA(model.parameters(), lr=0.1, c=0.05).load_state_dict(adam.state_dict())


# --- bad numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("named", [True, False])
def test_a_bad_gradient_is_found_with_step_and_tensor(bad, named):
    model = network()
    params = model.named_parameters() if named else model.parameters()
    optimizer = GRDA(params, lr=0.1, c=0.05)
    name = "2.weight" if named else "parameter 2 of group 0"
    for n in range(3):
        optimizer.zero_grad()
        loss(model, *batch(n)).backward()
        optimizer.step()
        optimizer.check_finite()
    model[2].weight.grad[1, 2] = bad
    with pytest.raises(NonFiniteError, match=rf"After 3 steps the gradient of {name}, shape \(3"):
        optimizer.check_finite()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(NonFiniteError, match=rf"After 4 steps the dual of {name}, .*lower `lr`"):
        optimizer.check_finite()


@forms
def test_a_nan_is_not_hidden_by_the_threshold(form):
    w = nn.Parameter(torch.ones(40))
    optimizer = GRDA([w], lr=0.1, c=1.0, **form)
    w.grad = torch.zeros(40)
    w.grad[17] = torch.nan
    optimizer.step()
    assert w.isnan().nonzero().flatten().tolist() == [17]


def test_several_devices_in_a_capturable_group_are_refused():
    params = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))]
    with pytest.raises(ValueError, match="on one device, but its parameters are on cpu, meta"):
        GRDA(params, lr=0.1, c=0.1, capturable=True)


# --- on a GPU -----------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("aim", [{"c": 0.05}, {"target_sparsity": 0.5, "horizon": 60}], ids=str)
def test_a_captured_step_is_the_plain_one(aim):
    runs = []
    for captured in (False, True):
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(3000, generator=generator).cuda())
        optimizer = GRDA([w], lr=0.1, **aim, capturable=captured)
        w.grad = torch.zeros_like(w)
        if captured:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                optimizer.step()  # makes the duals; a zero gradient
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        else:
            optimizer.step()
        for _ in range(59):
            w.grad.copy_(w.detach().sin() / 4 + 0.1 * torch.randn(3000, generator=generator).cuda())
            if captured:
                if "horizon" in aim:
                    optimizer.steer()
                graph.replay()
            else:
                optimizer.step()
        assert optimizer.param_groups[0]["step"] == 60
        runs.append(w.detach().clone())
    assert_close(*runs, rtol=0, atol=1e-5)
    assert 0 < int((runs[1] == 0).sum()) < 3000


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("form", [{}, {"foreach": False}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("aim", [{"c": 0.05}, {"target_sparsity": 0.5, "horizon": 3000}], ids=str)
def test_no_step_makes_the_host_wait(form, aim):
    w = nn.Parameter(torch.randn(100_000, device="cuda"))
    optimizer = GRDA([w], lr=0.1, **aim, **form)
    w.grad = torch.ones_like(w)
    optimizer.step()  # the very first measurement is waited for
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.param_groups[0]["step"] == 21


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("form", [{}, {"capturable": True}], ids=str)
def test_a_scaler_on_cuda_skips_and_goes_on(form):
    w = nn.Parameter(torch.ones(8, device="cuda"))
    optimizer = GRDA([w], lr=0.1, c=0.1, **form)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for n in range(6):
        optimizer.zero_grad()
        scaler.scale(w.sum()).backward()
        if n == 2:
            w.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    g = 0.1 * 0.1**0.5 * 0.5**0.6
    assert optimizer.param_groups[0]["step"] == 5
    assert_close(w.detach().cpu(), torch.full((8,), 0.5 - g))
