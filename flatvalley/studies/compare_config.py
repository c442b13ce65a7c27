"""The settings of a comparison of methods of pruning."""

from dataclasses import dataclass, field
from typing import Any

from flatvalley.dense_network import CALIBRATION_BATCH
from flatvalley.pruning_problem import require_sparsities
from flatvalley.studies.compare_rows import Row, parse_row
from flatvalley.train_config import TrainConfig

DEFAULT_METHODS = (
    "krylov:temperature=4",
    "eigenspace:k=50",
    "woodfisher:stages=4",
    "obc",
    "net-trim",
    "obd",
    "wanda",
    "dp-projector:k=50",
    "magnitude",
    "random",
)
DEFAULT_TRAINING = TrainConfig(
    model="digits-mlp", data="digits", runs=("sgd",), epochs=30, batch_size=32, threads=1
)


@dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison.

    Raises:
        ValueError: If one is out of range; the message says what it must be.

    Example:
        >>> CompareConfig(methods=("krylov:temperature=2|4",))
        Traceback (most recent call last):
        ...
        ValueError: `validation` must be above 0 to choose among the settings of \
krylov:temperature=2|4 by, got 0. Hold out a share of the training samples, such as 0.1.
    """

    training: TrainConfig = DEFAULT_TRAINING
    """Of the dense networks; its first run says by which optimizer, its seed is not used."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """A row each; see :mod:`flatvalley.studies.compare_rows`."""
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    seeds: tuple[int, ...] = (0, 1, 2)
    """A dense network each, with calibration samples of its own."""
    calibration: int | None = None
    """Training samples that methods look at; None for 10,000 or all."""
    calibration_batch: int = CALIBRATION_BATCH
    exclude: tuple[str, ...] = ()
    """Glob patterns of parameters that stay as many as they are."""
    recalibrate: bool = True
    """Whether the statistics of batch norm are renewed for sparse weights."""
    rows: tuple[Row, ...] = field(init=False, repr=False, compare=False)
    """The methods, parsed."""

    def __post_init__(self) -> None:
        require_sparsities(self.sparsities)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                "`methods` must be one or more that differ from each other, got "
                f"{', '.join(self.methods) or 'none'}."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                "`seeds` must be one or more whole numbers, each once and none negative, got "
                f"{', '.join(map(str, self.seeds)) or 'none'}."
            )
        if self.training.specs[0].name != "sgd" or len(self.training.runs) != 1:
            raise ValueError(
                f"`dense` must be one run of sgd, got {', '.join(self.training.runs)}."
            )
        rows = tuple(parse_row(text) for text in self.methods)
        for row in rows:
            if row.retrains and self.exclude:
                raise ValueError(
                    f"`exclude` cannot go with {row.text}, whose sparsity is that of the weights "
                    "it may prune. Use its own keep=, or leave one of them out."
                )
            if len(row.candidates) > 1 and not self.training.validation:
                raise ValueError(
                    "`validation` must be above 0 to choose among the settings of "
                    f"{row.text} by, got 0. Hold out a share of the training samples, such as 0.1."
                )
        object.__setattr__(self, "rows", rows)

    def identity(self) -> dict[str, Any]:
        """Return what the numbers of one cell depend on, as JSON types.

        Methods and seeds are no part of it: a folder takes more of them later.
        """
        training = {k: v for k, v in self.training.identity().items() if k != "seed"}
        names = ("sparsities", "calibration", "calibration_batch", "exclude", "recalibrate")
        return {"training": training} | {name: getattr(self, name) for name in names}
