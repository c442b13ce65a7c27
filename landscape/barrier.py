"""The height of the loss barrier along a path, by both definitions in use, with errors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian.objective import Objective
from landscape.evaluate import Progress, evaluate
from landscape.paths import Path
from landscape.records import Evaluation


@dataclass(frozen=True)
class Excess:
    """The largest excess of the loss along a path over a reference drawn from its ends."""

    value: float
    """In units of the loss; NaN if the loss is not finite at a point of the path."""
    location: float
    """The t of the largest excess, or the first t at which the loss is not finite."""
    standard_error: float
    """Of the excess at that t, from per-sample differences; zero where it vanishes identically."""


@dataclass(frozen=True)
class Barrier:
    """Barrier heights along a path, and the losses they are read from."""

    excess_over_chord: Excess
    """max_t L(t) − ((1 − t) L(0) + t L(1)). At least 0: the chord meets the loss at both ends."""
    excess_over_mean: Excess
    """max_t L(t) − (L(0) + L(1)) / 2. At least |L(0) − L(1)| / 2, whatever lies between."""
    evaluation: Evaluation


def barrier(
    objective: Objective, path: Path, *, num_points: int = 61, progress: Progress | None = None
) -> Barrier:
    """Measure the loss barrier along a path.

    The two definitions agree where the ends are equally good. Where they are not, the excess over
    the mean is positive even for a loss that falls all the way; the excess over the chord is not.

    The standard errors are paired: every sample is its own control, so what makes a sample hard
    along the whole path drops out. They hold for a fixed t. The maximum is *selected*: over a
    noisy flat profile it is biased upward, so an excess of two standard errors at the best of 61
    points is no evidence of a barrier. A peak narrower than the grid is missed.

    Args:
        objective: The loss L.
        path: A map from t to weights.
        num_points: Equally spaced t in [0, 1], both ends among them; at least 3. Costs one forward
            pass over the data each, and up to four more. Memory: one float64 a sample.
        progress: Called with the points done and their number after every point.

    Returns:
        Both excesses with location and standard error, and the evaluation along the path.

    Raises:
        ValueError: If ``num_points`` is below 3.

    Warns:
        BatchNormWarning: If the model normalises by running statistics.

    Example:
        >>> import torch
        >>> from landscape.paths import Line
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.ones(2, 1), torch.ones(2, 1)
        >>> objective = Objective(model, lambda y, x: ((y**2 - x) ** 2).mean(dim=1), data)
        >>> barrier(objective, Line(torch.tensor([-1.0]), torch.tensor([1.0]))).excess_over_chord
        Excess(value=1.0, location=0.5, standard_error=0.0)

    References:
        Entezari et al. (2022), The role of permutation invariance in linear mode connectivity.
        Frankle et al. (2020), Linear mode connectivity and the lottery ticket hypothesis.
        Ainsworth et al. (2023), Git Re-Basin.
    """
    if num_points < 3:
        raise ValueError(
            f"`num_points` must be at least 3 to see anything between the ends, got {num_points}."
        )
    ts = torch.linspace(0, 1, num_points, dtype=torch.float64)
    evaluation = evaluate(objective, path, ts, progress=progress)
    losses = evaluation.mean
    over_chord = losses - ((1 - ts) * losses[0] + ts * losses[-1])
    over_mean = losses - (losses[0] + losses[-1]) / 2
    ends = None
    found = []
    for excess, chord in ((over_chord, True), (over_mean, False)):
        best = int(excess.argmax())  # a NaN counts as the largest
        t, value = float(ts[best]), float(excess[best])
        if not math.isfinite(value):
            first = int((~torch.isfinite(losses)).nonzero()[0])
            found.append(Excess(math.nan, float(ts[first]), math.nan))
            continue
        if ends is None:
            ends = objective.sample_losses(path(0.0)), objective.sample_losses(path(1.0))
        share = t if chord else 0.5
        differences = objective.sample_losses(path(t)) - ((1 - share) * ends[0] + share * ends[1])
        found.append(Excess(value, t, _standard_error(differences)))
    return Barrier(found[0], found[1], evaluation)


def _standard_error(differences: Tensor) -> float:
    if len(differences) < 2:
        return math.nan
    return float(differences.std()) / math.sqrt(len(differences))
