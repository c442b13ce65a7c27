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
# # How sparse, at what accuracy, without tuning c?
#
# gRDA's constant c sets how many weights end at zero, but nobody knows the right c beforehand.
# `target_sparsity` asks for the zeros instead and finds c while it trains. Does it hit the target,
# with one call and no trial run? And what do the zeros cost in accuracy, beside gradual magnitude
# pruning with the same budget? SGD without pruning is the control. Three seeds each; accuracy is
# that on the test digits after the last epoch.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from flatvalley.batches import ResidentBatches
from flatvalley.data import load_dataset
from pruning import GRDA, GradualMagnitude

torch.set_num_threads(1)
data = load_dataset("digits")
EPOCHS, LR, SEEDS = 20, 0.3, (0, 1, 2)
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.98)
batches = {s: ResidentBatches(data.train_inputs, data.train_labels, 64, seed=s) for s in SEEDS}
STEPS = EPOCHS * len(batches[0])


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


def run(method, target, seed):
    model, zeros = network(seed), []
    if method == "gRDA":
        optimizer = GRDA(model.parameters(), LR, target_sparsity=target, horizon=STEPS)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = None
    if method == "magnitude":
        pruner = GradualMagnitude(optimizer, target, begin=0, end=3 * STEPS // 4, every=10)
    # A small rate at the end, or accuracy would be as noisy as the last steps.
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9 * STEPS // 10], gamma=0.1)
    for step in range(STEPS):
        x, y = batches[seed].batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        if pruner is not None:
            pruner.step()
        if step % 10 == 9:
            zeros.append(share_of_zeros(model))
    right = model(data.test_inputs).argmax(1) == data.test_labels
    return {
        "sparsity": share_of_zeros(model),
        "accuracy": float(right.float().mean()),
        "path": zeros,
    }


def share_of_zeros(model):
    flat = nn.utils.parameters_to_vector(model.parameters())
    return float((flat == 0).float().mean())


ends = {("SGD", 0.0): [run("SGD", 0.0, seed) for seed in SEEDS]}
for method in ("gRDA", "magnitude"):
    for target in TARGETS:
        ends[method, target] = [run(method, target, seed) for seed in SEEDS]

# %% [markdown]
# ## Is the target hit?
#
# Lowest and highest of three seeds. All 7,510 weights count, biases included.

# %%
print(f"{'':10}{'target':>7}{'sparsity':>18}{'test accuracy':>18}")
for (method, target), found in ends.items():
    sparsity, accuracy = ([end[key] for end in found] for key in ("sparsity", "accuracy"))
    print(
        f"{method:10}{target:7.2f}{min(sparsity):10.4f}-{max(sparsity):.4f}"
        f"{min(accuracy):11.4f}-{max(accuracy):.4f}"
    )

# %%
colors = dict(zip(("SGD", "gRDA", "magnitude"), ("0.4", "#D55E00", "#0072B2"), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
steps = range(10, STEPS + 1, 10)
for target in TARGETS:
    left.axhline(target, color="0.8", linewidth=0.8)
    for method in ("magnitude", "gRDA"):
        for seed in SEEDS:
            label = method if target == TARGETS[0] and seed == 0 else None
            path = ends[method, target][seed]["path"]
            left.plot(steps, path, color=colors[method], linewidth=0.9, label=label)
left.set(xlabel="step", ylabel="share of zeros", ylim=(0, 1))
left.legend(frameon=False)

dense = torch.tensor([end["accuracy"] for end in ends["SGD", 0.0]])
right.axhspan(100 * float(dense.min()), 100 * float(dense.max()), color="0.85", label="SGD")
for method, marker in (("magnitude", "s"), ("gRDA", "o")):
    found = torch.tensor([[e["accuracy"] for e in ends[method, t]] for t in TARGETS]) * 100
    middle = found.mean(dim=1)
    bars = torch.stack([middle - found.amin(dim=1), found.amax(dim=1) - middle])
    beside = torch.arange(len(TARGETS)) + (0.06 if method == "gRDA" else -0.06)
    right.errorbar(
        beside, middle, bars, marker=marker, color=colors[method], capsize=3, label=method
    )
right.set(xlabel="share of zeros asked for", ylabel="test accuracy, %")
right.set_xticks(range(len(TARGETS)), TARGETS)
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Answer
#
# At any sparsity asked for, to better than .01, in one run: the number of zeros is a setting now,
# and c a result. Half of the weights cost gRDA less than one point of accuracy on this small
# network, 80 % cost one, 95 % three. Gradual magnitude pruning with the same budget loses less at
# every sparsity, and clearly less at 98 %. It needs a ranking of all weights and never takes one
# back; gRDA needs one subtraction, a zero can return, and its weights have a theory.


# %%
def mean_accuracy(method, target):
    return sum(end["accuracy"] for end in ends[method, target]) / len(SEEDS)


for target in TARGETS:
    assert all(abs(end["sparsity"] - target) < 0.01 for end in ends["gRDA", target])
for target in (0.5, 0.8):
    assert mean_accuracy("gRDA", target) > mean_accuracy("SGD", 0.0) - 0.03
assert mean_accuracy("magnitude", 0.98) > mean_accuracy("gRDA", 0.98)
