"""How the eigenvalues of a symmetric matrix are distributed, by stochastic Lanczos quadrature."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hessian.operators import Operator
from hessian.progress import ProgressOption, report_progress
from hessian.quadrature import lanczos_runs, require_sizes
from hessian.subspace import Eigenspace


@dataclass(frozen=True)
class SpectralCurve:
    """A function of the spectrum at some points, with the error from the choice of probes."""

    grid: Float[Tensor, " g"]
    value: Float[Tensor, " g"]
    """Mean over probes."""
    standard_error: Float[Tensor, " g"]
    """Standard error of that mean, to be taken with one degree of freedom a probe less one."""
    sigma: float
    """Width of the smoothing Gaussian, zero where nothing is smoothed; in units of A."""


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the eigenvalues, as a quadrature for every probe.

    The mean of f over all eigenvalues is about ``(weights * f(nodes)).sum()`` for every probe.
    """

    nodes: Float[Tensor, "p q"]
    """Where the quadratures have their weights, in float64."""
    weights: Float[Tensor, "p q"]
    """Not negative, summing to one for every probe; zero at nodes that fill up short rows."""
    outliers: Float[Tensor, " k"]
    """Eigenvalues that were treated exactly: the last nodes of every probe, of weight 1 / n."""
    num_steps: int
    """Most Lanczos steps of a probe."""
    num_products: int

    @property
    def default_sigma(self) -> float:
        """The range of the spectrum without outliers over the number of steps.

        About the finest that so many steps resolve: for a Gaussian of this width the error of the
        quadrature is below the error over the probes.
        """
        low, high = self._bulk
        # No finer than what products in float32 tell apart.
        return max((high - low) / self.num_steps, 1e-6 * float(self.nodes.abs().max())) or 1.0

    def on(
        self, grid: Float[Tensor, " g"] | None = None, sigma: float | None = None
    ) -> SpectralCurve:
        """Return the density, smoothed by a Gaussian, on a grid.

        Args:
            grid: Points in units of A. Default: some hundred that resolve every Gaussian, more
                closely around the outliers.
            sigma: Width of the Gaussian. Default: ``default_sigma``.

        Raises:
            ValueError: If sigma is not positive.
        """
        sigma = self.default_sigma if sigma is None else sigma
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"`sigma` must be positive and finite, got {sigma}.")
        grid = self._default_grid(sigma) if grid is None else grid.to(torch.float64).cpu()

        def smoothed(nodes: Tensor, weights: Tensor) -> Tensor:
            z = (grid[:, None] - nodes) / sigma
            return torch.exp(-0.5 * z.square()) @ weights / (sigma * math.sqrt(2 * math.pi))

        return self._over_probes(grid, smoothed, sigma)

    def cdf(self, grid: Float[Tensor, " g"]) -> SpectralCurve:
        """Return the share of eigenvalues that are at most as large as every point of a grid.

        A quadrature knows the share at its nodes to about the weight of the nearest one; this comes
        on top of the standard error.
        """
        grid = grid.to(torch.float64).cpu()
        return self._over_probes(grid, lambda x, w: (x <= grid[:, None]).to(torch.float64) @ w, 0.0)

    def moments(self, highest: int = 4) -> SpectralCurve:
        """Return the means over all eigenvalues of λ⁰, λ¹, … up to a highest power.

        Unbiased where ``2 num_steps`` exceeds the power.

        Raises:
            ValueError: If the power is negative.
        """
        if highest < 0:
            raise ValueError(f"`highest` must not be negative, got {highest}.")
        powers = torch.arange(highest + 1, dtype=torch.float64, device="cpu")
        return self._over_probes(powers, lambda x, w: (x[None, :] ** powers[:, None]) @ w, 0.0)

    def _over_probes(
        self, grid: Tensor, curve: Callable[[Tensor, Tensor], Tensor], sigma: float
    ) -> SpectralCurve:
        pairs = zip(self.nodes, self.weights, strict=True)
        curves = torch.stack([curve(nodes, weights) for nodes, weights in pairs])
        error = curves.std(dim=0) / math.sqrt(len(curves))
        return SpectralCurve(grid, curves.mean(dim=0), error, sigma)

    @property
    def _bulk(self) -> tuple[float, float]:
        """Smallest and largest node that is no outlier."""
        nodes = self.nodes[:, : self.nodes.shape[1] - len(self.outliers)]
        nodes = nodes if nodes.numel() else self.nodes
        return float(nodes.min()), float(nodes.max())

    def _default_grid(self, sigma: float) -> Tensor:
        low, high = self._bulk
        reach = 7 * sigma  # nothing is left of a Gaussian there, also beside a much wider gap
        points = min(max(400, math.ceil(4 * (high - low + 2 * reach) / sigma)), 100_000)
        parts = [
            torch.linspace(low - reach, high + reach, points, dtype=torch.float64, device="cpu")
        ]
        parts += [
            torch.linspace(x - reach, x + reach, 57, dtype=torch.float64, device="cpu")
            for x in self.outliers.tolist()
        ]
        return torch.cat(parts).sort().values


def spectral_density(
    operator: Operator,
    *,
    num_probes: int = 10,
    num_steps: int = 80,
    eigenspace: Eigenspace | None = None,
    seed: int = 0,
    progress: ProgressOption = False,
) -> SpectralDensity:
    """Estimate the distribution of all eigenvalues by stochastic Lanczos quadrature.

    Every probe costs ``num_steps`` products, and gives a quadrature that is exact for polynomials
    of degree below 2 ``num_steps`` in the spectrum as the probe sees it. The reorthogonalisation is
    full, so no node is a ghost. A single eigenvalue has a share of 1 / n, which a probe sees with
    a relative standard deviation of √2: pass an ``eigenspace`` to have outliers in their place.

    Args:
        operator: Symmetric matrix A, shape [n, n].
        num_probes: Number of probes.
        num_steps: Products a probe; also the most vectors of length n in memory.
        eigenspace: Eigenpairs that get their exact share. The probes then see their complement
            only. Checked with one product.
        seed: Seed of the probes, drawn on the CPU; the global random state is not used.
        progress: A bar, or a function called with a ``Step``.

    Returns:
        The quadratures; ``on``, ``cdf`` and ``moments`` evaluate them, with an error over probes.

    Raises:
        ValueError: If there are fewer than two probes or no step, or the eigenspace is not one of
            this operator.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import torch
        >>> A = Operator.from_matrix(torch.diag(torch.tensor([0.0, 0.0, 1.0, 3.0]).double()))
        >>> spectral_density(A).cdf(torch.tensor([-1.0, 0.5, 2.0, 4.0])).value
        tensor([0.0000, 0.5000, 0.7500, 1.0000], dtype=torch.float64)

    References:
        Golub & Welsch (1969), Calculation of Gauss quadrature rules.
        Ubaru, Chen, Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.
        Ghorbani, Krishnan, Xiao (2019), An investigation into neural net optimization via Hessian
        eigenvalue density.
    """
    require_sizes(num_probes, num_steps)
    n = operator.size
    outliers = torch.empty(0, dtype=torch.float64, device="cpu")
    if eigenspace is not None:
        outliers = eigenspace.values.to(device="cpu", dtype=torch.float64)
    share = 1.0 - len(outliers) / n
    rows: list[tuple[Tensor, Tensor]] = []
    products = 0 if eigenspace is None else 1
    with report_progress(progress, "spectral density") as update:
        for basis in lanczos_runs(
            operator,
            num_probes=num_probes,
            num_steps=num_steps,
            eigenspace=eigenspace,
            seed=seed,
            update=update,
        ):
            values, vectors = basis.ritz()
            rows.append((torch.from_numpy(values), torch.from_numpy(vectors[0] ** 2)))
            products += len(basis)
    longest = max((len(values) for values, _ in rows), default=0)
    nodes = outliers.repeat(num_probes, 1)
    weights = torch.full_like(nodes, 1.0 / n)
    if rows:
        inner_nodes = torch.stack(
            [torch.cat([x, x[-1:].expand(longest - len(x))]) for x, _ in rows]
        )
        inner_weights = torch.stack(
            [torch.cat([w, w.new_zeros(longest - len(w))]) for _, w in rows]
        )
        # The first components of orthonormal vectors: one but for rounding.
        inner_weights *= share / inner_weights.sum(dim=1, keepdim=True)
        nodes = torch.cat([inner_nodes, nodes], dim=1)
        weights = torch.cat([inner_weights, weights], dim=1)
    return SpectralDensity(nodes, weights, outliers, longest or 1, products)
