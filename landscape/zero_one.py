"""The 0-1 loss: whether the largest score misses the target class."""

from jaxtyping import Float
from torch import Tensor


def zero_one_loss(output: Float[Tensor, "n c *rest"], target: Tensor) -> Float[Tensor, "n *rest"]:
    """Return 1 where the largest output is not the target class, 0 where it is.

    Args:
        output: Scores of c classes, shape [n, c] or [n, c, ...].
        target: Class indices, shape [n] or [n, ...].

    Returns:
        One value a sample (and position), in the type of the output.

    Raises:
        ValueError: If target does not hold one class index a sample.

    Example:
        >>> import torch
        >>> zero_one_loss(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
        tensor([0., 1.])
    """
    predicted = output.argmax(dim=1)
    if predicted.shape != target.shape or target.is_floating_point():
        raise ValueError(
            f"`target` must hold class indices of shape {list(predicted.shape)} for output of "
            f"shape {list(output.shape)}, got {target.dtype} of shape {list(target.shape)}."
        )
    return (predicted != target).to(output.dtype)
