"""Files in exactly the layout of the tools that write them, made here from known functions.

Keys, shapes, types and the order of axes are those of ``plane.py`` and ``eval_curve.py`` of
dnn-mode-connectivity (f0bf253) and ``plot_surface.py`` of loss-landscape (64ef4d5).
"""

import numpy as np

BENDS = np.array([[0.0, 0.0], [5.0, 4.0], [10.0, -0.007]], dtype=np.float32)
"""As the plane script gets them, from dot products in float32: the last y is not quite zero."""


def ridge(x, y):
    """A loss with a ridge at x = 5 that is lower the larger y is."""
    return np.exp(-((x - 5.0) ** 2) / 8 - y / 4) + 0.01


def write_plane(path, loss=ridge, size=29, bends=BENDS, **changes):
    """Write a plane as dnn-mode-connectivity does: a square grid, margins of a fifth."""
    dx, dy = np.float32(bends[2, 0]), np.float32(bends[1, 1])
    alphas, betas = np.linspace(-0.2, 1.2, size), np.linspace(-0.2, 1.2, size)
    grid, tr_loss = np.zeros((size, size, 2)), np.zeros((size, size))
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(betas):
            grid[i, j] = [alpha * dx, beta * dy]
            tr_loss[i, j] = loss(alpha * dx, beta * dy)
    ts = np.linspace(0, 1, 61)
    B = np.stack([(1 - ts) ** 2, 2 * ts * (1 - ts), ts**2], axis=1)
    accuracy = 100 * np.exp(-tr_loss)
    arrays = {
        "ts": ts,
        "bend_coordinates": bends,
        "curve_coordinates": (B @ bends[:3]).astype(np.float32),
        "alphas": alphas,
        "betas": betas,
        "grid": grid,
        "tr_loss": tr_loss + 0.001,
        "tr_acc": accuracy,
        "tr_nll": tr_loss,
        "tr_err": 100.0 - accuracy,
        "te_loss": 1.5 * tr_loss + 0.001,
        "te_acc": 0.9 * accuracy,
        "te_nll": 1.5 * tr_loss,
        "te_err": 100.0 - 0.9 * accuracy,
    }
    np.savez(path, **arrays | changes)
    return path


def write_curve(path, points=61):
    """Write the values along a curve as dnn-mode-connectivity does: scalars beside arrays."""
    ts = np.linspace(0, 1, points)
    dl = np.where(ts > 0, 0.5, 0.0)  # the first point has no step before it
    arrays = {"ts": ts, "dl": dl}
    for k, part in enumerate(("tr", "te")):
        loss = (1 + k) * (0.1 + ts * (1 - ts))
        accuracy = 100 * np.exp(-loss)
        values = {"loss": loss + 0.001, "nll": loss, "acc": accuracy, "err": 100 - accuracy}
        for name, v in values.items():
            arrays[f"{part}_{name}"] = v
            if name != "acc":
                integral = np.sum(0.5 * (v[:-1] + v[1:]) * dl[1:]) / np.sum(dl[1:])
                statistics = {"min": v.min(), "max": v.max(), "avg": v.mean(), "int": integral}
                arrays |= {f"{part}_{name}_{key}": s for key, s in statistics.items()}
    np.savez(path, **arrays)
    return path


def write_surface(path, xs, ys, loss, missing=()):
    """Write a surface as loss-landscape does: arrays [nx, ny], filled along a mesh [ny, nx].

    Args:
        path: The file.
        xs: Values along x.
        ys: Values along y.
        loss: Of x and y.
        missing: Places in the flat array that are not computed yet.
    """
    import h5py

    mesh_x, mesh_y = np.meshgrid(xs, ys)
    values = -np.ones((len(xs), len(ys)))
    accuracies = -np.ones((len(xs), len(ys)))
    for k in range(values.size):
        if k not in missing:
            values.ravel()[k] = loss(mesh_x.ravel()[k], mesh_y.ravel()[k])
            accuracies.ravel()[k] = 100 * np.exp(-values.ravel()[k])
    with h5py.File(path, "w") as file:
        file["dir_file"] = "model.t7_weights_xignore=biasbn_xnorm=filter.h5"
        file["xcoordinates"], file["ycoordinates"] = xs, ys
        file["train_loss"], file["train_acc"] = values, accuracies
    return path


def write_line(path, xs, loss):
    """Write a line as loss-landscape does."""
    import h5py

    with h5py.File(path, "w") as file:
        file["dir_file"] = "model.t7_model2.t7_states.h5"
        file["xcoordinates"] = xs
        file["train_loss"], file["train_acc"] = loss(xs), 100 * np.exp(-loss(xs))
    return path
