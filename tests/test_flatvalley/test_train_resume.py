"""A training that is killed, and goes on: the same weights and the same tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# One process imports everything once; each life is a fork of it, killed at a random moment: while
# it computes, evaluates or writes.
LIVES = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # what the first step would import, in every life anew
from torch import nn
from flatvalley.data import load_dataset
from flatvalley.train_config import TrainConfig
from flatvalley.training import train

torch.set_num_threads(1)
os.fsync = lambda handle: None  # what a killed process wrote is there; only a power cut loses it
base = Path(sys.argv[1])
data = load_dataset("digits")
config = TrainConfig(
    runs=("sgd:momentum=0.9", "grda:c=0.01", "grda:target=0.8", "magnitude:target=0.8"),
    epochs=4, log_every=4, schedule="cosine", validation=0.2, snapshots=7,
)

def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10)
    )

def life(folder):
    pid = os.fork()
    if pid == 0:
        train(config, folder, make_model=network, data=data, checkpoint_seconds=0.0)
        os._exit(0)
    return pid

def numbers(path):
    # Without the header of a safetensors file, whose metadata come in any order.
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 + length :] if path.suffix == ".safetensors" else data

def content(folder):
    found = {
        str(path.relative_to(folder)): numbers(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "time.csv")
        and path.parent.name != "checkpoints"
    }
    times = [line.split(",")[:2] for line in open(folder / "tables" / "time.csv")]
    return found | {"time": times}

began = time.monotonic()
assert os.waitpid(life(base / "whole"), 0)[1] == 0
whole, duration = content(base / "whole"), time.monotonic() - began
assert len(whole) == 4 + 2 + 2 + 8 + 1, sorted(whole)

def ended(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False

rng, kills, finished = random.Random(0), 0, 0
while kills < 20 or finished < 1:
    folder = base / str(finished)
    pid = life(folder)
    # After the last kill one is left to finish.
    if not ended(pid, rng.uniform(0.1, 0.9) * duration if kills < 20 else 60):
        os.kill(pid, signal.SIGKILL)
        # One that ended by itself just before is a finished one.
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL:
            kills += 1
            continue
    finished += 1
    resumed = content(folder)
    for name, expected in whole.items():
        assert resumed.get(name) == expected, (name, kills)
    assert resumed.keys() == whole.keys()
print(kills, "kills,", finished, "finished, seconds uninterrupted", duration)
"""


@pytest.mark.slow
def test_killed_twenty_times_weights_and_tables_are_those_of_an_uninterrupted_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LIVES, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "20 kills" in done.stdout
