"""Task: what one kind of question over a long context is, and how tasks are found by file name."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvtune import discovery
from kvtune.errors import UsageError

Count = Callable[[str], int]  # tokens of a text
MARGIN = 2  # tokens that a tokenizer may add at a start, or at the seam of context and question


@dataclass(frozen=True)
class Turn:
    """One question, with the start of its answer, and what the answer should hold."""

    question: str
    references: tuple[str, ...]
    new_tokens: int


@dataclass(frozen=True)
class Item:
    """A context, and questions that are asked on the same cache, one after the other.

    Only the last answer is scored. `candidates` are the answers among which one would guess who
    knows everything but which of them is asked for.
    """

    context: str
    turns: tuple[Turn, ...]
    candidates: Sequence[str] = ()
    depth: float | None = None  # of the needle: 0 at the start of the context, 1 at its end

    @property
    def references(self) -> tuple[str, ...]:
        """What the last answer should hold."""
        return self.turns[-1].references

    @property
    def chance(self) -> float:
        """The expected score of as many guesses as there are references."""
        return len(self.references) / len(self.candidates) if self.candidates else 0.0

    def tokens(self, count: Count) -> int:
        """Tokens of context, questions and answers together."""
        asked = sum(count(turn.question) + turn.new_tokens for turn in self.turns)
        return count(self.context) + asked + MARGIN


class Task(ABC):
    """One kind of question. Its name is the name of its file; its docstring is shown to users."""

    averaged: ClassVar[bool] = True  # whether it enters the mean over tasks
    follows_dense: ClassVar[bool] = False  # whether the reference is what the dense model says
    quick: ClassVar[bool] = False  # whether it is in the quick suite

    @classmethod
    def name(cls) -> str:
        """The task's name: the file's."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def describe(cls) -> str:
        """What the task asks, in one line."""
        return (cls.__doc__ or "").partition("\n")[0]

    @abstractmethod
    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """Makes an item of at most `tokens` tokens, answers included.

        Args:
            rng: all that is drawn comes from it.
            count: tokens of a text.
            prose: for tasks that hide something in real text.

        Raises:
            UsageError: the task does not fit into so few tokens.
        """

    def score(self, text: str, item: Item) -> float:
        """The share of the references that an answer holds, in [0, 1], whatever the case."""
        said = text.casefold()
        held = [reference.casefold() in said for reference in item.references]
        return sum(held) / len(held) if held else 0.0

    def details(self, text: str, item: Item) -> dict[str, float]:
        """Further numbers of an answer, for the table; none for most tasks."""
        return {}


def fit(build: Callable[[int], Item], count: Count, tokens: int, least: int = 1) -> Item:
    """The item of the largest size that takes at most `tokens` tokens, found by bisection.

    Args:
        build: makes an item of a size, the same one each time.
        least: the smallest size that makes sense.

    Raises:
        UsageError: even the smallest takes more.
    """
    held = build(least)
    if (needed := held.tokens(count)) > tokens:
        what = f"needs at least {needed} tokens, {tokens} are given."
        raise UsageError(f"A task {what}", "Give a larger --suite-length.")
    low, high = least, 2 * least
    while (item := build(high)).tokens(count) <= tokens:
        low, high, held = high, 2 * high, item
    while high - low > 1:
        middle = (low + high) // 2
        item = build(middle)
        if item.tokens(count) <= tokens:
            low, held = middle, item
        else:
            high = middle
    return held


def names() -> tuple[str, ...]:
    """The names of all tasks: the files in `kvtune/tasks`."""
    return discovery.names("tasks")


def find(name: str) -> Task:
    """Returns the task that the file `tasks/<name>.py` defines.

    Raises:
        UsageError: no such file.
    """
    task: Task = discovery.find("tasks", name, Task, "task", "tasks")()
    return task
