"""Draws the pictures of the gallery in the documentation, two of each kind, from short trainings.

    python benchmarks/gallery.py [folder]

One subject is a tanh network on digits, the other a convolutional network with batch norm on 1,000
images of MNIST. On one thread of a laptop everything takes some minutes.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from flatvalley.data import load_dataset
from flatvalley.models import tanh_mlp
from hessian import ConvergenceWarning, Objective, hessian_operator, leading_eigenspace
from hessian.batch_statistics import recalibrate_batch_norm_
from landscape import (
    BatchNorm,
    BezierCurve,
    Directions,
    Evaluation,
    Line,
    Plane,
    PolyChain,
    Recorder,
    align,
    barrier,
    eigenvector_directions,
    evaluate,
    grid,
    merge_tree,
    plot_barriers,
    plot_contours,
    plot_eigen_ratio,
    plot_interpolation,
    plot_matching,
    plot_merge_tree,
    plot_norms,
    plot_plane,
    plot_profile,
    plot_random_lines,
    plot_run_on_plane,
    plot_share,
    plot_share_over_time,
    plot_surface,
    plot_trajectory,
    principal_components,
    project_trajectory,
    random_directions,
    read_points,
    run_norms,
    share_in_subspace,
    sweep,
    train_curve,
    zero_one_loss,
)
from pruning import GRDA, magnitude_prune

BATCH = 64
DPI = 100
HESSIAN_SAMPLES = 256


@dataclass(frozen=True)
class Subject:
    """A network with its data and the settings of its training."""

    name: str
    make: Callable[[int], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    lr: float

    @property
    def about(self) -> dict[str, str]:
        """What pictures say of where they come from."""
        normalises = any(isinstance(m, nn.BatchNorm2d) for m in self.make(0).modules())
        return {
            "script": "benchmarks/gallery.py, which has all seeds",
            "data": f"{self.name}, {len(self.train[0])} train and {len(self.test[0])} test images",
            "batch norm": BatchNorm().words if normalises else "none in the model",
            "versions": f"flatvalley {version('flatvalley')}, torch {torch.__version__}",
        }

    def objective(self, part: str = "train", error: bool = False, **options: object) -> Objective:
        """The loss, or error, on all data of a part."""
        criterion = zero_one_loss if error else nn.CrossEntropyLoss()
        return Objective(self.make(0).eval(), criterion, getattr(self, part), **options)

    def run(
        self,
        seed: int,
        order: int | None = None,
        decay: float = 0.0,
        grda: bool = False,
        start: Tensor | None = None,
        epochs: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Points of a run after every epoch, and their numbers."""  # fmt: skip
        model = self.make(seed).train()
        if start is not None:
            nn.utils.vector_to_parameters(start.clone(), model.parameters())
        if grda:
            optimizer: torch.optim.Optimizer = GRDA(model.parameters(), lr=self.lr, c=0.02, mu=0.6)
        else:
            optimizer = torch.optim.SGD(
                model.parameters(), lr=self.lr, momentum=0.9, weight_decay=decay
            )
        x, y = self.train
        generator = torch.Generator().manual_seed(seed if order is None else order)
        with tempfile.TemporaryDirectory() as folder:
            recorder = Recorder(model, folder)
            recorder.record(0)
            for _ in range(self.epochs if epochs is None else epochs):
                for batch in torch.randperm(len(x), generator=generator).split(BATCH):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                    optimizer.step()
                recorder()
            found = read_points(folder)
        return found.points, found.times

    @cached_property
    def a(self) -> Tensor:
        """Points of the first run."""
        return self.run(0)[0]

    @cached_property
    def b(self) -> Tensor:
        """Points of a run from another start."""
        return self.run(1)[0]

    @cached_property
    def bezier(self) -> BezierCurve:
        """A curve between the ends of the two."""
        minibatches = self.objective(batch_size=BATCH)
        return train_curve(
            minibatches, self.a[-1], self.b[-1], kind=BezierCurve, epochs=25, lr=self.lr
        ).curve

    @cached_property
    def chain(self) -> PolyChain:
        """A chain of two segments between them."""
        minibatches = self.objective(batch_size=BATCH)
        return train_curve(
            minibatches, self.a[-1], self.b[-1], kind=PolyChain, epochs=25, lr=self.lr / 2
        ).curve


def subjects() -> tuple[Subject, Subject]:
    """A tanh network on digits, and one with convolutions and batch norm on MNIST."""
    digits = load_dataset("digits")
    mnist = load_dataset("mnist")

    def mlp(seed: int) -> nn.Module:
        return tanh_mlp([64, 24, 10], seed=seed)

    def cnn(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                nn.Conv2d(6, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
                nn.Flatten(), nn.Linear(588, 10),
            )  # fmt: skip

    return (
        Subject(
            "digits", mlp, (digits.train_inputs, digits.train_labels),
            (digits.test_inputs, digits.test_labels), 30, 0.1,
        ),
        Subject(
            "mnist", cnn, (mnist.train_inputs[:1000], mnist.train_labels[:1000]),
            (mnist.test_inputs[:1000], mnist.test_labels[:1000]), 10, 0.05,
        ),
    )  # fmt: skip


def axis(low: float, high: float, count: int) -> Tensor:
    """Equally spaced values."""
    return torch.linspace(low, high, count, dtype=torch.float64)


def interpolation(s: Subject) -> Figure:
    """Loss and accuracy on the line through two runs."""
    line, ts = Line(s.a[-1], s.b[-1]), axis(-0.5, 1.5, 41)
    losses = {part: evaluate(s.objective(part), line, ts) for part in ("train", "test")}
    errors = {part: evaluate(s.objective(part, error=True), line, ts) for part in losses}
    return plot_interpolation(losses, errors, ends=("run A", "run B")).figure


def random_lines(s: Subject) -> Figure:
    """Random filter-normalised directions around a run with and without weight decay."""
    found, ts = {}, axis(-1, 1, 31)
    for name, points in {"no decay": s.a, "decay 0.01": s.run(0, decay=0.01)[0]}.items():
        w, objective = points[-1], s.objective()
        directions = random_directions(objective, at=w, num=6)
        found[name] = [evaluate(objective, Line(w, w + d), ts) for d in directions.vectors]
    return plot_random_lines(found, ylabel="training loss", log=True).figure


def random_plane(s: Subject) -> tuple[Plane, Directions]:
    """The plane of two filter-normalised directions."""
    directions = random_directions(s.objective(), at=s.a[-1])
    return Plane.along(s.a[-1], directions), directions


def eigen_plane(s: Subject) -> Plane:
    """The plane of the largest and the smallest curvature, in steps of one and a half."""
    operator = hessian_operator(s.objective(), s.a[-1])
    return Plane.along(
        s.a[-1], eigenvector_directions(leading_eigenspace(operator, k=2, which="both", tol=1e-3))
    )


def contours(s: Subject) -> Figure:
    """Lines of the loss in two random directions."""
    plane, _ = random_plane(s)
    found = evaluate(s.objective(), plane, grid(axis(-1, 1, 35), axis(-1, 1, 35)))
    return plot_contours(found, plane).figure


def surface(s: Subject) -> Figure:
    """The loss above two Hessian eigenvectors, or two random directions."""
    plane, reach = (eigen_plane(s), 6.0) if s.name == "digits" else (random_plane(s)[0], 1.0)
    found = evaluate(s.objective(), plane, grid(axis(-reach, reach, 27), axis(-reach, reach, 27)))
    return plot_surface(found, plane).figure


def valley_plane(s: Subject) -> tuple[Plane, Evaluation]:
    """The loss on the plane through two runs and the bend of the curve between them."""
    bend = s.bezier.control_points[1]
    plane = Plane.through(s.a[-1], s.b[-1], bend)
    (dx, _, _), (x, y, _) = plane.coordinates(s.b[-1]), plane.coordinates(bend)
    margin = 0.25 * dx
    xs, ys = (
        axis(min(0, x) - margin, max(dx, x) + margin, 25),
        axis(-margin, max(y, 0.2 * dx) + margin, 15),
    )
    return plane, evaluate(s.objective(), plane, grid(xs, ys))


def valley(s: Subject) -> Figure:
    """The plane through two runs and the bend of the curve between them."""
    plane, found = valley_plane(s)
    points = {"run A": s.a[-1], "run B": s.b[-1], "bend": s.bezier.control_points[1]}
    return plot_plane(found, plane, points, curve=s.bezier, label="training loss").figure


def basins(s: Subject) -> Figure:
    """The basins of that plane, and where they meet."""
    return plot_merge_tree(merge_tree(valley_plane(s)[1]), label="training loss").figure


def along_curves(s: Subject) -> Figure:
    """Line, Bezier curve and chain between two runs."""
    paths = {"line": Line(s.a[-1], s.b[-1]), "Bézier": s.bezier, "chain": s.chain}
    found = {name: evaluate(s.objective(), p, axis(0, 1, 41)) for name, p in paths.items()}
    return plot_profile(found, ends=("run A", "run B"), ylabel="training loss", log=True).figure


def eigen_ratio(s: Subject) -> Figure:
    """Where on a random plane the loss is not convex."""
    plane, _ = random_plane(s)
    samples = tuple(t[:HESSIAN_SAMPLES] for t in s.train)
    few = Objective(s.make(0).eval(), nn.CrossEntropyLoss(), samples)
    count = 9 if s.name == "digits" else 5
    points = grid(axis(-1, 1, count), axis(-1, 1, count))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = sweep(few, plane, points, metrics=("top_eigenvalue", "bottom_eigenvalue"))
    return plot_eigen_ratio(
        found["objective", "top_eigenvalue"], found["objective", "bottom_eigenvalue"], plane
    ).figure


def run_on_components(s: Subject) -> Figure:
    """A run on the plane of its principal components."""
    found = principal_components(s.a)
    plane = Plane.along(found.center, found.directions)
    seen = project_trajectory(s.a, found.directions.basis, found.center)
    low, high = seen.coordinates.min(dim=0).values, seen.coordinates.max(dim=0).values
    margin = 0.3 * float((high - low).max())
    xs, ys = (axis(float(low[i]) - margin, float(high[i]) + margin, 25) for i in (0, 1))
    loss = evaluate(s.objective(), plane, grid(xs, ys))
    return plot_run_on_plane(seen, plane, evaluation=loss, label="training loss").figure


def barriers(s: Subject) -> Figure:
    """Barriers between runs against the epoch, or against the sparsity of both."""
    objectives = {part: s.objective(part) for part in ("train", "test")}
    if s.name == "digits":
        xs: list[float] = [1, 2, 4, 8, 16, 30]
        ends = [
            [(s.a[int(x)], other[int(x)]) for x in xs] for other in (s.b, s.run(2)[0], s.run(3)[0])
        ]
        xlabel = "epoch of both runs"
    else:
        xs = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9]
        ends = [
            [[magnitude_prune(w, x).weights for w in (s.a[-1], other)] for x in xs]
            for other in (s.b[-1], s.run(2)[0][-1])
        ]
        xlabel = "sparsity of both ends, magnitude-pruned"
    found = {
        part: torch.tensor(
            [
                [barrier(o, Line(*pair), num_points=11).excess_over_chord.value for pair in row]
                for row in ends
            ]
        )
        for part, o in objectives.items()
    }
    return plot_barriers(found, xs, xlabel=xlabel, ylabel="barrier over the chord (loss)").figure


def matching(s: Subject) -> Figure:
    """The line between two runs before and after their units were matched."""
    a, b, ts = s.a[-1], s.b[-1], axis(0, 1, 31)
    moved = align(s.objective(), b, at=a).apply(b)
    naive, matched = (
        {part: evaluate(s.objective(part), Line(a, end), ts) for part in ("train", "test")}
        for end in (b, moved)
    )
    return plot_matching(naive, matched, ends=("run A", "run B")).figure


def eigenspaces(s: Subject, points: Tensor, k: int) -> Iterator[Tensor]:
    """The leading eigenvectors at some points."""
    for w in points:
        model = s.make(0).eval()
        nn.utils.vector_to_parameters(w.clone(), model.parameters())
        recalibrate_batch_norm_(model, [s.train[0]])
        few = tuple(t[:HESSIAN_SAMPLES] for t in s.train)
        operator = hessian_operator(Objective(model, nn.CrossEntropyLoss(), few))
        yield leading_eigenspace(operator, k=k, tol=1e-2, multiple=False).vectors


def shares_over_time(s: Subject) -> Figure:
    """Share of the motion since an epoch before in the sharpest directions."""
    step = s.epochs // 5
    times = list(range(step, s.epochs + 1, step))
    rows = []
    for points in (s.a, s.b, s.run(2)[0]):
        pairs = zip(eigenspaces(s, points[times], 10), times, strict=True)
        rows.append([share_in_subspace(points[t] - points[t - 1], V) for V, t in pairs])
    shares = {"motion in one epoch": torch.tensor(rows)}
    return plot_share_over_time(shares, times, 10, s.a.shape[1]).figure


def shares(s: Subject) -> Figure:
    """Share of three differences in the top-k eigenspace against k."""
    w, ks = s.a[-1], [1, 2, 5, 10, 20, 40]
    (vectors,) = eigenspaces(s, w[None], ks[-1])
    half = magnitude_prune(w, 0.5).weights
    deltas = {"last epoch": s.a[-2] - w, "magnitude pruning": half - w, "other run": s.b[-1] - w}
    rows = {
        name: torch.tensor([share_in_subspace(d, vectors[:, :k]) for k in ks])
        for name, d in deltas.items()
    }
    return plot_share(rows, ks, len(w)).figure


def coordinates(s: Subject) -> Figure:
    """Runs in the three sharpest directions at the end of the first."""
    (vectors,) = eigenspaces(s, s.a[-1:], 3)
    runs = {"run A": s.a, "same start, other order": s.run(0, order=9)[0]}
    seen = {n: project_trajectory(points, vectors, s.a[-1]) for n, points in runs.items()}
    names = [f"eigenvector {i + 1}" for i in range(3)]
    return plot_trajectory(seen, range(len(s.a)), names=names)[0].figure


def norms(s: Subject) -> Figure:
    """Sizes of the weights of SGD and gRDA."""
    runs = {"SGD": run_norms(s.a), "gRDA": run_norms(s.run(0, grda=True)[0])}
    return plot_norms(runs, range(len(s.a)))[0].figure


KINDS = (
    interpolation, random_lines, contours, valley, basins, surface, eigen_ratio,
    run_on_components, along_curves, barriers, matching, shares_over_time, shares, coordinates,
    norms,
)  # fmt: skip


def save(figure: Figure, path: Path, provenance: Mapping[str, str]) -> None:
    """Write a small PNG of 128 colours that says where it comes from."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, bbox_inches="tight")
    notes = PngInfo()
    for key, value in provenance.items():
        notes.add_text(key, value)
    Image.open(buffer).convert("RGB").quantize(128).save(path, pnginfo=notes, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    """Draw everything, or the kinds or pictures named after the folder."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/gallery")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[2:]
    for subject in subjects():
        for draw in KINDS:
            name = f"{draw.__name__}_{subject.name}"
            if not wanted or name in wanted or draw.__name__ in wanted:
                save(draw(subject), folder / f"{name}.png", subject.about | {"picture": name})


if __name__ == "__main__":
    main()
