"""Laws of shortening a prompt: which positions stay, by attention rows alone."""

from __future__ import annotations

import tomllib

import jsonschema
import pytest
import torch

from kvtune import recipe as recipes
from kvtune.errors import IntegrityError
from kvtune.methods.specpc import Specpc
from kvtune.shortening import chosen, peak, row_weights


def test_a_prompt_within_the_budget_stays_whole() -> None:
    assert chosen(torch.rand(20), 20, 4, 2).tolist() == list(range(20))


@pytest.mark.parametrize("budget", [6, 10, 31, 99])
def test_as_many_positions_stay_as_asked_in_order_and_the_last_among_them(budget: int) -> None:
    score = torch.rand(100, generator=torch.Generator().manual_seed(budget))
    kept = chosen(score, budget, 6, 3)
    assert len(kept) == budget
    assert (kept.diff() > 0).all()
    assert kept[-6:].tolist() == list(range(94, 100))


def test_a_budget_below_the_window_keeps_its_last_tokens() -> None:
    assert chosen(torch.rand(50), 3, 8, 2).tolist() == [47, 48, 49]


def test_the_best_token_brings_its_neighbours() -> None:
    score = torch.zeros(60)
    score[20] = 1.0
    # 2 to each side are as good as it is, and bring 2 more
    assert chosen(score, 9 + 4, 4, 2).tolist() == [*range(16, 25), *range(56, 60)]


def test_better_regions_go_first() -> None:
    score = torch.zeros(80)
    score[10], score[40] = 0.5, 0.9
    kept = set(chosen(score, 5 + 2, 2, 1).tolist())
    assert {38, 39, 40, 41, 42} <= kept
    assert not {9, 10, 11} & kept


def test_later_rows_count_more_and_those_behind_the_prompt_in_full() -> None:
    weights = row_weights(5, 2)
    assert weights.tolist() == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    rows = torch.zeros(3, 7, 4)
    rows[0, 0, 0], rows[1, 2, 1], rows[2, 6, 2] = 1.0, 1.0, 0.75
    assert peak(rows, weights).tolist() == [0, 0.5, 0.75, 0]


def test_specpc_keeps_by_its_settings() -> None:
    part = Specpc(budget=40, window=16, kernel=16)
    score = torch.zeros(200)
    score[100] = 1.0
    kept = part.keep(score)
    assert len(kept) == 40
    assert set(range(184, 200)) <= set(kept.tolist())
    assert set(range(100 - 8, 100 + 9)) <= set(kept.tolist())


def written(prefill: str) -> str:
    return f'kvtune = 1\nprefill = {prefill}\n[[layers]]\nspan = "all"\n'


def test_a_recipe_says_how_a_prompt_is_cut() -> None:
    text = written('{ use = "specpc", budget = 512, skip = 4 }')
    recipe = recipes.loads(text)
    assert recipe.shortener == Specpc(budget=512, skip=4)
    assert recipes.loads(recipe.dumps()) == recipe
    jsonschema.validate(tomllib.loads(text), recipes.schema())
    bare = recipes.loads('kvtune = 1\n[[layers]]\nspan = "all"\n')
    assert bare.shortener is None
    assert recipes.digest(bare) != recipes.digest(recipe)


@pytest.mark.parametrize(
    ("prefill", "told"),
    [
        ('{ use = "kvzip" }', "kvzip is a selector; prefill takes a shortener"),
        ('{ use = "specpc", kernel = "search" }', "not searched here"),
        ('{ use = "specpc", kernel = 33 }', "33 is not one of"),
        ('{ use = "specpc", budget = 0 }', "greater than or equal to 1"),
        ('{ use = "specpc", width = 3 }', "specpc has no 'width'"),
        ('{ use = "specpd" }', "specp"),
        ('"specpc"', "expected a part such as"),
    ],
)
def test_another_prefill_is_refused(prefill: str, told: str) -> None:
    with pytest.raises(IntegrityError, match=told):
        recipes.loads(written(prefill))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(written(prefill)), recipes.schema())
