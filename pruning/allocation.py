"""Which weights stay: a ranking of scores over all parameters, or with a share for each."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hessian import Objective
from pruning.pruned import wanted_zeros
from pruning.scores import require_weights

Allocation: TypeAlias = Literal["global", "uniform"] | Mapping[str, float]
"""``"global"``, ``"uniform"``, or sparsities by glob pattern; see ``keep_mask``."""


def keep_mask(
    scores: Float[Tensor, " d"],
    w: Float[Tensor, " d"],
    *,
    sparsity: float,
    objective: Objective | None = None,
    allocation: Allocation = "global",
    exclude: Sequence[str] = (),
    progress: float = 1.0,
) -> Bool[Tensor, " d"]:
    """Return True for the weights that stay when those of the lowest scores go.

    Exactly ⌈sparsity · d⌉ weights go, those that are zero already among them, or only these if
    there are more. Of equal scores, the first in order go first.

    ============= ===========================================================================
    allocation    who competes with whom
    ============= ===========================================================================
    ``"global"``  all weights, in one ranking
    ``"uniform"`` the weights of one parameter tensor; all tensors give the same share, but for
                  those that have more zeros already
    a mapping     the weights of a tensor that a pattern fits give its share; all others are
                  ranked together, to meet ``sparsity``
    ============= ===========================================================================

    Args:
        scores: What keeps a weight, shape [d]; infinities are welcome.
        w: Weights, shape [d].
        sparsity: Share of zeros wanted among all d, in [0, 1].
        objective: Knows the parameters by name; needed for all but one global ranking.
        allocation: See the table. Of several patterns that fit, the first counts.
        exclude: Glob patterns of parameters that stay as they are. They count for the sparsity,
            and no allocation concerns them.
        progress: Share in [0, 1] of the weights that have to go that goes now, for pruning in
            stages: of m in all, exactly round(progress · m).

    Raises:
        ValueError: If w is not finite, a score is NaN, something does not fit, a share is outside
            [0, 1], a pattern matches nothing, or the sparsity cannot be reached.

    Example:
        >>> import torch
        >>> w = torch.tensor([3.0, -1.0, 0.5, 2.0])
        >>> keep_mask(w.abs(), w, sparsity=0.5)
        tensor([ True, False, False,  True])
    """
    if scores.shape != w.shape:
        raise ValueError(
            f"`scores` must hold one score for each of the {len(w)} weights, got shape "
            f"{list(scores.shape)}."
        )
    fixed = zeros_by_parameter(
        w, sparsity=sparsity, objective=objective, allocation=allocation, exclude=exclude
    )
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"`progress` must be in [0, 1], got {progress}.")
    if torch.isnan(scores).any():
        raise ValueError(f"`scores` must not be NaN, got {int(torch.isnan(scores).sum())} such.")
    keep = w != 0
    may_go = keep & prunable(w, objective, exclude)
    left = wanted_zeros(sparsity, len(w)) - int((~keep).sum())
    places = {} if objective is None else parameter_slices(objective)
    going = {name: zeros - int((w[places[name]] == 0).sum()) for name, zeros in fixed.items()}
    now = _shares_now([*going.values(), max(left - sum(going.values()), 0)], progress)
    for name, count in zip(going, now[:-1], strict=True):
        part = places[name]
        _drop_lowest_(keep[part], scores[part], may_go[part], count)
        may_go[part] = False
    _drop_lowest_(keep, scores, may_go, now[-1])
    return keep


def zeros_by_parameter(
    w: Float[Tensor, " d"],
    *,
    sparsity: float,
    objective: Objective | None = None,
    allocation: Allocation = "global",
    exclude: Sequence[str] = (),
) -> dict[str, int]:
    """Return the number of zeros of every parameter for which no ranking is needed to know it.

    All that may go for ``"uniform"``, rounded by largest remainders so that the total is exact;
    those that a pattern fits for a mapping; none for ``"global"``.

    Args:
        w: Weights, shape [d].
        sparsity: As for ``keep_mask``, like all that follow.
        objective: Knows the parameters by name.
        allocation: Who competes with whom.
        exclude: Glob patterns of parameters that stay.

    Raises:
        ValueError: As ``keep_mask``, for all but the scores.
    """
    require_weights(w)
    if not isinstance(allocation, Mapping) and allocation not in ("global", "uniform"):
        raise ValueError(
            '`allocation` must be "global", "uniform" or a mapping of glob patterns to '
            f"sparsities, got {allocation!r}."
        )
    if allocation != "global" and objective is None:
        raise ValueError(
            '`allocation` other than "global" needs an Objective, which knows the parameters by '
            "name. Pass it as `objective`."
        )
    if objective is not None:
        objective.require_vector(w, "w")
    may_go = prunable(w, objective, exclude)
    zeros = int((w == 0).sum())
    wanted = max(wanted_zeros(sparsity, len(w)), zeros)
    most = zeros + int((may_go & (w != 0)).sum())
    if wanted > most:
        raise _unreachable("at most", most, w, "what `exclude` keeps", sparsity)
    if objective is None or allocation == "global":
        return {}
    places = parameter_slices(objective)
    if isinstance(allocation, Mapping):
        found = _by_pattern(allocation, w, places, may_go)
        open_places = may_go & (w != 0)
        for name in found:
            open_places[places[name]] = False
        gone = sum(found.values()) - sum(int((w[places[name]] == 0).sum()) for name in found)
        least = zeros + gone
        if wanted < least:
            raise _unreachable("at least", least, w, "this `allocation`", sparsity)
        most = least + int(open_places.sum())
        if wanted > most:
            raise _unreachable("at most", most, w, "this `allocation`", sparsity)
        return found
    # Sizes and zeros of the tensors that may go; the others have the zeros they have.
    sizes = {name: part.stop - part.start for name, part in places.items()}
    has = {name: int((w[part] == 0).sum()) for name, part in places.items()}
    goes = [name for name, part in places.items() if sizes[name] and bool(may_go[part.start])]
    rest = wanted - sum(count for name, count in has.items() if name not in goes)
    return _equal_shares({name: (sizes[name], has[name]) for name in goes}, rest)


def prunable(
    w: Float[Tensor, " d"], objective: Objective | None, exclude: Sequence[str]
) -> Bool[Tensor, " d"]:
    """Return True for the weights of parameters that no pattern in ``exclude`` names.

    Raises:
        ValueError: If a pattern matches nothing, or there are patterns and no objective.
    """
    marks = torch.ones_like(w)
    if exclude and objective is None:
        raise ValueError(
            "`exclude` needs an Objective, which knows the parameters by name. Pass the one that "
            "the weights belong to."
        )
    parts = {} if objective is None else objective.unflatten(marks)
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        for name in _matches(pattern, parts, "exclude"):
            parts[name].zero_()
    return marks != 0


def parameter_slices(objective: Objective) -> dict[str, slice]:
    """Return the place of every parameter in the flat vector."""
    sizes = [shape.numel() for shape in objective.shapes.values()]
    ends = accumulate(sizes)
    return {
        name: slice(end - size, end)
        for name, size, end in zip(objective.shapes, sizes, ends, strict=True)
    }


def _by_pattern(
    allocation: Mapping[str, float], w: Tensor, places: Mapping[str, slice], may_go: Tensor
) -> dict[str, int]:
    """Return the zeros of the parameters that a pattern fits and that may go."""
    found: dict[str, int] = {}
    for pattern, share in allocation.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(
                f'`allocation` must hold sparsities in [0, 1], got {share} for "{pattern}".'
            )
        for name in _matches(pattern, places, "allocation"):
            part = places[name]
            values = w[part]
            if name not in found and len(values) and bool(may_go[part.start]):
                found[name] = max(wanted_zeros(share, len(values)), int((values == 0).sum()))
    return found


def _equal_shares(tensors: Mapping[str, tuple[int, int]], total: int) -> dict[str, int]:
    """Cut a number of zeros into equal shares of tensors, given by size and zeros they have."""
    found: dict[str, int] = {}
    share, whole = total, sum(size for size, _ in tensors.values())
    while True:
        # In integers, so that equal shares are equal.
        full = [
            name
            for name, (size, has) in tensors.items()
            if name not in found and has * whole > share * size
        ]
        if not full:
            break
        for name in full:
            size, found[name] = tensors[name]
            share, whole = share - found[name], whole - size
    rest = {name: share * size for name, (size, _) in tensors.items() if name not in found}
    found |= {name: product // whole for name, product in rest.items()}
    by_remainder = sorted(rest, key=lambda name: -(rest[name] % whole))
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    return found


def _shares_now(counts: Sequence[int], progress: float) -> list[int]:
    """Return a share of each count, rounded by largest remainders to that of their sum."""
    exact = [progress * count for count in counts]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: round(progress * sum(counts)) - sum(found)]:
        found[i] += 1
    return found


def _drop_lowest_(keep: Tensor, scores: Tensor, may_go: Tensor, count: int) -> None:
    places = may_go.nonzero()[:, 0]
    keep[places[scores[places].argsort(stable=True)[:count]]] = False


def _matches(pattern: str, names: Mapping[str, object], parameter: str) -> list[str]:
    hits = [name for name in names if fnmatchcase(name, pattern)]
    if not hits:
        raise ValueError(f'`{parameter}` pattern "{pattern}" matches none of {", ".join(names)}.')
    return hits


def _unreachable(bound: str, zeros: int, w: Tensor, why: str, sparsity: float) -> ValueError:
    # Ten digits give the number of zeros back, see `wanted_zeros`.
    share = f"{zeros / len(w):.10g}"
    return ValueError(f"`sparsity` must be {bound} {share} with {why}, got {sparsity}.")
