"""What a recipe does in each layer, and in each head where heads differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtune import parts
from kvtune.cli import spelled
from kvtune.parts import SEARCH, Codec
from kvtune.recipe import LayerPolicy, Recipe
from kvtune.spans import resolve

DENSE_BITS = 16.0
Tables = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Stored:
    """How one side is stored: code bits per value, group size ("head" or a number), the chain."""

    bits: float
    group: str
    chain: str

    @classmethod
    def of(cls, tables: Tables) -> Stored:
        """Of a chain's tables; the empty chain stores 16-bit values."""
        codecs = [parts.parse(table) for table in tables]
        bits = [codec.payload_bits for codec in codecs if isinstance(codec, Codec)]
        groups = [str(codec.table()["group"]) for codec in codecs if "group" in codec.table()]
        said = spelled.chain(tuple(dict(table) for table in tables))
        return cls(min(bits, default=DENSE_BITS), groups[-1] if groups else "", said)


Sides = Mapping[str, Stored]  # keys and values


@dataclass(frozen=True)
class Layer:
    """One layer: its exact tokens, both sides, and the heads that are treated in another way."""

    index: int
    sinks: int
    recent: int
    sides: Sides
    heads: Mapping[int, Sides]

    def side(self, name: str, head: int) -> Stored:
        """How one side of one kv head is stored."""
        return self.heads.get(head, self.sides)[name]


def of_recipe(recipe: Recipe, count: int) -> list[Layer]:
    """What each of `count` layers does; a recipe without entries leaves all of them as they are."""
    if not recipe.layers:
        return [Layer(i, 0, 0, _sides({}), {}) for i in range(count)]
    owner = resolve([entry.span for entry in recipe.layers], count)
    kv_heads = recipe.model.kv_heads if recipe.model else 0
    made = [_entry(entry, kv_heads) for entry in recipe.layers]
    return [Layer(i, *recipe.layers[owner[i]].windows()[0], *made[owner[i]]) for i in range(count)]


def _entry(entry: LayerPolicy, kv_heads: int) -> tuple[Sides, dict[int, Sides]]:
    table = entry.model_dump(mode="json")
    own = _sides(table["kept"])
    named = table.get("heads") or ()
    if not named or named == SEARCH or not kv_heads:
        return own, {}
    heads: dict[int, Sides] = {}
    for one in named:
        picked = resolve([one["span"], "rest"], kv_heads)
        heads |= {head: _sides(one["kept"]) for head in range(kv_heads) if picked[head] == 0}
    return own, heads


def _sides(kept: Mapping[str, Any]) -> Sides:
    return {side: Stored.of(kept.get(side) or ()) for side in ("keys", "values")}
