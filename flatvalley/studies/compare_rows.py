"""The rows of a comparison: methods of pruning, and trainings that end sparse."""

from collections.abc import Mapping
from dataclasses import dataclass

from flatvalley.pruners import alternatives, pruner, settings_title
from flatvalley.pruning_methods import METHODS
from flatvalley.specs import parse_spec
from flatvalley.train_config import OPTIMIZERS, TrainConfig

TRAININGS: Mapping[str, tuple[str, str]] = {
    "grda": ("grda", "gRDA"),
    "gradual-magnitude": ("magnitude", "gradual magnitude"),
}
"""Rows that train from the start: the optimizer of ``flatvalley train``, and what to call it."""
_NOT_FOR_ROWS = ("target", "c")
"""A row's sparsities are those of the comparison."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a method with settings, or with settings to choose from."""

    text: str
    candidates: tuple[str, ...]
    retrains: bool
    """Whether weights are trained on the way, by as many steps as the dense network's."""
    title: str
    sees: str
    """What it looks at: ``"nothing"``, ``"inputs"``, ``"labels"`` or ``"training"``, all of it."""

    @property
    def label(self) -> str:
        """The title, marked where weights are trained."""
        return f"{self.title} (retrained)" if self.retrains else self.title

    @property
    def kind(self) -> str:
        """Name of the method."""
        return self.text.partition(":")[0]


def parse_row(text: str) -> Row:
    """Return the row that a text names.

    Args:
        text: A method of ``flatvalley.pruners``, ``grda`` or ``gradual-magnitude``, with settings.
            Of a setting with alternatives, ``krylov:temperature=2|4``, one is chosen for every
            sparsity, by samples held out.

    Raises:
        ValueError: If the method or a setting is not known or out of range.

    Example:
        >>> parse_row("krylov:temperature=2|4").candidates
        ('krylov:temperature=2', 'krylov:temperature=4')
    """
    found = tuple(alternatives(text))
    name = text.partition(":")[0].strip()
    if name in TRAININGS:
        specs = [parse_spec(candidate, "methods", _training_settings()) for candidate in found]
        for candidate in found:
            TrainConfig(runs=(training_run(candidate, 0.5),))
        title, sees = TRAININGS[name][1], "training"
    elif name in METHODS:
        pruners = [pruner(candidate, "methods") for candidate in found]
        specs = [found.spec for found in pruners]
        method = METHODS[name]
        title = method.title
        labels = any(found.labels for found in pruners)
        sees = "labels" if labels else "inputs" if method.calibrates else "nothing"
        sees = "training" if method.replays else sees
    else:
        known = ", ".join([*METHODS, *TRAININGS])
        raise ValueError(f'`methods` must begin with one of {known}, got "{text}".')
    fixed = {
        key: value
        for key, value in specs[0].settings.items()
        if all(spec.settings[key] == value for spec in specs)
    }
    title = ", ".join([title, *settings_title(fixed)])
    return Row(text, found, name in TRAININGS, title, sees)


def training_run(text: str, sparsity: float) -> str:
    """Return the run of ``flatvalley train`` that a row's text means at a sparsity.

    Example:
        >>> training_run("gradual-magnitude:every=10", 0.9)
        'magnitude:every=10,target=0.9'
    """
    name, _, rest = text.partition(":")
    settings = [*([rest] if rest else []), f"target={sparsity:.10g}"]
    return f"{TRAININGS[name][0]}:{','.join(settings)}"


def _training_settings() -> dict[str, dict[str, type]]:
    return {
        name: {k: v for k, v in OPTIMIZERS[optimizer].items() if k not in _NOT_FOR_ROWS}
        for name, (optimizer, _) in TRAININGS.items()
    }
