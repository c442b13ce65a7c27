"""Figures of profiles, trajectories and shares; data in, axes out."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from landscape.figure_style import (
    MARKERS,
    legend_above,
    line_style,
    log_scale,
    mean_and_reach,
    new_axes,
    new_column,
    require_some,
    to_numpy,
)
from landscape.records import Evaluation
from landscape.trajectory import Trajectory, random_share, random_share_interval


def plot_profile(
    evaluations: Mapping[str, Evaluation],
    *,
    ax: Axes | None = None,
    ends: tuple[str, str] = ("start", "end"),
    ylabel: str = "loss",
    log: bool = False,
) -> Axes:
    """Draw the loss along paths, with bands of two standard errors where they are known.

    Points where the loss is not finite leave a gap, and are counted in the legend.

    Args:
        evaluations: Evaluations along paths, by the name for the legend.
        ax: Axes to draw into; default a new figure.
        ends: What to call t = 0 and t = 1.
        ylabel: Name of the loss, with its unit.
        log: Whether the loss axis is logarithmic.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, or an evaluation is of a plane.

    Example:
        >>> import torch
        >>> from landscape.records import Evaluation
        >>> t = torch.linspace(0, 1, 5).double()
        >>> n = torch.full((5,), 9.0).double()
        >>> plot_profile({"line": Evaluation(t, n, n * t, 2 * n)}).get_xlabel()
        'position t along the path'
    """
    require_some("evaluations", evaluations)
    ax = ax or new_axes((5.0, 3.2))
    banded = False
    for i, (name, evaluation) in enumerate(evaluations.items()):
        if evaluation.points.ndim != 1:
            raise ValueError(
                f'`evaluations["{name}"]` must be along a path, got one over a plane. Use '
                "`plot_plane`."
            )
        order = evaluation.points.argsort()
        t, mean = to_numpy(evaluation.points[order]), to_numpy(evaluation.mean[order])
        band = 2 * to_numpy(evaluation.standard_error[order])
        banded |= bool(np.isfinite(band).any())
        bad = evaluation.num_nonfinite
        style = line_style(i)
        ax.plot(t, mean, label=f"{name} ({bad} not finite)" if bad else name, **style)
        ax.fill_between(t, mean - band, mean + band, color=style["color"], alpha=0.2, linewidth=0)
    if log:
        log_scale(ax)
    for t in (0, 1):
        ax.axvline(t, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xticklabels([f"0\n{ends[0]}", "0.25", "0.5", "0.75", f"1\n{ends[1]}"])
    ax.set_xlabel("position t along the path")
    ax.set_ylabel(ylabel)
    legend_above(ax, title="band: ±2 standard errors" if banded else None)
    return ax


def plot_trajectory(
    trajectories: Mapping[str, Trajectory],
    times: Sequence[float] | Sequence[int] | Float[Tensor, " t"],
    *,
    axes: Sequence[Axes] | None = None,
    names: Sequence[str] | None = None,
    time_label: str = "epoch",
    ylabel: str = "distance in weight space",
) -> list[Axes]:
    """Draw coordinates against time, one small axes a direction, and the distance outside them.

    The last axes shows the residual, because what happens outside a few directions is usually the
    larger part of the motion.

    Args:
        trajectories: Trajectories in one basis, by the name for the legend.
        times: Time of every point, the same for all.
        axes: Axes to draw into, one more than directions; default a new figure.
        names: Names of the directions. Default: direction 1, 2, ….
        time_label: Name of the time, with its unit.
        ylabel: Unit of coordinates and residual; coordinates are distances if the directions have
            length one.

    Returns:
        The axes, one a direction and one for the residual.

    Raises:
        ValueError: If there is nothing to draw, or trajectories, times, names and axes do not fit.
    """
    require_some("trajectories", trajectories)
    time = to_numpy(torch.as_tensor(times))
    k = next(iter(trajectories.values())).coordinates.shape[1]
    names = list(names or [f"direction {j + 1}" for j in range(k)])
    for name, trajectory in trajectories.items():
        if trajectory.coordinates.shape != (len(time), k):
            raise ValueError(
                f'`trajectories["{name}"]` must have shape [{len(time)}, {k}] like `times` and '
                f"the first one, got {list(trajectory.coordinates.shape)}."
            )
    if axes is None:
        axes = new_column(k + 1)
    if len(names) != k or len(axes) != k + 1:
        raise ValueError(
            f"`names` must hold {k} names and `axes` {k + 1} axes, one for the residual, got "
            f"{len(names)} and {len(axes)}."
        )
    for i, (name, trajectory) in enumerate(trajectories.items()):
        columns = [*trajectory.coordinates.unbind(dim=1), trajectory.residuals]
        for ax, column in zip(axes, columns, strict=True):
            ax.plot(time, to_numpy(column), label=name, **line_style(i))
    for ax, title in zip(axes, [*names, "distance outside"], strict=True):
        ax.set_title(title, loc="left", fontsize="medium", pad=3)
        ax.yaxis.set_major_locator(MaxNLocator(4))
    for ax in axes[:-1]:
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.tick_params(labelbottom=False)
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel(time_label)
    axes[(k + 1) // 2].set_ylabel(ylabel)
    axes[0].legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return list(axes)


def plot_share(
    shares: Mapping[str, Float[Tensor, "*repeats k"]],
    ks: Sequence[int],
    dimension: int,
    *,
    ax: Axes | None = None,
    level: float = 0.95,
    subspace: str = "top-k eigenspace",
) -> Axes:
    """Draw the share of differences in the top-k eigenspace against k, over the random floor.

    Args:
        shares: Shares |P_k δ| / |δ| by name: one value for every k, or one row of them for every
            repeat (seed). Of repeats, the line is the mean and bars reach from the smallest to the
            largest, which is all that a few repeats can tell.
        ks: Dimensions of the subspaces.
        dimension: Number of weights d.
        ax: Axes to draw into; default a new figure.
        level: Probability of the band of random directions.
        subspace: What the share is a share in.

    Returns:
        The axes, both scales logarithmic.

    Raises:
        ValueError: If there is nothing to draw, or a row is not as long as ``ks``.
    """
    require_some("shares", shares)
    ax = ax or new_axes((5.0, 3.6))
    for i, (name, share) in enumerate(shares.items()):
        rows = to_numpy(share[None] if share.ndim == 1 else share)
        if rows.ndim != 2 or rows.shape[1] != len(ks):
            raise ValueError(
                f'`shares["{name}"]` must hold one value for each of the {len(ks)} entries of '
                f"`ks`, got shape {list(share.shape)}."
            )
        mean, reach = mean_and_reach(rows)
        many = len(rows) > 1
        ax.errorbar(
            ks,
            mean,
            yerr=reach if many else None,
            label=f"{name} ({len(rows)} runs, mean and range)" if many else name,
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            capsize=2,
            elinewidth=1,
            **line_style(i),
        )
    smooth = np.unique(np.geomspace(min(ks), max(ks), 100).round().astype(int)).tolist()
    low, high = zip(
        *(random_share_interval(k, dimension, level=level) for k in smooth), strict=True
    )
    ax.fill_between(smooth, low, high, color="0.5", alpha=0.3, linewidth=0)
    ax.plot(
        smooth,
        [random_share(k, dimension) for k in smooth],
        color="0.35",
        linewidth=1,
        label=f"random direction, {level:.0%}".replace("%", " %"),
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("k")
    ax.set_ylabel(f"share in the {subspace}")
    ax.legend(frameon=False)
    return ax
