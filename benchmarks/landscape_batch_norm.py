"""What the batch-norm policy does to the barrier between two independently trained networks.

Two small CNNs with batch norm are trained on a part of CIFAR-10 from different starts. The loss
along the line between them is evaluated with frozen, interpolated and recomputed statistics, the
last from subsets of several sizes. No time is measured.
"""

import torch
from timing import report, say
from torch import Tensor, nn

from flatvalley.data import load_dataset
from hessian import Objective
from landscape import BatchNorm, Line, evaluate

TRAIN, TEST, EPOCHS, BATCH = 10_000, 2_000, 5, 100
SUBSETS = (128, 512, 2_048, 10_000)
NUM_POINTS = 9
HEADS = ("L(0)", "max", "L(1)", "over chord", "over mean")


def network(seed: int) -> nn.Module:
    """Return three convolutions with batch norm and a linear layer."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model.to(memory_format=torch.channels_last)


def train(seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """Train with momentum and a linearly falling learning rate."""
    model = network(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    for epoch in range(EPOCHS):
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            schedule.step()
        say(f"seed {seed}, epoch {epoch + 1}: loss {loss.item():.3f}")
    return model.eval()


def main() -> None:
    """Print and keep the table."""
    torch.set_num_threads(1)
    say("data")
    data = load_dataset("cifar10")
    x, y = data.train_inputs[:TRAIN], data.train_labels[:TRAIN]
    x = x.contiguous(memory_format=torch.channels_last)
    a, b = train(1, x, y), train(2, x, y)
    weights = [torch.cat([p.detach().reshape(-1) for p in model.parameters()]) for model in (a, b)]
    criterion = nn.CrossEntropyLoss()
    gathered = Objective(a, criterion, (x, y), batch_size=128)
    loss = Objective(a, criterion, (x[:TEST], y[:TEST]), batch_size=128)
    line = Line(*weights)
    ts = torch.linspace(0, 1, NUM_POINTS).double()
    policies = {
        "frozen (those of t = 0)": BatchNorm("frozen"),
        "interpolated": BatchNorm("interpolated", ends=(a.state_dict(), b.state_dict())),
        "batch (128)": BatchNorm("batch"),
    } | {f"recompute on {n:,}": BatchNorm(num_samples=n, data=gathered) for n in SUBSETS}
    barriers, over_means, lines = {}, {}, []
    for name, policy in policies.items():
        say(name)
        losses = evaluate(loss, line, ts, batch_norm=policy, speed="plain").mean
        barriers[name] = float((losses - (losses[0] + (losses[-1] - losses[0]) * ts)).max())
        over_means[name] = float((losses - losses[[0, -1]].mean()).max())
        numbers = [losses[0], losses.max(), losses[-1], barriers[name], over_means[name]]
        lines.append(f"  {name:26}" + "".join(f"{float(v):10.4f}" for v in numbers))
    kinds = ("frozen (those of t = 0)", "interpolated", "recompute on 512")
    order = sorted(kinds, key=over_means.__getitem__)
    full, small = barriers[f"recompute on {SUBSETS[-1]:,}"], barriers["recompute on 512"]
    report(
        "landscape_batch_norm",
        [
            f"Loss on {TEST:,} CIFAR-10 training images on the line between two CNNs with batch",
            f"norm ({len(weights[0]):,} weights), trained on {TRAIN:,} images from other starts.",
            "",
            f"  {'statistics':26}" + "".join(f"{head:>10}" for head in HEADS),
            *lines,
            "",
            f"Over the mean, and at the maximum: {' > '.join(reversed(order))}.",
            "Over the chord frozen statistics hide the ridge: they are those of the start, so that",
            "the end looks as high as the ridge.",
            f"Barrier over the chord, 512 images against {SUBSETS[-1]:,}: {small / full - 1:+.2%}.",
        ],
    )


if __name__ == "__main__":
    main()
