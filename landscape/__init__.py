"""The ground between solutions: paths, planes and trajectories, evaluated and drawn."""

from landscape.adaptive import AdaptiveSurface, adaptive_surface
from landscape.alignment import Alignment, align
from landscape.bands import Band, simultaneous_band
from landscape.barrier import Barrier, BarrierTable, Excess, barrier, barrier_table
from landscape.batch_norm import BatchNorm
from landscape.connect import ConnectedCurve, train_bezier, train_curve
from landscape.curvature import curvature_share
from landscape.directions import (
    Directions,
    difference_directions,
    eigenvector_directions,
    orthogonalized,
)
from landscape.evaluate import BatchNormWarning, evaluate, sweep
from landscape.figures import plot_profile, plot_share, plot_trajectory
from landscape.figures_lines import (
    plot_barriers,
    plot_interpolation,
    plot_matching,
    plot_random_lines,
)
from landscape.figures_runs import RunNorms, plot_norms, plot_share_over_time, run_norms
from landscape.figures_surfaces import (
    plot_contours,
    plot_eigen_ratio,
    plot_run_on_plane,
    plot_surface,
)
from landscape.figures_topology import plot_merge_tree
from landscape.interactive import surface_html
from landscape.merge_tree import MergeTree, merge_tree
from landscape.paraview import write_paraview
from landscape.paths import BezierCurve, Line, Path, PolyChain
from landscape.pca import PrincipalComponents, principal_components
from landscape.permutations import Permutations
from landscape.plane_figure import plot_plane
from landscape.planes import Plane, grid
from landscape.plans import Plan, PlanWarning
from landscape.published import LineMaximum, PublishedLine, PublishedPlane
from landscape.random_directions import random_directions
from landscape.readers import (
    read_connectivity_curve,
    read_connectivity_plane,
    read_loss_landscape,
    read_published_landscape,
)
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
    "AdaptiveSurface",
    "Alignment",
    "Band",
    "Barrier",
    "BarrierTable",
    "BatchNorm",
    "BatchNormWarning",
    "BezierCurve",
    "ConnectedCurve",
    "Directions",
    "Evaluation",
    "Excess",
    "Line",
    "LineMaximum",
    "MergeTree",
    "Path",
    "Permutations",
    "Plan",
    "PlanWarning",
    "Plane",
    "PolyChain",
    "PrincipalComponents",
    "Projector",
    "PublishedLine",
    "PublishedPlane",
    "RecordedPoints",
    "RecordedTrajectory",
    "Recorder",
    "RunNorms",
    "Sweep",
    "Trajectory",
    "adaptive_surface",
    "align",
    "barrier",
    "barrier_table",
    "curvature_share",
    "difference_directions",
    "eigenvector_directions",
    "evaluate",
    "grid",
    "load_sweep",
    "merge_tree",
    "orthogonalized",
    "plot_barriers",
    "plot_contours",
    "plot_eigen_ratio",
    "plot_interpolation",
    "plot_matching",
    "plot_merge_tree",
    "plot_norms",
    "plot_plane",
    "plot_profile",
    "plot_random_lines",
    "plot_run_on_plane",
    "plot_share",
    "plot_share_over_time",
    "plot_surface",
    "plot_trajectory",
    "principal_components",
    "project_trajectory",
    "random_directions",
    "random_share",
    "random_share_interval",
    "read_connectivity_curve",
    "read_connectivity_plane",
    "read_loss_landscape",
    "read_points",
    "read_published_landscape",
    "read_trajectory",
    "run_norms",
    "save_figure",
    "save_sweep",
    "share_in_subspace",
    "simultaneous_band",
    "surface_html",
    "sweep",
    "train_bezier",
    "train_curve",
    "write_paraview",
    "zero_one_loss",
]
