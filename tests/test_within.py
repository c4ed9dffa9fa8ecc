"""Laws of what is proved within numbers of true bits, and of a recipe's formats on the bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvtune import recipe as recipes
from kvtune.bench.applied import row_of
from kvtune.bench.cases import Shape, spelled
from kvtune.errors import UnsupportedError, UsageError
from kvtune.front import Candidate, worth_proving
from kvtune.goal import Goal
from kvtune.recipe import Recipe

SHAPE = Shape(8, 32768)


@pytest.mark.parametrize(
    ("words", "bits"),
    [("", ()), ("3", (3.0,)), ("4,2,2.5", (2.0, 2.5, 4.0)), (" 2 , 16", (2.0, 16.0))],
)
def test_true_bits_are_read_in_any_order(words: str, bits: tuple[float, ...]) -> None:
    assert Goal.parse("memory,accuracy", 1024, 1, within=words).within == bits


@pytest.mark.parametrize("words", ["two", "2,,3", "0", "17", "2,2.0", "-1", "nan"])
def test_no_true_bits_are_refused(words: str) -> None:
    with pytest.raises(UsageError, match=r"--bits 2,2\.5,3"):
        Goal.parse("memory,accuracy", 1024, 1, within=words)


def points(*pairs: tuple[int, float]) -> list[Candidate]:
    return [Candidate("knapsack", (), size, kl) for size, kl in pairs]


@pytest.mark.parametrize(
    ("budgets", "kept"),
    [
        ((100,), [100]),
        ((99, 100), [100, 90]),
        ((99,), [90]),
        ((50,), []),
        ((1000, 95, 70), [120, 90, 70]),
    ],
)
def test_the_best_within_each_budget_is_proved(budgets: Sequence[int], kept: list[int]) -> None:
    """Even where a hair more bytes would be a bargain: a budget is a budget."""
    measured = points((120, 0.001), (100, 0.01), (90, 0.02), (89, 0.0999), (70, 0.1), (95, 0.5))
    assert [one.bytes for one in worth_proving(measured, 9, budgets)] == kept


def loaded(keys: str, values: str) -> Recipe:
    layer = f'[[layers]]\nspan = "SPAN"\nkept.keys = [{keys}]\nkept.values = [{values}]\n'
    other = layer.replace("SPAN", "rest").replace("bits = 2", "bits = 4")
    return recipes.loads(f"kvtune = 1\n{layer.replace('SPAN', 'first 8')}{other}")


def test_a_recipe_is_a_row_of_its_layers_formats() -> None:
    turned = '{ use = "klt" }, { use = "waterfill", bits = 2, group = 128 }'
    row = row_of(loaded(turned, '{ use = "hadamard" }, { use = "normal", bits = 2 }'), SHAPE)
    assert row.layers == (8, 24)
    told = [(spelled(case.keys, 128), spelled(case.values, 128)) for case in row.cases]
    assert told == [("2pg128", "2sg128"), ("4pg128", "4sg128")]
    assert {case.shape for case in row.cases} == {SHAPE}


def test_what_no_kernel_reads_is_said_by_name() -> None:
    with pytest.raises(UnsupportedError, match="ternary"):
        row_of(loaded('{ use = "affine", bits = 2 }', '{ use = "ternary" }'), SHAPE)


@pytest.mark.parametrize("name", ["klt-2.3", "kivi-2", "smollm2-135m-instruct-2.5bit"])
def test_shipped_fast_recipes_are_rows(name: str, shipped: dict[str, Path]) -> None:
    file = next(
        path for key, path in shipped.items() if key in (f"{name}.toml", f"{name}/recipe.toml")
    )
    row = row_of(recipes.load(file), SHAPE)
    assert sum(row.layers) in (30, 32)
