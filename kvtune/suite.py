"""The proof suite: tasks answered through the dense and the compressed cache, and compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvtune import recipe as recipes
from kvtune import task as tasks
from kvtune.answers import Pair, answers
from kvtune.cache import CompressedCache, load
from kvtune.errors import UsageError, suggest
from kvtune.models import facts
from kvtune.prefill import Draft
from kvtune.recipe import Recipe
from kvtune.scores import Scores, TaskScores
from kvtune.task import Count, Item, Task

Say = Callable[[str, int, int], None]

SHORTEST, QUICK_LONGEST, CPU_LONGEST, LONGEST = 256, 512, 4096, 32768
PROBE = 6  # items of a task that tell whether the dense model works at a length
ITEMS = 24


def chosen(spec: str) -> tuple[str, ...]:
    """The names that `quick`, `full` or `NAME,...` stand for.

    Raises:
        UsageError: a name that is no task.
    """
    known = tasks.names()
    if spec == "full":
        return known
    if spec == "quick":
        return tuple(name for name in known if tasks.find(name).quick)
    wanted = dict.fromkeys(part.strip() for part in spec.split(","))
    for name in wanted:
        if name not in known:
            said = suggest(name, ("quick", "full", *known))
            raise UsageError(f"There is no task {name!r} for --suite.", said)
    return tuple(wanted)


def run(
    model: Any,
    tokenizer: Any,
    recipe: Recipe | Path | str,
    names: str | Sequence[str] = "quick",
    *,
    items: int = ITEMS,
    seed: int = 0,
    length: int | None = None,
    data: str = "",
    force: bool = False,
    draft: Draft | None = None,
    say: Say | None = None,
) -> Scores:
    """Scores a recipe beside the dense model on the same items, greedily; runs agree exactly.

    Args:
        names: `quick`, `full`, `NAME,...`, or task names.
        items: of each task.
        length: tokens of an item, answer included; found where left out: the longest at which the
            dense model clears chance on most tasks.
        data: prose for tasks that hide something in text; Python's own text when empty.
        draft: a small model, for a recipe that looks ahead or cuts prompts.
        say: takes (stage, done, total).

    Raises:
        IntegrityError: the recipe is of another model, unless forced.
        UsageError: an unknown task, or a length that the model or a task does not have.
    """
    wanted = chosen(names) if isinstance(names, str) else tuple(names)
    cache = load(recipe, model, force)
    asked = Asking(model, tokenizer, seed, data or _own_prose(), say or _silent, draft)
    positions = facts(model.config).max_positions
    if length is not None and length > positions:
        what = f"--suite-length {length:,} exceeds the model's {positions:,} positions."
        raise UsageError(what, f"Give at most {positions}.")
    longest = _longest(model, names, positions)
    size = length or asked.working_length([tasks.find(name) for name in wanted], longest)
    found, skipped = [], []
    for name in wanted:
        task = tasks.find(name)
        if (scores := asked.scored(task, size, items, cache)) is None:
            skipped.append(name)
        else:
            found.append(scores)
    if not found:
        what = f"No task of {', '.join(wanted)} fits into {size:,} tokens."
        raise UsageError(what, "Give a larger --suite-length.")
    return Scores(size, seed, items, tuple(found), tuple(skipped), _name(recipe))


class Asking:
    """A model that is asked items of one seed."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        seed: int,
        prose: str,
        say: Say,
        draft: Draft | None = None,
    ) -> None:
        self._model, self._tokenizer, self._draft = model, tokenizer, draft
        self._seed, self._prose, self._say = seed, prose, say

    def working_length(self, wanted: list[Task], longest: int) -> int:
        """The longest candidate at which the dense model clears chance on most tasks.

        Where it does at none, the shortest at which a task fits.
        """
        size, fits = longest, longest
        while size >= SHORTEST:
            found = [self.scored(task, size, PROBE, None) for task in wanted if task.averaged]
            told = [scores for scores in found if scores is not None]
            if told:
                fits = size
            if told and sum(not scores.at_chance for scores in told) * 2 > len(found):
                return size
            size //= 2
        return fits

    def scored(
        self, task: Task, length: int, count: int, cache: CompressedCache | None
    ) -> TaskScores | None:
        """Scores `count` items of a task; None when it does not fit into the length."""
        try:
            items = self._items(task, length, count)
        except UsageError:
            return None
        stage = f"{task.name()} at {length:,} tokens" + ("" if cache else ", dense alone")
        pairs: list[Pair | None] = [None] * count
        self._say(stage, 0, count)
        for done, (place, pair) in enumerate(
            answers(self._model, self._tokenizer, items, cache, self._draft), 1
        ):
            pairs[place] = pair
            self._say(stage, done, count)
        return _compared(task, items, [pair for pair in pairs if pair is not None])

    def _items(self, task: Task, length: int, count: int) -> list[Item]:
        """Item by item from its own seed, so that fewer items are the first of more."""

        def tokens(text: str) -> int:
            return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        counted: Count = tokens
        return [
            task.make(
                random.Random(f"{self._seed}:{task.name()}:{place}"), counted, length, self._prose
            )
            for place in range(count)
        ]


def _compared(task: Task, items: list[Item], pairs: list[Pair]) -> TaskScores:
    if task.follows_dense:
        items = [_following(item, pair.dense) for item, pair in zip(items, pairs, strict=True)]
    sides = list(zip(*pairs, strict=True))
    dense, compressed = (
        tuple(task.score(text, item) for text, item in zip(side, items, strict=True))
        for side in sides
    )
    told = [
        [task.details(text, item) for text, item in zip(side, items, strict=True)] for side in sides
    ]
    details = tuple(
        (name, _mean([x[name] for x in told[0]]), _mean([x[name] for x in told[1]]))
        for name in told[0][0]
    )
    chance = _mean([item.chance for item in items])
    return TaskScores(task.name(), chance, dense, compressed, task.averaged, details)


def _name(recipe: Recipe | Path | str) -> str:
    if isinstance(recipe, Recipe):
        return recipe.name
    return recipes.load(Path(recipe)).name or Path(recipe).stem


def _following(item: Item, said: str) -> Item:
    last = replace(item.turns[-1], references=(said,))
    return replace(item, turns=(*item.turns[:-1], last))


def _longest(model: Any, names: str | Sequence[str], positions: int) -> int:
    """The longest candidate: a power of two within the model's window and one's patience."""
    most = CPU_LONGEST if model.device.type == "cpu" else LONGEST
    most = min(QUICK_LONGEST if names == "quick" else most, positions)
    size = SHORTEST
    while 2 * size <= most:
        size *= 2
    return min(size, positions)


def _own_prose() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _silent(stage: str, done: int, total: int) -> None:
    pass
