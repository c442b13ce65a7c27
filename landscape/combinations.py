"""Weights at a point of a path or plane, written in closed form into one flat buffer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape.paths import BezierCurve, Line, Path, PolyChain
from landscape.planes import Plane


@dataclass(frozen=True)
class Combination:
    """A path or plane as Σ_k c_k(point) v_k, with coefficients that depend on the point alone.

    Whatever is affine in the weights, such as the first layer's output, is then the same
    combination of what it is at the v_k.
    """

    vectors: tuple[Tensor, ...]
    coefficients: Callable[[Tensor], tuple[float, ...]]
    is_line: bool = False


def as_combination(path: Path | Plane) -> Combination | None:
    """Return what a path or plane combines; None for a function that does not say."""
    if isinstance(path, Plane):
        return Combination((path.origin, path.u, path.v), lambda p: (1.0, *p.tolist()))
    if isinstance(path, Line):
        return Combination((path.start, path.end), lambda p: (1.0 - float(p), float(p)), True)
    if isinstance(path, BezierCurve | PolyChain):
        points: BezierCurve | PolyChain = path
        return Combination(
            tuple(path.control_points.detach()),
            lambda p: tuple(points.coefficients(float(p)).tolist()),
        )
    return None


def defining_vectors(path: Path | Plane, points: Tensor) -> tuple[Tensor, ...]:
    """Return what tells a path or plane from others: what it combines, or where it passes."""
    combination = as_combination(path)
    if combination is not None:
        return combination.vectors
    # A function is known by its values only; three of the points, shape [m].
    return tuple(path(float(t)) for t in points[[0, len(points) // 2, -1]])


def write_weights_(
    out: Tensor, combination: Combination, point: Tensor, entries: slice = slice(None)
) -> None:
    """Write the weights at a point; each point from the origin, never from its neighbour.

    Terms of coefficient zero are left out, so that ends and origin are met to the last bit.

    Args:
        out: The flat buffer, shape [d].
        combination: Of the path or plane.
        point: Where.
        entries: Which entries of the buffer are written.
    """
    coefficients = combination.coefficients(point)
    terms = tuple(v[entries] for v in combination.vectors)
    if combination.is_line and 0.0 not in coefficients:
        # Entries in which both ends agree stay what they are.
        start, end = terms
        torch.lerp(start, end, coefficients[1], out=out[entries])
    else:
        combine_(out[entries], terms, coefficients)


def combine_(out: Tensor, terms: tuple[Tensor, ...], coefficients: tuple[float, ...]) -> None:
    """Write Σ_k c_k t_k into a buffer of the terms' shape."""
    first = True
    for term, c in zip(terms, coefficients, strict=True):
        if c == 0.0:
            continue
        if not first:
            out.add_(term, alpha=c)
        elif c == 1.0:
            out.copy_(term)
        else:
            torch.mul(term, c, out=out)
        first = False
    if first:
        out.zero_()


def describe_path(path: Path | Plane) -> dict[str, Any]:
    """Return what is known of a path or plane, as JSON values."""
    found: dict[str, Any] = {"kind": type(path).__name__}
    if isinstance(path, Plane):
        found |= {"axes": list(path.labels), "lengths": list(path.lengths), "cosine": path.cosine}
    elif isinstance(path, BezierCurve | PolyChain):
        found["control_points"] = len(path.control_points)
    return found
