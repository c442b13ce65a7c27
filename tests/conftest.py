"""What every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small matrices on shared cores: one thread is fastest, and repeats to the last bit."""
    torch.set_num_threads(1)
