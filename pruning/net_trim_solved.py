"""One layer of a network, solved by Net-Trim, and as tensors with JSON beside them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hessian import Objective
from hessian.errors import NonFiniteError
from pruning.layer_trim import LayerTrim, shortfall
from pruning.net_trim_layer_search import sparse_to
from pruning.net_trim_options import TrimOptions
from pruning.net_trim_problem import GroupProblem, group_problems
from pruning.net_trim_survey import FoundLayer

NUMBERS = tuple(field.name for field in fields(LayerTrim) if field.name != "weights")


@dataclass(frozen=True)
class SolvedLayer:
    """The sparse weights of one layer of a network."""

    trims: tuple[LayerTrim, ...]
    """One for each group of outputs, in order."""
    drift: float
    """The discrepancy of the dense weights on the inputs of the programs."""
    told: tuple[str, ...]
    """Of budgets that ran out."""

    @property
    def rows(self) -> Float[Tensor, "m n"]:
        """The weights of all groups, a row an output."""
        return torch.cat([trim.weights for trim in self.trims])


def solved_layer(
    objective: Objective,
    layer: FoundLayer,
    dense: Float[Tensor, " d"],
    now: Float[Tensor, " d"] | None,
    share: float,
    options: TrimOptions,
    known: dict[str, list[GroupProblem]] | None = None,
) -> SolvedLayer:
    """Return the sparse weights of a layer.

    Args:
        objective: Model and calibration inputs.
        layer: Which layer.
        dense: Weights of which the layer keeps the outputs.
        now: Weights that give the layer its inputs. Default: the dense ones.
        share: ε over the norm of outputs, or the share of zeros that is wanted.
        options: As for ``net_trim``.
        known: Programs of layers, by weight, to take or to add to. Default: they are made.

    Raises:
        NonFiniteError: As ``net_trim``; the message names the layer.
    """
    try:
        problems = None if known is None else known.get(layer.weight)
        if problems is None:
            problems = group_problems(
                objective,
                layer,
                dense,
                now,
                ball=options.ball,
                penalise_bias=options.penalise_bias,
                options=options.program,
            )
        if known is not None:
            known[layer.weight] = problems
        trims: list[LayerTrim] = []
        told: list[str] = []
        if options.layer_sparsity is None:
            sizes = [problem.epsilon(share, options.gamma) for problem in problems]
            sparse = [
                problem.sparse(epsilon, before_refit=options.refit, **options.goal)
                for problem, epsilon in zip(problems, sizes, strict=True)
            ]
        else:
            sparse, missed = sparse_to(problems, share, options, has_bias=layer.bias is not None)
            told += [f"Layer of `{layer.weight}`: {text}" for text in missed]
        for problem, found in zip(problems, sparse, strict=True):
            trim = problem.program.refit(found, **options.goal) if options.refit else found
            if not trim.converged:
                told.append(f"Layer of `{layer.weight}`: {shortfall(trim, options.tol)}")
            trims.append(problem.own(trim))
    except NonFiniteError as error:
        raise NonFiniteError(f"Layer of `{layer.weight}`: {error}") from error
    except Exception as error:
        error.add_note(f"In the layer of `{layer.weight}`.")
        raise
    drift = math.hypot(*(problem.drift or 0.0 for problem in problems))
    return SolvedLayer(tuple(trims), drift, tuple(told))


def packed(layers: Mapping[str, SolvedLayer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return layers, by weight, as tensors with JSON values beside them; every bit is kept."""
    tensors, about = {}, []
    for name, layer in layers.items():
        for i, trim in enumerate(layer.trims):
            tensors[f"{name}/{i}"] = trim.weights
        numbers = [{key: getattr(trim, key) for key in NUMBERS} for trim in layer.trims]
        about.append({"weight": name, "drift": layer.drift, "told": layer.told, "trims": numbers})
    return tensors, {"layers": about}


def unpacked(
    tensors: Mapping[str, Tensor], about: Mapping[str, Sequence[Any]], device: torch.device
) -> dict[str, SolvedLayer]:
    """Return layers as they were before ``packed``."""
    return {
        entry["weight"]: SolvedLayer(
            tuple(
                # Copies, because tensors inside of a file's bytes lie at any address.
                LayerTrim(weights=tensors[f"{entry['weight']}/{i}"].clone().to(device), **numbers)
                for i, numbers in enumerate(entry["trims"])
            ),
            entry["drift"],
            tuple(entry["told"]),
        )
        for entry in about["layers"]
    }
