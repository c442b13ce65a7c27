import torch
from torch.testing import assert_close

from pruning.net_trim_supports import in_chunks, newton_move
from pruning.net_trim_targets import LayerTargets
from tests.test_pruning.test_net_trim_layer import layer, normal, relu_goal
from tests.test_pruning.test_net_trim_refit import sparse


def test_sums_over_supports_are_those_of_each_neuron_alone(monkeypatch):
    W, X = layer(15, 7, 60)
    Y, active = relu_goal(W, X)
    U = sparse(W)
    U[3] = 0.0
    targets = LayerTargets(X, Y, "relu")
    seen = []
    for size in (1 << 27, 30_000, 1):  # all at once, some, one by one and a sample at a time
        monkeypatch.setattr("pruning.net_trim_supports.CHUNK_BYTES", size)
        chunks = list(in_chunks(U, targets))
        seen.append(len(chunks))
        rows = torch.cat([supports.rows for supports in chunks])
        assert sorted(rows.tolist()) == [0, 1, 2, 4, 5, 6]  # of the fourth nothing is left
        for supports in chunks:
            k, s = supports.index.shape
            T, on = supports.goal
            assert_close(T, (Y * active).T[supports.rows])
            off = normal(k, 60, seed=2)
            counts = normal(k, 60, seed=3).relu()
            moments = supports.moments(on)
            more = torch.zeros(k, s, s, dtype=torch.float64)
            supports.add_moments_(more, counts)
            images, gradient = supports.images(supports.of(U)), supports.gradient(off)
            for i, row in enumerate(supports.rows):
                kept = supports.index[i, supports.real[i]]
                assert sorted(kept.tolist()) == U[row].nonzero()[:, 0].tolist()
                own, n = X[:, kept], len(kept)
                assert_close(images[i], X @ U[row])
                assert_close(gradient[i, :n], own.T @ off[i])
                assert_close(moments[i, :n, :n], own[on[i]].T @ own[on[i]])
                assert_close(more[i, :n, :n], own.T @ (counts[i, :, None] * own))
                for t in (gradient[i], moments[i], moments[i].T, more[i], more[i].T):
                    assert not t[n:].any()
    assert seen[0] == 1 and seen[2] == 6


def test_weights_go_where_they_came_from():
    W, X = layer(15, 7, 60)
    U = sparse(W)
    into = torch.full_like(U, 5.0)
    for supports in in_chunks(U, LayerTargets(X, X @ U.T, "linear")):
        supports.put(supports.of(U), into)
    assert_close(into, torch.where(U == 0, 5.0, U))


def test_a_move_solves_the_normal_equations_and_bears_repeated_inputs():
    A = normal(3, 6, 6)
    H, g = A @ A.mT, normal(3, 6, seed=1)
    damping = torch.full((3,), 1e-10, dtype=torch.float64)
    assert_close(
        newton_move(H.clone(), g, damping), -torch.linalg.solve(H, g), rtol=1e-5, atol=1e-8
    )
    most = torch.tensor([1e-10, 1.0, 1e6]).double()
    damped = H + torch.diag_embed(
        (most * H.diagonal(dim1=1, dim2=2).amax(dim=1))[:, None].expand(3, 6)
    )
    assert_close(
        newton_move(H.clone(), g, most), -torch.linalg.solve(damped, g), rtol=1e-5, atol=1e-8
    )
    H[0, :, 1] = H[0, :, 0]
    H[0, 1, :] = H[0, 0, :]
    H[1] = 0.0
    assert torch.isfinite(newton_move(H, g, damping)).all()
