"""Does gRDA perform directional pruning? The study behind ``flatvalley verify``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from torch import Tensor, nn

from flatvalley.coupled import CoupledConfig
from flatvalley.data import load_dataset
from flatvalley.run import Run
from flatvalley.studies.verify_cell import (
    DTYPE,
    NUM_PATH_POINTS,
    CellConfig,
    barrier_record,
    network,
    read_cell,
    run_cell,
    share_ks,
)
from flatvalley.workers import run_jobs
from hessian import Objective
from landscape import Evaluation, Line, barrier, random_share

# What the study asserts. A fourfold smaller learning rate must lower the error of the transport
# scores by 1.7 or more (expected: 2), to .20 or less at .025; other rates scale like its square
# root, but more than half the way from SGD to gRDA is never close.
WANTED_FALL = 1.7
WANTED_ERROR, WANTED_ERROR_GAMMA, LARGEST_WANTED_ERROR = 0.20, 0.025, 0.5
# Networks whose loss did not fall to half of where it started have no minimum to compare.
TRAINED_SHARE = 0.5

STUDIED = ("digits",)
"""Data sets small enough for the Hessians of this study."""

Record = dict[str, Any]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class VerifyConfig:
    """Settings of the study.

    Raises:
        ValueError: If one is out of range; the message says what is needed.
    """

    data: str = "digits"
    gammas: tuple[float, ...] = (0.4, 0.1, 0.025)
    """Learning rates, largest first."""
    seeds: int = 3
    """Number of repetitions, each with its own initial weights and batch order."""
    c: float = 0.02
    mu: float = 0.6
    time: float = 200.0
    batch_size: int = 64
    hidden: int = 20
    ks: tuple[int, ...] = (10, 200)
    """Sizes of the eigenspaces for the projector scores."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gammas", tuple(sorted(self.gammas, reverse=True)))
        object.__setattr__(self, "ks", tuple(sorted(self.ks)))
        if not self.gammas or len(set(self.gammas)) < len(self.gammas):
            raise ValueError(
                f"`gamma` must be one or more different learning rates, got {list(self.gammas)}."
            )
        for name in ("seeds", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for gamma in self.gammas:
            self.training(gamma, 0)
        if self.data not in STUDIED:
            raise ValueError(f'`data` must be one of {", ".join(STUDIED)}, got "{self.data}".')
        data = load_dataset(self.data)
        inputs, outputs = data.train_inputs[0].numel(), data.num_classes
        size = (inputs + 1) * self.hidden + (self.hidden + 1) * outputs
        if not self.ks or min(self.ks) < 1 or max(self.ks) > size // 2:
            raise ValueError(
                f"`k` must be between 1 and {size // 2}, half the {size} weights, got "
                f"{list(self.ks)}."
            )

    def training(self, gamma: float, seed: int) -> CoupledConfig:
        """Return the settings of one coupled run."""
        return CoupledConfig(gamma, self.time, self.c, self.mu, self.batch_size, seed)

    def cell(self, gamma: float, seed: int) -> CellConfig:
        """Return the settings of one cell; the plane is drawn for the first seed only."""
        with_plane = seed == 0
        return CellConfig(self.data, self.hidden, self.ks, self.training(gamma, seed), with_plane)


@dataclass(frozen=True)
class Claim:
    """Something the study asserts, and what it found."""

    statement: str
    evidence: str
    holds: bool


@dataclass(frozen=True)
class Findings:
    """The study's numbers over all cells."""

    config: VerifyConfig
    records: dict[tuple[float, int], Record]
    """Measurements by (gamma, seed)."""
    tensors: dict[tuple[float, int], dict[str, Tensor]]
    independent: list[Record]
    """Barriers on lines between SGD minima of different seeds."""
    independent_profiles: dict[float, Evaluation]
    """Losses along the first such line of every learning rate; empty with a single seed."""
    claims: list[Claim]
    order: tuple[float, float]
    """Fitted exponent of gamma in the transport error, and its standard error over seeds."""

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(claim.holds for claim in self.claims)

    def over_seeds(self, gamma: float, *keys: str) -> Array:
        """Return one number of every seed's record at a learning rate; NaN where it is missing."""
        found = []
        for seed in range(self.config.seeds):
            value: Any = self.records[gamma, seed]
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            found.append(math.nan if value is None else float(value))
        return np.array(found)

    @property
    def methods(self) -> list[str]:
        """Names of the methods compared with gRDA."""
        return list(self.records[self.config.gammas[0], 0]["methods"])


def verify(run: Run, config: VerifyConfig, *, workers: int, console: Console) -> Findings:
    """Train and measure what is not in the run's folder yet, and draw the conclusions.

    Args:
        run: The folder.
        config: Settings.
        workers: Processes; the cells are independent.
        console: Where progress is shown.

    Returns:
        The findings. Tables are written to the run's folder.
    """
    began = monotonic()
    before = float(run.record.get("cost", {}).get("seconds", 0.0))  # of earlier, finished sessions
    names = {
        (gamma, seed): f"cells/gamma{gamma:g}_seed{seed}.safetensors"
        for gamma in reversed(config.gammas)  # the longest first
        for seed in range(config.seeds)
    }
    jobs = {
        f"gamma {gamma:g}, seed {seed}": (config.cell(gamma, seed), run.path / name)
        for (gamma, seed), name in names.items()
        if not run.has(name)
    }
    run_jobs(run_cell, jobs, workers=workers, console=console)
    found = {key: read_cell(run.path / name) for key, name in names.items()}
    tensors = {key: value[0] for key, value in found.items()}
    records = {key: value[1] for key, value in found.items()}
    independent, profiles = _independent_barriers(config, tensors)
    errors = {gamma: _transport_errors(records, gamma, config.seeds) for gamma in config.gammas}
    findings = Findings(
        config,
        records,
        tensors,
        independent,
        profiles,
        _claims(config, records, errors),
        _order(errors),
    )
    for name, rows in tables(findings).items():
        run.write_table(name, rows)
    run.finish(
        {
            "claims": [asdict(claim) for claim in findings.claims],
            "fitted_order": {
                "exponent": findings.order[0],
                "standard_error": findings.order[1],
            },
            "cost": {
                "seconds": round(before + monotonic() - began, 1),
                "cpu_seconds": round(
                    sum(
                        r["cost"]["training_cpu_seconds"] + r["cost"]["measuring_cpu_seconds"]
                        for r in records.values()
                    ),
                    1,
                ),
                "training_steps": sum(3 * r["cost"]["steps"] for r in records.values()),
            },
        }
    )
    return findings


def tables(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """Return the study's tables by name: rows of plain numbers, one seed a row."""
    config = findings.config
    cells = [(gamma, seed) for gamma in config.gammas for seed in range(config.seeds)]
    result: dict[str, list[dict[str, Any]]] = {
        "summary": summary(findings),
        "methods": [],
        "minima": [],
        "shares": [],
        "barriers": [],
        "curvature": [],
    }
    for gamma, seed in cells:
        record = findings.records[gamma, seed]
        key = {"gamma": gamma, "seed": seed, "lambda": record["lambda"]}
        result["methods"] += [{**key, "method": m, **v} for m, v in record["methods"].items()]
        result["minima"] += [{**key, "point": p, **v} for p, v in record["points"].items()]
        ks = share_ks(max(config.ks))
        result["shares"] += [
            {**key, "difference": name, "k": k, "share": share}
            | {"random": random_share(k, record["size"])}
            for name, shares in record["shares"].items()
            for k, share in zip(ks, shares, strict=True)
        ]
        result["curvature"] += [
            {**key, "difference": n, **v} for n, v in record["curvature"].items()
        ]
        result["barriers"] += [
            {**key, "path": name, "what": what, **_flat(values)}
            for name, kinds in record["barriers"].items()
            for what, values in kinds.items()
        ]
    for row in findings.independent:
        values = {key: value for key, value in row.items() if key != "barrier"}
        result["barriers"].append({**values, **_flat(row["barrier"])})
    return result


def summary(findings: Findings) -> list[dict[str, Any]]:
    """Return mean and standard error over seeds for every learning rate and method."""
    columns = (
        "relative_error",
        "relative_error_never_clipped",
        "relative_error_clipped",
        "cosine",
        "zeros_overlap",
        "zeros_overlap_by_chance",
        "sparsity",
        "train_loss",
        "test_accuracy",
    )
    rows = []
    for gamma in findings.config.gammas:
        for method in findings.methods:
            row: dict[str, Any] = {"gamma": gamma, "method": method}
            for column in columns:
                mean, error = mean_and_error(findings.over_seeds(gamma, "methods", method, column))
                row |= {column: mean, f"{column}_se": error}
            rows.append(row)
        for point in ("SGD", "gRDA"):
            row = {"gamma": gamma, "method": point}
            for column in ("sparsity", "train_loss", "test_accuracy"):
                mean, error = mean_and_error(findings.over_seeds(gamma, "points", point, column))
                row |= {column: mean, f"{column}_se": error}
            rows.append(row)
    return rows


def mean_and_error(values: Sequence[float] | Array) -> tuple[float, float]:
    """Return the mean and its standard error; NaN for the error of a single value."""
    array = np.asarray(values, dtype=np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(error)


def _transport_errors(
    records: Mapping[tuple[float, int], Record], gamma: float, seeds: int
) -> list[float]:
    methods = [records[gamma, seed]["methods"] for seed in range(seeds)]
    return [m["transport"]["relative_error"] for m in methods]


def _order(errors: Mapping[float, Sequence[float]]) -> tuple[float, float]:
    """Slope of log error against log gamma by least squares, seed by seed."""
    if len(errors) < 2:
        return math.nan, math.nan
    logs = np.log(np.array(list(errors)))
    slopes = [np.polyfit(logs, np.log(seed), 1)[0] for seed in zip(*errors.values(), strict=True)]
    return mean_and_error(slopes)


def _claims(
    config: VerifyConfig,
    records: Mapping[tuple[float, int], Record],
    errors: Mapping[float, Sequence[float]],
) -> list[Claim]:
    means = {gamma: float(np.mean(values)) for gamma, values in errors.items()}
    listed = ", ".join(f"{means[g]:.3f} at γ = {g:g}" for g in config.gammas)
    claims = [_trained_claim(records)]
    if len(config.gammas) > 1:
        exponent = math.log(WANTED_FALL) / math.log(4.0)
        falls = [(means[a] / means[b], (a / b) ** exponent) for a, b in pairwise(config.gammas)]
        claims.append(
            Claim(
                "The error of the transport scores falls with the learning rate at close to the "
                f"expected γ^½: by {WANTED_FALL} or more for a fourfold smaller γ.",
                "Relative error " + listed + "; it falls by "
                + ", ".join(f"{fall:.2f} (needed {needed:.2f})" for fall, needed in falls) + ".",
                all(fall >= needed for fall, needed in falls),
            )
        )  # fmt: skip
    smallest = min(config.gammas)
    limit = min(WANTED_ERROR * math.sqrt(smallest / WANTED_ERROR_GAMMA), LARGEST_WANTED_ERROR)
    claims.append(
        Claim(
            "At the smallest learning rate, DP with the transport scores is gRDA's minimum up to "
            f"{limit:.2f} of the way from SGD.",
            f"Relative error {means[smallest]:.3f} at γ = {smallest:g}.",
            means[smallest] <= limit,
        )
    )
    k = min(config.ks)
    pairs = {
        gamma: tuple(
            float(
                np.mean(
                    [
                        records[gamma, seed]["methods"][method]["relative_error"]
                        for seed in range(config.seeds)
                    ]
                )
            )
            for method in ("filter", f"projector k={k}")
        )
        for gamma in config.gammas
    }
    claims.append(
        Claim(
            "The soft projector φ(H) of finite training time beats the hard projector with "
            f"k = {k} at every learning rate.",
            "Relative errors "
            + ", ".join(f"{a:.3f} against {b:.3f} at γ = {g:g}" for g, (a, b) in pairs.items())
            + ".",
            all(a < b for a, b in pairs.values()),
        )
    )
    return claims


def _trained_claim(records: Mapping[tuple[float, int], Record]) -> Claim:
    """Without this, networks that never learned, or were pruned away, could satisfy the others."""
    worst = max(
        max(r["points"][name]["train_loss"] for name in ("SGD", "gRDA")) / r["start_loss"]
        for r in records.values()
    )
    densest = max(r["points"]["gRDA"]["sparsity"] for r in records.values())
    return Claim(
        "There is something to compare: SGD and gRDA trained in every run, to half of the loss at "
        "the start or less, and gRDA kept some weights.",
        f"Highest share of the starting loss {worst:.3f}, highest sparsity {densest:.3f}.",
        worst <= TRAINED_SHARE and densest < 1.0,
    )


def _independent_barriers(
    config: VerifyConfig, tensors: Mapping[tuple[float, int], Mapping[str, Tensor]]
) -> tuple[list[Record], dict[float, Evaluation]]:
    """Barriers between SGD minima of different initial weights: what a barrier looks like here.

    Also returns the losses along the first such line of every learning rate.
    """
    data = load_dataset(config.data, dtype=DTYPE)
    train = data.train_inputs, data.train_labels
    rows: list[Record] = []
    profiles: dict[float, Evaluation] = {}
    for gamma in config.gammas:
        for seed in range(config.seeds - 1):
            loss = Objective(network(config.cell(gamma, seed), data), nn.CrossEntropyLoss(), train)
            line = Line(tensors[gamma, seed]["sgd"], tensors[gamma, seed + 1]["sgd"])
            found = barrier(loss, line, num_points=NUM_PATH_POINTS)
            profiles.setdefault(gamma, found.evaluation)
            name = {"gamma": gamma, "seed": seed, "path": "independent SGD", "what": "train loss"}
            rows.append({**name, "barrier": barrier_record(found)})
    return rows, profiles


def _flat(barrier: Mapping[str, Any]) -> dict[str, float]:
    flat = {"highest": barrier["highest"]}
    for definition in ("over_chord", "over_mean"):
        flat |= {f"{definition}_{key}": value for key, value in barrier[definition].items()}
    return flat
