"""Budgets: the surrogate's exact front, the least predicted KL within every size."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from kvtune.knapsack import Knapsack, unit_of
from kvtune.space import SIDES
from kvtune.surrogate import Assignment, Place, Rung, Size, Surrogate, by_bytes, undominated

COARSER = 1 << 16  # sums of sizes where there are too many: slopes take a knapsack each


def by_time(rung: Rung) -> int:
    """What a latency budget counts, in tenths of a microsecond."""
    return max(1, round(10 * rung.time))


class Budgets:
    """Solves a surrogate for every budget of bytes, or of time.

    Where tokens are searched, layers are one knapsack over triples. The KL is a sum, but that it
    grows less than evenly with the prices of tokens: what is best is best under some slope of that
    growth as well (a corner of the hull of what can be had), so there is a knapsack for each of a
    few slopes, exact itself, and the least predicted KL of theirs is taken. Else keys and values
    are two: whatever the growth of their sums into a KL, it rises with either of them, so the best
    of all ways to split a budget between the two is exact as well.
    """

    def __init__(self, surrogate: Surrogate, size: Size = by_bytes) -> None:
        self._surrogate, self._size = surrogate, size
        sides = dict.fromkeys(place.side for place in surrogate.rungs)
        self._ladders = {side: self._of(side) for side in sides}

    def _of(self, side: str) -> dict[Place, list[Rung]]:
        rungs = self._surrogate.rungs
        return {p: undominated(rungs[p], self._size) for p in rungs if p.side == side}

    @property
    def range(self) -> tuple[int, int]:
        """The least size there is, and that of the dearest settings."""
        every = [ladder for side in self._ladders.values() for ladder in side.values()]
        low = sum(self._size(ladder[0]) for ladder in every)
        return low, sum(self._size(ladder[-1]) for ladder in every)

    def spread(self, count: int, low: float = 0.0, high: float = math.inf) -> list[int]:
        """Budgets from the least size to the dearest, evenly in logarithms, within limits."""
        least, most = self.range
        first, last = max(least, low), min(most, high)
        if last < first:
            return []
        steps = [i / max(1, count - 1) for i in range(count)]
        return [math.ceil(first * (last / first) ** step) for step in steps]

    def best(self, budget: int) -> Assignment:
        """The assignment of least predicted KL within a budget.

        Raises:
            ValueError: nothing is that small.
        """
        if self._surrogate.joint:
            return self._of_layers(budget)
        keys, values = self._solvers
        units = budget // keys.unit
        low, high = keys.least, units - values.least
        if high < low:
            if budget < self.range[0]:
                raise self._too_small(budget)
            low = high = keys.least  # sizes that were rounded up to the unit fit all the same
        splits = np.arange(low, min(high, len(keys.prices) - 1) + 1)
        rest = np.clip(units - splits, values.least, len(values.prices) - 1)
        kl = self._surrogate.growth.kl(keys.prices[splits], values.prices[rest])
        at = int(np.argmin(kl))
        picked = keys.solve(int(splits[at])), values.solve(int(rest[at]))
        return {
            place: ladder[index].chain
            for side, indices in zip(SIDES, picked, strict=True)
            for (place, ladder), index in zip(self._ladders[side].items(), indices, strict=True)
        }

    def _of_layers(self, budget: int) -> Assignment:
        """One knapsack over whole layers: prices of triples add up."""
        if budget < self.range[0]:
            raise self._too_small(budget)
        found = []
        for ladders, solver in self._of_slopes:
            picked = solver.solve(max(solver.least, budget // solver.unit))
            pairs = zip(ladders.items(), picked, strict=True)
            found.append({place: own[i].chain for (place, own), i in pairs})
        return min(found, key=lambda chosen: self._surrogate.predict(chosen).kl)

    def _too_small(self, budget: int) -> ValueError:
        return ValueError(f"budget {budget} is below the smallest, {self.range[0]}")

    @cached_property
    def _of_slopes(self) -> list[tuple[dict[Place, list[Rung]], Knapsack]]:
        whole, found = self._surrogate, []
        for slope in whole.growth.slopes(whole.most_tokens):
            rungs = whole.sloped(slope, whole.growth)
            ladders = {place: undominated(own, self._size) for place, own in rungs.items()}
            items = [[(self._size(r), r.price) for r in own] for own in ladders.values()]
            found.append((ladders, Knapsack(items, unit_of(items, COARSER))))
        return found

    @cached_property
    def _solvers(self) -> tuple[Knapsack, Knapsack]:
        groups = [
            [[(self._size(rung), rung.price) for rung in ladder] for ladder in side.values()]
            for side in self._ladders.values()
        ]
        unit = unit_of([*groups[0], *groups[1]])
        return Knapsack(groups[0], unit), Knapsack(groups[1], unit)
