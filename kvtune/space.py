"""What a template opens: the settings of keys and of values, and the windows, as the search space
and the price table see them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kvtune import parts, selection
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.models import Facts
from kvtune.parts import Codec, Quantizer
from kvtune.policy import LayerPolicy, Policy, to_entry
from kvtune.recipe import Recipe
from kvtune.retention import Selector
from kvtune.spans import resolve, write

Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")
WHOLE: Literal["layers"] = "layers"  # beside the sides: what has one setting of all three axes
AXES = ("tokens", "bits", "rank")


class Triple(NamedTuple):
    """The setting of a whole layer: which tokens stay (None: all), and both chains."""

    select: Selector | None
    keys: Chain
    values: Chain

    @property
    def projects(self) -> bool:
        """Whether anything is projected."""
        return self.keys.projects or self.values.projects

    @property
    def axes(self) -> frozenset[str]:
        """Which of tokens, bits and rank it saves by."""
        return _axes(self.select, (self.keys, self.values))

    def __str__(self) -> str:
        told = f"{self.keys} | {self.values}"
        return told if self.select is None else f"{told} | {self.select}"


@dataclass(frozen=True)
class Opened:
    """What one layer may be: its exact tokens, and the chains
    that its keys and its values choose from.

    Where `selects` holds selectors, the layer is searched as a whole: it has all of its tokens or
    those of one of them, and 16 bits are among the chains of each side.
    """

    sinks: int
    recent: int
    keys: tuple[Chain, ...]
    values: tuple[Chain, ...]
    per_head: bool = False  # kv heads may differ
    shape: tuple[int, int] = (1, 1)  # kv heads and head_dim
    selects: tuple[Selector, ...] = ()  # of shares below 1, the largest first

    def chains(self, side: Side) -> tuple[Chain, ...]:
        """The choices of one side."""
        return self.keys if side == "keys" else self.values

    def policy(self, keys: Chain, values: Chain, select: Selector | None = None) -> Policy:
        """The layer's policy under two choices, of all tokens or of those that are selected."""
        made = Policy(sinks=self.sinks, recent=self.recent, keys=keys, values=values, select=select)
        return made.of_shape(*self.shape)

    def policy_of(self, triple: Triple) -> Policy:
        """The layer's policy under a setting of the whole layer."""
        return self.policy(triple.keys, triple.values, triple.select)

    def policy_by_head(self, heads: Sequence[tuple[Chain, Chain]]) -> Policy:
        """The layer's policy where each kv head has its own keys and values."""
        return Policy.by_head(self.sinks, self.recent, heads).of_shape(*self.shape)

    @property
    def anchors(self) -> tuple[Selector | None, ...]:
        """The selections under which chains are priced; between their shares prices of chains are
        interpolated. All tokens, the smallest share, and one in the middle."""
        found = (None, *self.selects[len(self.selects) // 2 :][:1], *self.selects[-1:])
        return tuple(dict.fromkeys(found))

    def cells(self, side: Side) -> list[tuple[Chain, Selector | None]]:
        """What is priced of one side while the other is dense: every chain under every anchor;
        with keys, selections alone as well. Of all tokens at 16 bits the price is nothing."""
        if not self.selects:
            return [(chain, None) for chain in self.chains(side)]
        alone = [(Chain(), select) for select in self.selects] if side == "keys" else []
        coded = [chain for chain in self.chains(side) if chain.codecs]
        return [*alone, *((chain, select) for select in self.anchors for chain in coded)]

    def cell(self, side: Side, chain: Chain, select: Selector | None = None) -> Policy:
        """The layer's policy with one side compressed and the other dense."""
        return self.sided({side: chain}, select)

    def sided(self, chains: Mapping[Side, Chain], select: Selector | None = None) -> Policy:
        """The layer's policy with the given sides compressed and others dense."""
        return self.policy(chains.get("keys", Chain()), chains.get("values", Chain()), select)


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
    if listed := [own.span for own in template.layers if own.heads and not own.per_head]:
        raise UsageError(
            f"Layers {listed[0]} list their heads in a template, which searches layers as a whole.",
            'Write heads = "search" there, or leave the heads out.',
        )
    closed = [own for own in template.layers if own.select is not None and not own.selectors()]
    if closed:
        raise UsageError(
            f"Layers {closed[0].span} select tokens in a template, by a share that is not opened.",
            'Write share = "search" in select, or leave select out there.',
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
    selects = {i: policy.selectors() for i, policy in layers.items()}
    if any(selects.values()):
        sides = {i: [_with_dense(own) for own in found] for i, found in sides.items()}
        _check_selects(selects, sides)
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
                selects=selects[i],
            )
            for i, policy in layers.items()
        }
    return found


def _with_dense(chains: tuple[Chain, ...]) -> tuple[Chain, ...]:
    return tuple(dict.fromkeys((Chain(), *chains)))


def _check_selects(
    selects: Mapping[int, tuple[Selector, ...]], sides: Mapping[int, list[tuple[Chain, ...]]]
) -> None:
    for i, own in selects.items():
        for select, found in itertools.product(own[:1], sides[i]):
            for chain in found:
                selection.check(select, (0, 0), (chain, chain), None, None, f"layer {i}")


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


def axes(policies: Sequence[Policy]) -> frozenset[str]:
    """Which of tokens, bits and rank a recipe saves by."""
    return frozenset[str]().union(*(_axes(own.select, own.chains) for own in policies))


def _axes(select: Selector | None, chains: Sequence[Chain]) -> frozenset[str]:
    codecs = [codec for chain in chains for codec in chain.codecs]
    used = {
        "tokens": select is not None,
        "bits": any(isinstance(codec, Quantizer) for codec in codecs),
        "rank": any(chain.projects for chain in chains),
    }
    return frozenset(axis for axis, there in used.items() if there)


def to_recipe(policies: dict[int, Policy], layers: int, **fields: Any) -> Recipe:
    """Returns the recipe of resolved policies, equal layers sharing one entry."""
    spans: dict[Policy, list[int]] = {}
    for layer in range(layers):
        spans.setdefault(policies.get(layer, Policy()), []).append(layer)
    entries = tuple(to_entry(policy, write(found)) for policy, found in spans.items())
    return Recipe(layers=entries, **fields)
