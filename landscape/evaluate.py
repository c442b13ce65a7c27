"""The loss at every point of a path or plane, with what its error bars need."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hessian.errors import NonFiniteError
from hessian.loss_statistics import LossStatistics
from hessian.objective import Objective
from landscape.paths import Path
from landscape.planes import Plane

Progress: TypeAlias = Callable[[int, int], object]
"""Called as ``progress(done, total)``."""


class BatchNormWarning(UserWarning):
    """Running statistics of one model are used at points far from that model."""


@dataclass(frozen=True)
class Evaluation:
    """Losses of the samples at every point, as count, sum and sum of squares.

    Args:
        points: Values of t, shape [m], or coordinates in a plane, shape [..., 2].
        count: Number of samples at every point, shape [m] or [...].
        total: Sum of their losses; NaN where the loss is not finite.
        total_squares: Sum of their squared losses; NaN where the loss is not finite.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> t, n = torch.tensor([0.0, 1.0]).double(), torch.tensor([4.0, 4.0]).double()
        >>> Evaluation(t, n, 2 * n, 5 * n).standard_error
        tensor([0.5774, 0.5774], dtype=torch.float64)
    """

    points: Float64[Tensor, "..."]
    count: Float64[Tensor, "*shape"]
    total: Float64[Tensor, "*shape"]
    total_squares: Float64[Tensor, "*shape"]

    def __post_init__(self) -> None:
        along_path = self.points.ndim == 1 and self.count.shape == self.points.shape
        in_plane = self.points.shape == (*self.count.shape, 2)
        if not (along_path or in_plane):
            raise ValueError(
                "`points` must have shape [m] or [..., 2] with one entry of `count` a point, got "
                f"{list(self.points.shape)} and {list(self.count.shape)}."
            )

    @property
    def mean(self) -> Float64[Tensor, "*shape"]:
        """The loss: the mean over samples."""
        return self.total / self.count

    @property
    def standard_error(self) -> Float64[Tensor, "*shape"]:
        """Standard error of every mean, the samples taken as independent; NaN for one sample.

        All points share their samples, so the difference of two points is known better than
        this; `barrier` has the paired error.
        """
        spread = (self.total_squares - self.total**2 / self.count).clamp(min=0)
        error = torch.sqrt(spread / (self.count - 1) / self.count)
        return torch.where(self.count < 2, torch.nan, error)

    @property
    def num_nonfinite(self) -> int:
        """Number of points at which the loss is NaN or infinite."""
        return int((~torch.isfinite(self.mean)).sum())


def evaluate(
    objective: Objective,
    path: Path | Plane,
    ts: Sequence[float] | Float[Tensor, "..."],
    *,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate the loss at every point of a path or plane.

    A point where the loss is NaN or infinite is kept as NaN and counted, never replaced. For the
    error rate instead of the loss, pass an objective with `zero_one_loss` as its criterion.

    Args:
        objective: The loss L.
        path: A map from t to weights, or a plane.
        ts: Values of t, shape [m], or coordinates [..., 2] in a plane, e.g. from `grid`. Any
            order, any spacing. Every point costs one forward pass over the data.
        progress: Called with the points done and their number after every point.

    Returns:
        Sums of losses and squared losses, with the points in the order given.

    Raises:
        ValueError: If ``ts`` has the wrong shape, or is empty.

    Warns:
        BatchNormWarning: If the model normalises by running statistics. They belong to the
            model's own weights; away from those, at other ends too, the loss is that of another
            function.

    Example:
        >>> import torch
        >>> from landscape.paths import Line
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(2, 1), torch.zeros(2, 1)))
        >>> line = Line(torch.tensor([0.0]), torch.tensor([2.0]))
        >>> evaluate(objective, line, [0.0, 0.5, 1.0]).mean
        tensor([0., 1., 4.], dtype=torch.float64)
    """
    points = torch.as_tensor(ts, dtype=torch.float64, device="cpu").detach()
    _require_points(points, isinstance(path, Plane))
    warn_about_batch_norm(objective)
    rows = points.reshape(-1, 2) if isinstance(path, Plane) else points
    sums = torch.empty(len(rows), 3, dtype=torch.float64)
    for i, row in enumerate(rows):
        w = path(row) if isinstance(path, Plane) else path(float(row))
        found = _statistics(objective, w)
        sums[i, 0], sums[i, 1], sums[i, 2] = found.count, found.total, found.total_squares
        if progress is not None:
            progress(i + 1, len(rows))
    shape = points.shape[:-1] if isinstance(path, Plane) else points.shape
    count, total, squares = (column.reshape(shape) for column in sums.unbind(dim=1))
    return Evaluation(points, count, total, squares)


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


def warn_about_batch_norm(objective: Objective) -> None:
    """Warn, naming the layers, if the model normalises by running statistics."""
    names = [
        name or type(module).__name__
        for name, module in objective.model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
    ]
    if names:
        listed = f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        warnings.warn(
            f"The model has running statistics in {listed}. They are used as they are at every "
            "point, but belong to the model's own weights: elsewhere the loss is that of another "
            "function. A barrier may be made up, or hidden by an end that looks worse than it is.",
            BatchNormWarning,
            stacklevel=3,
        )


def _statistics(objective: Objective, w: Tensor) -> LossStatistics:
    try:
        return objective.statistics(w)
    except NonFiniteError:
        return LossStatistics(objective.num_samples, torch.nan, torch.nan)


def _require_points(points: Tensor, in_plane: bool) -> None:
    good = points.shape[-1:] == (2,) if in_plane else points.ndim == 1
    if not good or points.numel() == 0:
        wanted = "coordinates of shape [..., 2] in a plane" if in_plane else "values of shape [m]"
        raise ValueError(
            f"`ts` must hold {wanted}, at least one point, got shape {list(points.shape)}."
        )
