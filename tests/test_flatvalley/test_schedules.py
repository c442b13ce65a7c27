import math

import pytest
import torch

from flatvalley.recipes import RECIPES, config_of
from flatvalley.schedules import horizon_by_time, schedule

# Steps of an epoch of CIFAR-10 at batch 128.
CIFAR = 391


@pytest.mark.parametrize(("epochs", "total"), [(600, 16473), (200, 5478)])
def test_papers_schedule_has_the_training_time_of_its_logs(epochs, total):
    """The sums of the learning rate that the authors' logs give for VGG16 and WRN-28-10."""
    factor = schedule("paper", epochs=epochs, steps_per_epoch=CIFAR)
    rates = [0.1 * factor(epoch * CIFAR) for epoch in range(epochs)]
    assert rates == [0.1 * factor(epoch * CIFAR + CIFAR - 1) for epoch in range(epochs)]
    assert round(CIFAR * math.fsum(rates)) == total


@pytest.mark.parametrize(
    ("recipe", "mu", "threshold"),
    [
        ("vgg16-cifar10", 0.51, 0.0223),
        ("vgg16-cifar10", 0.6, 0.0530),
        ("vgg16-cifar10", 0.7, 0.1384),
        ("wrn28x10-cifar10", 0.501, 0.0235),
        ("wrn28x10-cifar10", 0.55, 0.0357),
        ("wrn28x10-cifar10", 0.6, 0.0547),
        ("wrn28x10-cifar10", 0.65, 0.0837),
    ],
)
def test_recipes_end_at_the_thresholds_of_the_papers_logs(recipe, mu, threshold):
    config = RECIPES[recipe].config
    (spec,) = [s for s in config.specs if s.settings.get("mu") == mu]
    factor = schedule(config.schedule, epochs=config.epochs, steps_per_epoch=CIFAR)
    # The rate is constant within an epoch, so that an epoch's increments add up to one difference.
    found = math.fsum(
        (config.lr * factor(epoch * CIFAR)) ** (mu + 0.5)
        * (((epoch + 1) * CIFAR) ** mu - (epoch * CIFAR) ** mu)
        for epoch in range(config.epochs)
    )
    assert spec.settings["c"] * found == pytest.approx(threshold, abs=1e-4)


def test_published_figures_are_of_runs_that_the_recipes_have():
    for recipe in RECIPES.values():
        assert set(recipe.published) <= set(recipe.config.runs)


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("step:every=3", lambda o: torch.optim.lr_scheduler.StepLR(o, 3)),
        ("step:at=2/7,factor=0.5", lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 7], 0.5)),
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)),
        ("constant", lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    ],
)
def test_schedules_are_those_of_torch(text, make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = make(optimizer)
    ours = schedule(text, epochs=10, steps_per_epoch=1)
    for epoch in range(10):
        assert ours(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warmup_rises_linearly_and_multiplies_the_schedule():
    plain = schedule("cosine", epochs=10, steps_per_epoch=4)
    warm = schedule("cosine", epochs=10, steps_per_epoch=4, warmup=1.5)
    assert [warm(s) / plain(s) for s in range(7)] == pytest.approx(
        [*(k / 6 for k in range(1, 7)), 1]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paprika", "`schedule` must begin with one of constant, paper, step, cosine"),
        ("step", "`schedule` step needs one of `every` and `at`"),
        ("step:every=3,at=4", "`schedule` step needs one of `every` and `at`"),
        ("step:every=0", "`schedule` needs every >= 1 epoch, got 0"),
        ("step:at=4/x", "`schedule` needs epochs such as at=80/120, got at=4/x"),
        ("step:every=3,factor=2", "`schedule` needs 0 < factor <= 1, got 2.0"),
        ("step:every=1.5", "`schedule` needs a whole number for every"),
        ("cosine:every=3", "`schedule` cosine takes no settings"),
        ("step:every=3,every=4", "`schedule` must give every once"),
    ],
)
def test_a_schedule_that_is_not_understood_says_what_to_write(text, message):
    with pytest.raises(ValueError, match=message):
        schedule(text, epochs=10, steps_per_epoch=1)


def test_warmup_below_zero_is_refused():
    with pytest.raises(ValueError, match="`warmup` must be a number of epochs, finite and ≥ 0"):
        schedule("constant", epochs=10, steps_per_epoch=1, warmup=-1.0)


def test_overrides_replace_settings_of_a_recipe_one_by_one():
    config = config_of("vgg16-cifar10", {"epochs": 7, "lr": None, "runs": ("sgd",)})
    base = RECIPES["vgg16-cifar10"].config
    assert (config.epochs, config.runs, config.lr) == (7, ("sgd",), base.lr)
    assert config.schedule == "paper"
    with pytest.raises(ValueError, match="`RECIPE` must be one of lenet-300-100-mnist, "):
        config_of("vgg16-imagenet", {})


@pytest.mark.parametrize("text", ["constant", "step:at=12", "cosine", "paper"])
def test_the_horizon_lands_after_three_quarters_of_the_training_time(text):
    factor = schedule(text, epochs=20, steps_per_epoch=50)
    horizon = horizon_by_time(factor, 1000)
    rates = [factor(step) for step in range(1000)]
    landing = round(0.75 * horizon)
    assert abs(sum(rates[:landing]) / sum(rates) - 0.75) < 0.002
    assert (horizon == 1000) == (text == "constant")
    for steps in range(1, 9):
        constant = schedule("constant", epochs=1, steps_per_epoch=steps)
        assert horizon_by_time(constant, steps) == steps
        assert (
            1
            <= horizon_by_time(schedule("cosine", epochs=1, steps_per_epoch=steps), steps)
            <= steps
        )
