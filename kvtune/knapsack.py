"""The multiple-choice knapsack, solved exactly for every budget at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STATES = 1 << 18  # past this many distinct sums sizes are rounded up to a common unit

Item = tuple[int, float]  # size, price


def unit_of(groups: Sequence[Sequence[Item]], states: int = STATES) -> int:
    """The unit that sizes are counted in: their common divisor; where sums are too many for that,
    so much that there are `states` of them."""
    most = sum(max(size for size, _ in group) for group in groups)
    common = math.gcd(*(size for group in groups for size, _ in group))
    few = most <= STATES * common
    return max(common, 1) if few else max(common, math.ceil(most / states), 1)


class Knapsack:
    """Picks one item of each group so that the sizes keep within a budget at the least price.

    Dynamic programming over sizes in units of their common divisor. One pass serves all budgets,
    and is exact where a solver in floating point stops at its tolerances.
    """

    def __init__(self, groups: Sequence[Sequence[Item]], unit: int = 0) -> None:
        self.unit = unit or unit_of(groups)
        self._sizes = [[math.ceil(size / self.unit) for size, _ in group] for group in groups]
        self.least = sum(min(sizes) for sizes in self._sizes)
        top = sum(max(sizes) for sizes in self._sizes)
        best = np.zeros(top + 1)
        self._picks: list[np.ndarray] = []
        for sizes, group in zip(self._sizes, groups, strict=True):
            best, pick = _joined(best, sizes, [price for _, price in group])
            self._picks.append(pick)
        self.prices = best  # by budget in units; infinite below `least`

    def solve(self, budget: int) -> list[int]:
        """Returns the index of the chosen item of each group; the budget counts in units.

        Raises:
            ValueError: the smallest items exceed the budget.
        """
        if budget < self.least:
            raise ValueError(f"budget {budget} is below the smallest sum {self.least}")
        left = min(budget, len(self.prices) - 1)
        chosen = []
        for sizes, pick in zip(reversed(self._sizes), reversed(self._picks), strict=True):
            chosen.append(int(pick[left]))
            left -= sizes[chosen[-1]]
        return chosen[::-1]


def _joined(
    best: np.ndarray, sizes: Sequence[int], prices: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Least price for every budget with one more group, and the item that gives it."""
    joined = np.full_like(best, np.inf)
    pick = np.zeros(len(best), dtype=np.uint16)
    for index, (size, price) in enumerate(zip(sizes, prices, strict=True)):
        offer = best[: len(best) - size] + price
        better = offer < joined[size:]
        joined[size:][better] = offer[better]
        pick[size:][better] = index
    return joined, pick
