"""Short texts that name a thing and its settings: ``grda:c=0.004,mu=0.6``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Spec:
    """A name with settings, parsed from ``name:key=value,key=value``."""

    name: str
    settings: Mapping[str, Any]


def parse_spec(text: str, option: str, known: Mapping[str, Mapping[str, type]]) -> Spec:
    """Return the name and the settings that a text gives, each value of its known type.

    Args:
        text: For example ``"grda:c=0.004,mu=0.6"``.
        option: What the text was given for, for messages.
        known: The settings of every name, with their types: float, int, str or bool.

    Raises:
        ValueError: If the name or a setting is not known, is given twice, or is not of its type.

    Example:
        >>> parse_spec("step:every=30", "schedule", {"step": {"every": int}})
        Spec(name='step', settings={'every': 30})
    """
    name, _, rest = text.strip().partition(":")
    if name not in known:
        raise ValueError(f'`{option}` must begin with one of {", ".join(known)}, got "{text}".')
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if key not in known[name] or not separator:
            offer = ", ".join(f"{k}=…" for k in known[name]) or "no settings"
            raise ValueError(f'`{option}` {name} takes {offer}, got "{part}" in "{text}".')
        if key in settings:
            raise ValueError(f'`{option}` must give {key} once, got "{text}".')
        kind = known[name][key]
        try:
            settings[key] = _TRUTH[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            word = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise ValueError(f'`{option}` needs {word} for {key}, got "{text}".') from None
    return Spec(name, settings)
