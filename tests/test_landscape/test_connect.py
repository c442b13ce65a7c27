from functools import partial

import pytest
import torch
from torch import nn

from hessian import DamagedFileError
from hessian.errors import NonDeterministicError, NonFiniteError
from hessian.objective import Objective
from landscape import (
    BatchNormWarning,
    BezierCurve,
    Line,
    PolyChain,
    barrier,
    train_bezier,
    train_curve,
)
from landscape.connect import _control_gradient, _rate_factor

START, END = (torch.tensor(p, dtype=torch.float64) for p in ([1.0, 0.0], [-1.0, 0.0]))


def ring(w, x):
    """Zero on the unit circle, one in its middle."""
    return (w.square().sum() - 1) ** 2 + x[:, 0]


def test_the_curve_goes_round_a_hill(formula_objective):
    objective = formula_objective(ring, [1.0, 0.0], torch.zeros(8, 1).double(), batch_size=2)
    bend = torch.tensor([0.0, 0.1]).double()  # on the line itself the ridge pushes to no side
    found = train_bezier(objective, START, END, epochs=60, lr=0.1, bend=bend)
    assert barrier(objective, Line(START, END)).excess_over_chord.value == pytest.approx(1.0)
    assert barrier(objective, found.curve).excess_over_chord.value < 0.1
    assert found.curve.control_points[1, 1] > 1
    assert found.num_gradients == 60 * 4
    assert found.losses.shape == (60,)
    assert found.losses[-5:].mean() < 0.1 * found.losses[:5].mean()


def test_hidden_units_in_another_order_are_connected(permuted_nets):
    objective, start, end = permuted_nets
    found = train_bezier(objective, start, end, epochs=150, lr=0.05)
    before = barrier(objective, Line(start, end)).excess_over_chord.value
    after = barrier(objective, found.curve).excess_over_chord.value
    assert after < 0.25 * before


def test_ends_are_exact_and_interior_points_move(permuted_nets):
    objective, start, end = permuted_nets
    found = train_bezier(objective, start, end, epochs=2, lr=0.05, order=4).curve
    assert found.order == 4
    assert torch.equal(found(0.0), start)
    assert torch.equal(found(1.0), end)
    line = Line(start, end)
    for k in (1, 2, 3):
        assert not torch.allclose(found.control_points[k], line(k / 4))


@pytest.mark.parametrize("kind", [BezierCurve, PolyChain])
def test_gradient_in_control_points_is_that_of_autograd(permuted_nets, kind):
    objective, start, end = permuted_nets
    generator = torch.Generator().manual_seed(5)
    interior = torch.randn(2, len(start), generator=generator, dtype=torch.float64)
    points = torch.stack([start, *interior, end]).requires_grad_()
    batch = next(objective.batches())
    w = kind(points)(0.3)
    loss = objective.batch_loss(w, batch)
    (loss + 0.5 * 0.7 * w.square().sum()).backward()
    value, gradient = _control_gradient(objective, kind(points.detach()), 0.3, batch, 0.7)
    torch.testing.assert_close(gradient, points.grad[1:-1])
    assert float(value) == pytest.approx(float(loss.detach()))


def test_training_is_torchs_sgd(permuted_nets):
    """The same draws, the optimizer and scheduler of torch, autograd through the curve."""
    objective, start, end = permuted_nets
    epochs, lr = 10, 0.02
    found = train_bezier(objective, start, end, epochs=epochs, lr=lr, seed=4)
    bend = ((start + end) / 2).requires_grad_()
    optimizer = torch.optim.SGD([bend], lr=lr, momentum=0.9)
    # alpha = 0, .1, … .9: constant up to a half, then linear to 1 % at .9.
    factors = [1, 1, 1, 1, 1, 1, 0.7525, 0.505, 0.2575, 0.01]
    generator = torch.Generator().manual_seed(4)
    batches = list(objective.batches())
    for factor in factors:
        optimizer.param_groups[0]["lr"] = lr * factor
        for i in torch.randperm(len(batches), generator=generator).tolist():
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            optimizer.zero_grad()
            objective.batch_loss(
                BezierCurve(torch.stack([start, bend, end]))(t), batches[i]
            ).backward()
            optimizer.step()
    torch.testing.assert_close(found.curve.control_points[1], bend.detach(), rtol=1e-9, atol=1e-12)


def test_schedule_is_that_of_dnn_mode_connectivity():
    expected = {0.0: 1.0, 0.5: 1.0, 0.7: 0.505, 0.9: 0.01, 0.95: 0.01, 1.0: 0.01}
    assert {f: _rate_factor(f) for f in expected} == pytest.approx(expected)


def test_epoch_losses_weight_every_sample_once(formula_objective):
    """A loss that does not depend on w: ragged batches must still give the mean over samples."""
    x = torch.arange(7).double()[:, None]
    objective = formula_objective(lambda w, x: 0 * w.sum() + x[:, 0], [0.0, 0.0], x, batch_size=3)
    found = train_bezier(objective, START, END, epochs=2, lr=0.1)
    assert found.losses.tolist() == pytest.approx([3.0, 3.0])


def test_seed_repeats_and_matters(permuted_nets):
    objective, start, end = permuted_nets
    runs = [train_bezier(objective, start, end, epochs=2, lr=0.05, seed=s) for s in (1, 1, 2)]
    bends = [run.curve.control_points[1] for run in runs]
    assert torch.equal(bends[0], bends[1])
    assert not torch.equal(bends[0], bends[2])
    assert torch.equal(runs[0].losses, runs[1].losses)


@pytest.mark.parametrize("lr", [0.05, 1e300])
def test_everything_is_left_as_found_also_after_an_exception(permuted_nets, lr):
    objective, start, end = permuted_nets
    model = objective.model.train()
    ends, weights = (start.clone(), end.clone()), objective.weights()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    try:
        train_bezier(objective, start, end, epochs=2, lr=lr)
        failed = False
    except NonFiniteError:
        failed = True
    assert failed == (lr > 1)
    assert torch.equal(objective.weights(), weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(start, ends[0])
    assert torch.equal(end, ends[1])


def test_works_under_no_grad(permuted_nets):
    objective, start, end = permuted_nets
    expected = train_bezier(objective, start, end, epochs=1, lr=0.05).losses
    with torch.no_grad():
        assert torch.equal(train_bezier(objective, start, end, epochs=1, lr=0.05).losses, expected)


def test_a_diverging_run_names_epoch_and_learning_rate(permuted_nets):
    objective, start, end = permuted_nets
    with pytest.raises(NonFiniteError, match=r"epoch 1 of 3 at t = .* learning rate 1e\+300"):
        train_bezier(objective, start, end, epochs=3, lr=1e300)


def test_progress_counts_epochs(permuted_nets):
    objective, start, end = permuted_nets
    seen = []
    train_bezier(objective, start, end, epochs=3, lr=0.05, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_dropout_switched_on_later_is_refused():
    model = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5)).double().eval()
    x = torch.ones(4, 2, dtype=torch.float64)
    objective = Objective(model, nn.MSELoss(), (x, x[:, :1]))
    w = objective.weights()
    model.train()
    with pytest.raises(NonDeterministicError, match="Dropout must be off"):
        train_bezier(objective, w, 2 * w, epochs=1, lr=0.1)


def test_batch_norm_is_warned_about_and_its_buffers_stay(batch_norm_objective):
    w = batch_norm_objective.weights()
    before = {k: v.clone() for k, v in batch_norm_objective.model.state_dict().items()}
    with pytest.warns(BatchNormWarning):
        train_curve(
            batch_norm_objective, w, 2 * w, kind=BezierCurve, epochs=1, lr=0.1, batch_norm="frozen"
        )
    for key, value in batch_norm_objective.model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("fails", [False, True])
def test_batch_norm_trains_on_batch_statistics_and_is_left_as_found(fails):
    """The loss of the first step is that of a copy in training mode."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double().eval()
    model[1].running_mean += 7.0
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = Objective(model, nn.MSELoss(), (x, x[:, :1]))
    w = objective.weights()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lr = 1e300 if fails else 0.01
    try:
        found = train_bezier(objective, w, 2 * w, epochs=1 + fails, lr=lr)
    except NonFiniteError:
        assert fails
    else:
        assert not fails
        t = torch.rand((), generator=_after_one_permutation(1), dtype=torch.float64)
        copy = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double().train()
        nn.utils.vector_to_parameters(Line(w, 2 * w)(float(t)), copy.parameters())
        expected = nn.functional.mse_loss(copy(x), x[:, :1])
        assert float(found.losses[0]) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[1].training
    assert model[1].track_running_stats


def _after_one_permutation(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    torch.randperm(length, generator=generator)
    return generator


def test_a_chain_goes_round_a_hill(formula_objective):
    objective = formula_objective(ring, [1.0, 0.0], torch.zeros(8, 1).double(), batch_size=2)
    bend = torch.tensor([[0.5, 0.1], [-0.5, 0.1]]).double()
    found = train_curve(
        objective, START, END, kind=PolyChain, num_bends=2, epochs=60, lr=0.02, bend=bend
    )
    assert isinstance(found.curve, PolyChain)
    assert barrier(objective, found.curve).excess_over_chord.value < 0.15  # of 1 on the line
    assert torch.equal(found.curve(0.0), START)
    assert torch.equal(found.curve(1.0), END)


def test_any_optimizer_trains_as_it_does_elsewhere(permuted_nets):
    objective, start, end = permuted_nets
    found = train_curve(
        objective, start, end, kind=PolyChain, epochs=2, lr=0.01, optimizer=torch.optim.Adam,
        weight_decay=0.1, seed=3,
    ).curve.control_points[1]  # fmt: skip
    bend = ((start + end) / 2).requires_grad_()
    optimizer = torch.optim.Adam([bend], lr=0.01)
    generator = torch.Generator().manual_seed(3)
    batches = list(objective.batches())
    for factor in (1, 1):
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        for i in torch.randperm(len(batches), generator=generator).tolist():
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            optimizer.zero_grad()
            w = PolyChain(torch.stack([start, bend, end]))(t)
            (objective.batch_loss(w, batches[i]) + 0.05 * w.square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(found, bend.detach(), rtol=1e-9, atol=1e-12)


class Killed(Exception):  # noqa: N818
    pass


def killed_after(epochs):
    def progress(done, total):
        if done == epochs:
            raise Killed

    return progress


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        torch.optim.Adam,
        partial(torch.optim.AdamW, amsgrad=True),
        torch.optim.Rprop,
        torch.optim.ASGD,
        torch.optim.NAdam,
    ],
)
def test_a_killed_training_goes_on_to_the_same_bits(permuted_nets, tmp_path, optimizer):
    objective, start, end = permuted_nets
    call = partial(
        train_curve, objective, start, end, kind=BezierCurve, num_bends=2, epochs=6, lr=0.01,
        optimizer=optimizer,
    )  # fmt: skip
    whole = call()
    file = tmp_path / "curve.safetensors"
    for kill in (2, 5):
        with pytest.raises(Killed):
            call(checkpoint=file, checkpoint_every=2, progress=killed_after(kill))
    seen = []
    found = call(checkpoint=file, progress=lambda *step: seen.append(step))
    assert seen == [(5, 6), (6, 6)]  # the last write was after four
    assert torch.equal(found.curve.control_points, whole.curve.control_points)
    assert torch.equal(found.losses, whole.losses)
    again = call(checkpoint=file, progress=killed_after(1))  # nothing is left to do
    assert torch.equal(again.curve.control_points, whole.curve.control_points)
    assert [p.name for p in tmp_path.iterdir()] == ["curve.safetensors"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"epochs": 3}, {"lr": 0.2}, {"weight_decay": 0.1}, {"kind": PolyChain}],
)
def test_a_checkpoint_of_another_training_is_refused(permuted_nets, tmp_path, change):
    objective, start, end = permuted_nets
    settings = {"kind": BezierCurve, "epochs": 1, "lr": 0.1, "checkpoint": tmp_path / "c"}
    train_curve(objective, start, end, **settings)
    with pytest.raises(ValueError, match="is of a training with other settings"):
        train_curve(objective, start, end, **(settings | change))
    with pytest.raises(ValueError, match=r"start, end or bend differ"):
        train_curve(objective, start, 2 * end, **settings)


def test_a_damaged_checkpoint_is_named(permuted_nets, tmp_path):
    objective, start, end = permuted_nets
    settings = {"kind": BezierCurve, "epochs": 1, "lr": 0.1, "checkpoint": tmp_path / "c"}
    train_curve(objective, start, end, **settings)
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-9])
    with pytest.raises(DamagedFileError, match="is damaged"):
        train_curve(objective, start, end, **settings)


@pytest.mark.parametrize("kind", [BezierCurve, PolyChain])
@pytest.mark.parametrize("as_mask", [False, True])
def test_zeros_of_both_ends_stay_zero_on_the_curve(permuted_nets, kind, as_mask):
    objective, start, end = permuted_nets
    start, end = start.clone(), end.clone()
    start[:9] = 0
    end[5:12] = 0
    mask = (torch.arange(len(start)) >= 5) & (torch.arange(len(start)) < 9)
    found = train_curve(
        objective, start, end, kind=kind, num_bends=2, epochs=2, lr=0.05, weight_decay=0.01,
        keep_zeros=mask if as_mask else True, bend=torch.ones(2, len(start)).double(),
    ).curve  # fmt: skip
    for t in (0.1, 0.5, 0.77):
        assert torch.equal(found(t) == 0, mask)
    free = train_curve(objective, start, end, kind=kind, epochs=1, lr=0.05).curve
    assert free(0.5).all()


def test_a_mask_of_weights_that_are_not_zero_is_refused(permuted_nets):
    objective, start, end = permuted_nets
    mask = torch.zeros(len(start), dtype=torch.bool)
    mask[:3] = True
    with pytest.raises(ValueError, match="only where both ends are zero, got 3 weights"):
        train_curve(objective, start, end, kind=BezierCurve, epochs=1, lr=0.1, keep_zeros=mask)


def test_ends_of_another_architecture_are_refused(permuted_nets):
    objective, start, end = permuted_nets
    with pytest.raises(ValueError, match=r"`start` must be a flat vector .* got shape \[3\]"):
        train_bezier(objective, start[:3], end[:3], epochs=1, lr=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bends": 0}, "`num_bends` must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "`checkpoint_every` must be at least 1, got 0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0 and finite, got -1.0"),
    ],
)
def test_bad_settings_of_a_curve_are_named(formula_objective, change, message):
    objective = formula_objective(ring, [1.0, 0.0])
    with pytest.raises(ValueError, match=message):
        train_curve(objective, START, END, **({"kind": PolyChain, "epochs": 1, "lr": 0.1} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"lr": 0.0}, "`lr` must be positive and finite, got 0.0"),
        ({"order": 1}, "`order` must be at least 2 .* got 1"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"bend": torch.zeros(3).double()}, r"`bend` must hold 1 control point.* got shape \[3\]"),
        ({"bend": torch.zeros(2)}, "`bend` must hold .* torch.float64, got .* torch.float32"),
    ],
)
def test_bad_settings_are_named(formula_objective, change, message):
    objective = formula_objective(ring, [1.0, 0.0])
    with pytest.raises(ValueError, match=message):
        train_bezier(objective, START, END, **({"epochs": 1, "lr": 0.1} | change))
