import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pruning import Transport

F64 = torch.float64


def test_transport_is_the_discrete_recursion():
    rng = np.random.default_rng(0)
    d, e, g = 6, np.zeros(6), 0.0
    transport = Transport(torch.zeros(d, dtype=F64))
    for n in range(50):
        A = rng.standard_normal((d, d))
        H, w, lr = A @ A.T / d, rng.standard_normal(d), rng.uniform(0.0, 0.2)
        w[n % d] = 0.0
        e = e - lr * H @ (e - g * np.sign(w))
        g = g + rng.uniform(0.0, 0.1)
        transport.step(
            lambda v, H=H: torch.from_numpy(H) @ v, torch.from_numpy(w), lr=lr, threshold=g
        )
        assert_close(transport.offset, torch.from_numpy(e), atol=1e-12, rtol=1e-12)
        difference = transport.difference(torch.from_numpy(w))
        assert_close(difference, torch.from_numpy(e - g * np.sign(w)), atol=1e-12, rtol=1e-12)
    assert transport.num_steps == 50 and transport.threshold == g


def test_no_product_is_spent_before_there_is_a_threshold():
    w, calls = torch.ones(2, dtype=F64), []

    def product(v):
        calls.append(v.clone())
        return v

    transport = Transport(w)
    for threshold in (0.0, 0.0, 0.1, 0.2):
        transport.step(product, w, lr=0.5, threshold=threshold)
    assert transport.num_products == len(calls) == 1
    assert torch.equal(calls[0], torch.full((2,), -0.1, dtype=F64))  # with the g of the weights


def test_a_sign_change_in_a_flat_direction_is_invisible_to_the_dual():
    transport = Transport(torch.ones(1, dtype=F64))
    for sign in (1.0, 1.0, -1.0, -1.0):
        w = torch.tensor([sign], dtype=F64)
        transport.step(torch.zeros_like, w, lr=0.1, threshold=transport.threshold + 0.1)
        assert torch.equal(transport.offset, torch.zeros(1, dtype=F64))
        assert float(transport.difference(w)) == pytest.approx(-sign * transport.threshold)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(3, dtype=F64)}, r"`w` must have shape \[2\] as at the start, got \[3\]"),
        ({"lr": -0.1}, "`lr` must not be negative, got -0.1"),
        ({"lr": math.nan}, "`lr` must not be negative, got nan"),
        ({"threshold": 0.1}, "`threshold` must not fall, got 0.1 after 0.2"),
        ({"threshold": math.nan}, "`threshold` must not fall, got nan after 0.2"),
    ],
)
def test_bad_steps_are_named_and_leave_no_trace(change, message):
    w = torch.ones(2, dtype=F64)
    transport = Transport(w)
    transport.step(lambda v: v, w, lr=0.1, threshold=0.2)
    before = transport.offset.clone(), transport.threshold, transport.num_steps
    arguments = {"w": w, "lr": 0.1, "threshold": 0.3} | change
    with pytest.raises(ValueError, match=message):
        transport.step(lambda v: v, arguments.pop("w"), **arguments)
    assert torch.equal(transport.offset, before[0])
    assert (transport.threshold, transport.num_steps) == before[1:]
