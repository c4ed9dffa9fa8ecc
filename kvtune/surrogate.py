"""The surrogate: ladders of settings, clusters of layers, and the exact front over prices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from kvtune.cache import layer_bytes
from kvtune.knapsack import Knapsack
from kvtune.models import Facts
from kvtune.parts import Chain
from kvtune.profile import Cell, Profile, setting
from kvtune.recipe import Policy
from kvtune.space import SIDES, Opened, Side

Place = tuple[int, Side]
Assignment = dict[
    Place, Chain
]  # one setting for the keys and one for the values of every compressible layer


@dataclass(frozen=True)
class Rung:
    """One setting of one side of one layer: its bytes at the
    stated context, and its priced KL in nats."""

    chain: Chain
    bytes: int
    price: float


@dataclass(frozen=True)
class Surrogate:
    """What the price table predicts: all rungs of each place by
    ascending bytes, and its undominated ladder."""

    rungs: dict[Place, tuple[Rung, ...]]
    ladders: dict[Place, tuple[Rung, ...]]

    @classmethod
    def of(
        cls,
        choices: Mapping[int, Opened],
        profile: Profile,
        known: Facts,
        context: int,
        scales: Mapping[Side, float],
    ) -> Surrogate:
        """Prices come from the profile, times each side's scale;
        bytes from the runtime at the context length."""
        prices = profile.prices()
        weighed = cache(layer_bytes)  # most layers are alike
        rungs: dict[Place, tuple[Rung, ...]] = {}
        for layer, own in choices.items():
            shape = known.layers[layer].kv_heads, known.layers[layer].head_dim, context
            for side in SIDES:
                found = []
                for chain in own.chains(side):
                    size = weighed(_paired(own, side, chain), *shape)[SIDES.index(side)]
                    cell = Cell(layer, side, setting(chain), own.sinks, own.recent)
                    found.append(Rung(chain, size, prices[cell] * scales.get(side, 1.0)))
                rungs[layer, side] = tuple(sorted(found, key=lambda rung: (rung.bytes, rung.price)))
        return cls(rungs, {place: tuple(undominated(found)) for place, found in rungs.items()})

    def predict(self, chosen: Assignment) -> tuple[int, float]:
        """Bytes and KL that the table adds up to."""
        picked = [
            next(r for r in self.rungs[place] if r.chain == chain)
            for place, chain in chosen.items()
        ]
        return sum(rung.bytes for rung in picked), math.fsum(rung.price for rung in picked)

    def budgets(self, count: int) -> list[int]:
        """Byte budgets from the smallest possible cache to the
        dearest ladder end, evenly in log bytes."""
        low = sum(ladder[0].bytes for ladder in self.ladders.values())
        high = sum(ladder[-1].bytes for ladder in self.ladders.values())
        return [round(low * (high / low) ** (i / max(1, count - 1))) for i in range(count)]

    def cheapest(self, budget: int) -> Assignment:
        """The assignment of least priced KL within a byte budget, exactly."""
        picked = self._knapsack.solve(budget)
        return {
            place: ladder[index].chain
            for (place, ladder), index in zip(self.ladders.items(), picked, strict=True)
        }

    @cached_property
    def _knapsack(self) -> Knapsack:
        return Knapsack(
            [[(rung.bytes, rung.price) for rung in ladder] for ladder in self.ladders.values()]
        )

    def clusters(self, per_side: int) -> dict[str, tuple[Place, ...]]:
        """Places that react alike, per side, named `keys 0`, `keys
        1`, ... from the least sensitive on."""
        found: dict[str, tuple[Place, ...]] = {}
        for side in SIDES:
            own = [place for place in self.ladders if place[1] == side]
            groups = _grouped(own, self.rungs, self.ladders, per_side)
            groups.sort(
                key=lambda group: float(np.mean([self.rungs[place][0].price for place in group]))
            )
            found |= {f"{side} {index}": tuple(group) for index, group in enumerate(groups)}
        return found

    def moved(self, chosen: Assignment, places: Iterable[Place], steps: int) -> Assignment:
        """Another assignment with the given places moved along their ladders; the ends hold."""
        result = dict(chosen)
        for place in places:
            ladder = self.ladders[place]
            at = _nearest(ladder, self.rungs[place], chosen[place])
            result[place] = ladder[min(max(at + steps, 0), len(ladder) - 1)].chain
        return result


def _paired(own: Opened, side: Side, chain: Chain) -> Policy:
    """The side beside the other side's longest blocks, which both sides' windows wait for."""
    if side == "keys":
        return own.policy(chain, max(own.values, key=lambda other: other.block))
    return own.policy(max(own.keys, key=lambda other: other.block), chain)


def undominated(rungs: Iterable[Rung]) -> list[Rung]:
    """Rungs that no other beats in both bytes and price:
    KVTuner's intra-layer pruning (arXiv:2502.04420)."""
    kept: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.bytes, rung.price)):
        if not kept or rung.price < kept[-1].price:
            kept.append(rung)
    return kept


def _nearest(ladder: Sequence[Rung], rungs: Sequence[Rung], chain: Chain) -> int:
    """Where a setting stands on the ladder; a dominated one stands where its bytes do."""
    size = next(rung.bytes for rung in rungs if rung.chain == chain)
    return min(range(len(ladder)), key=lambda i: (abs(ladder[i].bytes - size), i))


def _grouped(
    own: list[Place],
    rungs: Mapping[Place, Sequence[Rung]],
    ladders: Mapping[Place, Sequence[Rung]],
    count: int,
) -> list[list[Place]]:
    """Average linkage over the mean distance of log prices plus
    the Jaccard distance of surviving settings."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(own) <= count:
        return [[place] for place in own]
    distances = [_distance(a, b, rungs, ladders) for i, a in enumerate(own) for b in own[i + 1 :]]
    labels = fcluster(linkage(np.array(distances), "average"), count, "maxclust")
    return [
        [place for place, label in zip(own, labels, strict=True) if label == wanted]
        for wanted in sorted(set(labels))
    ]


def _distance(
    a: Place,
    b: Place,
    rungs: Mapping[Place, Sequence[Rung]],
    ladders: Mapping[Place, Sequence[Rung]],
) -> float:
    left, right = ({r.chain: math.log(r.price + 1e-12) for r in rungs[place]} for place in (a, b))
    shared = [chain for chain in left if chain in right]
    apart = sum(abs(left[chain] - right[chain]) for chain in shared) / max(1, len(shared))
    alive_a, alive_b = ({r.chain for r in ladders[place]} for place in (a, b))
    return apart + 1 - len(alive_a & alive_b) / len(alive_a | alive_b)
