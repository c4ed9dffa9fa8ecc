"""Laws of the knapsack: exact for every budget, within the budget always."""

import itertools
import random

import pytest

from kvtune.knapsack import STATES, Item, Knapsack


def drawn(seed: int, groups: int, unit: int) -> list[list[Item]]:
    """Random groups of three to five items, sizes multiples of a unit."""
    source = random.Random(seed)
    return [
        [(unit * source.randint(1, 30), source.random()) for _ in range(source.randint(3, 5))]
        for _ in range(groups)
    ]


def totals(groups: list[list[Item]], picked: tuple[int, ...] | list[int]) -> tuple[int, float]:
    """Size and price of a choice."""
    items = [group[index] for group, index in zip(groups, picked, strict=True)]
    return sum(size for size, _ in items), sum(price for _, price in items)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", [1, 192])
def test_no_choice_within_the_budget_is_better(seed: int, unit: int) -> None:
    groups = drawn(seed, 5, unit)
    every = [totals(groups, p) for p in itertools.product(*(range(len(g)) for g in groups))]
    solver = Knapsack(groups)
    for budget in range(min(size for size, _ in every), max(size for size, _ in every), 7 * unit):
        size, price = totals(groups, solver.solve(budget // solver.unit))
        assert size <= budget
        assert price == pytest.approx(min(p for s, p in every if s <= budget))


def test_huge_sizes_are_rounded_but_the_budget_holds() -> None:
    groups = drawn(1, 6, 1)
    huge = [[(size * STATES + 1, price) for size, price in group] for group in groups]
    most = sum(max(size for size, _ in group) for group in huge)
    solver = Knapsack(huge)
    size, price = totals(huge, solver.solve(most * 3 // 4 // solver.unit))
    assert size <= most * 3 // 4
    plain = Knapsack(groups)
    exact = totals(groups, plain.solve(most * 3 // 4 // STATES // plain.unit))[1]
    assert price == pytest.approx(exact, rel=0.2)


def test_a_budget_below_the_smallest_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="below the smallest"):
        Knapsack([[(5, 1.0)], [(7, 1.0), (9, 0.5)]]).solve(11)
