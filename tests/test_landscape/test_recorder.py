import math

import pytest
import torch
from torch import nn

from hessian import DamagedFileError, Objective
from landscape import (
    Directions,
    Recorder,
    project_trajectory,
    random_directions,
    read_points,
    read_trajectory,
)
from tests.cases import seeded


@pytest.fixture
def training():
    """A model with batch norm, its optimizer, and one step of a training loop."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()

    return model, optimizer, step


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_every_third_step_is_kept_to_the_last_bit(training, tmp_path):
    model, optimizer, step = training
    rows = [flat(model)]
    handle = Recorder(model, tmp_path, every=3).attach(optimizer)
    for i in range(10):
        step()
        rows += [flat(model)] if i % 3 == 2 else []
    handle.remove()
    step()
    found = read_points(tmp_path)
    assert found.times.tolist() == [0, 3, 6, 9]
    assert torch.equal(found.points, torch.stack(rows))
    assert len(list(tmp_path.iterdir())) == 4


def test_any_loop_can_call_it(training, tmp_path):
    model, _, step = training
    recorder = Recorder(model, tmp_path, every=2)
    for _ in range(4):
        step()
        recorder()
    assert read_points(tmp_path).times.tolist() == [2, 4]
    assert torch.equal(read_points(tmp_path).points[-1], flat(model))


def test_the_selection_is_that_of_the_objective(training, tmp_path):
    model, _, _ = training
    x = torch.ones(2, 3, dtype=torch.float64)
    objective = Objective(model.eval(), nn.MSELoss(), (x, x[:, :2]), parameters="2.*")
    Recorder(objective, tmp_path).record(0)
    assert torch.equal(read_points(tmp_path).points[0], objective.weights())


def test_projection_on_the_fly_is_that_of_the_kept_points(training, tmp_path):
    model, optimizer, step = training
    directions = random_directions(model, num=2)
    center = flat(model) + 0.1
    for recorder in (
        Recorder(model, tmp_path / "points"),
        Recorder(model, tmp_path / "few", directions=directions, center=center),
    ):
        recorder.attach(optimizer)
    for _ in range(5):
        step()
    points, found = read_points(tmp_path / "points"), read_trajectory(tmp_path / "few")
    assert torch.equal(points.times, found.times)
    expected = project_trajectory(points.points, directions.basis, center)
    for name in ("coordinates", "residuals", "distances"):
        torch.testing.assert_close(
            getattr(found.trajectory, name), getattr(expected, name), rtol=1e-12, atol=1e-14
        )
    assert float(found.trajectory.residuals[-1]) > 0
    sizes = [file.stat().st_size for file in (tmp_path / "few").iterdir()]
    assert len(sizes) == 1


def test_a_killed_run_that_resumes_leaves_one_trajectory(training, tmp_path):
    model, _, step = training
    directions = random_directions(model, num=1)
    for folder, options in (("a", {}), ("b", {"directions": directions, "center": flat(model)})):
        first = Recorder(model, tmp_path / folder, **options)
        for _ in range(5):
            step()
            first()
        again = Recorder(model, tmp_path / folder, **options)
        again.resume(2)
        again()
        read = read_points if folder == "a" else read_trajectory
        assert read(tmp_path / folder).times.tolist() == [1, 2, 3]


def test_recording_changes_nothing(training, tmp_path):
    model, optimizer, _ = training
    state, before = torch.get_rng_state(), flat(model)
    Recorder(model, tmp_path, directions=random_directions(model)).attach(optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat(model), before)
    assert model.training


def test_what_does_not_fit_is_refused(training, tmp_path):
    model, _, _ = training
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        Recorder(model, tmp_path, every=0)
    with pytest.raises(ValueError, match="`center` must come with `directions`"):
        Recorder(model, tmp_path, center=flat(model))
    short = Directions(torch.ones(1, 7, dtype=torch.float64), "mine", ("a",))
    with pytest.raises(ValueError, match="`directions` must be a flat vector with one entry"):
        Recorder(model, tmp_path, directions=short)
    with pytest.raises(ValueError, match="`count` must be at least 0"):
        Recorder(model, tmp_path).resume(-1)
    with pytest.raises(FileNotFoundError, match="must hold checkpoints of a `Recorder`"):
        read_points(tmp_path)
    Recorder(model, tmp_path).record(0)
    with pytest.raises(ValueError, match=r"another run \(layout differ\)"):
        Recorder(nn.Linear(2, 2), tmp_path)
    one = random_directions(model, num=1)
    Recorder(model, tmp_path, directions=one).record(0)
    with pytest.raises(ValueError, match=r"another run \(directions differ\)"):
        Recorder(model, tmp_path, directions=random_directions(model, num=1, seed=1))
    file = next(tmp_path.glob("point-*"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DamagedFileError, match="is damaged"):
        read_points(tmp_path)


def test_every_checkpoint_has_the_length_of_a_coordinate_row(training, tmp_path):
    """A point at the center has distance zero, and its share explained is undefined."""
    model, _, _ = training
    Recorder(model, tmp_path, directions=random_directions(model)).record(7)
    found = read_trajectory(tmp_path)
    assert found.times.tolist() == [7]
    assert math.isnan(float(found.trajectory.explained_fraction[0]))
