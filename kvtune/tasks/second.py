"""Asks a second, unrelated question of the same cache: what was dropped after the first is gone."""

import random

from kvtune.haystack import Numerals, filler, hidden, keys, numbers
from kvtune.task import Count, Item, Task, Turn, fit


class Second(Task):
    """Two numbers in filler; the second is asked for after the first was answered."""

    quick = True

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """Only the second answer counts; the first is the model's own."""
        seed, names, values = rng.random(), keys(rng, 2), numbers(rng, 2)
        needles = [
            f"The special number of the {key} is {value}."
            for key, value in zip(names[::-1], values[::-1], strict=True)
        ]
        turns = tuple(
            Turn(
                f"\n\nQuestion: What is the special number of the {key}?"
                f"\nAnswer: The special number of the {key} is",
                (value,),
                12,
            )
            for key, value in zip(names, values, strict=True)
        )

        def build(size: int) -> Item:
            text, depth = hidden(random.Random(seed), filler(size), needles)
            return Item(text, turns, Numerals(), depth)

        return fit(build, count, tokens)
