"""What a template opens: the settings of keys and of
values, as the search space and the price table see them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvtune import parts
from kvtune.errors import UsageError
from kvtune.models import Facts
from kvtune.parts import Chain, Codec
from kvtune.recipe import LayerPolicy, Policy, Recipe, Tier
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

    def chains(self, side: Side) -> tuple[Chain, ...]:
        """The choices of one side."""
        return self.keys if side == "keys" else self.values

    def policy(self, keys: Chain, values: Chain) -> Policy:
        """The layer's policy under two choices."""
        return Policy(sinks=self.sinks, recent=self.recent, keys=keys, values=values)

    def cell(self, side: Side, chain: Chain) -> Policy:
        """The layer's policy with one side compressed and the other dense."""
        return self.policy(chain, Chain()) if side == "keys" else self.policy(Chain(), chain)


def opened(template: Recipe, known: Facts) -> dict[int, Opened]:
    """Returns what each compressible layer may be; settings that do not fit the heads are left out.

    Raises:
        UsageError: nothing is open, or no setting of a layer fits the model.
    """
    if not template.is_open():
        raise UsageError(
            f"{template.name or 'The template'} opens nothing to search.",
            'Write "search" for a setting: bits = "search".',
        )
    owner = resolve([policy.span for policy in template.layers], len(known.layers))
    return {
        i: _opened(template.layers[owner[i]], known.layers[i].head_dim, i)
        for i in known.compressible()
    }


def _opened(policy: LayerPolicy, head_dim: int, layer: int) -> Opened:
    keys = _fitting(policy.kept.keys, head_dim, "keys", layer)
    values = _fitting(policy.kept.values, head_dim, "values", layer)
    return Opened(policy.sinks, policy.recent, keys, values)


def _fitting(
    tables: Sequence[dict[str, Any]], head_dim: int, side: Side, layer: int
) -> tuple[Chain, ...]:
    fits, reason = [], ""
    for codecs in itertools.product(*(list(parts.choices(table)) for table in tables)):
        chain = Chain(tuple(codec for codec in codecs if isinstance(codec, Codec)))
        try:
            chain.check(head_dim, side)
        except ValueError as error:
            reason = str(error)
        else:
            fits.append(chain)
    if not fits:
        raise UsageError(f"No setting of layer {layer}'s {side} fits the model: {reason}.")
    return tuple(dict.fromkeys(fits))


def to_recipe(policies: dict[int, Policy], layers: int, **fields: Any) -> Recipe:
    """Returns the recipe of resolved policies, equal layers sharing one entry."""
    spans: dict[Policy, list[int]] = {}
    for layer in range(layers):
        spans.setdefault(policies.get(layer, Policy()), []).append(layer)
    entries = tuple(_entry(policy, write(found)) for policy, found in spans.items())
    return Recipe(layers=entries, **fields)


def _entry(policy: Policy, span: str) -> LayerPolicy:
    tier = Tier(keys=tuple(policy.keys.tables()), values=tuple(policy.values.tables()))
    return LayerPolicy(span=span, sinks=policy.sinks, recent=policy.recent, kept=tier)
