"""The surrogate: what the price table predicts of whole recipes, and the ladders of settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from kvtune.cache import fitted_bytes, layer_bytes
from kvtune.chains import Chain
from kvtune.growth import Growth
from kvtune.models import Facts
from kvtune.profile import Cell, Profile, setting
from kvtune.recipe import Policy
from kvtune.space import SIDES, WHOLE, Choices, Opened, Side, Triple
from kvtune.speed import Speed


class Place(NamedTuple):
    """What has one setting: a side of a layer, or of one kv head where heads may differ; or a
    whole layer, where its tokens are searched too."""

    layer: int
    side: Side | Literal["layers"]
    head: int | None = None  # None: all heads alike


Setting = Chain | Triple  # of a side, or of a whole layer
Assignment = dict[Place, Setting]  # one setting for each place of all compressible layers


@dataclass(frozen=True)
class Rung:
    """One setting of one place: bytes at the stated context, priced KL in nats, and its part of
    the layer's attention time in microseconds (0 without a latency table)."""

    chain: Setting
    bytes: int
    price: float
    time: float = 0.0
    parts: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of a triple's price, in the order below

    def grown(self, growth: Growth, slope: float) -> Rung:
        """With parts rescaled so that prices still add up, tokens by a slope of their growth."""
        tokens, keys, values = self.parts
        price = growth.kl(keys, values) + slope * tokens
        return Rung(self.chain, self.bytes, price, self.time, self.parts)


PARTS = ("tokens", "keys", "values")
STRIDE = 24  # moves along a layer's ladder go at least so far: a part of its rungs


Size = Callable[[Rung], int]


class Prediction(NamedTuple):
    """What the table says of an assignment."""

    bytes: int
    kl: float
    time: float


@dataclass(frozen=True)
class Surrogate:
    """All rungs of each place by ascending bytes, and how their prices grow into a KL."""

    rungs: dict[Place, tuple[Rung, ...]]
    growth: Growth = field(default_factory=Growth)

    @cached_property
    def ladders(self) -> dict[Place, tuple[Rung, ...]]:
        """The rungs of each place that no other beats in bytes and price."""
        return {place: tuple(undominated(found)) for place, found in self.rungs.items()}

    @cached_property
    def _found(self) -> dict[Place, dict[Setting, Rung]]:
        return {place: {r.chain: r for r in found} for place, found in self.rungs.items()}

    @property
    def joint(self) -> bool:
        """Whether layers have one setting each, of tokens, keys and values."""
        return next(iter(self.rungs)).side == WHOLE

    def grown(self, growth: Growth) -> Surrogate:
        """The same with sums that grow as measured."""
        if not self.joint:
            return Surrogate(self.rungs, growth)
        slopes = growth.slopes(self.most_tokens)
        return Surrogate(self.sloped(slopes[len(slopes) // 2], growth), growth)

    @property
    def most_tokens(self) -> float:
        """What tokens are priced at where every layer drops the most."""
        return sum(max(rung.parts[0] for rung in own) for own in self.rungs.values())

    def sloped(self, slope: float, growth: Growth) -> dict[Place, tuple[Rung, ...]]:
        """All rungs of whole layers where tokens cost a slope of their prices."""
        grown = {p: [rung.grown(growth, slope) for rung in own] for p, own in self.rungs.items()}
        return {p: tuple(sorted(own, key=lambda r: (r.bytes, r.price))) for p, own in grown.items()}

    def rung(self, place: Place, chain: Setting) -> Rung:
        """The rung of a setting."""
        return self._found[place][chain]

    def sums(self, chosen: Assignment) -> dict[str, float]:
        """The priced sum of each side, and of tokens where they are searched, in nats."""
        found: dict[str, list[float]] = {side: [] for side in SIDES}
        for place, chain in chosen.items():
            rung = self.rung(place, chain)
            if place.side == WHOLE:
                for axis, price in zip(PARTS, rung.parts, strict=True):
                    found.setdefault(axis, []).append(price)
            else:
                found[place.side].append(rung.price)
        return {side: math.fsum(prices) for side, prices in found.items()}

    def predict(self, chosen: Assignment) -> Prediction:
        """Bytes, KL and time that the table leads to."""
        rungs = [self.rung(place, chain) for place, chain in chosen.items()]
        sums = self.sums(chosen)
        kl = float(self.growth.kl(sums["keys"], sums["values"], sums.get("tokens", 0.0)))
        return Prediction(sum(r.bytes for r in rungs), kl, math.fsum(r.time for r in rungs))

    def moved(
        self, chosen: Assignment, places: Iterable[tuple[int, str]], steps: int
    ) -> Assignment:
        """Another assignment with sides of layers moved along their ladders; the ends hold."""
        wanted, result = set(places), dict(chosen)
        for place, chain in chosen.items():
            if place[:2] in wanted:
                ladder = self.ladders[place]
                at = _nearest(ladder, self.rung(place, chain).bytes)
                far = max(1, len(ladder) // STRIDE) if self.joint else 1
                result[place] = ladder[min(max(at + far * steps, 0), len(ladder) - 1)].chain
        return result


def surrogate(
    choices: Choices,
    profile: Profile,
    known: Facts,
    context: int,
    *,
    speed: Speed | None = None,
    by_head: bool = False,
) -> Surrogate:
    """Prices come from the profile, bytes from the runtime at the context length, times from the
    latency table. With `by_head`, layers that open it have a place for each kv head."""
    prices = profile.prices_by_head() if by_head else profile.prices()
    rungs: dict[Place, tuple[Rung, ...]] = {}
    for layer, own in choices.items():
        kv_heads, head_dim = known.layers[layer].kv_heads, known.layers[layer].head_dim
        for side in SIDES:
            cells: list[tuple[Chain, int, tuple[float, ...], float]] = []
            for chain in own.chains(side):
                sizes = layer_bytes(_paired(own, side, chain), kv_heads, head_dim, context)
                fixed = fitted_bytes(own.cell(side, chain), kv_heads, head_dim)
                size = sizes[SIDES.index(side)] + fixed[SIDES.index(side)]
                cell = Cell(layer, side, setting(chain), own.sinks, own.recent)
                time = _time(speed, own, side, chain) if speed else 0.0
                found = prices[cell]
                split = found if isinstance(found, tuple) else (found,)
                cells.append((chain, size, split, time))
            heads = range(kv_heads) if by_head and own.per_head else (None,)
            for head in heads:
                rungs[Place(layer, side, head)] = _rungs(cells, head, kv_heads)
    return Surrogate(rungs)


def _rungs(
    cells: Sequence[tuple[Chain, int, tuple[float, ...], float]], head: int | None, kv_heads: int
) -> tuple[Rung, ...]:
    """One place's settings, of the whole side or of one head: bytes and times split evenly."""
    part = 1 if head is None else kv_heads
    found = [
        Rung(chain, size // part, math.fsum(split) if head is None else split[head], time / part)
        for chain, size, split, time in cells
    ]
    return tuple(sorted(found, key=lambda rung: (rung.bytes, rung.price)))


def _time(speed: Speed, own: Opened, side: Side, chain: Chain) -> float:
    """A setting's part of a layer's time: beside the first of the other side, which takes half."""
    first = {name: own.chains(name)[0] for name in SIDES}
    pair = {**first, side: chain}
    both = speed.pair(first["keys"], first["values"])
    return max(0.0, speed.pair(pair["keys"], pair["values"]) - both / 2)


def _paired(own: Opened, side: Side, chain: Chain) -> Policy:
    """The side beside the other side's longest blocks, which both sides' windows wait for."""
    if side == "keys":
        return own.policy(chain, max(own.values, key=lambda other: other.block))
    return own.policy(max(own.keys, key=lambda other: other.block), chain)


def by_bytes(rung: Rung) -> int:
    """What a memory budget counts."""
    return rung.bytes


def undominated(rungs: Iterable[Rung], size: Size = by_bytes) -> list[Rung]:
    """Rungs that no other beats in both size and price:
    KVTuner's intra-layer pruning (arXiv:2502.04420)."""
    kept: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (size(rung), rung.price)):
        if not kept or rung.price < kept[-1].price:
            kept.append(rung)
    return kept


def _nearest(ladder: Sequence[Rung], size: int) -> int:
    """Where a setting stands on the ladder; a dominated one stands where its bytes do."""
    return min(range(len(ladder)), key=lambda i: (abs(ladder[i].bytes - size), i))
