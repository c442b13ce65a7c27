"""Results to files and tables: safetensors without pickle, pandas."""

import dataclasses
import json
import math
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save as dump_tensors
from torch import Tensor

from hessian.atomic import write_atomically
from hessian.subspace import Eigenspace
from hessian.tensor_files import DamagedFileError, read_with_header

FORMAT = "flatvalley eigenspace"


def save(result: Eigenspace, path: str | Path) -> Path:
    """Write an eigenspace to a safetensors file, whole or not at all.

    Tensors keep their types and every bit; they are on the CPU when read again. Everything else
    stands as JSON in the file's header, where any reader of safetensors sees it.

    Args:
        result: What ``leading_eigenspace`` returned.
        path: The file; its folder is made, a file that is there is replaced.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written; what was there before is left as it was.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    metadata = {"format": FORMAT, "version": version("flatvalley")}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.detach().cpu().contiguous()
        else:
            metadata[field.name] = json.dumps(_worded(value))
    write_atomically(path, dump_tensors(tensors, metadata))
    return path


def load_eigenspace(path: str | Path) -> Eigenspace:
    """Return the eigenspace that ``save`` wrote, equal to the last bit, on the CPU.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is cut short, or holds anything else.
    """
    path = Path(path)
    tensors, header = read_with_header(path)
    if header.get("format") != FORMAT:
        raise DamagedFileError(
            f"`path` must be a file that `save` wrote from an eigenspace, got {path} with "
            f"{', '.join(sorted(tensors)) or 'no tensors'}."
        )
    known = {field.name: field for field in dataclasses.fields(Eigenspace)}
    values: dict[str, Any] = dict(tensors)
    values |= {name: _number(json.loads(text)) for name, text in header.items() if name in known}
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is dataclasses.MISSING
    ]
    if missing or values.keys() - known:
        raise DamagedFileError(
            f"{path} was written by flatvalley {header.get('version')} with other fields: "
            f"{', '.join(sorted(missing or values.keys() - known))}. Read it with that version."
        )
    return Eigenspace(**values)


def to_pandas(result: Eigenspace) -> Any:
    """Return a DataFrame with one row a pair: its value and its residual.

    The table's ``attrs`` hold everything else but the vectors: the gap, the number of products,
    whether all pairs converged, how they lead, the chance that one was missed, whether the
    residuals were measured, and how many products were exact.

    Raises:
        ModuleNotFoundError: If pandas is not installed.
    """
    pandas = require_pandas()
    table = pandas.DataFrame(
        {"value": result.values.cpu().numpy(), "residual": result.residuals.cpu().numpy()}
    )
    table.index.name = "pair"
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if not isinstance(value, Tensor):
            table.attrs[field.name] = value
    return table


def require_pandas() -> Any:
    """Return the module ``pandas``.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        return import_module("pandas")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`to_pandas` needs pandas. Install it with `pip install pandas`."
        ) from error


def _worded(value: Any) -> Any:
    """Return a value as strict JSON has it, where numbers are finite."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
