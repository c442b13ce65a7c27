import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatvalley.data import load_dataset
from tests.cases import seeded


@pytest.fixture
def unchecked_shapes():
    """Shape annotations off, as outside of tests: our own errors must hold without them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module")
def digits_mlp():
    """A 64-24-16-10 network after some steps on digits, and calibration inputs."""
    data = load_dataset("digits", dtype=torch.float64)
    X, y = data.train_inputs[:500].flatten(1), data.train_labels[:500]
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, X[:250]
