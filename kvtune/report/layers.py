"""What a recipe does in each layer, and in each head where heads differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtune import parts
from kvtune.cli import spelled
from kvtune.parts import SEARCH, Codec, Projection
from kvtune.recipe import LayerPolicy, Recipe, Tier
from kvtune.retention import Selector
from kvtune.spans import resolve

DENSE_BITS = 16.0
Tables = Sequence[Mapping[str, Any]]
Shape = tuple[int, int] | None  # kv heads and head_dim


@dataclass(frozen=True)
class Stored:
    """How one side is stored: code bits per value, group size ("head" or a number), the chain, and
    which part of the channels is stored."""

    bits: float
    group: str
    chain: str
    rank: float = 1.0

    @classmethod
    def of(cls, tables: Tables, shape: Shape = None) -> Stored:
        """Of a chain's tables, for heads of a shape; the empty chain stores 16-bit values. Where
        heads are known, what a projection saves is rank and no bits."""
        codecs = [parts.parse(table) for table in tables]
        coding = [own for own in codecs if not (shape and isinstance(own, Projection))]
        bits = [codec.payload_bits for codec in coding if isinstance(codec, Codec)]
        groups = [str(codec.table()["group"]) for codec in codecs if "group" in codec.table()]
        said = spelled.chain(tuple(dict(table) for table in tables))
        group = groups[-1] if groups else ""
        return cls(min(bits, default=DENSE_BITS), group, said, _rank(codecs, shape))


def _rank(codecs: Sequence[parts.Part], shape: Shape) -> float:
    """The part of the channels that is stored; 1 where heads are not known."""
    if shape is None:
        return 1.0
    left = shape
    for codec in codecs:
        if isinstance(codec, Codec):
            left = codec.shape(*left)
    return math.prod(left) / math.prod(shape)


Sides = Mapping[str, Stored]  # keys and values


@dataclass(frozen=True)
class Layer:
    """One layer: its exact tokens, both sides, and the heads that are treated in another way."""

    index: int
    sinks: int
    recent: int
    sides: Sides
    heads: Mapping[int, Sides]
    tokens: float = 1.0  # the part that stays of those that leave the window

    def side(self, name: str, head: int) -> Stored:
        """How one side of one kv head is stored."""
        return self.heads.get(head, self.sides)[name]


def of_recipe(recipe: Recipe, count: int, context: int = 0) -> list[Layer]:
    """What each of `count` layers does; a recipe without entries leaves all of them as they are.
    A budget in tokens is a part of a context, where that is given."""
    if not recipe.layers:
        return [Layer(i, 0, 0, _sides({}), {}) for i in range(count)]
    owner = resolve([entry.span for entry in recipe.layers], count)
    kv_heads = recipe.model.kv_heads if recipe.model else 0
    shape = (kv_heads, recipe.model.head_dim) if recipe.model else None
    made = [_entry(entry, kv_heads, shape) for entry in recipe.layers]
    entries = [recipe.layers[own] for own in owner]
    return [
        Layer(i, *entries[i].windows()[0], *made[owner[i]], _tokens(entries[i], context))
        for i in range(count)
    ]


def _tokens(entry: LayerPolicy, context: int) -> float:
    """The part of the tokens that is stored at all: a rest tier stores those that lose."""
    if entry.select is None or isinstance(entry.rest, Tier):
        return 1.0
    select = parts.parse(entry.select)
    assert isinstance(select, Selector), "the entry was checked"
    if select.budget:
        return min(1.0, select.budget / context) if context else 1.0
    return select.share


def _entry(entry: LayerPolicy, kv_heads: int, shape: Shape) -> tuple[Sides, dict[int, Sides]]:
    table = entry.model_dump(mode="json")
    own = _sides(table["kept"], shape)
    named = table.get("heads") or ()
    if not named or named == SEARCH or not kv_heads:
        return own, {}
    heads: dict[int, Sides] = {}
    for one in named:
        picked = resolve([one["span"], "rest"], kv_heads)
        heads |= {head: _sides(one["kept"], shape) for head in range(kv_heads) if picked[head] == 0}
    return own, heads


def _sides(kept: Mapping[str, Any], shape: Shape = None) -> Sides:
    return {side: Stored.of(kept.get(side) or (), shape) for side in ("keys", "values")}
