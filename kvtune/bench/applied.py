"""Applied: a recipe's formats at another shape, as one row of the kernels' bench."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from kvtune.bench.cases import Case, Row, Shape, ratio
from kvtune.errors import UnsupportedError, UsageError
from kvtune.models import FULL, Facts, LayerFacts
from kvtune.policy import Policy
from kvtune.recipe import Recipe

LAYERS = 32  # of a recipe that names no model


def row_of(recipe: Recipe, shape: Shape) -> Row:
    """The mean of all layers of a recipe, each with its own formats, at a shape: bits a channel
    are kept where head_dim differs.

    Raises:
        UnsupportedError: kernels do not read a layer's codes.
        UsageError: heads that differ within a layer, or settings that do not fit the shape's heads.
    """
    bound = recipe.model
    layer = LayerFacts(FULL, shape.kv_heads, shape.heads, shape.head_dim)
    known = Facts("", (layer,) * (bound.layers if bound else LAYERS), shape.context, 1)
    found = Counter(_case(policy, shape) for policy in recipe.policies(known))
    name = f"{recipe.name or 'recipe'}, mean of {len(known.layers)} layers"
    return Row(0, name, (ratio(1),), tuple(found), tuple(found.values()))


def _case(policy: Policy, shape: Shape) -> Case:
    if policy.heads or policy.select:
        raise UsageError(
            "The bench takes recipes that treat all heads and tokens of a layer alike."
        )
    formats = [chain.format(shape.head_dim) for chain in (policy.keys, policy.values)]
    if formats[0] is None or formats[1] is None:
        odd = policy.keys if formats[0] is None else policy.values
        raise UnsupportedError(f"No kernel reads {odd}.", "Time it with `kvtune bench decode`.")
    return Case(formats[0], formats[1], replace(shape, ragged=False))
