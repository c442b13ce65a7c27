"""Which weights of a model stay, kept beside the model so that the model stays plain."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hessian import NonFiniteError
from hessian.atomic import write_atomically
from hessian.flat_weights import FlatWeights
from hessian.parameters import unwrapped
from hessian.tensor_files import DamagedFileError
from hessian.unsharded import is_sharded

FORMAT = "flatvalley masks 1"


@dataclass(frozen=True, eq=False)
class Masks:
    """Which weights stay, by the names of a model's parameters.

    Nothing is put into the model: no hook, no buffer, no other parameter. Its ``state_dict`` is
    that of a dense model, and ``deepcopy``, ``torch.export`` and ``DistributedDataParallel`` see
    nothing. ``keep_zeros`` holds the zeros while an optimizer trains.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> masks = Masks.of(model)
        >>> _ = model.weight.data.add_(1.0)  # as momentum or an average of weights would
        >>> _ = masks.apply_(model)
        >>> model.weight.data, masks.sparsity
        (tensor([[2., 0.],
                [0., 3.]]), 0.5)
    """

    keep: Mapping[str, Tensor] = field(repr=False)
    """Booleans in the shapes of the parameters: True for weights that stay. Tied ones once."""
    zeros: Mapping[str, int] = field(init=False)
    """Number of weights that go, by parameter."""

    def __post_init__(self) -> None:
        for name, mask in self.keep.items():
            if mask.dtype != torch.bool:
                raise TypeError(
                    f"`keep` must hold boolean tensors, got {mask.dtype} for `{name}`. Say "
                    "`weights != 0`."
                )
        if not sum(mask.numel() for mask in self.keep.values()):
            raise ValueError("`keep` must speak of at least one weight, got none.")
        object.__setattr__(self, "keep", dict(self.keep))
        zeros = {name: int((~mask).sum()) for name, mask in self.keep.items()}
        object.__setattr__(self, "zeros", zeros)

    @classmethod
    def of(cls, model: nn.Module, *, exclude: str | Sequence[str] = ()) -> "Masks":
        """Return the masks of the zeros that a model has now.

        Every zero counts, also that of a bias that has not been trained yet: exclude what should
        stay dense, for instance ``"*bias"``.

        Args:
            model: Only read. Data-parallel, ``torch.compile`` and averaging wrappers are taken off.
            exclude: Glob patterns of parameters that the masks shall not speak of.

        Raises:
            ValueError: If a pattern matches no parameter, or nothing is left.
            TypeError: If a parameter is sharded over ranks (DTensor).
            NonFiniteError: If a weight is NaN or infinite.
        """
        params = _parameters(model)
        for pattern in patterns(exclude):
            hits = [name for name in params if fnmatchcase(name, pattern)]
            if not hits:
                raise ValueError(
                    f'`exclude` pattern "{pattern}" matches none of {", ".join(params)}.'
                )
            for name in hits:
                del params[name]
        for name, p in params.items():
            if not torch.isfinite(p).all():
                raise NonFiniteError(
                    f"`model` must have finite weights, but `{name}` holds NaN or infinity."
                )
        return cls({name: p.detach() != 0 for name, p in params.items()})

    @classmethod
    def from_vector(cls, objective: FlatWeights, mask: Bool[Tensor, " d"]) -> "Masks":
        """Return the masks that a flat vector means to an objective's weights.

        Args:
            objective: Says which weights make up the vector, and in which order.
            mask: True for weights that stay, shape [d], such as ``pruned.mask``.

        Raises:
            ValueError: If the mask has another length than the objective's weights.
            TypeError: If it is not boolean.
        """
        if mask.dtype != torch.bool:
            raise TypeError(
                f"`mask` must be a boolean tensor, got {mask.dtype}. Say `weights != 0`."
            )
        flags = mask.to(objective.dtype)
        return cls({name: part.bool() for name, part in objective.unflatten(flags).items()})

    @property
    def num_weights(self) -> int:
        """Number of weights that the masks speak of."""
        return sum(mask.numel() for mask in self.keep.values())

    @property
    def num_zeros(self) -> int:
        """Number of weights that go."""
        return sum(self.zeros.values())

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights that the masks speak of."""
        return self.num_zeros / self.num_weights

    def sparsity_by_parameter(self) -> dict[str, float]:
        """Return the share of zeros of every parameter, by name."""
        return {name: self.zeros[name] / max(1, mask.numel()) for name, mask in self.keep.items()}

    def pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Bool[Tensor, "..."]]]:
        """Return the parameters that have zeros, each with True where a weight goes.

        Args:
            model: A model with the same parameters; wrappers are taken off. It may have more.

        Raises:
            ValueError: If a parameter is missing or has another shape; the message names all.
            TypeError: If a parameter is sharded over ranks (DTensor).
        """
        params = _parameters(model, every_name=True)
        differing = [
            f"`{name}` {list(mask.shape)}"
            + (f" here {list(params[name].shape)}" if name in params else " missing here")
            for name, mask in self.keep.items()
            if name not in params or params[name].shape != mask.shape
        ]
        if differing:
            raise ValueError(
                "`model` must have the parameters that the masks were made for, got another model: "
                f"{', '.join(differing)}."
            )
        return [
            (params[name], (~mask).to(params[name].device))
            for name, mask in self.keep.items()
            if self.zeros[name]
        ]

    def apply_(self, model: nn.Module) -> nn.Module:
        """Set the weights that go to zero, and return the model.

        Serves for any copy: a dense one, a checkpoint, the averages of an ``AveragedModel``.

        Raises:
            ValueError: If the masks are of another model. It is left as it was.
            TypeError: If a parameter is sharded over ranks (DTensor).
        """
        with torch.no_grad():
            for p, gone in self.pairs(model):
                p.masked_fill_(gone, 0.0)
        return model

    def apply_to_gradients_(self, model: nn.Module) -> nn.Module:
        """Set the gradients of weights that go to zero, and return the model.

        ``keep_zeros`` does so at every step. Do it before that where gradients are put together:
        ahead of ``clip_grad_norm_``, and in the closure of an L-BFGS.

        Raises:
            ValueError: If the masks are of another model.
            TypeError: If a parameter is sharded over ranks (DTensor).
        """
        for p, gone in self.pairs(model):
            if p.grad is not None:
                p.grad.masked_fill_(gone, 0.0)
        return model

    def save(self, path: str | Path) -> Path:
        """Write the masks to a safetensors file, one bit a weight, and return the path.

        Raises:
            OSError: If the file cannot be written; what was there before is left as it was.
        """
        shapes = {name: list(mask.shape) for name, mask in self.keep.items()}
        bits = {name: pack_bits(mask) for name, mask in self.keep.items()}
        metadata = {"format": FORMAT, "shapes": json.dumps(shapes)}
        return write_atomically(Path(path), dump_tensors(bits, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Masks":
        """Return the masks that ``save`` wrote, on the CPU.

        Whether they are of the model at hand is looked at where they are applied.

        Raises:
            FileNotFoundError: If there is no such file.
            DamagedFileError: If it is damaged, or was written by something else.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise DamagedFileError(
                f"`path` must be a whole safetensors file, got {path} ({error})."
            ) from error
        if header.get("format") != FORMAT:
            raise DamagedFileError(
                f"`path` must be a file that `Masks.save` wrote, got {path} with "
                f"{', '.join(sorted(bits)) or 'no tensors'}."
            )
        try:
            shapes = json.loads(header["shapes"])
            if shapes.keys() != bits.keys():
                raise ValueError("names and shapes differ")
            return cls({name: unpack_bits(bits[name], shape) for name, shape in shapes.items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFileError(f"`path` {path} is damaged ({error}).") from error


def pack_bits(mask: Bool[Tensor, "..."]) -> Tensor:
    """Return booleans as bytes, eight in each, the first in the highest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Bool[Tensor, "..."]:
    """Return the booleans that ``pack_bits`` took, in their shape.

    Raises:
        ValueError: If there are more or fewer than the shape asks for.
    """
    size = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-size // 8),):
        raise ValueError(f"{list(packed.shape)} {packed.dtype} bytes for shape {list(shape)}")
    bits = np.unpackbits(packed.numpy())
    if bits[size:].any():
        raise ValueError("bits beyond the last weight")
    return torch.from_numpy(bits[:size].astype(bool)).view(list(shape))


def patterns(selection: str | Sequence[str]) -> Sequence[str]:
    """Return one or several glob patterns as a sequence."""
    return [selection] if isinstance(selection, str) else selection


def _parameters(model: nn.Module, *, every_name: bool = False) -> dict[str, nn.Parameter]:
    """Return whole floating-point parameters by name, tied ones once or under each name."""
    if isinstance(model, AveragedModel):
        model = model.module
    named: Any = unwrapped(model).named_parameters(remove_duplicate=not every_name)
    params = {name: p for name, p in named if p.is_floating_point()}
    for name, p in params.items():
        if is_sharded(p):
            raise TypeError(
                f"`model` must hold whole parameters, but `{name}` is sharded over ranks (DTensor)."
                " Train with DistributedDataParallel."
            )
    return params
