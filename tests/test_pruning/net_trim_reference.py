"""Net-Trim's program handed to an interior-point solver, and the published iteration, slowly."""

import numpy as np
import torch


def solved(X, T, active, epsilon, *, penalty=None, joint=False, solver="CLARABEL"):
    """Least Σ λ |U| with X Uᵀ near T where active, and at most T elsewhere: objective and U."""
    import cvxpy as cp

    X, T, on = X.numpy(), T.numpy(), active.numpy().astype(float)
    U = cp.Variable((T.shape[1], X.shape[1]))
    weights = np.ones(U.shape) if penalty is None else penalty.expand(U.shape).numpy()
    Z = X @ U.T - T
    over = cp.Variable(T.shape, nonneg=True)
    within = cp.multiply(1 - on, Z)
    near = cp.multiply(on, Z)
    if joint:
        near, limits = near + cp.multiply(1 - on, over), [within <= over]
    else:
        limits = [within <= 0]
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.multiply(weights, cp.abs(U)))),
        [cp.norm(near, "fro") <= epsilon, *limits],
    )
    return problem.solve(solver=solver), torch.from_numpy(U.value)


def refitted(X, Y, offset, support, bound=None):
    """Least ‖(X Uᵀ + S − Y)_Ω‖² + ‖((X Uᵀ + S)_Ωᶜ)₊‖² for one neuron on a support: the minimum.

    With a bound, for (X Uᵀ + S)_Ωᶜ ≤ V.
    """
    import cvxpy as cp

    on = (Y > 0).numpy().astype(float)
    u = cp.Variable(int(support.sum()))
    z = X[:, support].numpy() @ u + offset.numpy()
    error = cp.sum_squares(cp.multiply(on, z - Y.numpy()))
    error += cp.sum_squares(cp.multiply(1 - on, cp.pos(z)))
    limits = [] if bound is None else [cp.multiply(1 - on, z - bound.numpy()) <= 0]
    return cp.Problem(cp.Minimize(error), limits).solve(solver="CLARABEL", tol_gap_abs=1e-12)


def published(X, T, active, epsilon, *, c0, threshold, iterations, relaxation=1.0, changes=()):
    """The iteration of the authors, with X [N, P] and weights [N, M]: sparse weights after each.

    ``changes`` gives factors of ρ by the iteration after which they hold.
    """
    X, T, on = X.numpy().T / c0, T.numpy().T / c0, active.numpy().T
    epsilon = epsilon / c0
    factor = np.linalg.inv(X @ X.T + np.eye(len(X)))
    W3 = np.zeros((len(X), len(T)))
    U1, U2 = np.zeros_like(T), np.zeros_like(W3)
    sparse = []
    for k in range(1, iterations + 1):
        Z = W3.T @ X - U1
        off = (Z - T) * on
        length = np.linalg.norm(off)
        W1 = np.where(on, T + min(1.0, epsilon / length) * off, np.minimum(Z, T))
        V = W3 - U2
        W2 = np.sign(V) * np.maximum(np.abs(V) - threshold, 0.0)
        sparse.append(torch.from_numpy(W2.T.copy()))
        H1 = relaxation * W1 + (1 - relaxation) * (W3.T @ X)
        H2 = relaxation * W2 + (1 - relaxation) * W3
        W3 = factor @ (X @ (H1 + U1).T + H2 + U2)
        U1 += H1 - W3.T @ X
        U2 += H2 - W3
        if k in dict(changes):
            f = dict(changes)[k]
            U1, U2, threshold = U1 / f, U2 / f, threshold / f
    return sparse
