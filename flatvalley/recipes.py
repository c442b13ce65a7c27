"""Trainings by name: the settings of the papers, and of this project's own tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flatvalley.train_config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """Settings of a training, and where they come from."""

    config: TrainConfig
    origin: str
    published: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Test accuracy and sparsity by run, as they were printed or logged."""


_PAPER = "Chao, Wang, Xing, Cheng (2020), Directional Pruning of Deep Neural Networks"

RECIPES: Mapping[str, Recipe] = {
    "lenet-300-100-mnist": Recipe(
        TrainConfig(
            model="lenet-300-100",
            data="mnist",
            runs=(
                "sgd",
                *(f"grda:target={s}" for s in (0.9, 0.95, 0.98)),
                *(f"magnitude:target={s}" for s in (0.9, 0.95, 0.98)),
            ),
            epochs=20,
            lr=0.1,
        ),
        "this project's table of sparsities, with gradual magnitude pruning beside gRDA",
    ),
    "lenet-5-mnist": Recipe(
        TrainConfig(
            model="lenet-5",
            data="mnist",
            runs=(
                "sgd",
                *(f"grda:target={s}" for s in (0.9, 0.95, 0.98)),
                *(f"magnitude:target={s}" for s in (0.9, 0.95, 0.98)),
            ),
            epochs=20,
            lr=0.05,
        ),
        "this project's table of sparsities, with gradual magnitude pruning beside gRDA",
    ),
    "resnet20-cifar10": Recipe(
        TrainConfig(
            model="resnet20",
            data="cifar10",
            runs=("sgd", "grda:target=0.8", "grda:target=0.9"),
            epochs=200,
            lr=0.1,
            schedule="paper",
            augment="crop-flip",
        ),
        f"the network of He et al. (2016) with the schedule of {_PAPER}",
    ),
    "vgg16-cifar10": Recipe(
        TrainConfig(
            model="vgg16",
            data="cifar10",
            runs=("sgd", *(f"grda:c=0.0005,mu={mu}" for mu in (0.51, 0.6, 0.7))),
            epochs=600,
            lr=0.1,
            schedule="paper",
            augment="crop-flip",
        ),
        _PAPER,
        {
            "sgd": (0.9082, 0.0),
            "grda:c=0.0005,mu=0.51": (0.9102, 0.614),
            "grda:c=0.0005,mu=0.6": (0.9086, 0.905),
            "grda:c=0.0005,mu=0.7": (0.9064, 0.972),
        },
    ),
    "wrn28x10-cifar10": Recipe(
        TrainConfig(
            model="wrn-28-10",
            data="cifar10",
            runs=("sgd", *(f"grda:c=0.001,mu={mu}" for mu in (0.501, 0.55, 0.6, 0.65))),
            epochs=200,
            lr=0.1,
            schedule="paper",
            augment="crop-flip",
        ),
        _PAPER,
        {
            "sgd": (0.9417, 0.0),
            "grda:c=0.001,mu=0.501": (0.9446, 0.9017),
            "grda:c=0.001,mu=0.55": (0.9443, 0.9474),
            "grda:c=0.001,mu=0.6": (0.9450, 0.9707),
            "grda:c=0.001,mu=0.65": (0.9453, 0.9829),
        },
    ),
    "resnet50-imagenet": Recipe(
        TrainConfig(
            model="resnet50",
            data="imagenet",
            runs=("sgd", *(f"grda:c=0.005,mu={mu}" for mu in (0.501, 0.51, 0.55))),
            epochs=150,
            batch_size=256,
            lr=0.1,
            schedule="step:at=140",
            augment="crop-flip",
        ),
        _PAPER,
        {
            "grda:c=0.005,mu=0.501": (0.73126, 0.860885),
            "grda:c=0.005,mu=0.51": (0.73140, 0.872770),
            "grda:c=0.005,mu=0.55": (0.73240, 0.915893),
        },
    ),
}
"""Recipes by name. All train without momentum and weight decay, as gRDA's theory has none."""


def config_of(recipe: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a recipe with some of them replaced; without one, the defaults.

    Args:
        recipe: A name in ``RECIPES``, or None.
        overrides: Settings by name; those that are None stay as they are.

    Raises:
        ValueError: If the recipe is not known, or a setting is out of range.

    Example:
        >>> config_of("lenet-5-mnist", {"epochs": 2, "lr": None}).lr
        0.05
    """
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f'`RECIPE` must be one of {", ".join(RECIPES)}, got "{recipe}".')
    base = TrainConfig() if recipe is None else RECIPES[recipe].config
    return replace(base, **{key: value for key, value in overrides.items() if value is not None})
