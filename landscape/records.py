"""What was measured at the points of a path or plane, and how; to files and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float64
from safetensors.torch import save as dump_tensors
from torch import Tensor

from hessian.atomic import write_atomically
from hessian.tensor_files import DamagedFileError, read_with_header

FORMAT = "flatvalley sweep"


@dataclass(frozen=True)
class Evaluation:
    """Losses of the samples at every point, as count, sum and sum of squares.

    Args:
        points: Values of t, shape [m], or coordinates in a plane, shape [..., 2].
        count: Number of samples at every point, shape [m] or [...].
        total: Sum of their losses; NaN where the loss is not finite.
        total_squares: Sum of their squared losses; NaN where the loss is not finite.
        provenance: How the numbers were made: what batch norm normalised by, type, path, the way of
            evaluation and its measured deviation; JSON values. Empty if it is not known.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> t, n = torch.tensor([0.0, 1.0]).double(), torch.tensor([4.0, 4.0]).double()
        >>> Evaluation(t, n, 2 * n, 5 * n).standard_error
        tensor([0.5774, 0.5774], dtype=torch.float64)
    """

    points: Float64[Tensor, "..."]
    count: Float64[Tensor, "*shape"]
    total: Float64[Tensor, "*shape"]
    total_squares: Float64[Tensor, "*shape"]
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        along_path = self.points.ndim == 1 and self.count.shape == self.points.shape
        in_plane = self.points.shape == (*self.count.shape, 2)
        if not (along_path or in_plane):
            raise ValueError(
                "`points` must have shape [m] or [..., 2] with one entry of `count` a point, got "
                f"{list(self.points.shape)} and {list(self.count.shape)}."
            )

    @property
    def mean(self) -> Float64[Tensor, "*shape"]:
        """The loss: the mean over samples."""
        return self.total / self.count

    @property
    def standard_error(self) -> Float64[Tensor, "*shape"]:
        """Standard error of every mean, the samples taken as independent; NaN for one sample.

        All points share their samples, so the difference of two points is known better than
        this; `barrier` has the paired error.
        """
        spread = (self.total_squares - self.total**2 / self.count).clamp(min=0)
        error = torch.sqrt(spread / (self.count - 1) / self.count)
        return torch.where(self.count < 2, torch.nan, error)

    @property
    def num_nonfinite(self) -> int:
        """Number of points at which the loss is NaN or infinite."""
        return int((~torch.isfinite(self.mean)).sum())


@dataclass(frozen=True)
class Sweep:
    """Several metrics of several objectives at the same points.

    ``sweep["test", "error"]`` is the `Evaluation` of one metric of one objective.

    Args:
        points: Values of t, shape [m], or coordinates in a plane, shape [..., 2].
        columns: Names of objective and metric.
        sums: Count, sum and sum of squares of every column, shape [columns, 3, ...].
        provenance: How the numbers were made, as in an `Evaluation`.

    Raises:
        ValueError: If the shapes do not fit.
    """

    points: Float64[Tensor, "..."]
    columns: tuple[tuple[str, str], ...]
    sums: Float64[Tensor, "columns three ..."]
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.sums.shape[:2] != (len(self.columns), 3):
            raise ValueError(
                "`sums` must have shape [columns, 3, ...], got "
                f"{list(self.sums.shape)} for {len(self.columns)} columns."
            )

    def __getitem__(self, column: tuple[str, str]) -> Evaluation:
        """Return one metric of one objective.

        Raises:
            KeyError: If it was not measured; the message lists what was.
        """
        if column not in self.columns:
            known = ", ".join(map(str, self.columns))
            raise KeyError(f"{column} was not measured, but {known}.")
        count, total, squares = self.sums[self.columns.index(column)]
        about = dict(self.provenance) | {"objective": column[0], "metric": column[1]}
        return Evaluation(self.points, count, total, squares, about)


def save_sweep(result: Sweep | Evaluation, path: str | Path) -> Path:
    """Write what was measured to a safetensors file, whole or not at all, and return its path.

    The numbers keep every bit; columns and provenance stand as JSON in the file's header, where any
    reader of safetensors sees them. The same sweep gives the same file, byte for byte.

    Args:
        result: From `sweep` or `evaluate`.
        path: The file; its folder is made, a file that is there is replaced.

    Raises:
        OSError: If the file cannot be written; what was there before is left as it was.
    """
    if isinstance(result, Evaluation):
        about = result.provenance
        column = str(about.get("objective", "objective")), str(about.get("metric", "loss"))
        sums = torch.stack([result.count, result.total, result.total_squares])[None]
        result = Sweep(result.points, (column,), sums, about)
    tensors = {"points": result.points.contiguous(), "sums": result.sums.contiguous()}
    header = {
        "format": FORMAT,
        "version": version("flatvalley"),
        "columns": json.dumps(result.columns),
        "provenance": json.dumps(dict(result.provenance)),
    }
    return write_atomically(Path(path), _in_order(dump_tensors(tensors, header)))


def load_sweep(path: str | Path) -> Sweep:
    """Return what `save_sweep` wrote, equal to the last bit.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is cut short, or holds anything else.
    """
    path = Path(path)
    tensors, header = read_with_header(path)
    try:
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')!r} instead of {FORMAT!r}")
        columns = tuple((str(a), str(b)) for a, b in json.loads(header["columns"]))
        return Sweep(tensors["points"], columns, tensors["sums"], json.loads(header["provenance"]))
    except (ValueError, KeyError) as error:
        raise DamagedFileError(
            f"`path` must be a file that `save_sweep` wrote, got {path} ({error})."
        ) from error


def _in_order(data: bytes) -> bytes:
    """The same file, its header in a fixed order: safetensors leaves that to chance."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
