"""Weights on a given support whose outputs are nearest to what a ReLU lets through."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.layer_trim import SLACK
from pruning.net_trim_supports import Supports, in_chunks, newton_move
from pruning.net_trim_targets import LayerTargets

MAX_STEPS = 30
"""Steps of Newton for one set of multipliers; five are usual."""

MAX_HALVINGS = 10
"""Of a step that would lead further away."""

DAMPING, DAMPED_MORE, MOST_DAMPING = 1e-10, 1e3, 1.0
"""Added to second derivatives, as a share of the largest; by which factor more of it is added where
all halves of a step lead further away; and how much of it at most. Inputs may repeat, and where
few outputs count, those that do not may be far off."""

ROUNDING = 1e-12
"""What of an error counts as none."""

MAX_UPDATES = 30
"""Of the multipliers of bounds; three to six are usual, and twelve in a convolution."""

STIFFNESS = 10.0
"""What one sample above a bound counts to begin with, beside all samples of an input."""

SHRINKS, STIFFER = 0.25, 5.0
"""By which factor what is off must shrink at an update, and by which bounds are stiffer if not."""


@torch.no_grad()
def refitted(
    U: Float[Tensor, "m n"], targets: LayerTargets, *, scale: float | None = None
) -> Float[Tensor, "m n"]:
    """Return weights with the zeros of U, and outputs at least as near to the targets.

    Least ½ ‖(X Uᵀ + S − Y)_Ω‖² + ½ ‖((X Uᵀ + S)_Ωᶜ)₊‖², which bounds the squared discrepancy of
    the outputs; with ``scale``, subject to (X Uᵀ + S)_Ωᶜ ≤ V for every entry by itself. Each neuron
    is a problem of its own. The first is convex and piecewise quadratic, and Newton's method ends
    in its optimum. With bounds it becomes a few like it, by the method of multipliers. A neuron
    whose outputs come no nearer keeps its weights, unless they break a bound and new ones do not.

    For a neuron of s weights about 2 s² P flops in float64 once, and at each step 4 N P and 2 s²
    for each sample at which it is above zero or a bound.

    Args:
        U: Sparse weights.
        targets: The layer.
        scale: Unit of violations, of which at most a thousandth is left. Default: inactive outputs
            have no bounds of their own.

    References:
        Rockafellar (1973), The multiplier method of Hestenes and Powell applied to convex
        programming.
    """
    fitted = U.to(torch.float64, copy=True)
    for supports in in_chunks(U, targets):
        first = supports.of(U)
        u = _Refit(supports).nearest(first, None if scale is None else SLACK * scale)
        supports.put(u, fitted)
    return fitted.to(U.dtype)


class _Press(NamedTuple):
    """What bounds add to an error: ``stiffness`` (e + s)₊² of outputs that are e above them."""

    shift: Float[Tensor, "k p"]
    """s: multipliers, over the stiffness."""
    stiffness: float


class _Refit:
    """The problems of some neurons, by e = X uᵀ − T on all samples."""

    def __init__(self, supports: Supports) -> None:
        self._supports = supports
        self._T, self._active = supports.goal
        targets, rows = supports.targets, supports.rows
        S = targets.offset
        self._base = self._T if S is None else self._T + (S if S.ndim == 2 else S[None])[:, rows].T
        self._Y = targets.Y[:, rows].T.double()
        self._moments = supports.moments(self._active)
        self._press: _Press | None = None

    def nearest(self, first: Float[Tensor, "k s"], slack: float | None) -> Float[Tensor, "k s"]:
        """Return the weights of least error.

        Args:
            first: Weights to begin with, and to stay at if nothing is gained.
            slack: By how much a bound may be exceeded. Default: there are none.
        """
        e = self._off_goal(first)
        before = self._error(e), self._outputs_error(e)
        broken = self._above(e) > (slack or 0.0)
        u = self._least(first, e)
        if slack is not None and self._active is not None:
            u = self._least_below(u, slack)
        e = self._off_goal(u)
        better = (self._error(e) <= before[0]) & (self._outputs_error(e) <= before[1])
        if slack is not None:
            better = (self._above(e) <= slack) & (better | broken)
        return torch.where(better[:, None], u, first)

    def _least_below(self, u: Float[Tensor, "k s"], slack: float) -> Float[Tensor, "k s"]:
        """Return the weights of least error with inactive outputs at most at their bounds.

        Goes on to a quarter of the slack. If no weights keep the bounds: those of the last update.
        """
        e = self._off_goal(u)
        shift, stiffness = torch.zeros_like(e), STIFFNESS * e.shape[1] / u.shape[1]
        before = torch.inf
        for _ in range(MAX_UPDATES):
            # Above a bound, or inside of it with a multiplier.
            off = self._inactive(torch.maximum(e, -shift))
            size = float(off.abs().max())
            if size <= 0.25 * slack:
                break
            factor = STIFFER if size > SHRINKS * before else 1.0
            shift, stiffness, before = (shift + off).div_(factor), stiffness * factor, size
            self._press = _Press(shift, stiffness)
            u = self._least(u, e)
            e = self._off_goal(u)
        self._press = None
        return u

    def _least(self, u: Float[Tensor, "k s"], e: Float[Tensor, "k p"]) -> Float[Tensor, "k s"]:
        """Return the weights of least error for these multipliers by Newton's method."""
        e = e.clone()
        start = now = self._error(e)
        counts: Tensor | None = None
        whole, damping = False, torch.full_like(now, DAMPING)
        for _ in range(MAX_STEPS):
            last, counts = counts, self._counts(e)
            if last is not None and whole and torch.equal(counts, last):
                break  # it was one quadratic function all along, and this is its minimum
            H = self._moments.clone()
            self._supports.add_moments_(H, counts)
            move = newton_move(H, self._supports.gradient(self._slope(e)), damping)
            along, length = self._supports.images(move), torch.ones_like(now)
            most = now + ROUNDING * start
            for _ in range(MAX_HALVINGS):
                worse = self._error(e + length[:, None] * along) > most
                if not bool(worse.any()):
                    break
                length = torch.where(worse, 0.5 * length, length)
            length *= self._error(e + length[:, None] * along) <= most
            whole = bool((length == 1.0).all())
            u = u + length[:, None] * move
            e += length[:, None] * along
            then = self._error(e)
            stuck = (length == 0.0) & (damping < MOST_DAMPING)
            if bool(((now - then <= ROUNDING * start) & ~stuck).all()):
                break
            damping = torch.where(stuck, damping * DAMPED_MORE, damping)
            now = then
        return u

    def _off_goal(self, u: Tensor) -> Tensor:
        return self._supports.images(u).sub_(self._T)

    def _above(self, e: Tensor) -> Tensor:
        """Return by how much the outputs of a neuron are above their bounds at most."""
        return self._inactive(e.clone()).amax(dim=1)

    def _positive(self, e: Tensor) -> Tensor:
        """Return what of inactive outputs is above zero."""
        return self._inactive((e + self._base).clamp_(min=0.0))

    def _pressed(self, e: Tensor, press: _Press) -> Tensor:
        """Return (e + s)₊ of inactive outputs."""
        return self._inactive((e + press.shift).clamp_(min=0.0))

    def _inactive(self, values: Tensor) -> Tensor:
        """Put zeros where outputs are active, and return the values."""
        if self._active is None:
            return values.zero_()
        return values.masked_fill_(self._active, 0.0)

    def _counts(self, e: Tensor) -> Tensor:
        """Return what inactive outputs count in the second derivative."""
        if self._active is None:
            return torch.zeros_like(e)
        counts = (self._positive(e) > 0).double()
        if self._press is not None:
            counts += self._press.stiffness * (self._pressed(e, self._press) > 0)
        return counts

    def _slope(self, e: Tensor) -> Tensor:
        """Return the derivative of half the error by outputs."""
        if self._active is None:
            return e
        slope = self._positive(e).add_(e * self._active)
        if self._press is not None:
            slope += self._press.stiffness * self._pressed(e, self._press)
        return slope

    def _error(self, e: Tensor) -> Tensor:
        if self._active is None:
            return e.square().sum(dim=1)
        error = (e * self._active).square().sum(dim=1) + self._positive(e).square().sum(dim=1)
        if self._press is not None:
            above = self._pressed(e, self._press)
            error += self._press.stiffness * above.square_().sum(dim=1)
        return error

    def _outputs_error(self, e: Tensor) -> Tensor:
        """Return the squared discrepancy of what comes out."""
        if self._active is None:
            return e.square().sum(dim=1)
        return ((e + self._base).relu() - self._Y).square().sum(dim=1)
