"""A random sketch of a matrix, and what it would say with one of its probes left out.

XTrace and XDiag use every probe twice: to build an orthonormal basis Q of the range of A Ω, and to
sample what Q misses. Probe i is sampled against the basis of the *other* probes, so each sample is
unbiased. Leaving one or two probes out changes Q by a rotation of few columns, which small matrices
tell; no product is needed.

References:
    Epperly, Tropp, Webber (2024), XTrace: making the most of every sample in stochastic trace
    estimation.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.probes import inner


class RangeBasis:
    """Orthonormal columns Q that span the columns of Y, Y = Q R, both growing.

    Directions of the size of rounding are left out, so Q may have fewer columns than Y.
    Memory: one vector of length n for each column of Q.

    Args:
        like: Any tensor [n, ·] of the vectors' type and device.
    """

    def __init__(self, like: Tensor) -> None:
        self.Q: Tensor = like.new_empty((len(like), 0))
        self.R = torch.zeros((0, 0), dtype=torch.float64, device="cpu")

    def add(self, Y: Float[Tensor, "n k"]) -> Float[Tensor, "n r"]:
        """Take in further columns of Y and return the columns that Q gained."""
        scale = max(float(self.R.norm()), float(torch.linalg.vector_norm(Y, dtype=torch.float64)))
        gained: Tensor
        Y, above = self._cleared(Y)
        gained, rest = torch.linalg.qr(Y)
        U, sigma, Wt = torch.linalg.svd(rest.to(torch.float64), full_matrices=False)
        kept = sigma > 100.0 * torch.finfo(Y.dtype).eps * scale
        coordinates = (sigma[kept, None] * Wt[kept]).cpu()
        # A direction close to rounding has lost its right angle to Q; once more gives it back.
        gained, _ = self._cleared(gained @ U[:, kept].to(Y.dtype))
        gained, turn = torch.linalg.qr(gained)
        below = turn.to(device="cpu", dtype=torch.float64) @ coordinates
        empty = torch.zeros((len(below), self.R.shape[1]), dtype=torch.float64, device="cpu")
        self.R = torch.cat([torch.cat([self.R, above], 1), torch.cat([empty, below], 1)])
        self.Q = torch.cat([self.Q, gained], dim=1)
        return gained

    def _cleared(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Remove Q from Y by two passes of Gram-Schmidt, and say how much there was."""
        removed = torch.zeros((self.Q.shape[1], Y.shape[1]), dtype=torch.float64, device="cpu")
        for _ in range(2):
            c = inner(self.Q, Y)
            Y = Y - self.Q @ c.to(self.Q)
            removed += c
        return Y, removed


def left_out_directions(R: Float[Tensor, "r m"]) -> Float[Tensor, "r m"]:
    """Return for every probe the unit vector s with Q s outside the range of all other probes.

    Zero for a probe whose column depends on the others: the range is the same without it.
    """
    U, sigma, Wt = torch.linalg.svd(R, full_matrices=False)
    S: Tensor = (U / sigma) @ Wt
    redundant = 1.0 - Wt.square().sum(dim=0) > 1e-8
    S = S / S.norm(dim=0)
    S[:, redundant] = 0.0
    return S


def pair_directions(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return g and c of b = (s_j − g s_i) / c, the direction that goes when j leaves after i.

    Rows are j, columns i.
    """
    G = S.T @ S
    return G, (1.0 - G.square()).clamp(min=1e-12).sqrt()


def leave_one_out_traces(
    H: Float[Tensor, "r r"],
    R: Float[Tensor, "r m"],
    W: Float[Tensor, "r m"],
    forms: Float[Tensor, " m"],
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Return the XTrace sample of every probe, and the estimate without every probe.

    Args:
        H: Qᵀ A Q.
        R: Qᵀ A Ω.
        W: Qᵀ Ω.
        forms: ωᵀ A ω for every probe.
    """
    m = len(forms)
    S = left_out_directions(R)
    SW, SR = S.T @ W, S.T @ R
    # The part of ω inside the basis of the other probes, in coordinates of Q.
    C = W - S * SW.diag()
    HC, K = S.T @ H @ C, S.T @ H @ S
    samples = H.trace() - K.diag() + forms - 2 * (C * R).sum(dim=0) + (C * (H @ C)).sum(dim=0)
    # Without probe j as well, the basis loses b too; entry [j, i].
    g, c = pair_directions(S)
    bW = (SW - g * SW.diag()) / c
    bR = (SR - g * SR.diag()) / c
    bHC = (HC - g * HC.diag()) / c
    bHb = (K.diag()[:, None] - 2 * g * K + g.square() * K.diag()) / c.square()
    pairs = samples + 2 * bW * (bR - bHC) + (bW.square() - 1.0) * bHb
    return samples, pairs.fill_diagonal_(0.0).sum(dim=1) / (m - 1)


def leave_one_out_error(samples: Tensor, without: Tensor) -> Tensor:
    """Return the standard error of the mean of leave-one-out samples, shape [m, ...].

    Each sample is unbiased, but they share probes. Split the estimate into interactions of q
    probes each. The spread of the samples counts the variance of an interaction once where it
    enters the mean q times; the jackknife, from the estimates without one probe, counts it q times
    too often. By the Cauchy-Schwarz inequality the geometric mean of the two variances counts none
    too little, and all of them right when one q dominates.

    References:
        Efron & Stein (1981), The jackknife estimate of variance.
    """
    m = len(samples)
    spread = samples.var(dim=0) / m
    jackknife = (m - 1) ** 2 / m * without.var(dim=0)
    return (spread * jackknife) ** 0.25
