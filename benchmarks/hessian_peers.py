"""Ten leading eigenpairs of two trained networks: ours, PyHessian, hessian-eigenthings, curvlinops.

Every library makes its own products and runs its own solver to one goal: all ten measured residuals
at most 1e-3 of the largest eigenvalue. CPU time on one thread, three seeds of the starting vector,
every library at its fastest batch size and at the loosest setting that meets the goal.

A product of a peer over all the data takes most of a minute on the larger network, and a power
iteration takes hundreds. So the total is composed by default of figures that are each measured:

    total = set-up + products x (seconds of one product) + seconds of the solver outside products

The seconds of a product are the median over rounds in which the libraries take turns, one process
at a time, each product measured beside a plain gradient in the same process; what drifts between
rounds drifts in both. The number of products is counted by running the solver's own code on our
products (the same matrix to rounding, see ``peer_counts.py``), which are not timed. ``--direct``
runs every solver on its own products in full, and the table shows these seconds beside the composed
ones. At the end the worst residual of each is measured in plain torch, nobody's library.

The libraries need an environment of their own, for PyPI's dependencies of curvlinops would replace
a CPU build of torch. From the project's root, with ``peers`` any folder outside it:

    python3 -m venv peers && peers/bin/pip install -c constraints.txt -e '.[data]'
    peers/bin/pip install --no-deps -r benchmarks/peers.txt
    peers/bin/python benchmarks/hessian_peers.py --direct mlp

Every figure is kept as a small file in ``--out`` when it is there; the same command goes on where
it was stopped. What was measured before the code changed is not measured again: remove the folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peer_counts import HINTS, RememberedProducts, loosest_setting, orthonormal, rayleigh
from peer_libraries import GOAL, LIBRARIES, SOLVERS, K, counted
from peer_problems import SETTINGS, floors, load, plain_columns, plain_gradient, prepare
from threadpoolctl import threadpool_limits
from timing import RESULTS, report, say

from flatvalley.run import read_tensors, write_atomically, write_tensors

Record = dict[str, Any]
SEEDS = (0, 1, 2)
PACKAGES = ("PyHessian", "hessian-eigenthings", "curvlinops-for-pytorch", "scipy")
TRIAL_SAMPLES = 128
"""Images on which batch sizes of the larger network are compared."""
COMBINATIONS = 8
"""Random sums of all vectors by which the products behind the residuals are checked."""


@dataclass(frozen=True)
class Row:
    """A library with one of its solvers."""

    title: str
    library: str
    solver: str


ROWS = {
    "kept": Row("flatvalley, graph kept", "kept", "lanczos"),
    "measured": Row("  with residuals measured", "kept", "lanczos-measured"),
    "copies": Row("  and copies searched: default", "kept", "lanczos-copies"),
    "anew": Row("flatvalley, computed anew", "anew", "lanczos"),
    "pyhessian-kept": Row("PyHessian, all data one batch", "pyhessian-kept", "pyhessian"),
    "pyhessian": Row("PyHessian, batches", "pyhessian", "pyhessian"),
    "eigenthings": Row("hessian-eigenthings, 50 steps", "eigenthings", "eigenthings"),
    "eigenthings-fewest": Row("  the fewest steps that do", "eigenthings", "eigenthings-fewest"),
    "curvlinops": Row("curvlinops + eigsh", "curvlinops", "eigsh"),
}

SPEED_TARGETS = {
    "mlp": {"PyHessian": 15.0, "hessian-eigenthings, 50 steps": 1.5, "curvlinops + eigsh": 2.5},
    "cnn": {"PyHessian": 15.0, "hessian-eigenthings, 50 steps": 1.5, "curvlinops + eigsh": 1.6},
}
KEPT_TARGETS = {"mlp": 1.3, "cnn": 2.7}


# What a process of its own does: a function of its task that returns a record.


def trial(task: Record) -> Record:
    """CPU seconds of a product, or of the plain gradient, at every batch size."""
    problem = load(Path(task["path"]), task["samples"])
    v = _direction(problem.size)
    found: dict[int, float] = {}
    for size in task["sizes"]:
        if task["library"] == "gradient":
            gradient = plain_gradient(problem, size)
            call: Callable[[], object] = gradient
        else:
            product = LIBRARIES[task["library"]].build(problem, size, task["budget"])
            call = _bound(product, v)
        call()
        # The fewer seconds a call takes, the more one interruption spoils.
        found[size] = min(_seconds(call) for _ in range(task["repeats"]))
        del call
    return {"seconds": found, "best": min(found, key=lambda size: found[size])}


def one_round(task: Record) -> Record:
    """Set-up, products beside plain gradients, a matrix of columns; memory at its highest."""
    problem = load(Path(task["path"]), task["samples"])
    v = _direction(problem.size)
    gradient = plain_gradient(problem, task["gradient_batch"])
    gradients, products, setup = [], [], 0.0
    before = _peak()
    if task["library"] != "gradient":
        began = time.process_time()
        product = LIBRARIES[task["library"]].build(problem, task["batch"], task["budget"])
        call = _bound(product, v)
        call()
        setup = time.process_time() - began
    for _ in range(task["repeats"]):
        gradients.append(_seconds(gradient))
        if task["library"] != "gradient":
            products.append(_seconds(call))
    peak, columns = _peak(), None
    if task["columns"]:
        V = torch.linalg.qr(torch.stack([v.roll(i) for i in range(K)], dim=1))[0]
        columns = _seconds(lambda: product(V)) / _seconds(gradient)
    return {
        "gradients": gradients,
        "products": products,
        "columns_in_gradients": columns,
        "setup_and_first": setup,
        "peak_bytes": peak,
        "peak_before_bytes": before,
    }


def count(task: Record) -> Record:
    """Products, setting and seconds outside products of every solver and seed."""
    problem = load(Path(task["path"]), task["samples"])
    folder = Path(task["folder"])
    real = LIBRARIES["kept"].build(problem, task["batch"], task["budget"])
    file = folder / f"remembered-{problem.name}.safetensors"
    remembered = RememberedProducts(real, problem.size, path=file)
    hints = dict(HINTS)
    for seed in task["seeds"]:
        for solver in SOLVERS:
            cell = folder / f"{problem.name}-count-{solver}-{seed}.json"
            if cell.exists():
                continue
            record, vectors = loosest_setting(remembered, problem, solver, seed, hints)
            write_tensors(
                _vectors_file(folder, problem.name, "count", solver, seed), {"V": vectors}, {}
            )
            _keep(cell, record)
            say(f"{problem.name} {solver} seed {seed}: {record}, {len(remembered)} real products")
    return {"real_products": len(remembered)}


def direct(task: Record) -> Record:
    """Seconds and products of a solver on its own products, in full."""
    problem = load(Path(task["path"]), task["samples"])
    library, solver = LIBRARIES[task["library"]], SOLVERS[task["solver"]][0]
    # Torch imports half a second of modules when it first goes through a gradient's graph.
    plain_columns(problem.first(2), _direction(problem.size)[:, None], 2)
    began = time.process_time()
    with counted(library.build(problem, task["batch"], task["budget"])) as (product, spent):
        vectors = solver(product, problem, task["seed"], **task["setting"])
    seconds, peak = time.process_time() - began, _peak()
    write_tensors(Path(task["vectors"]), {"V": orthonormal(vectors)}, {})
    return {"seconds": seconds, "products": spent["products"], "peak_bytes": peak}


def residual(task: Record) -> Record:
    """Residuals and eigenvalues of what the solvers found, the worst pair of each in plain torch.

    Which pair of a result is the worst is known from the products that the counts ran on; what
    sticks out of their span is multiplied in plain torch. Then the worst pairs, and random sums of
    all vectors, are multiplied in plain torch. For g with independent standard normal entries the
    mean of ‖D V g‖² is ‖D V‖² in the Frobenius norm, so that from ``COMBINATIONS`` products the
    difference D of the two matrices is known on the other vectors, too.
    """
    problem = load(Path(task["path"]), task["samples"])
    files = [Path(file) for file in task["vectors"]]
    V = torch.cat([read_tensors(file)[0]["V"] for file in files], dim=1)
    plain = LIBRARIES["plain"].build(problem, task["batch"], task["budget"])
    file = Path(task["folder"]) / f"remembered-{problem.name}.safetensors"
    remembered = RememberedProducts(plain, problem.size, path=file)
    HV = remembered(V).double()
    values = (V.double() * HV).sum(dim=0)
    residuals = (HV - V.double() * values).norm(dim=0)
    worst = [i * K + int(residuals[i * K : (i + 1) * K].argmax()) for i in range(len(files))]
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(V.shape[1], COMBINATIONS, generator=generator, dtype=torch.float64)
    sums = (V.double() @ G).to(V.dtype)
    measured = plain_columns(problem, torch.cat([V[:, worst], sums], dim=1), task["batch"])
    largest = float(values.abs().max())
    squares = float((measured[:, len(worst) :] - HV @ G).square().sum()) / COMBINATIONS
    found = {}
    for i, file in enumerate(files):
        residual, _ = rayleigh(V[:, worst[i : i + 1]], measured[:, i : i + 1])
        own = values[i * K : (i + 1) * K].tolist()
        found[file.stem] = {
            "residual": residual * abs(float(values[worst[i]])) / max(map(abs, own)),
            "values": sorted(own, key=abs, reverse=True),
        }
    return {"found": found, "disagreement": (squares / V.shape[1]) ** 0.5 / largest}


COMMANDS = {f.__name__: f for f in (trial, one_round, count, direct, residual)}
UNTIMED = ("count", "residual")


# What the first process does: hand out tasks, keep their records, and make the table.


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    trained: Path
    out: Path
    samples: int | None
    rounds: int
    seeds: tuple[int, ...]
    budget: int
    direct: tuple[str, ...]
    libraries: tuple[str, ...]
    threads: int
    """Threads of what is not timed."""

    def cell(self, name: str, task: Record) -> Record:
        """Return the record of a task, from its file or from a process that does it now."""
        path = self.out / f"{name}.json"
        if not path.exists():
            say(name)
            threads = self.threads if task["do"] in UNTIMED else 1
            _keep(path, _in_a_process({**task, "budget": self.budget}, threads))
        return dict(json.loads(path.read_text()))


def measure(plan: Plan, name: str) -> Record:
    """Every figure of one problem."""
    path = prepare(name, plan.trained)
    problem = load(path, plan.samples)
    samples = len(problem.inputs)
    sizes = [size for size in SETTINGS[name].batch_sizes if samples % size == 0] or [samples]
    task: Record = {"path": str(path), "samples": samples, "folder": str(plan.out)}

    batches: dict[str, int] = {}
    for library in ("gradient", *plan.libraries):
        if library in LIBRARIES and LIBRARIES[library].one_batch:
            batches[library] = samples
            continue
        trial_samples = samples if name == "mlp" else min(samples, TRIAL_SAMPLES)
        found = plan.cell(
            f"{name}-batch-{library}",
            {
                **task,
                "do": "trial",
                "library": library,
                "sizes": sizes,
                "samples": trial_samples,
                "repeats": 12 if name == "mlp" else 3,
            },
        )
        batches[library] = int(found["best"])

    rounds: dict[str, list[Record]] = {library: [] for library in batches}
    for number in range(plan.rounds):
        names = list(batches)
        # Another library begins every round.
        for library in names[number % len(names) :] + names[: number % len(names)]:
            record = plan.cell(
                f"{name}-round-{number}-{library}",
                {
                    **task,
                    "do": "one_round",
                    "library": library,
                    "batch": batches[library],
                    "gradient_batch": batches["gradient"],
                    "repeats": 5 if name == "mlp" else 1,
                    # Dear, and needed for the few products that measure residuals.
                    "columns": library in ("kept", "anew") and (name == "mlp" or number == 0),
                },
            )
            rounds[library].append(record)

    plan.cell(
        f"{name}-counted-{'-'.join(map(str, plan.seeds))}",
        {**task, "do": "count", "seeds": plan.seeds, "batch": batches["kept"]},
    )
    counts = {
        solver: [
            json.loads((plan.out / f"{name}-count-{solver}-{seed}.json").read_text())
            for seed in plan.seeds
        ]
        for solver in SOLVERS
    }
    directs: dict[str, list[Record]] = {}
    if name in plan.direct:
        for i, seed in enumerate(plan.seeds):
            for key, row in ROWS.items():
                if row.library not in plan.libraries:
                    continue
                record = plan.cell(
                    f"{name}-direct-{key}-{seed}",
                    {
                        **task,
                        "do": "direct",
                        "library": row.library,
                        "solver": row.solver,
                        "batch": batches[row.library],
                        "seed": seed,
                        "setting": counts[row.solver][i]["setting"],
                        "vectors": str(_vectors_file(plan.out, name, "direct", key, seed)),
                    },
                )
                directs.setdefault(key, []).append(record)

    files = []
    for seed in plan.seeds:
        files += [_vectors_file(plan.out, name, "count", solver, seed) for solver in SOLVERS]
        files += [_vectors_file(plan.out, name, "direct", key, seed) for key in directs]
    seeds = "-".join(map(str, plan.seeds))
    residuals = plan.cell(
        f"{name}-residuals-{'direct-' if directs else ''}{seeds}",
        {
            **task,
            "do": "residual",
            "vectors": [str(file) for file in files],
            "batch": batches["plain"],
        },
    )
    return {
        "problem": name,
        "title": SETTINGS[name].title,
        "size": problem.size,
        "samples": samples,
        "training_loss": problem.training_loss,
        "training_accuracy": problem.training_accuracy,
        "test_accuracy": problem.test_accuracy,
        "floors": floors(problem),
        "batches": batches,
        "rounds": rounds,
        "counts": counts,
        "direct": directs,
        "residuals": residuals["found"],
        "disagreement": residuals["disagreement"],
        "seeds": plan.seeds,
    }


def costs(found: Record) -> dict[str, Record]:
    """Every library's price of a product in gradients and in seconds, its set-up and memory."""
    everything = [
        g for records in found["rounds"].values() for r in records for g in r["gradients"]
    ]
    gradient = statistics.median(everything)
    out: dict[str, Record] = {}
    for library, records in found["rounds"].items():
        pairs = [
            (p, g) for r in records for p, g in zip(r["products"], r["gradients"], strict=False)
        ]
        ratio = statistics.median(p / g for p, g in pairs) if pairs else 1.0
        first = statistics.median(
            r["setup_and_first"] / statistics.median(r["gradients"]) for r in records
        )
        columns = [r["columns_in_gradients"] for r in records if r["columns_in_gradients"]]
        out[library] = {
            "ratio": ratio,
            "seconds": ratio * gradient,
            "columns": statistics.median(columns) * gradient if columns else None,
            "setup": max(first - ratio, 0.0) * gradient if pairs else 0.0,
            "peak": max(r["peak_bytes"] for r in records),
            "before": min(r["peak_before_bytes"] for r in records),
        }
    return out


def summary(found: Record) -> list[Record]:
    """One line of the table for every library with a solver."""
    price, rows = costs(found), []
    best = [max(column) for column in zip(*_magnitudes(found), strict=True)]
    for key, row in ROWS.items():
        if row.library not in price:
            continue
        counted, product = found["counts"][row.solver], price[row.library]
        stems = [
            _vectors_file(Path(), found["problem"], "count", row.solver, seed).stem
            for seed in found["seeds"]
        ]
        direct_records = found["direct"].get(key, [])
        stems += [
            _vectors_file(Path(), found["problem"], "direct", key, seed).stem
            for seed in found["seeds"][: len(direct_records)]
        ]
        measured = [found["residuals"][stem] for stem in stems]
        products = statistics.mean(record["products"] for record in counted)
        outside = statistics.mean(record["seconds_outside"] for record in counted)
        in_columns = statistics.mean(record["in_columns"] for record in counted)
        in_products = (products - in_columns) * product["seconds"]
        if in_columns:
            in_products += in_columns / K * product["columns"]
        rows.append(
            {
                "key": key,
                "title": row.title,
                "batch": found["batches"][row.library],
                "ratio": product["ratio"],
                "products": products,
                "settings": [record["setting"] for record in counted],
                "composed_seconds": product["setup"] + in_products + outside,
                "seconds_outside": outside,
                "direct_seconds": statistics.mean(r["seconds"] for r in direct_records)
                if direct_records
                else None,
                "direct_products": statistics.mean(r["products"] for r in direct_records)
                if direct_records
                else None,
                "residual": max(m["residual"] for m in measured),
                "complete": all(
                    abs(value) > 0.99 * wanted
                    for m in measured
                    for value, wanted in zip(m["values"], best, strict=True)
                ),
                "peak": max([product["peak"], *(r["peak_bytes"] for r in direct_records)]),
                "baseline": product["before"],
            }
        )
    return rows


def _magnitudes(found: Record) -> list[list[float]]:
    return [[abs(v) for v in record["values"]] for record in found["residuals"].values()]


def table(found: Record) -> list[str]:
    """The lines of one problem."""
    price, rows = costs(found), summary(found)
    base, lowest = price["gradient"], found["floors"]
    lines = [
        f"{found['title']}: d = {found['size']:,}, N = {found['samples']:,}",
        f"trained to a loss of {found['training_loss']:.3f} on these images, accuracy "
        f"{found['training_accuracy']:.1%} on them and {found['test_accuracy']:.1%} on test images",
        f"one gradient: {base['seconds']:.3f} s, plain torch, batches of "
        f"{found['batches']['gradient']}, {base['peak'] / 2**20:,.0f} MiB in all",
        "",
        f"{'a product, in gradients':32}{'':>7}{'floor':>7}{'batch':>8}{'MiB':>9}",
    ]
    floor_of = {
        "kept": "graph kept",
        "pyhessian-kept": "graph kept",
        "gauss-newton": "Gauss-Newton, graph kept",
        "gauss-newton-anew": "Gauss-Newton, computed anew",
        "curvlinops-ggn": "Gauss-Newton, computed anew",
    }
    for library, cost in price.items():
        if library == "gradient":
            continue
        floor = lowest[floor_of.get(library, "computed anew")]
        lines.append(
            f"{LIBRARIES[library].title:32}{cost['ratio']:7.2f}{floor:7.2f}"
            f"{found['batches'][library]:8,}{cost['peak'] / 2**20:9,.0f}"
        )
    lines += [
        "Floors in flops of the layers: 2, 3, 1.33 and 1.67, less what the first layer saves, that",
        f"has {lowest['share of the first layer']:.0%} of the work.",
        "",
        f"{f'{K} pairs to {GOAL:g}':32}{'composed':>10}{'direct':>10}{'times':>8}{'prod-':>8}"
        f"{'residual':>10}{'outside':>9}{'MiB':>8}",
        f"{'':32}{'s':>10}{'s':>10}{'ours':>8}{'ucts':>8}{'':>10}{'s':>9}",
    ]
    ours = rows[0]["composed_seconds"]
    for row in rows:
        direct_seconds = row["direct_seconds"]
        lines.append(
            f"{row['title']:32}{row['composed_seconds']:10.1f}"
            f"{'' if direct_seconds is None else f'{direct_seconds:.1f}':>10}"
            f"{row['composed_seconds'] / ours:8.2f}{row['products']:8.0f}{row['residual']:10.1e}"
            f"{row['seconds_outside']:9.2f}{row['peak'] / 2**20:8,.0f}"
            f"{'' if row['residual'] <= GOAL else '  goal not met'}"
            f"{'' if row['complete'] else '  misses a pair'}"
        )
    lines += [
        "Residuals are of the worst pair and in plain torch; on all vectors, plain torch and the",
        f"products counted differ by {found['disagreement']:.0e} of the largest eigenvalue.",
    ]
    lines += ["", "settings, seed by seed:"]
    lines += [
        f"  {ROWS[row['key']].solver}: " + "; ".join(_in_words(s) for s in row["settings"])
        for row in rows
        if row["key"] not in ("anew", "pyhessian-kept")
    ]
    return [*lines, "", *targets(found, rows, price), ""]


def targets(found: Record, rows: list[Record], price: dict[str, Record]) -> list[str]:
    """What was aimed at, and whether it was reached: composed, and in full where that was run."""
    peers = {
        "PyHessian": ("pyhessian", "pyhessian-kept"),
        "PyHessian in batches": ("pyhessian",),
        "hessian-eigenthings, 50 steps": ("eigenthings",),
        "curvlinops + eigsh": ("curvlinops",),
    }
    wanted = SPEED_TARGETS[found["problem"]]
    lines = []
    for peer, keys in peers.items():
        ratios = {}
        for kind in ("composed", "direct"):
            seconds = {row["key"]: row[f"{kind}_seconds"] for row in rows}
            known = [seconds[key] for key in keys if seconds.get(key) is not None]
            if known and seconds["kept"] is not None:
                ratios[kind] = min(known) / seconds["kept"]
        text = ", ".join(f"{ratio:.2f} {kind}" for kind, ratio in ratios.items())
        if peer in wanted and ratios:
            met = "PASS" if min(ratios.values()) >= wanted[peer] else "FAIL"
            lines.append(f"{met}  {wanted[peer]:g} times faster than {peer}: {text}")
        elif ratios:
            lines.append(f"      (than {peer}: {text})")
    kept = KEPT_TARGETS[found["problem"]]
    lines.append(
        _bounded(
            f"a product at most {kept:g} gradients, graph kept",
            price["kept"]["ratio"],
            kept,
        )
    )
    if "plain" in price and "anew" in price:
        lines.append(
            _bounded(
                "computed anew at most plain reverse over reverse",
                price["anew"]["ratio"],
                price["plain"]["ratio"],
            )
        )
    return lines


def _bounded(what: str, value: float, bound: float) -> str:
    return f"{'PASS' if value <= bound else 'FAIL'}  {what}: {value:.2f} (bound {bound:.2f})"


def _in_words(setting: Record) -> str:
    names = {"tol": "tol {:g}", "basis": "basis {}", "steps": "{} steps", "multiple": "copies {}"}
    names["measure"] = "measured {}"
    return ", ".join(
        names[key].format("default" if value is None else value) for key, value in setting.items()
    )


def _vectors_file(folder: Path, problem: str, kind: str, name: str, seed: int) -> Path:
    return folder / f"vectors-{problem}-{kind}-{name}-{seed}.safetensors"


def _direction(size: int) -> torch.Tensor:
    v = torch.randn(size, generator=torch.Generator().manual_seed(1))
    return v / v.norm()


def _bound(
    product: Callable[[torch.Tensor], torch.Tensor], v: torch.Tensor
) -> Callable[[], object]:
    return lambda: product(v)


def _seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def _peak() -> int:
    """Highest resident memory of this process so far; ``ru_maxrss`` would include the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def _keep(path: Path, record: Record) -> None:
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def _in_a_process(task: Record, threads: int) -> Record:
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--task",
            json.dumps(task | {"threads": threads}),
        ],
        stdout=subprocess.PIPE,
        env=os.environ | dict.fromkeys(names, str(threads)),
        check=True,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _do(task: Record) -> None:
    torch.set_num_threads(task["threads"])
    output, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not the record
    with threadpool_limits(task["threads"]):
        record = COMMANDS[task["do"]](task)
    output.write(json.dumps(record) + "\n")


def main() -> None:
    """Measure what is missing, print the table and keep it."""
    parser = argparse.ArgumentParser(description="The peer benchmark of the Hessian engine.")
    parser.add_argument("--out", type=Path, default=Path("runs/hessian_peers"))
    parser.add_argument("--problems", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--direct", nargs="*", choices=SETTINGS, default=[])
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--samples", type=int, help="fewer images, for a trial")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--memory-gib", type=float, default=10.0, help="budget of kept graphs")
    parser.add_argument("--threads", type=int, default=1, help="of what is not timed")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        _do(json.loads(arguments.task))
        return
    torch.set_num_threads(1)
    out = arguments.out if arguments.samples is None else arguments.out / str(arguments.samples)
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        arguments.out,
        out,
        arguments.samples,
        arguments.rounds,
        tuple(arguments.seeds),
        int(arguments.memory_gib * 2**30),
        tuple(arguments.direct),
        # Without these two there is no count, and no residual.
        tuple(dict.fromkeys(("kept", "plain", *arguments.libraries))),
        arguments.threads,
    )
    found = [measure(plan, name) for name in arguments.problems]
    lines = [
        f"{K} leading eigenpairs, every residual at most {GOAL:g} of the largest eigenvalue,",
        f"measured in plain torch; means over {len(plan.seeds)} seeds, CPU time on one thread.",
        "Composed: set-up + products x seconds of one + the solver's own seconds; direct: in full.",
        "Peak memory of a process of the library's own, Python, torch and the images included.",
        "No peer measures residuals or looks for copies of multiple eigenvalues: ours is compared",
        "without that (first row), and with it.",
        "",
    ]
    for one in found:
        lines += table(one)
    name = "-".join(["hessian_peers", *arguments.problems])
    if plan.samples is not None:
        name += f"-{plan.samples}"
    report(name, lines, PACKAGES)
    record = [{**one, "costs": costs(one), "summary": summary(one)} for one in found]
    _keep(RESULTS / f"{name}.json", {"problems": record})


if __name__ == "__main__":
    main()
