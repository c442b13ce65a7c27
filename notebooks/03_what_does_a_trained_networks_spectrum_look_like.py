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
# # What does a trained network's spectrum look like?
#
# The Hessian of the loss of a trained classifier is said to have a few large eigenvalues, about as
# many as there are classes, and a bulk near zero. We measure a small network on the digits, and ask
# where the large ones come from. Two controls: the same network with random weights, and the same
# network trained as long on shuffled labels, where there is nothing to learn.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from flatvalley.data import load_dataset
from flatvalley.models import tanh_mlp
from hessian import (
    Objective,
    gauss_newton_operator,
    hessian_operator,
    leading_eigenspace,
    spectral_density,
    trace,
)

torch.set_num_threads(1)
data = load_dataset("digits", dtype=torch.float64)
SEED = 1


def digits_up_to(classes, shuffled=False):
    kept = data.train_labels < classes
    inputs, labels = data.train_inputs[kept], data.train_labels[kept]
    if shuffled:
        generator = torch.Generator().manual_seed(SEED)
        labels = labels[torch.randperm(len(labels), generator=generator)]
    return inputs, labels


def trained(inputs, labels, classes, epochs=5):
    model = tanh_mlp([64, 20, classes], seed=SEED, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return Objective(model, nn.CrossEntropyLoss(), (inputs, labels))


# %% [markdown]
# ## Ten classes, before and after
#
# Twenty eigenpairs with their residuals, the trace with its standard error, and the density of all
# 1,510 eigenvalues with a band of two standard errors over the probes. Ticks: the eigenpairs.

# %%
X, y = digits_up_to(10)
points = {
    "random weights": trained(X, y, 10, epochs=0),
    "trained": trained(X, y, 10),
    "trained on shuffled labels": trained(*digits_up_to(10, shuffled=True), 10),
}
operators = {name: hessian_operator(loss) for name, loss in points.items()}
spaces = {name: leading_eigenspace(H, k=20, tol=1e-4) for name, H in operators.items()}
densities = {
    name: spectral_density(H, eigenspace=spaces[name], num_probes=6, num_steps=60)
    for name, H in operators.items()
}
print(f"{'':28s}{'loss':>7}{'largest':>9}{'residual':>10}{'trace':>7}{'± SE':>6}")
for name, loss in points.items():
    space, whole = spaces[name], trace(operators[name], eigenspace=spaces[name])
    print(
        f"{name:28s}{loss.loss(loss.weights()):7.3f}{float(space.values[0]):9.3f}"
        f"{float(space.residuals.max()):10.1e}{whole.value:7.2f}{whole.standard_error:6.2f}"
    )

# %%
figure, axes = plt.subplots(3, 1, figsize=(7, 6.4), sharex=True, layout="constrained")
for ax, (name, density), color in zip(
    axes, densities.items(), ("#0072B2", "#D55E00", "#009E73"), strict=True
):
    curve = density.on()
    low = (curve.value - 2 * curve.standard_error).clamp(min=2e-3)
    high = (curve.value + 2 * curve.standard_error).clamp(min=2e-3)
    ax.fill_between(curve.grid, low, high, where=high > 2e-3, color=color, alpha=0.25, linewidth=0)
    ax.plot(curve.grid, torch.where(curve.value > 2e-3, curve.value, torch.nan), color=color)
    ax.vlines(spaces[name].values, 4e-4, 1.1e-3, color="black", linewidth=1)
    ax.set(yscale="log", ylim=(2.5e-4, 5 * float(high.max())), ylabel="density")
    ax.set_title(name, loc="left", fontsize="medium")
axes[-1].set_xlabel("eigenvalue of the Hessian")
plt.show()

# %% [markdown]
# The network is small enough to look at every eigenvalue. How far is the estimate from the truth,
# outside of the peak at zero, which is sharper than any quadrature resolves?

# %%
H = operators["trained"]
exact = torch.linalg.eigvalsh(H @ torch.eye(H.size, dtype=torch.float64))
at = torch.cat([torch.linspace(-0.1, -0.02, 50), torch.linspace(0.02, 2.0, 400)]).double()
share = (exact <= at[:, None]).double().mean(dim=1)
off = float((densities["trained"].cdf(at).value - share).abs().max())
print(f"share of eigenvalues below λ, worst error of the estimate: {off:.3f}")

# %% [markdown]
# ## How many stand out, and why
#
# The number of outliers: where two neighbouring positive eigenvalues have the largest ratio. We
# count for 2, 4, 7 and 10 classes, in the Hessian H and in its Gauss-Newton part G. The rest,
# H − G, is what the loss would add at weights where the model fits badly: for each sample the
# residual of its prediction times the curvature of the logits.


# %%
def outliers(operator):
    values = leading_eigenspace(operator, k=14, tol=1e-3, which="largest").values
    ratios = values[:-1] / values[1:]
    return int(ratios.argmax()) + 1, float(ratios.max())


CLASSES = (2, 4, 7, 10)
counts = {name: [] for name in ("G, random weights", "G, trained", "H, random weights")}
counts |= {name: [] for name in ("H, trained", "H, trained on shuffled labels")}
for classes in CLASSES:
    X, y = digits_up_to(classes)
    start, end = trained(X, y, classes, epochs=0), trained(X, y, classes)
    control = trained(*digits_up_to(classes, shuffled=True), classes)
    for name, operator in {
        "G, random weights": gauss_newton_operator(start),
        "G, trained": gauss_newton_operator(end),
        "H, random weights": hessian_operator(start),
        "H, trained": hessian_operator(end),
        "H, trained on shuffled labels": hessian_operator(control),
    }.items():
        counts[name].append(outliers(operator))
print(f"{'outliers (ratio to the next)':32s}" + "".join(f"{c:>9} cl." for c in CLASSES))
for name, found in counts.items():
    print(f"{name:32s}" + "".join(f"{count:5d} ({ratio:4.1f})" for count, ratio in found))

# %%
figure, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
ax.plot(CLASSES, [c - 1 for c in CLASSES], color="0.6", label="classes − 1")
colors = ("#0072B2", "#56B4E9", "#CC79A7", "#D55E00", "#009E73")
for i, (name, found) in enumerate(counts.items()):
    beside = [c + 0.12 * (i - 2) for c in CLASSES]  # or they would hide each other
    ax.plot(beside, [count for count, _ in found], "osDv^"[i], color=colors[i], label=name)
ax.set(xlabel="classes", ylabel="outliers", xticks=CLASSES)
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## Answer
#
# A bulk near zero, and outliers above it: in the Gauss-Newton part exactly one less than there are
# classes. They are there with random weights already, and on labels without meaning: they come
# from the softmax over classes, not from learning. What training changes is the rest. With random
# weights H − G spreads the bulk to both sides, down to a quarter of the largest eigenvalue below
# zero, and hides the outliers. As the fit improves it shrinks, the negative side goes, and the
# Hessian shows up to as many outliers as its Gauss-Newton part has. The last of them are close to
# the bulk, so that for ten classes the count is one too few on this network.

# %%
expected = [c - 1 for c in CLASSES]
for name in ("G, random weights", "G, trained", "H, trained on shuffled labels"):
    assert [count for count, _ in counts[name]] == expected
assert all(
    e - 2 <= count <= e for (count, _), e in zip(counts["H, trained"], expected, strict=True)
)
assert [count for count, _ in counts["H, random weights"]] != expected
lowest = {name: float(d.nodes.min()) / float(d.nodes.max()) for name, d in densities.items()}
assert lowest["random weights"] < -0.2
assert -0.1 < lowest["trained"] < 0
assert off < 0.02
