"""Whether there are calibration samples enough for what is to be learned from them."""

import warnings
from collections.abc import Mapping


class CalibrationWarning(UserWarning):
    """There are too few calibration inputs for what is to be learned from them."""


def warn_of_few(layers: Mapping[str, tuple[int, int]], damping: str, *, stacklevel: int) -> None:
    """Tell which layers have fewer calibration rows than inputs.

    Args:
        layers: Rows and inputs by the name of the layer's weight.
        damping: Name of the parameter that stands in for what is missing.
        stacklevel: Of the warning, as seen by the caller.
    """
    few = {name: rows / inputs for name, (rows, inputs) in layers.items() if rows < inputs}
    if few:
        worst = min(few, key=lambda name: few[name])
        rows, inputs = layers[worst]
        warnings.warn(
            f"{len(few)} of {len(layers)} layers have fewer calibration rows (samples times "
            f"positions) than inputs, the worst `{worst}` with {rows} for {inputs}, so what is "
            f"known of them rests on `{damping}`. Pass more calibration inputs, or raise the "
            "damping.",
            CalibrationWarning,
            stacklevel=stacklevel + 1,
        )
