"""Methods of pruning by name: ``krylov:temperature=4``, ``magnitude:allocation=uniform``."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatvalley.pruning_methods import METHODS, Method
from flatvalley.pruning_problem import PrunedAt, PruningProblem
from flatvalley.pruning_runs import EIGENSPACE, require_replay
from flatvalley.specs import Spec, parse_spec
from pruning.allocation import prunable

_SIGNS = {"temperature": "T", "mu": "μ", "gamma": "γ"}


@dataclass(frozen=True)
class Pruner:
    """A method with its settings, as ``pruner`` parses it."""

    text: str
    method: Method
    spec: Spec

    @property
    def labels(self) -> bool:
        """Whether it takes the labels of the calibration samples."""
        return self.method.labels(self.spec.settings)

    @property
    def title(self) -> str:
        """The method and its settings as people write them."""
        return ", ".join([self.method.title, *settings_title(self.spec.settings)])

    def require(self, problem: PruningProblem) -> None:
        """See that the method can do what the problem asks for.

        Raises:
            ValueError: If it cannot, a pattern matches no parameter, there are fewer weights
                than eigenpairs that it takes, or it needs a training that is not known or not
                covered.
        """
        prunable(problem.w, problem.objective, problem.exclude)  # refuses what matches nothing
        if self.method.replays:
            require_replay(problem)
        allocates = problem.allocation is not None
        for name, asked in (("exclude", bool(problem.exclude)), ("allocation", allocates)):
            if asked and name not in self.method.takes:
                raise ValueError(
                    f"`{name}` cannot go with {self.spec.name}, which knows no such thing. Leave "
                    "one of them out."
                )
        if allocates and "allocation" in self.spec.settings:
            raise ValueError(f'`allocation` is given twice, the second time in "{self.text}".')
        k = self.spec.settings.get("k", EIGENSPACE["k"] if "k" in self.method.settings else 1)
        if k > len(problem.w):
            raise ValueError(
                f"`method` {self.spec.name} needs k at most {len(problem.w):,}, the number of "
                f"weights, got {k:,}. Give a smaller one: {self.spec.name}:k=…"
            )

    def prune(self, problem: PruningProblem, sparsities: Sequence[float]) -> Iterator[PrunedAt]:
        """Prune the dense network to sparsities that increase, one after the other.

        Methods that work in stages make one run through all of them.

        Raises:
            ValueError: If sparsities do not increase or cannot be reached, or a setting does not
                fit the network.
            NonFiniteError: If weights, a loss or a product are not finite.
        """
        problem.require_sparsities(sparsities)
        self.require(problem)
        return self.method.run(problem, sparsities, self.spec.settings)


def pruner(text: str, option: str = "method") -> Pruner:
    """Return the method of pruning that a text names.

    Args:
        text: For example ``"krylov:temperature=4,products=50"``.
        option: What the text was given for, for messages.

    Raises:
        ValueError: If the method or a setting is not known or out of range.

    Example:
        >>> pruner("eigenspace:k=50").title
        'compensated, eigenspace, k=50'
    """
    spec = parse_spec(text, option, {name: method.settings for name, method in METHODS.items()})
    method = METHODS[spec.name]
    try:
        method.check(spec.settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f'`{option}` "{text}": {error}') from error
    return Pruner(text, method, spec)


def settings_title(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as people write them.

    Example:
        >>> settings_title({"temperature": 4.0, "stages": 3, "refit": True})
        ['T=4', 'stages=3', 'refit=true']
    """
    return [
        f"{_SIGNS.get(key, key)}={value:g}" if isinstance(value, float) else f"{key}={_word(value)}"
        for key, value in settings.items()
    ]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def alternatives(text: str) -> list[str]:
    """Return every setting of a text with alternatives between bars.

    Example:
        >>> alternatives("krylov:temperature=2|4,products=50")
        ['krylov:temperature=2,products=50', 'krylov:temperature=4,products=50']
    """
    name, separator, rest = text.partition(":")
    if not separator:
        return [text]
    parts = []
    for part in rest.split(","):
        key, equals, values = part.partition("=")
        parts.append([f"{key}{equals}{value}" for value in values.split("|")])
    return [f"{name}:{','.join(chosen)}" for chosen in itertools.product(*parts)]
