import pytest
import torch

from flatvalley.augmentation import CropAndFlip
from flatvalley.batches import ResidentBatches

SIZE = 23


def batches_of(batch_size: int = 4, **options) -> ResidentBatches:
    """Samples that tell their own place."""
    places = torch.arange(SIZE)
    return ResidentBatches(places[:, None].float(), places, batch_size, seed=5, **options)


def pictures(n: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 40])
def test_every_sample_comes_once_an_epoch_with_its_label(batch_size):
    batches = batches_of(batch_size)
    for epoch in range(3):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        found = [batches.batch(step) for step in steps]
        assert all(torch.equal(x[:, 0].long(), y) for x, y in found)
        assert sorted(torch.cat([y for _, y in found]).tolist()) == list(range(SIZE))


def test_a_step_is_known_without_the_steps_before_it():
    options = {"augment": CropAndFlip(2), "normalise": ([0.5], [0.2])}
    labels = torch.arange(SIZE)
    batches = ResidentBatches(pictures(), labels, 4, seed=1, **options)
    forth = [batches.batch(step) for step in range(15)]
    again = ResidentBatches(pictures(), labels, 4, seed=1, **options)
    for step in (14, 3, 0, 9, 3):
        x, y = again.batch(step)
        assert torch.equal(x, forth[step][0])
        assert torch.equal(y, forth[step][1])


def test_orders_and_changes_differ_between_epochs_steps_and_seeds():
    labels = torch.arange(SIZE)
    first = ResidentBatches(pictures(), labels, SIZE, seed=1)
    other = ResidentBatches(pictures(), labels, SIZE, seed=2)
    orders = [first.batch(0)[1], first.batch(1)[1], other.batch(0)[1]]
    assert len({tuple(order.tolist()) for order in orders}) == 3
    still = ResidentBatches(pictures(), labels, SIZE, seed=1, augment=CropAndFlip(2), shuffle=False)
    assert not torch.equal(still.batch(0)[0], still.batch(1)[0])
    assert torch.equal(still.batch(0)[1], labels)


def test_the_last_batch_can_be_dropped():
    assert (len(batches_of()), len(batches_of(drop_last=True))) == (6, 5)
    assert len(batches_of().batch(5)[1]) == 3
    assert len(batches_of(drop_last=True).batch(5)[1]) == 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batches_of_one_process(world_size):
    def of(rank: int, world_size: int) -> ResidentBatches:
        return ResidentBatches(
            pictures(),
            torch.arange(SIZE),
            8,
            seed=3,
            augment=CropAndFlip(2),
            drop_last=True,
            rank=rank,
            world_size=world_size,
        )

    whole = of(0, 1)
    for step in range(2 * len(whole)):
        parts = [of(rank, world_size).batch(step) for rank in range(world_size)]
        x, y = whole.batch(step)
        for rank, (part, labels) in enumerate(parts):
            assert torch.equal(part, x[rank::world_size])
            assert torch.equal(labels, y[rank::world_size])


def test_bytes_are_normalised_as_the_data_sets_are():
    mean, deviation = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    batches = ResidentBatches(
        pictures(),
        torch.arange(SIZE),
        5,
        seed=0,
        normalise=(mean, deviation),
        dtype=torch.float64,
        shuffle=False,
    )
    x, _ = batches.batch(1)
    for channel in range(3):
        expected = (pictures()[5:10, channel].double() / 255 - mean[channel]) / deviation[channel]
        # Two roundings of numbers below 10.
        torch.testing.assert_close(x[:, channel], expected, rtol=0, atol=1e-14)
    assert batches.inputs.dtype == torch.uint8


def test_numbers_are_normalised_without_the_scale_of_bytes_and_left_in_place():
    inputs = torch.rand(4, 3, dtype=torch.float64)
    kept = inputs.clone()
    batches = ResidentBatches(
        inputs, torch.arange(4), 4, seed=0, normalise=([0.5], [0.25]), dtype=torch.float64
    )
    x, y = batches.batch(0)
    torch.testing.assert_close(x, (kept[y] - 0.5) / 0.25)
    assert torch.equal(inputs, kept)
    assert torch.equal(ResidentBatches(inputs, torch.arange(4), 4, seed=0).batch(0)[0], kept[y])


def test_the_global_random_state_stays_as_it_is():
    state = torch.get_rng_state()
    ResidentBatches(pictures(), torch.arange(SIZE), 4, seed=1, augment=CropAndFlip()).batch(9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.arange(3)}, "as many, got 23 and 3"),
        ({"inputs": torch.zeros(0), "labels": torch.zeros(0)}, "at least one sample, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"batch_size": 24, "drop_last": True}, "got 24 for 23 samples"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"rank": 2, "world_size": 2}, "`rank` must be from 0 to 1, got 2"),
        ({"world_size": 3, "drop_last": True}, "share evenly among 3 ranks"),
        ({"world_size": 2}, "a last one of 3. Choose a multiple of the ranks"),
        ({"normalise": ([0.0, 0.0], [1.0, 1.0])}, "a mean and a positive deviation for each of 1"),
        ({"normalise": ([0.0], [0.0])}, "a positive deviation"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    places = torch.arange(SIZE)
    settings = {"inputs": places[:, None].float(), "labels": places, "batch_size": 4, "seed": 0}
    with pytest.raises(ValueError, match=message):
        ResidentBatches(**{**settings, **changes})


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="`step` must be at least 0, got -1"):
        batches_of().batch(-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_batches_and_is_not_waited_for():
    def of(device: str) -> ResidentBatches:
        labels = torch.arange(SIZE)
        return ResidentBatches(pictures(), labels, 4, seed=1, augment=CropAndFlip(), device=device)

    ours, theirs = of("cpu"), of("cuda")
    theirs.batch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = theirs.batch(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(ours.batch(3), found, strict=True):
        torch.testing.assert_close(b.cpu(), a)
