"""The surrogate of a search over tokens, bits and rank: each layer has one setting, a triple."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from kvtune.cache import fitted_bytes, layer_bytes
from kvtune.chains import Chain
from kvtune.models import Facts, LayerFacts
from kvtune.profile import Cell, Profile, selected, setting
from kvtune.retention import Selector
from kvtune.space import SIDES, WHOLE, Choices, Opened, Side, Triple
from kvtune.surrogate import Assignment, Place, Rung, Surrogate, undominated

Select = Selector | None
Sizes = dict[tuple[Side, Chain, Select, int, int], int]  # of layers that are alike
Sized = tuple[int, float]  # bytes and price of one chain beside 16 bits


class Sheet:
    """What one layer's settings cost, in bytes at a context and in priced nats."""

    def __init__(
        self,
        layer: int,
        own: Opened,
        prices: Mapping[Cell, float],
        known: LayerFacts,
        context: int,
        measured: int,
        sizes: dict[tuple[int, ...], Sizes],
    ) -> None:
        self._measured = measured
        self.own, self._layer, self._prices = own, layer, prices
        self._shape, self._at = (known.kv_heads, known.head_dim), (context, known.query_heads)
        self._sizes = sizes.setdefault((own.sinks, own.recent, *self._shape, *self._at), {})

    @property
    def selects(self) -> tuple[Select, ...]:
        """All tokens, and every selection that is opened."""
        return None, *self.own.selects

    def drops(self, select: Select, keys: Chain, values: Chain) -> bool:
        """Whether a selection drops any tokens of the contexts that prices and trials measure:
        tokens compete in blocks, and before one is whole nothing is told of what it costs."""
        if select is None:
            return True
        return self.own.policy(keys, values, select).due(self._measured) > 0

    def tokens(self, select: Select) -> float:
        """What a selection costs while both sides are dense."""
        return 0.0 if select is None else self._priced("keys", Chain(), select)

    def chain(self, side: Side, chain: Chain, select: Select) -> float:
        """What a chain costs beyond the selection that it is under; between the shares that were
        measured it is interpolated."""
        if not chain.codecs:
            return 0.0
        pair = (chain, Chain()) if side == "keys" else (Chain(), chain)
        anchors = [one for one in self.own.anchors[::-1] if self.drops(one, *pair)]
        at = [1.0 if one is None else one.share for one in anchors]
        found = [max(0.0, self._priced(side, chain, one) - self.tokens(one)) for one in anchors]
        return float(np.interp(1.0 if select is None else select.share, at, found))

    def size(self, side: Side, chain: Chain, other: Chain, select: Select) -> int:
        """True bytes of one side beside another, of which its block and what it waits for matter
        alone; what is fitted is counted."""
        key = (side, chain, select, other.block, other.least(*self._shape))
        if key not in self._sizes:
            pair = (chain, other) if side == "keys" else (other, chain)
            policy = self.own.policy(*pair, select)
            at = SIDES.index(side)
            stored = layer_bytes(policy, *self._shape, *self._at)[at]
            self._sizes[key] = stored + fitted_bytes(policy, *self._shape)[at]
        return self._sizes[key]

    def alone(self, side: Side, chain: Chain, select: Select) -> Sized:
        """A chain while the other side is dense."""
        return self.size(side, chain, Chain(), select), self.chain(side, chain, select)

    def rung(self, triple: Triple) -> Rung:
        """A setting of the layer."""
        select, keys, values = triple
        size = self.size("keys", keys, values, select) + self.size("values", values, keys, select)
        chains = (self.chain("keys", keys, select), self.chain("values", values, select))
        parts = (self.tokens(select), *chains)
        return Rung(triple, size, sum(parts), parts=parts)

    def _priced(self, side: Side, chain: Chain, select: Select) -> float:
        own = self.own
        cell = Cell(self._layer, side, setting(chain), own.sinks, own.recent, selected(select))
        return self._prices[cell]


def surrogate(
    choices: Choices, profile: Profile, known: Facts, context: int, measured: int
) -> Surrogate:
    """One place for each layer: bytes are those at a context, prices of contexts of `measured`
    tokens. A triple costs what its tokens cost at 16 bits, and what each chain costs beyond that
    under the same tokens.

    Of each side, and under each selection, chains are left out that another of the same axes beats
    in bytes and price, in their layer and where all layers are alike: prices add up, so no best
    recipe has them.
    """
    prices = profile.prices()
    sizes: dict[tuple[int, ...], Sizes] = {}
    sheets = {
        layer: Sheet(layer, own, prices, known.layers[layer], context, measured, sizes)
        for layer, own in choices.items()
    }
    alike = _alike(list(sheets.values()))
    rungs = {}
    for layer, sheet in sheets.items():
        found = [
            sheet.rung(Triple(select, keys, values))
            for select in sheet.selects
            for keys, values in itertools.product(
                *(_worth(sheet, side, select, alike) for side in SIDES)
            )
            if sheet.drops(select, keys, values)
        ]
        rungs[Place(layer, WHOLE)] = tuple(sorted(found, key=lambda rung: (rung.bytes, rung.price)))
    return Surrogate(rungs)


Alike = dict[tuple[Side, Select], list[Chain]]


def _alike(sheets: list[Sheet]) -> Alike:
    """The chains of each side that are best where all layers have the same one."""
    selects = [s for s in sheets[0].selects if all(s in sheet.selects for sheet in sheets)]
    found: Alike = {}
    for side, select in itertools.product(SIDES, selects):
        rest = [set(sheet.own.chains(side)) for sheet in sheets[1:]]
        common = [c for c in sheets[0].own.chains(side) if all(c in own for own in rest)]
        sums = {c: [sheet.alone(side, c, select) for sheet in sheets] for c in common}
        total = {c: (sum(b for b, _ in own), sum(p for _, p in own)) for c, own in sums.items()}
        found[side, select] = _best(total)
    return found


def _worth(sheet: Sheet, side: Side, select: Select, alike: Alike) -> list[Chain]:
    own = {chain: sheet.alone(side, chain, select) for chain in sheet.own.chains(side)}
    kept = {*_best(own), *alike.get((side, select), ())}
    return [chain for chain in own if chain in kept or not chain.codecs]


def _best(sized: Mapping[Chain, Sized]) -> list[Chain]:
    """What no other beats that saves by the same axes, so that each has a front of its own."""
    kinds: dict[frozenset[str], list[Rung]] = {}
    for chain, own in sized.items():
        kinds.setdefault(Triple(None, chain, Chain()).axes, []).append(Rung(chain, *own))
    best = itertools.chain.from_iterable(map(undominated, kinds.values()))
    return [rung.chain for rung in best if isinstance(rung.chain, Chain)]


def common(surrogate: Surrogate) -> list[Triple]:
    """The settings that every layer has, from the smallest in the first layer on."""
    first, *rest = surrogate.rungs.values()
    others = [{rung.chain for rung in found} for found in rest]
    every = [rung.chain for rung in first if all(rung.chain in own for own in others)]
    return [chain for chain in every if isinstance(chain, Triple)]


def everywhere(surrogate: Surrogate, triple: Triple) -> Assignment:
    """All layers alike."""
    return dict.fromkeys(surrogate.rungs, triple)


def probes(surrogate: Surrogate) -> list[Triple]:
    """Settings of all layers by which keys and values are rescaled: two of each alone, the
    cheapest and one a third of the way up, and both together."""
    ladder = next(iter(surrogate.rungs.values()))
    found = set(common(surrogate))
    own = [rung for rung in ladder if rung.chain in found]
    keys = _two(own, lambda t: t.select is None and bool(t.keys.codecs) and not t.values.codecs)
    values = _two(own, lambda t: t.select is None and bool(t.values.codecs) and not t.keys.codecs)
    pairs = zip(keys, values, strict=False)
    both = [Triple(None, k.keys, v.values) for k, v in pairs]
    return [*keys, *values, *(triple for triple in both if triple in found)]


def _two(rungs: Iterable[Rung], wanted: Callable[[Triple], bool]) -> list[Triple]:
    own = undominated(r for r in rungs if isinstance(r.chain, Triple) and wanted(r.chain))
    ladder = [rung.chain for rung in own if isinstance(rung.chain, Triple)]
    return list(dict.fromkeys((ladder[0], ladder[len(ladder) // 3]))) if ladder else []
