"""The ground between solutions: paths, planes and trajectories, evaluated and drawn."""

from landscape.alignment import Alignment, align
from landscape.barrier import Barrier, Excess, barrier
from landscape.batch_norm import BatchNorm
from landscape.connect import ConnectedCurve, train_bezier, train_curve
from landscape.directions import (
    Directions,
    difference_directions,
    eigenvector_directions,
    orthogonalized,
)
from landscape.evaluate import BatchNormWarning, evaluate, sweep
from landscape.figures import plot_profile, plot_share, plot_trajectory
from landscape.paths import BezierCurve, Line, Path, PolyChain
from landscape.pca import PrincipalComponents, principal_components
from landscape.permutations import Permutations
from landscape.plane_figure import plot_plane
from landscape.planes import Plane, grid
from landscape.plans import Plan
from landscape.random_directions import random_directions
from landscape.recorder import (
    RecordedPoints,
    RecordedTrajectory,
    Recorder,
    read_points,
    read_trajectory,
)
from landscape.records import Evaluation, Sweep, load_sweep, save_sweep
from landscape.saving import save_figure
from landscape.trajectory import (
    Projector,
    Trajectory,
    project_trajectory,
    random_share,
    random_share_interval,
    share_in_subspace,
)
from landscape.zero_one import zero_one_loss

__all__ = [
    "Alignment",
    "Barrier",
    "BatchNorm",
    "BatchNormWarning",
    "BezierCurve",
    "ConnectedCurve",
    "Directions",
    "Evaluation",
    "Excess",
    "Line",
    "Path",
    "Permutations",
    "Plan",
    "Plane",
    "PolyChain",
    "PrincipalComponents",
    "Projector",
    "RecordedPoints",
    "RecordedTrajectory",
    "Recorder",
    "Sweep",
    "Trajectory",
    "align",
    "barrier",
    "difference_directions",
    "eigenvector_directions",
    "evaluate",
    "grid",
    "load_sweep",
    "orthogonalized",
    "plot_plane",
    "plot_profile",
    "plot_share",
    "plot_trajectory",
    "principal_components",
    "project_trajectory",
    "random_directions",
    "random_share",
    "random_share_interval",
    "read_points",
    "read_trajectory",
    "save_figure",
    "save_sweep",
    "share_in_subspace",
    "sweep",
    "train_bezier",
    "train_curve",
    "zero_one_loss",
]
