"""Principal components against the singular value decomposition of the centred points."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from landscape import principal_components, project_trajectory


def walk(t=9, d=200, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(t, d, generator=generator, dtype=torch.float64)
    return (steps.cumsum(dim=0) + 5).to(dtype)


@pytest.mark.parametrize("center", ["mean", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_are_the_right_singular_vectors(center, dtype):
    points = walk(dtype=dtype)
    found = principal_components(points, num=3, center=center)
    x = points.double()
    M = (x - (x.mean(dim=0) if center == "mean" else x[-1])).numpy()
    _, s, Vt = np.linalg.svd(M, full_matrices=False)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for row, v in zip(found.directions.vectors.double().numpy(), Vt[:3], strict=True):
        assert abs(row @ v) == pytest.approx(1, abs=tolerance)
        assert row[abs(row).argmax()] > 0
    np.testing.assert_allclose(found.explained, (s**2 / (s**2).sum())[:3], rtol=tolerance)
    torch.testing.assert_close(
        found.directions.cosines, torch.eye(3).double(), atol=tolerance, rtol=0
    )


def test_coordinates_are_those_of_scikit_learn():
    points = walk()
    found = principal_components(points, num=2)
    seen = project_trajectory(points, found.directions.basis, found.center)
    expected = PCA(2).fit(points.numpy())
    np.testing.assert_allclose(found.explained, expected.explained_variance_ratio_)
    np.testing.assert_allclose(abs(seen.coordinates), abs(expected.transform(points.numpy())))
    total = seen.distances.square().sum()
    inside = seen.coordinates.square().sum(dim=0) / total
    torch.testing.assert_close(inside, found.explained)


def test_centring_is_stated():
    found = principal_components(walk(), center="last")
    assert found.directions.settings["center"] == "last"
    assert torch.equal(found.center, walk()[-1])
    assert found.directions.names[0] == f"PC 1 ({100 * float(found.explained[0]):.1f} %)"


def test_running_statistics_are_no_part_of_the_points():
    """Flat weights of a model with batch norm have no entry for its buffers."""
    from hessian.flat_weights import FlatWeights

    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    rows = []
    for i in range(3):
        model[1].running_mean.fill_(1000.0 * i)
        with torch.no_grad():
            model[0].weight[0, 0] = float(i)
        rows.append(FlatWeights(model).weights())
    found = principal_components(torch.stack(rows), num=1)
    assert float(found.explained[0]) == pytest.approx(1)
    assert int(found.directions.vectors[0].abs().argmax()) == 0


def test_refusals():
    points = walk()
    with pytest.raises(ValueError, match=r"at least 2 checkpoints, one a row, .* got 1"):
        principal_components(points[:1], num=1)
    with pytest.raises(ValueError, match=r"one a row, .* got shape \[20\]"):
        principal_components.__wrapped__(torch.ones(20), num=1)
    with pytest.raises(ValueError, match="all 4 checkpoints are equal"):
        principal_components(points[:1].expand(4, -1).float(), num=1)
    with pytest.raises(ValueError, match="span at least 2 dimensions, got 1"):
        principal_components(points[:1] * torch.arange(4.0)[:, None])
    with pytest.raises(ValueError, match="`num` must be between 1 and 8, got 9"):
        principal_components(points, num=9)
    with pytest.raises(ValueError, match="must be finite"):
        principal_components(torch.full((3, 4), float("nan")))
    with pytest.raises(ValueError, match='"mean" or "last", got "first"'):
        principal_components.__wrapped__(points, center="first")
