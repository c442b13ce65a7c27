# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What lies between the SGD and the gRDA minimum?
#
# gRDA is said to find a sparse point in the valley of SGD's minimum. Is there a ridge between the
# two? We walk the straight line and a trained Bézier curve, with error bars, and set beside them
# what a ridge looks like: the line between two SGD runs from different starts.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from flatvalley.coupled import CoupledConfig, train_coupled
from flatvalley.data import load_dataset
from flatvalley.models import tanh_mlp
from hessian import Objective, hessian_operator, leading_eigenspace
from landscape import (
    Line,
    Plane,
    barrier,
    evaluate,
    grid,
    plot_plane,
    plot_profile,
    random_share,
    share_in_subspace,
    train_bezier,
)
from pruning import magnitude_prune

torch.set_num_threads(1)
data = load_dataset("digits", dtype=torch.float64)
train = data.train_inputs, data.train_labels


def train_pair(seed):
    def make_model():
        return tanh_mlp([64, 10, 10], seed=seed, dtype=torch.float64)

    config = CoupledConfig(gamma=0.4, time=60.0, seed=seed)
    return make_model(), train_coupled(make_model, *train, config)


model, run = train_pair(seed=0)
_, other = train_pair(seed=1)
loss = Objective(model, nn.CrossEntropyLoss(), train)
minibatches = Objective(model, nn.CrossEntropyLoss(), train, batch_size=64)

# %% [markdown]
# ## The line, the curve and their controls

# %%
sparsity = float((run.grda == 0).double().mean())
magnitude = magnitude_prune(run.sgd, sparsity).weights
bezier = train_bezier(minibatches, run.grda, run.sgd, epochs=40, lr=0.1).curve
paths = {
    "line gRDA → SGD": Line(run.grda, run.sgd),
    "Bézier gRDA → SGD": bezier,
    "line magnitude-pruned → SGD": Line(magnitude, run.sgd),
    "line to SGD from another start": Line(other.sgd, run.sgd),
}
found = {name: barrier(loss, path, num_points=41) for name, path in paths.items()}
print(f"gRDA has {sparsity:.0%} zeros\n")
print(f"{'barrier':34s}{'over chord':>12}{'± SE':>9}{'at t':>7}{'over mean':>12}")
for name, b in found.items():
    chord, mean = b.excess_over_chord, b.excess_over_mean
    print(
        f"{name:34s}{chord.value:12.4f}{chord.standard_error:9.4f}{chord.location:7.2f}"
        f"{mean.value:12.4f}"
    )

# %%
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
plot_profile(
    {name: b.evaluation for name, b in found.items()},
    ax=ax,
    ends=("start", "SGD"),
    ylabel="training loss",
    log=True,
)
ax.get_legend().set_bbox_to_anchor((1.0, 1.0))
ax.get_legend().set_loc("upper left")
plt.show()

# %% [markdown]
# ## The plane through gRDA, SGD and the bend of the curve

# %%
plane = Plane.through(run.grda, run.sgd, bezier.control_points[1])
x, y, _ = plane.coordinates(bezier.control_points[1])
distance = float((run.sgd - run.grda).norm())
margin = 0.3 * distance
points = grid(
    torch.linspace(-margin, max(x, distance) + margin, 25, dtype=torch.float64),
    torch.linspace(-margin, y + margin, 25, dtype=torch.float64),
)
ground = evaluate(loss, plane, points)
figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
plot_plane(
    ground,
    plane,
    {"gRDA": run.grda, "SGD": run.sgd, "bend": bezier.control_points[1]},
    curve=bezier,
    label="training loss",
    ax=ax,
)
plt.show()

# %% [markdown]
# ## Does the way to gRDA lead through sharp directions?
#
# The share of a difference in the ten leading eigenvectors of the Hessian, against what a random
# direction scores.

# %%
space = leading_eigenspace(hessian_operator(loss, run.sgd), k=10)
differences = {
    "gRDA − SGD": run.grda - run.sgd,
    "second SGD − SGD": run.second_sgd - run.sgd,
    "magnitude-pruned − SGD": magnitude - run.sgd,
}
shares = {name: share_in_subspace(D, space.vectors) for name, D in differences.items()}
for name, share in shares.items():
    print(f"{name:28s}{share:.4f}")
print(f"{'random direction':28s}{random_share(10, len(run.sgd)):.4f}")

# %% [markdown]
# ## Answer
#
# A valley. Neither the line nor the curve from gRDA to SGD rises above the chord by a tenth of what
# separates two SGD runs from different starts, and the way leads through flat directions: its share
# in the sharp ones is below that of a random direction, and far below that of SGD's own noise.
# Training stopped early here, so the trained curve finds lower ground than both ends; what counts
# is that nothing rises between them.

# %%
ridge = found["line to SGD from another start"].excess_over_chord.value
assert ridge > 0.05
assert found["line gRDA → SGD"].excess_over_chord.value < 0.1 * ridge
assert found["Bézier gRDA → SGD"].excess_over_chord.value < 0.1 * ridge
assert shares["gRDA − SGD"] < random_share(10, len(run.sgd)) < shares["second SGD − SGD"]
