"""Directional-pruning scores s = sign(w) * Π₀ sign(w), with three ways to know Π₀."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import hyp1f1
from torch import Tensor

from hessian import Eigenspace, Operator, apply_function
from pruning.transport import Transport

Response = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """Directional-pruning scores, one a weight: positive shrinks it, negative makes it grow."""

    values: Float[Tensor, " d"]
    form: Literal["projector", "filter", "transport"]
    error: float
    """Bound (projector) or estimate (filter) of ‖s − exact s of this form‖₂; NaN if unknown."""
    num_products: int
    """Hessian-vector products spent."""
    lowest_eigenvalue: float
    """Lowest eigenvalue of H that was met, NaN if none was looked at. Below 0, w is no minimum."""

    @property
    def mean(self) -> float:
        """Mean score: the share of sign(w) that lies in flat directions, in [0, 1] for Π₀."""
        return float(self.values.mean())


def directional_scores(
    w: Float[Tensor, " d"],
    curvature: Eigenspace | Operator | Transport,
    *,
    response: Response | None = None,
    tol: float = 1e-3,
    max_products: int = 500,
) -> Scores:
    """Return the scores of weights w; what is known of the curvature chooses the form.

    ========== ====================== =================================================
    form       ``curvature``          Π₀ sign(w)
    ========== ====================== =================================================
    projector  ``Eigenspace``         sign(w) − V Vᵀ sign(w): hard cut after k pairs
    filter     Hessian ``Operator``   φ(H) sign(w): soft cut, ``response`` gives φ
    transport  ``Transport``          what SGD and gRDA did differently, to first order
    ========== ====================== =================================================

    A zero weight has sign 0 and score 0. With k far below d the projector's scores are near 1
    and DP is near soft thresholding: show that beside it.

    Args:
        w: Weights at the (S)GD minimum, shape [d].
        curvature: See the table. The eigenspace should lead by magnitude.
        response: φ of the filter form, such as ``flat_response(mu=, t=)``.
        tol: Filter form: relative tolerance of φ(H) sign(w).
        max_products: Filter form: budget of Hessian-vector products.

    Returns:
        The scores with their error and cost. The projector's error is Davis-Kahan's bound times
        ‖sign(w)‖₂.

    Raises:
        ValueError: If w is not finite or does not fit the curvature, ``response`` is missing, not
            finite or given without need, tol or max_products is not positive, or the transport
            has not seen a threshold above 0.
        TypeError: If ``curvature`` is none of the three.
        NonFiniteError: If a product with the Hessian is not finite.

    Warns:
        ConvergenceWarning: If the filter's budget ran out before its tolerance was reached.

    Example:
        >>> import torch
        >>> from hessian import leading_eigenspace
        >>> H = Operator.from_matrix(torch.diag(torch.tensor([4.0, 0.0, 0.0])))
        >>> space = leading_eigenspace(H, k=1)
        >>> directional_scores(torch.tensor([1.0, -1.0, 2.0]), space).values.round(decimals=3)
        tensor([0., 1., 1.])

    References:
        Chao, Wang, Xing, Cheng (2020), Directional Pruning of Deep Neural Networks, section 1.
    """
    require_weights(w)
    if isinstance(curvature, Operator):
        if response is None:
            raise ValueError(
                "`response` must be given with an Operator, such as `flat_response(mu=0.6, t=200)`."
            )
        return _filter_scores(w, curvature, response, tol, max_products)
    if response is not None:
        raise ValueError(
            "`response` belongs to the filter form, which takes the Hessian as an Operator; "
            f"`curvature` is {type(curvature).__name__}."
        )
    if isinstance(curvature, Eigenspace):
        return _projector_scores(w, curvature)
    if isinstance(curvature, Transport):
        return _transport_scores(w, curvature)
    raise TypeError(
        "`curvature` must be an Eigenspace, an Operator or a Transport, got "
        f"{type(curvature).__name__}."
    )


def flat_response(*, mu: float, t: float) -> Response:
    """Return φ(h) = ₁F₁(1; 1+μ; −h t): how flat gRDA finds an eigenvalue h after time t.

    φ(0) = 1 and φ(h) ≈ μ / (h t) for h t ≫ 1, so eigenvalues below 1/t count as flat. Negative
    eigenvalues, which a minimum has not, are taken as 0.

    Args:
        mu: gRDA's exponent μ > 0.
        t: Training time, steps times learning rate, t > 0.

    Raises:
        ValueError: If mu or t is not positive and finite.

    Example:
        >>> import torch
        >>> flat_response(mu=0.6, t=200.0)(torch.tensor([-1.0, 0.0, 0.005, 0.5])).round(decimals=3)
        tensor([1.0000, 1.0000, 0.5610, 0.0060], dtype=torch.float64)

    References:
        The solution of D' = −H D − g'(t) sign(w) for constant H and g = c √γ t^μ, see
        docs/explanation/why_grda_prunes_directionally.md.
    """
    if not (0 < mu < math.inf and 0 < t < math.inf):
        raise ValueError(f"`mu` and `t` must be positive and finite, got mu={mu} and t={t}.")

    def response(h: Tensor) -> Tensor:
        x = h.detach().cpu().to(torch.float64).clamp(min=0).numpy() * t
        return torch.from_numpy(np.asarray(hyp1f1(1.0, 1.0 + mu, -x)))

    return response


def schedule_response(learning_rates: Sequence[float], thresholds: Sequence[float]) -> Response:
    """Return gRDA's φ for any schedule of learning rates, step by step.

    φ(h) = Σ_k (g_k − g_{k−1}) Π_{j>k} (1 − γ_j h) / g_n. Negative eigenvalues are taken as 0.
    Grows without bound for h above 2/γ, where SGD itself is not stable.

    Args:
        learning_rates: γ_1 … γ_n.
        thresholds: gRDA's threshold g_1 … g_n after each step, not decreasing, g_n > 0.

    Raises:
        ValueError: If the two differ in length or are empty, or g_n is not positive.
    """
    if len(learning_rates) != len(thresholds) or not learning_rates:
        raise ValueError(
            "`learning_rates` and `thresholds` must be of one positive length, got "
            f"{len(learning_rates)} and {len(thresholds)}."
        )
    if not thresholds[-1] > 0:
        raise ValueError(f"`thresholds` must end above 0, got {thresholds[-1]}.")

    def response(h: Tensor) -> Tensor:
        h = h.detach().cpu().to(torch.float64).clamp(min=0)
        total, before = torch.zeros_like(h), 0.0
        for rate, threshold in zip(learning_rates, thresholds, strict=True):
            total = (1.0 - rate * h) * total + (threshold - before)
            before = threshold
        return total / before

    return response


def require_weights(w: Tensor, name: str = "w") -> None:
    """Refuse weights that are not a finite flat vector of at least one entry."""
    if w.ndim != 1 or not w.is_floating_point():
        raise ValueError(
            f"`{name}` must be a flat floating-point vector, got {w.dtype} of shape "
            f"{list(w.shape)}. `Objective.weights()` gives one."
        )
    if len(w) == 0:
        raise ValueError(f"`{name}` must hold at least one weight, got none.")
    if not torch.isfinite(w).all():
        count = int((~torch.isfinite(w)).sum())
        raise ValueError(f"`{name}` must be finite, got {count} entries that are NaN or infinite.")


def _projector_scores(w: Tensor, space: Eigenspace) -> Scores:
    _require_length(w, space.vectors.shape[0])
    sign = w.sign()
    values = sign * space.project_flat(sign)
    error = space.projector_error_bound * float(sign.norm())
    lowest = float(space.values.min()) if len(space.values) else math.nan
    return Scores(values, "projector", error, space.num_products, lowest)


def _filter_scores(
    w: Tensor, H: Operator, response: Response, tol: float, max_products: int
) -> Scores:
    _require_length(w, H.size)
    sign = w.sign()
    product = apply_function(H, response, sign, tol=tol, max_products=max_products)
    lowest = float(product.ritz_values.min()) if len(product.ritz_values) else math.nan
    return Scores(sign * product.value, "filter", product.error, product.num_products, lowest)


def _transport_scores(w: Tensor, transport: Transport) -> Scores:
    _require_length(w, len(transport.offset))
    if not transport.threshold > 0:
        raise ValueError(
            "`curvature` must have seen a threshold above 0, got a Transport after "
            f"{transport.num_steps} steps with threshold {transport.threshold}. Take steps first."
        )
    sign = w.sign()
    values = sign.abs() - sign * transport.offset / transport.threshold
    return Scores(values, "transport", math.nan, transport.num_products, math.nan)


def _require_length(w: Tensor, length: int) -> None:
    if len(w) != length:
        raise ValueError(
            f"`w` must have {length} entries like the curvature it is used with, got {len(w)}."
        )
