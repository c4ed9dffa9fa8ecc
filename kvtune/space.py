"""What a template opens: the settings of keys and of values, and the windows, as the search space
and the price table see them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvtune import parts
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.models import Facts
from kvtune.parts import Codec
from kvtune.policy import LayerPolicy, Policy, to_entry
from kvtune.recipe import Recipe
from kvtune.spans import resolve, write

Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")


@dataclass(frozen=True)
class Opened:
    """What one layer may be: its exact tokens, and the chains
    that its keys and its values choose from."""

    sinks: int
    recent: int
    keys: tuple[Chain, ...]
    values: tuple[Chain, ...]
    per_head: bool = False  # kv heads may differ
    shape: tuple[int, int] = (1, 1)  # kv heads and head_dim

    def chains(self, side: Side) -> tuple[Chain, ...]:
        """The choices of one side."""
        return self.keys if side == "keys" else self.values

    def policy(self, keys: Chain, values: Chain) -> Policy:
        """The layer's policy under two choices."""
        made = Policy(sinks=self.sinks, recent=self.recent, keys=keys, values=values)
        return made.of_shape(*self.shape)

    def policy_by_head(self, heads: Sequence[tuple[Chain, Chain]]) -> Policy:
        """The layer's policy where each kv head has its own keys and values."""
        return Policy.by_head(self.sinks, self.recent, heads).of_shape(*self.shape)

    def cell(self, side: Side, chain: Chain) -> Policy:
        """The layer's policy with one side compressed and the other dense."""
        return self.sided({side: chain})

    def sided(self, chains: Mapping[Side, Chain]) -> Policy:
        """The layer's policy with the given sides compressed and others dense."""
        return self.policy(chains.get("keys", Chain()), chains.get("values", Chain()))


Choices = dict[int, Opened]  # of every compressible layer, under one window


def opened(template: Recipe, known: Facts) -> dict[str, Choices]:
    """Returns what each compressible layer may be, for each window that the template opens.

    A window is one for all layers of a span, so that their pages close in the same step. Settings
    that do not fit the heads are left out. Windows are named ("sinks 4, recent 64") when there are
    several.

    Raises:
        UsageError: nothing is open, or no setting of a layer fits the model.
    """
    if not template.is_open():
        raise UsageError(
            f"{template.name or 'The template'} opens nothing to search.",
            'Write "search" for a setting: bits = "search".',
        )
    if closed := [own.span for own in template.layers if own.heads and not own.per_head]:
        raise UsageError(
            f"Layers {closed[0]} list their heads in a template, which searches layers as a whole.",
            'Write heads = "search" there, or leave the heads out.',
        )
    if selecting := [own.span for own in template.layers if own.select is not None]:
        raise UsageError(
            f"Layers {selecting[0]} select tokens in a template, which searches codecs only.",
            "Leave select out there, or measure such recipes with `kvtune bench tiers`.",
        )
    if sharing := [own.span for own in template.layers if own.share is not None]:
        raise UsageError(
            f"Layers {sharing[0]} share their cache in a template, which searches layers apart.",
            "Leave share out there, or compare such recipes with `kvtune bench sharing`.",
        )
    owner = resolve([policy.span for policy in template.layers], len(known.layers))
    layers = {i: template.layers[owner[i]] for i in known.compressible()}
    shapes = {i: (known.layers[i].kv_heads, known.layers[i].head_dim) for i in layers}
    sides = {
        i: [_fitting(tables, shapes[i], side, i) for side, tables in _tables(policy)]
        for i, policy in layers.items()
    }
    for i, policy in layers.items():
        if policy.per_head and (joint := [c for own in sides[i] for c in own if not c.apart]):
            raise UsageError(
                f"Layer {i} opens its heads and {joint[0]}, which stores heads together.",
                'Leave heads = "search" out there.',
            )
    opens = list(dict.fromkeys(policy.windows() for policy in layers.values()))
    found = {}
    for windows in itertools.product(*opens):
        at = dict(zip(opens, windows, strict=True))
        found[_window_name(opens, windows)] = {
            i: Opened(
                *at[policy.windows()],
                keys=sides[i][0],
                values=sides[i][1],
                per_head=policy.per_head,
                shape=shapes[i],
            )
            for i, policy in layers.items()
        }
    return found


def _tables(policy: LayerPolicy) -> list[tuple[Side, Sequence[dict[str, Any]]]]:
    return [("keys", policy.kept.keys), ("values", policy.kept.values)]


def _window_name(
    opens: Sequence[tuple[tuple[int, int], ...]], windows: Sequence[tuple[int, int]]
) -> str:
    """The windows that were open to choice, in words; nothing when none was."""
    free = [window for pairs, window in zip(opens, windows, strict=True) if len(pairs) > 1]
    return "; ".join(f"sinks {sinks}, recent {recent}" for sinks, recent in free)


def _fitting(
    tables: Sequence[dict[str, Any]], shape: tuple[int, int], side: Side, layer: int
) -> tuple[Chain, ...]:
    fits, reason = [], ""
    for own in _alternatives(tables):
        for codecs in itertools.product(*(list(parts.choices(table)) for table in own)):
            chain = Chain(tuple(codec for codec in codecs if isinstance(codec, Codec)))
            try:
                chain.check(*shape, side)
            except ValueError as error:
                reason = str(error)
            else:
                fits.append(chain)
    if not fits:
        raise UsageError(f"No setting of layer {layer}'s {side} fits the model: {reason}.")
    return tuple(dict.fromkeys(fits))


def _alternatives(tables: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """All lists of tables that a list with alternatives (`any = [[...], [...]]`) stands for."""
    each = [table.get(parts.ANY, [[table]]) for table in tables]
    return [list(itertools.chain.from_iterable(lists)) for lists in itertools.product(*each)]


def to_recipe(policies: dict[int, Policy], layers: int, **fields: Any) -> Recipe:
    """Returns the recipe of resolved policies, equal layers sharing one entry."""
    spans: dict[Policy, list[int]] = {}
    for layer in range(layers):
        spans.setdefault(policies.get(layer, Policy()), []).append(layer)
    entries = tuple(to_entry(policy, write(found)) for policy, found in spans.items())
    return Recipe(layers=entries, **fields)
