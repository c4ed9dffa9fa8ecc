"""Laws of tasks, for every file in kvtune/tasks."""

import math
import random
from dataclasses import replace

import pytest

from kvtune import task as tasks
from kvtune.errors import UsageError
from kvtune.task import Item, Task

NAMES = tasks.names()
PROSE = " ".join(
    f"Road {n} leads to village {n * 7}, and few people know the way." for n in range(400)
)
LENGTHS = (512, 1024, 5000)


def count(text: str) -> int:
    """Tokens of a rough tokenizer: four characters each."""
    return math.ceil(len(text) / 4)


def made(task: Task, seed: int, tokens: int = 1024) -> Item:
    item = task.make(random.Random(seed), count, tokens, PROSE)
    if task.follows_dense:
        turn = replace(item.turns[-1], references=("one two three four",))
        item = replace(item, turns=(turn,))
    return item


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return tasks.find(request.param)


def test_a_seed_makes_the_same_item_again(task: Task) -> None:
    first, again, other = made(task, 1), made(task, 1), made(task, 2)
    assert (first.context, first.turns) == (again.context, again.turns)
    assert first.context != other.context


@pytest.mark.parametrize("tokens", LENGTHS)
def test_an_item_never_exceeds_its_length_and_fills_most_of_it(task: Task, tokens: int) -> None:
    for seed in range(5):
        taken = made(task, seed, tokens).tokens(count)
        assert 0.75 * tokens < taken <= tokens


def test_a_length_too_small_is_refused(task: Task) -> None:
    with pytest.raises(UsageError, match="needs at least"):
        made(task, 0, tokens=16)


def test_the_references_score_one_and_an_empty_answer_nothing(task: Task) -> None:
    item = made(task, 3)
    assert item.references
    assert task.score("\n".join(item.references), item) == 1.0
    assert task.score("", item) == 0.0


def test_a_score_is_a_share(task: Task) -> None:
    item = made(task, 4)
    for text in ("no", item.context, item.references[0], " ".join(item.references) * 2):
        assert 0.0 <= task.score(text, item) <= 1.0


def test_chance_is_what_guessing_gives(task: Task) -> None:
    if task.follows_dense:
        assert made(task, 0).chance == 0.0
        return
    items = [made(task, seed) for seed in range(20)]
    rng = random.Random(0)
    guessed = [
        task.score("\n".join(rng.sample(item.candidates, len(item.references))), item)
        for item in items
        for _ in range(50)
    ]
    expected = sum(item.chance for item in items) / len(items)
    assert 0 < expected < 0.6
    assert abs(sum(guessed) / len(guessed) - expected) < 0.04


def test_references_are_among_what_is_guessed(task: Task) -> None:
    item = made(task, 5)
    if not task.follows_dense:
        assert all(reference in item.candidates for reference in item.references)


def test_the_question_alone_does_not_hold_the_answer(task: Task) -> None:
    item = made(task, 6)
    asked = " ".join(turn.question for turn in item.turns)
    assert task.score(asked, item) == 0.0


def test_what_is_asked_stands_in_the_context(task: Task) -> None:
    item = made(task, 7)
    if not task.follows_dense:
        assert task.score(item.context, item) == 1.0


def test_needles_lie_at_all_depths(task: Task) -> None:
    items = [made(task, seed) for seed in range(60)]
    depths = [item.depth for item in items if item.depth is not None]
    if not depths:
        return
    assert len(depths) == len(items)
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    for item in items:
        assert item.depth is not None
        first = item.context.index(item.references[0]) / len(item.context)
        assert abs(first - item.depth) < 0.15


def test_a_task_says_in_one_line_what_it_is(task: Task) -> None:
    line = (type(task).__doc__ or "").partition("\n")[0]
    assert 10 < len(line) <= 100


def test_details_are_named_numbers(task: Task) -> None:
    item = made(task, 8)
    told = task.details("a b c a b c a b c", item)
    assert all(math.isfinite(value) for value in told.values())


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="passkey"):
        tasks.find("paskey")
