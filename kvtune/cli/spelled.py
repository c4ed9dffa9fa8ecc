"""Recipes in words: policies, bytes and measured numbers, without loading a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvtune.errors import UsageError
from kvtune.spans import resolve, write

if TYPE_CHECKING:
    from kvtune.recipe import LayerPolicy, ModelBinding, Recipe

Words = dict[str, str]  # what a layer does: exact tokens, keys, values
DENSE: Words = {"exact": "all", "keys": "16-bit", "values": "16-bit"}


def policy(entry: LayerPolicy) -> Words:
    """What an entry of a recipe does, in three short texts."""
    sides = {side: _side(entry, side) for side in ("keys", "values")}
    if set(sides.values()) == {DENSE["keys"]}:
        return DENSE
    held = {"first": _count(entry.sinks), "last": _count(entry.recent)}
    exact = ", ".join(f"{where} {count}" for where, count in held.items() if count)
    return {"exact": exact or "none", **sides}


def _side(entry: LayerPolicy, side: str) -> str:
    """The chain of one side; those of kv heads that have their own, or of tokens that lose."""
    from kvtune.recipe import Tier

    told = chain(getattr(entry.kept, side))
    if entry.select is not None:
        fate = chain(getattr(entry.rest, side)) if isinstance(entry.rest, Tier) else "dropped"
        return f"{told} where {_codec(entry.select)}, rest {fate}"
    if entry.share is not None:
        codecs = getattr(entry.kept, side)
        return " > ".join([_codec(entry.share), *([told] if codecs else [])])
    if entry.heads == "search":
        return f"{told}, each head its own"
    others = [f"heads {one.span}: {chain(getattr(one.kept, side))}" for one in entry.heads]
    if not others:
        return told
    same = all(other.endswith(f": {told}") for other in others)
    return told if same else "; ".join([told, *others])


def _count(tokens: int | str | tuple[int, ...]) -> str:
    if isinstance(tokens, tuple):
        return " or ".join(map(str, tokens))
    return str(tokens or "")


def chain(tables: Sequence[Mapping[str, Any]]) -> str:
    """A chain of codecs; `search` stands where a template is open."""
    return " > ".join(_codec(table) for table in tables) or DENSE["keys"]


def _codec(table: Mapping[str, Any]) -> str:
    from kvtune import parts

    if parts.ANY in table:
        return f"either {' or '.join(f'({chain(tables)})' for tables in table[parts.ANY])}"
    free = parts.is_open(table) or isinstance(table.get("share"), list | tuple)
    whole = dict(table) if free else parts.parse(table).table()
    optional = whole.pop(parts.OPTIONAL, False)
    settings = " ".join(f"{key}={value}" for key, value in whole.items() if key != "use")
    told = f"{whole['use']} {settings}".strip()
    return f"({told})" if optional else told


def layers(recipe: Recipe, count: int) -> list[Words]:
    """What each of `count` layers does."""
    if not recipe.layers:
        return [DENSE] * count
    said = [policy(entry) for entry in recipe.layers]
    return [said[owner] for owner in resolve([entry.span for entry in recipe.layers], count)]


def weight(binding: ModelBinding, recipe: Recipe, context: int, batch: int) -> dict[str, Any]:
    """What a recipe stores for the model that it names, to the last scale."""
    from kvtune.cache import weigh
    from kvtune.models import FULL, Facts, LayerFacts

    layer = LayerFacts(FULL, binding.kv_heads, binding.kv_heads, binding.head_dim)
    known = Facts(binding.architecture, (layer,) * binding.layers, context, 0)
    found = weigh(recipe.policies(known), known, context, batch)
    return {
        "bytes": found.bytes,
        "dense_bytes": found.dense_bytes,
        "ratio": found.ratio,
        "bits": found.bits,
        "payload_bits": found.payload_bits,
        "bytes_context": context,
        "batch": batch,
    }


def differences(left: Recipe, right: Recipe, count: int) -> list[dict[str, Any]]:
    """The layers in which two recipes differ, equal differences together."""
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    pairs = zip(layers(left, count), layers(right, count), strict=True)
    for layer, (a, b) in enumerate(pairs):
        if a != b:
            found.setdefault((tuple(a.values()), tuple(b.values())), []).append(layer)
    return [
        {
            "layers": write(own),
            "left": dict(zip(DENSE, a, strict=True)),
            "right": dict(zip(DENSE, b, strict=True)),
        }
        for (a, b), own in found.items()
    ]


def layer_count(left: Recipe, right: Recipe, wanted: int | None) -> int:
    """How many layers to compare: those of the models that the recipes name.

    Raises:
        UsageError: models of different depth.
    """
    known = {recipe.model.layers for recipe in (left, right) if recipe.model}
    if len(known) > 1:
        told = " and ".join(map(str, sorted(known)))
        raise UsageError(
            f"The recipes are for models of {told} layers.", "Compare two of one model."
        )
    return known.pop() if known else wanted or 32


def numbers(recipe: Recipe) -> dict[str, float]:
    """The measured numbers of a recipe."""
    kinds = (int, float)
    return {
        name: value
        for name, value in recipe.measured.items()
        if isinstance(value, kinds) and not isinstance(value, bool)
    }
