"""The settings of a training: what is trained on what, and by which optimizers side by side."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flatvalley.schedules import schedule
from flatvalley.specs import Spec, parse_spec

OPTIMIZERS: dict[str, Mapping[str, type]] = {
    "sgd": {"lr": float, "momentum": float, "weight_decay": float},
    "grda": {"c": float, "mu": float, "target": float, "horizon": float, "lr": float, "keep": str},
    "magnitude": {
        "target": float,
        "begin": float,
        "end": float,
        "every": int,
        "lr": float,
        "momentum": float,
        "weight_decay": float,
        "keep": str,
    },
}
"""The kinds of runs and their settings."""

PRECISIONS = ("float32", "float64", "tf32", "bf16")
AUGMENTATIONS = ("none", "crop-flip")
SPACINGS = ("even", "log")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training; every one of them may change a number of the result.

    Raises:
        ValueError: If one is out of range; the message says what it must be.

    Example:
        >>> TrainConfig(runs=("sgd", "grda:target=0.95"), epochs=3).specs[1].settings
        {'target': 0.95}
    """

    model: str = "lenet-300-100"
    """Name of a network, or ``package.module:factory``."""
    data: str = "mnist"
    """Name of a data set, a folder of images, or ``package.module:factory``.

    A folder holds ``train`` and ``val``, each with a folder of images for each class.
    """
    runs: tuple[str, ...] = ("sgd", "grda:target=0.9")
    """Optimizers side by side, from one start and on the same batches.

    ``sgd``, with ``momentum``, ``weight_decay``. ``grda``, with ``c`` or ``target`` (the sparsity
    wanted), ``mu`` and ``horizon`` (a share of all steps, after three quarters of which
    the target is to be there; left out, that is after three quarters of the training time).
    ``magnitude``: SGD with gradual magnitude pruning to ``target`` from ``begin`` to ``end``
    (shares of all steps), ``every`` so many steps. All take ``lr`` in place of the common one; the
    sparse ones take ``keep``, glob patterns joined by ``+`` of parameters that stay dense.
    """
    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "constant"
    """See :func:`flatvalley.schedules.schedule`."""
    warmup: float = 0.0
    """Epochs in which the learning rate rises linearly."""
    criterion: str = "cross-entropy"
    """The loss, a mean over the batch; or ``package.module:factory`` of another."""
    seed: int = 0
    """Of the start, the order of the batches, the augmentation and dropout."""
    augment: str = "none"
    """``"none"`` or ``"crop-flip"``: shifts by up to 4 pixels and mirror images.

    Of a folder of images: a random part, 8 to 100 % of the area, in place of a shift.
    """
    image_size: int = 224
    """Height and width of the images of a folder."""
    drop_last: bool = False
    """Whether to leave out the last batch of an epoch where it is smaller."""
    train_samples: int = 0
    """Only so many training samples, the same for every seed, by class; 0 for all."""
    validation: float = 0.0
    """Share of the training samples that is held out to choose settings by.

    The test samples are then looked at once, after the last epoch.
    """
    eval_every: int = 1
    """Epochs between two looks at the held-out samples."""
    log_every: int = 100
    """Steps between two rows of ``steps.csv``; the losses are read from the device only then."""
    precision: str = "float32"
    """``float32``, ``float64``, ``tf32`` (float32 with TF32 products), ``bf16`` (autocast)."""
    channels_last: bool | None = None
    """Memory format of convolutions; None picks the faster one, see ``prepare_model``."""
    compile: bool = False
    """Whether to compile the model: faster steps after a first one that takes a minute."""
    threads: int = 0
    """Threads of torch on the CPU; 0 leaves them as they are."""
    device: str = "cpu"
    snapshots: int = 0
    """Points of the trajectories that are kept beside the start; 0 keeps none."""
    snapshot_spacing: str = "even"
    """``"even"`` or ``"log"``, in steps."""
    specs: tuple[Spec, ...] = field(init=False, repr=False, compare=False)
    """The runs, parsed."""

    def __post_init__(self) -> None:
        least = {
            "epochs": 1,
            "batch_size": 1,
            "eval_every": 1,
            "log_every": 1,
            "image_size": 1,
            "seed": 0,
            "train_samples": 0,
            "threads": 0,
            "snapshots": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be at least {low}, got {getattr(self, name)}.")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite, got {self.lr}.")
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"`validation` must be a share in [0, 1), got {self.validation}.")
        choices = {
            "precision": PRECISIONS,
            "augment": AUGMENTATIONS,
            "snapshot_spacing": SPACINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f'`{name}` must be one of {", ".join(allowed)}, got "{getattr(self, name)}".'
                )
        if self.criterion != "cross-entropy" and ":" not in self.criterion:
            raise ValueError(
                "`criterion` must be cross-entropy or package.module:factory, got "
                f'"{self.criterion}".'
            )
        schedule(self.schedule, epochs=self.epochs, steps_per_epoch=1, warmup=self.warmup)
        if not self.runs:
            raise ValueError("`runs` must name one optimizer or more, got none.")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"`runs` must differ from each other, got {', '.join(self.runs)}.")
        specs = tuple(_run_spec(text) for text in self.runs)
        object.__setattr__(self, "specs", specs)

    def identity(self) -> dict[str, Any]:
        """Return the settings as JSON types, by which a folder knows its run."""
        return {key: value for key, value in vars(self).items() if key != "specs"} | {
            "runs": list(self.runs)
        }


def _run_spec(text: str) -> Spec:
    """Parse one run, and hold its settings against what its kind needs."""
    spec = parse_spec(text, "runs", OPTIMIZERS)
    found = spec.settings
    if spec.name == "grda":
        if ("c" in found) == ("target" in found):
            raise ValueError(
                f'`runs` needs either c or target for grda, got "{text}". Give c, such as '
                "grda:c=0.004, or the sparsity wanted, such as grda:target=0.9."
            )
        if "horizon" in found and "target" not in found:
            raise ValueError(f'`runs` takes horizon with target only, got "{text}".')
    if spec.name == "magnitude" and "target" not in found:
        raise ValueError(f'`runs` needs target for magnitude, such as 0.9, got "{text}".')
    for name in ("lr", "momentum", "weight_decay", "c"):
        if name in found and not 0.0 <= found[name] < math.inf:
            raise ValueError(f'`runs` needs {name} finite and ≥ 0, got "{text}".')
    for name in ("target", "horizon", "begin", "end"):
        if name in found and not 0.0 <= found[name] <= 1.0:
            raise ValueError(f'`runs` needs {name} between 0 and 1, got "{text}".')
    return spec


def file_name(text: str) -> str:
    """Return the text of a run as the name of its folder, for every file system.

    Example:
        >>> file_name("grda:c=0.004,mu=0.6")
        'grda_c0.004_mu0.6'
    """
    for old, new in ((":", "_"), (",", "_"), ("=", ""), ("*", "~"), ("/", "-"), (" ", "")):
        text = text.replace(old, new)
    return text
