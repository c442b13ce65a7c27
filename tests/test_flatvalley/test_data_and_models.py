import pytest
import torch

from flatvalley.data import load_dataset
from flatvalley.models import tanh_mlp


def test_digits_are_split_without_overlap_and_class_by_class():
    data = load_dataset("digits", dtype=torch.float64)
    assert len(data.train_inputs) + len(data.test_inputs) == 1797
    assert data.train_inputs.dtype == torch.float64
    assert float(data.train_inputs.min()) == 0.0
    assert float(data.train_inputs.max()) == 1.0
    shares = torch.bincount(data.test_labels, minlength=10) / torch.bincount(data.train_labels)
    assert torch.all((shares > 0.22) & (shares < 0.28))
    rows = {tuple(row) for row in data.train_inputs.tolist()}
    assert not rows & {tuple(row) for row in data.test_inputs.tolist()}


def test_the_split_is_the_same_every_time():
    first, second = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(first.train_inputs, second.train_inputs)
    assert torch.equal(first.test_labels, second.test_labels)


def test_unknown_data_name_lists_the_known_ones():
    with pytest.raises(ValueError, match='`data` must be one of digits, got "nope"'):
        load_dataset("nope")


def test_mlp_starts_from_its_seed_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, second = (tanh_mlp([4, 3, 2], seed=7, dtype=torch.float64) for _ in range(2))
    other = tanh_mlp([4, 3, 2], seed=8, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_mlp_weights_start_uniform_within_one_over_root_fan_in():
    weights = tanh_mlp([64, 50, 10], seed=0)[0].weight.detach()
    assert float(weights.abs().max()) <= 1 / 8
    # The standard deviation of a uniform on ±b is b / √3; 3,200 draws know it to 2 %.
    assert float(weights.std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.06)


@pytest.mark.parametrize("sizes", [[4], [4, 0, 2]])
def test_mlp_without_two_positive_widths_is_refused(sizes):
    with pytest.raises(ValueError, match="`sizes` must be two or more positive widths"):
        tanh_mlp(sizes, seed=0)
