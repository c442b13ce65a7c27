"""Interleaved timing: only ratios within one run mean anything on a shared machine."""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each function, called in turn ``repeats`` times after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.process_time()
            function()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(name: str, lines: list[str], packages: Sequence[str] = ()) -> None:
    """Print a table and keep it in benchmarks/results, with machine, date and versions."""
    device = f"GPU {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    header = [
        f"# {name}, {date.today().isoformat()}",
        f"# {platform.machine()}, {_processor()}, {torch.get_num_threads()} thread(s), {device}, "
        f"torch {torch.__version__}",
    ]
    if packages:
        header.append("# " + ", ".join(f"{package} {version(package)}" for package in packages))
    header.append("")
    text = "\n".join([*header, *lines]) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.txt").write_text(text)


def say(text: str) -> None:
    """Say on the error output what is being done."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
