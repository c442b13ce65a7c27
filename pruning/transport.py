"""What gRDA does differently from SGD, to first order, carried along SGD's own path."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class Transport:
    """The difference e = v − w of gRDA's dual v and SGD's weights w, from w alone.

    Along SGD's path w₀, w₁, … with the threshold g_n that gRDA would have,

        D_n = e_n − g_n sign(w_n),    e_{n+1} = e_n − γ_{n+1} H(w_n) D_n,    e_0 = 0,

    and D approximates w_gRDA − w_SGD. Exact on a quadratic where no weight clips or changes
    sign; otherwise exact to first order in the threshold. The dual e is carried, not D: a sign
    change along the way makes D jump by 2 g, which e does not see.

    Args:
        w: SGD's initial weights, shape [d]: gives length, type and device.

    Example:
        >>> import torch
        >>> w, h = torch.ones(2), torch.tensor([1.0, 0.0])
        >>> transport = Transport(w)
        >>> transport.step(lambda v: h * v, w, lr=0.5, threshold=0.1)
        >>> transport.step(lambda v: h * v, w, lr=0.5, threshold=0.2)
        >>> transport.difference(w)
        tensor([-0.1500, -0.2000])

    References:
        First-order form of the coupling in Chao, Wang, Xing, Cheng (2020), theorem 1; see
        docs/explanation/why_grda_prunes_directionally.md.
    """

    def __init__(self, w: Float[Tensor, " d"]) -> None:
        self.offset: Float[Tensor, " d"] = torch.zeros_like(w)
        """e, shape [d]."""
        self.threshold = 0.0
        """g after the last step."""
        self.num_steps = 0
        self.num_products = 0

    def difference(self, w: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return D = e − g sign(w), the predicted w_gRDA − w at SGD's current weights w."""
        return self.offset - self.threshold * w.sign()

    def step(
        self,
        product: Callable[[Tensor], Tensor],
        w: Float[Tensor, " d"],
        *,
        lr: float,
        threshold: float,
    ) -> None:
        """Follow one step of SGD. Call it before the weights move.

        Costs one product. With the Hessian of the minibatch that SGD is about to use, the
        recursion is the exact linearisation of the coupled pair, noise included; with the
        Hessian of the whole training loss it is the theorem's. They agree to O(γ).

        Args:
            product: v ↦ H(w) v.
            w: SGD's weights before the step, shape [d].
            lr: Learning rate γ of the step; the sum of several steps' rates where one product is
                to serve them all, at an error that grows with lr · ‖H‖.
            threshold: gRDA's threshold g after the step.

        Raises:
            ValueError: If w has another length, lr is negative or the threshold falls.
        """
        if w.shape != self.offset.shape:
            raise ValueError(
                f"`w` must have shape {list(self.offset.shape)} as at the start, got "
                f"{list(w.shape)}."
            )
        if not lr >= 0:
            raise ValueError(f"`lr` must not be negative, got {lr}.")
        if not threshold >= self.threshold:
            raise ValueError(f"`threshold` must not fall, got {threshold} after {self.threshold}.")
        if self.threshold > 0:  # before that D is zero, and so is its product
            self.offset = self.offset - lr * product(self.difference(w))
            self.num_products += 1
        self.threshold = threshold
        self.num_steps += 1
